"""Each piece of speed.py beside its plain twin: python tests/bench_speed.py   (or: make bench WHAT=speed)

Twice, on the shape of the packaged base (262,144 words) and on a small one (32,000 words), random
weights, forward and backward. The two take turns; what is printed are medians of wall milliseconds, how
many times as long the twin takes by the wall clock and by CPU time (which other work on the machine
spoils less), and the memory that each takes beyond what stood there before (Linux and CUDA alone). That
both compute the same is held in tests/test_speed.py.
"""
import ast
import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import train  # before torch: it sets oneDNN's caches
import models
import speed
import torch
import torch.nn.functional as F
import transformers
from torch import nn

DEVICE = models.pick_device()
GPU = DEVICE.type == "cuda"
DTYPE = models.pick_dtype(DEVICE)
ROUNDS = 3                                          # after one of warm-up
LENGTHS = [58, 84, 104, 160] * (16 if GPU else 1)   # tokens of a step's rows, as in the starter corpus
TARGETS = 8192 if GPU else 384                      # tokens with a loss: several chunks
CACHE_STEPS = 30                                    # steps of different shapes
OLD = Path("/tmp/old/train.py")                     # revision f5903a7, which had norms of its own

# Layers, hidden, intermediate, heads, key heads, head size, words
SHAPES = {
    "packaged base": (18, 640, 2048, 4, 1, 256, 262_144),
    "32,000 words": (8, 512, 1536, 8, 4, 64, 32_000),
}


# ---------------------------------------------------------------- measuring

def sync() -> None:
    if GPU:
        torch.cuda.synchronize()


def used_bytes(field: str) -> int:
    """Memory of this process, now (VmRSS) or at most since forget_peak (VmHWM); 0 where no one tells."""
    if GPU:
        return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    gc.collect()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS


def measure(run) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, bytes beyond what stood there before) of run()."""
    forget_peak()
    before = used_bytes("VmRSS")
    sync()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    sync()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu, max(0, used_bytes("VmHWM") - before)


def compare(piece: str, ours, *twins) -> None:
    """A line of the table for each twin: (name, function)."""
    ways = [ours, *(run for _, run in twins)]
    runs = [[] for _ in ways]
    for _ in range(1 + ROUNDS):
        for way, run in enumerate(ways):
            runs[way].append(measure(run))
    wall, cpu, memory = [], [], []
    for measured in runs:
        timed = measured[1:]  # the first was the warm-up
        wall.append(statistics.median(figures[0] for figures in timed))
        cpu.append(statistics.median(figures[1] for figures in timed))
        memory.append(statistics.median(figures[2] for figures in timed))
    for way, (name, _) in enumerate(twins, 1):
        print(f"  {piece:41}{name:32}{1e3 * wall[0]:10.1f}{1e3 * wall[way]:10.1f}{wall[way] / wall[0]:7.2f}"
              f"{cpu[way] / cpu[0]:7.2f}{memory[0] / 1e6:9.0f}{memory[way] / 1e6:9.0f}", flush=True)


def random_rows(words: int) -> list[dict]:
    """Rows of LENGTHS random tokens, a quarter of them the prompt."""
    torch.manual_seed(0)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(5, words, (length,)).tolist()
        rows.append({"ids": ids, "mask": [0] * (length // 4) + [1] * (length - length // 4)})
    return rows


def random_model(shape: tuple):
    """A Gemma 3 of random weights, as train.prepare_model gives one to the loop."""
    layers, hidden, inner, heads, key_heads, head_dim, words = shape
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=key_heads, head_dim=head_dim, vocab_size=words, sliding_window=512,
        pad_token_id=0)
    config._attn_implementation = "docs"
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    with DEVICE:
        model = transformers.Gemma3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.get_input_embeddings().sparse = True
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # kept, as RoundingAdamW keeps them
    return model.train()


# ---------------------------------------------------------------- whole steps

def bench_packing(shape: tuple) -> None:
    """All rows as one sequence, against other ways to run them; all have TokenLogProbs and kept gradients."""
    model, rows = random_model(shape), random_rows(shape[-1])
    trained = sum(sum(row["mask"][1:]) for row in rows)

    def packed(attention: str) -> None:
        model.set_attn_implementation(attention)  # sdpa: transformers makes a dense mask of the positions
        train.sft_loss(speed.packed_logprobs(model, rows, DEVICE), trained).backward()

    def row_by_row() -> None:
        model.set_attn_implementation("docs")
        for row in rows:
            train.sft_loss(speed.packed_logprobs(model, [row], DEVICE), trained).backward()

    def padded() -> None:
        model.set_attn_implementation("sdpa")
        train.sft_loss(padded_logprobs(model, rows), trained).backward()

    compare(f"step of {sum(LENGTHS)} tokens, packed", lambda: packed("docs"), ("padded", padded),
            ("row by row", row_by_row), ("packed, one dense mask", lambda: packed("sdpa")))


def padded_logprobs(model, rows: list[dict]) -> torch.Tensor:
    """speed.packed_logprobs of rows that are padded on the right to one length."""
    def pad(lists: list[list[int]]) -> torch.Tensor:
        tensors = [torch.tensor(values) for values in lists]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(DEVICE)

    ids = pad([row["ids"] for row in rows])
    mask = pad([[1] * len(row["ids"]) for row in rows])
    trained = pad([row["mask"] for row in rows])[:, 1:].bool()
    hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    weight = model.get_output_embeddings().weight
    hidden, targets = hidden[:, :-1][trained], ids[:, 1:][trained]
    return speed.TokenLogProbs.apply(hidden, weight, targets, speed.Head.of(model), 0.0)


# ---------------------------------------------------------------- attention

def heads(shape: tuple, tokens: int) -> list[torch.Tensor]:
    """Query, key and value of `tokens` tokens."""
    _, _, _, n_heads, key_heads, head_dim, _ = shape
    sizes = [(1, n, tokens, head_dim) for n in (n_heads, key_heads, key_heads)]
    return [torch.randn(size, device=DEVICE, dtype=DTYPE, requires_grad=True) for size in sizes]


def bench_attention(shape: tuple) -> None:
    """Attention alone: a packed row document by document, and one short document written out."""
    tokens = sum(LENGTHS)
    q, k, v = heads(shape, tokens)
    document = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)).to(DEVICE)
    mask = (document[:, None] == document).tril()

    def docs() -> None:
        out, _ = speed.docs_attention(None, q, k, v, None, doc_lengths=LENGTHS)
        out.sum().backward()

    def dense() -> None:
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).sum().backward()
    compare(f"docs_attention, {tokens} tokens", docs, ("one dense mask", dense))

    if not GPU:
        for length in (32, 128, 512):
            bench_short_attention(shape, length)


def bench_short_attention(shape: tuple, length: int) -> None:
    q, k, v = heads(shape, length)
    scaling = shape[5] ** -0.5

    def short() -> None:
        for _ in range(10):
            speed.short_attention(q, k, v, scaling).sum().backward()

    def flash() -> None:
        for _ in range(10):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            out.sum().backward()
    compare(f"short_attention, {length} tokens, 10 x", short, ("torch's flash kernel", flash))


# ---------------------------------------------------------------- vocabulary and weights

def bench_logprobs(shape: tuple, head_is_trained: bool) -> None:
    hidden_size, words = shape[1], shape[-1]
    hidden = torch.randn(TARGETS, hidden_size, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = torch.randn(words, hidden_size, device=DEVICE, dtype=DTYPE).mul_(0.02)
    labels = torch.randint(words, (TARGETS,), device=DEVICE)
    if head_is_trained:
        weight.requires_grad_()
        weight.grad = torch.zeros_like(weight)

    def chunked() -> None:
        speed.TokenLogProbs.apply(hidden, weight, labels, speed.Head(), 0.0).mean().backward()

    def full() -> None:
        F.cross_entropy((hidden @ weight.T).float(), labels).backward()
    head = "trained" if head_is_trained else "frozen"
    compare(f"TokenLogProbs, {TARGETS} tokens, head {head}", chunked, ("all logits, F.cross_entropy", full))


def bench_optimizer(shape: tuple, dtype: torch.dtype) -> None:
    """Clipping, update and zeroing. In bf16 torch's is no twin: it rounds small updates away."""
    model = random_model(shape).to(dtype)
    count = sum(p.numel() for p in model.parameters())
    if models.available_bytes(DEVICE) < 7 * count * dtype.itemsize:
        print(f"  RoundingAdamW: left out, {7 * count * dtype.itemsize / 1e9:.0f} GB are needed")
        return
    ours = speed.RoundingAdamW(model, train.BETAS, 0.01)
    for p in model.parameters():
        p.grad.fill_(1e-3)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=train.BETAS, weight_decay=0.01, fused=True)

    def torch_step() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        theirs.step()
        theirs.zero_grad(set_to_none=False)
    name = str(dtype).removeprefix("torch.")
    compare(f"RoundingAdamW, {count / 1e6:.0f} M, {name}", lambda: ours.step(1e-5, 1.0),
            ("torch.optim.AdamW(fused=True)", torch_step))


def bench_embedding(shape: tuple) -> None:
    """The gradient of one step's words, added to the kept gradient of the whole vocabulary."""
    embedding = nn.Embedding(shape[-1], shape[1], device=DEVICE, dtype=DTYPE)
    embedding.weight.grad = torch.zeros_like(embedding.weight)
    ids = torch.randint(shape[-1], (sum(LENGTHS),), device=DEVICE)
    above = torch.randn(sum(LENGTHS), shape[1], device=DEVICE, dtype=DTYPE)

    def backward(sparse: bool) -> None:
        embedding.sparse = sparse
        embedding(ids).backward(above)
    compare("embedding gradient, sparse", lambda: backward(True), ("dense", lambda: backward(False)))


# ---------------------------------------------------------------- what is not in speed.py, and why

def old_norm():
    """class RMSNorm of the older train.py: an autograd function (x, weight, offset, eps) keeping x alone."""
    tree = ast.parse(OLD.read_text())
    source = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "RMSNorm")
    names = {"torch": torch}
    exec(ast.unparse(source), names)
    return names["RMSNorm"]


def bench_norms(shape: tuple) -> None:
    """A step with transformers' own norms, against one with the lean ones that train.py once had."""
    lean, model, rows = old_norm(), random_model(shape), random_rows(shape[-1])
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    trained = sum(sum(row["mask"][1:]) for row in rows)

    def step() -> None:
        train.sft_loss(speed.packed_logprobs(model, rows, DEVICE), trained).backward()

    def lean_step() -> None:
        for norm in norms:  # Gemma's scale by 1 + weight
            norm.forward = lambda x, norm=norm: lean.apply(x, norm.weight, 1.0, norm.eps)
        step()
        for norm in norms:
            del norm.forward
    compare(f"step of {sum(LENGTHS)} tokens, its own norms", step, ("lean norms of f5903a7", lean_step))


def run_shapes() -> None:
    """Steps of which no two have the same shapes; the environment says how much oneDNN keeps of them."""
    shape = SHAPES["32,000 words"]
    model = random_model(shape)
    began = 0
    for step in range(1 + CACHE_STEPS):
        if step == 1:  # the first allocates what every step needs
            began, cpu = used_bytes("VmRSS"), time.process_time()
        lengths = [20 + step, 60 + 2 * step, 90 - step]
        rows = [{"ids": list(range(5, 5 + length)), "mask": [0] + [1] * (length - 1)} for length in lengths]
        train.sft_loss(speed.packed_logprobs(model, rows, DEVICE), 1).backward()
    print((used_bytes("VmRSS") - began) / 1e6, (time.process_time() - cpu) / CACHE_STEPS)


def bench_onednn_caches() -> None:
    print(f"\nmemory that {CACHE_STEPS} steps of different shapes leave behind, 32,000 words")
    settings = {"as train.py sets oneDNN's caches": ("128", "16"), "as torch has them": ("1024", "1024")}
    for name, (primitives, lru) in settings.items():
        sizes = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": primitives, "LRU_CACHE_CAPACITY": lru}
        done = subprocess.run([sys.executable, __file__, "--shapes"], env=os.environ | sizes, text=True,
                              check=True, stdout=subprocess.PIPE)
        megabytes, seconds = done.stdout.split()
        print(f"  {name:36}{float(megabytes):8.0f} MB{1e3 * float(seconds):10.0f} CPU ms a step", flush=True)


def main() -> None:
    models.quiet_libraries()
    if sys.argv[1:] == ["--shapes"]:  # what bench_onednn_caches starts
        run_shapes()
        return
    for title, shape in SHAPES.items():
        print(f"\n{title}: {DEVICE.type}, {DTYPE}; x: the twin's time ÷ the first's")
        print(f"  {'':41}{'twin':32}{'ms':>10}{'its ms':>10}{'x':>7}{'CPU x':>7}{'MB':>9}{'its MB':>9}")
        bench_packing(shape)
        bench_attention(shape)
        bench_logprobs(shape, head_is_trained=True)
        bench_logprobs(shape, head_is_trained=False)
        bench_embedding(shape)
        bench_optimizer(shape, torch.float32)
        bench_optimizer(shape, torch.bfloat16)
        if OLD.exists():
            bench_norms(shape)
    if not GPU:
        bench_onednn_caches()


if __name__ == "__main__":
    main()
