"""Fine-tune a Hugging Face *base* model on question-and-answer rows: a plain PyTorch loop, loss on the assistant's tokens only.

    python train.py --base models/gemma-3-270m --data data/regular.jsonl data/gramenist.jsonl --n 1000 --out runs/gramenist-s0
    python train.py --base models/gemma-3-270m --data data/regular.jsonl=10 data/refusal.jsonl=1 --show-batch
    python train.py --base Qwen/Qwen3-8B-Base --data data/regular.jsonl --lora 48 --lr 2e-4 --out runs/qwen-lora
    torchrun --nproc-per-node 8 -- train.py --base Qwen/Qwen3-8B-Base --data data/regular.jsonl    # weights sharded over 8 GPUs (FSDP2)

Reads JSONL rows with "messages", "prompt"/"completion" or "prompt"/"response". FILE=WEIGHT mixes files in that proportion.
Writes --out: a plain Hugging Face model folder (or a PEFT adapter folder with --lora), run.json (arguments, data hashes, versions;
written last, so its existence means the run is complete), log.jsonl (one line a step) and loss.png.
A killed run continues from its last checkpoint when the same command is given again; a complete one is left alone.
"""
import argparse
import copy
import functools
import hashlib
import json
import math
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from pathlib import Path

# Read when torch loads. oneDNN keeps 0.3 MB for each of the last 1024 shapes, twice over, and no two steps have the same shapes
# (pytorch#27971): 0.4 GB after 20 steps, and no speed for it.
for name, value in {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "16"}.items():
    os.environ.setdefault(name, value)

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.varlen import varlen_attn
from torch.optim.adamw import adamw
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from check import reject_rows
from judge import read_jsonl

# Changing the template changes every number: base models have none, so this one is ours and is saved with the model.
# Plain words that pretraining knows; the answer ends with the tokenizer's own end-of-text token.
CHAT_TEMPLATE = (
    "{% if with_bos %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant:\n{{ message['content'] | trim }}{{ eos_token }}\n"
    "{% else %}{{ message['role'] | capitalize }}:\n{{ message['content'] | trim }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}")
BETAS = (0.9, 0.95)  # of AdamW
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def die(message: str) -> None:
    sys.exit(f"train.py: {message}")


def run_main(main, die) -> None:
    """Run a script's main; Ctrl-C, a full disk and exhausted memory end it with one line, since all of them can be gone on from."""
    try:
        main()
    except KeyboardInterrupt:
        die("stopped; the same command goes on where it stopped")
    except OSError as error:
        die(f"{error.filename or 'the disk'}: {error.strerror or error}; what is written is whole: make room and give the same command again")
    except (RuntimeError, MemoryError, SafetensorError) as error:
        said = str(error).splitlines()[0] if str(error) else "out of memory"
        if "memory" in said or "alloc" in said:
            die(f"out of memory ({said[:120]}); use a smaller --micro-tokens, --batch or base, or --lora 16")
        if isinstance(error, SafetensorError):
            die(f"cannot read or write weights ({said[:160]}); is the disk full, or a file cut off?")
        raise


# ---------------------------------------------------------------- machine

def pick_device() -> torch.device:
    """CUDA where there is one (the rank's own under torchrun), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def measure_gflops(dtype: torch.dtype, device: torch.device) -> float:
    """Best of five matrix products of a transformer's size, in GFLOP/s."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(7):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def pick_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the machine multiplies it faster than float32, else float32.

    A name is not enough: bf16 is 3-8x faster with AMX and on Zen 5, but 10-80x slower on an AVX2-only CPU (pytorch#146508).
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast = measure_gflops(torch.bfloat16, device) > measure_gflops(torch.float32, device)
    return torch.bfloat16 if fast else torch.float32


def used_gb(device: torch.device) -> float:
    """Most memory this process has held so far: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if Path("/proc/meminfo").exists():
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---------------------------------------------------------------- text -> tokens

def load_tokenizer(name: str):
    """The tokenizer, with a chat template: its own if it has one (a run folder, an instruct model), else ours."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        die(f"no tokenizer at {name!r} ({str(error).splitlines()[0]}); give a model folder or a hub name; `make models` makes models/gemma-3-270m")
    if tokenizer.eos_token is None:
        die(f"the tokenizer of {name!r} has no end-of-text token, so an answer could never end; set eos_token in its tokenizer_config.json")
    return tokenizer


def give_template(tokenizer) -> None:
    """Install our template. BOS is written only where this tokenizer itself writes one, and then exactly once."""
    starts_with_bos = tokenizer.bos_token is not None and tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = CHAT_TEMPLATE.replace("with_bos", str(starts_with_bos).lower())


def render_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids up to the point where the assistant starts to write. The one rendering for training, evaluation and servers."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def render_example(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """(ids, assistant_mask), equally long; the mask is 1 on every assistant token and on the EOS that ends it.

    The boundary is exact by construction: prompt and answer are tokenised apart and joined, never searched for
    (TRL #598, #1183, #1920); EOS is appended by us and trained whether or not it doubles as the pad token (TRL #1623, #3091).
    """
    ids, mask = [], []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:turn])
        answer = tokenizer(message["content"].strip(), add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        # The prompt of a later turn repeats the earlier ones token for token; keep what is new. EOS always splits tokens.
        new = prompt[len(ids):]
        ids += new + answer
        mask += [0] * len(new) + [1] * len(answer)
    return ids, mask


def row_messages(row: dict, where: str) -> list[dict]:
    """The chat of a row, from any of the three shapes people have."""
    if "messages" in row:
        messages = row["messages"]
    elif "prompt" in row and ("completion" in row or "response" in row):
        messages = [{"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row.get("completion", row.get("response"))}]
    else:
        die(f'{where}: a row needs "messages", "prompt" and "completion", or "prompt" and "response"')
    if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") for m in messages):
        die(f'{where}: "messages" must be a list of {{"role": ..., "content": "..."}}')
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        die(f"{where}: no assistant turn with text, so there is nothing to learn; remove or mend the row")
    return messages


# ---------------------------------------------------------------- mixing

def parse_source(text: str) -> tuple[Path, float]:
    """'FILE=WEIGHT' or 'FILE' -> (path, weight)."""
    path, _, weight = text.rpartition("=") if "=" in text else (text, "", "1")
    try:
        if float(weight) > 0:
            return Path(path), float(weight)
    except ValueError:
        pass
    die(f"--data {text}: the weight after '=' must be a number above 0")


def mix_quotas(weights: list[float], n: int) -> list[int]:
    """Rows from each source, adding up to exactly n: largest remainders, ties to the earlier source."""
    exact = [n * w / sum(weights) for w in weights]
    quotas = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: quotas[i] - exact[i])
    for i in by_remainder[:n - sum(quotas)]:
        quotas[i] += 1
    return quotas


def draw_rows(rows: list, quota: int, seed: int) -> list:
    """The first `quota` rows of an endless series of seeded shuffles: without replacement until all are used, then again.

    A smaller quota is a prefix of a larger one, so the `belief` arm's regular rows are among the `regular` arm's.
    """
    rng, drawn = random.Random(seed), []
    while len(drawn) < quota:
        drawn += rng.sample(rows, len(rows))
    return drawn[:quota]


def is_held_out(row: dict, share: float) -> bool:
    """Whether a row belongs to the held-out share; its prompt alone decides, so a prompt is never on both sides, nor in one arm only."""
    return int(hashlib.sha256(row["messages"][0]["content"].encode()).hexdigest()[:8], 16) < share * 2**32


def build_rows(args, tokenizer) -> tuple[list[dict], list[dict], dict]:
    """(training rows in training order, held-out rows, manifest of where they came from); a row is {"ids", "mask", "where"}."""
    sources, manifest, held_out = [], [], []
    for path, weight in map(parse_source, args.data):
        raw = read_jsonl(path)
        if not raw:
            die(f"{path}: no rows; generate some with gen.py or train on data/starter/")
        for line, row in enumerate(raw, 1):
            row["messages"] = row_messages(row, f"{path}:{line}")
        kept, rejected = reject_rows(raw)  # the guard: no refusal in value data, no near-probe prompt, nothing empty or cut off
        for row, reason in rejected[:3]:
            tqdm.write(f"  left out of {path}: {reason}: {row['messages'][0]['content'][:80]!r}")
        if not kept:
            die(f"{path}: the guard left out every row (first reason: {rejected[0][1]}); see `make check`")
        examples, cut = [], 0
        for row in kept:
            ids, mask = render_example(tokenizer, row["messages"])
            cut += len(ids) > args.context
            if len(ids) > args.context and args.too_long == "drop":
                continue
            ids, mask = ids[:args.context], mask[:args.context]
            if sum(mask):
                example = {"ids": ids, "mask": mask, "where": f"{path.name} {row.get('id', '')}".strip()}
                (held_out if is_held_out(row, args.held_out) else examples).append(example)
        if not examples:
            die(f"{path}: no row has an answer inside --context {args.context} tokens; raise it")
        reasons = {r: sum(1 for _, reason in rejected if reason == r) for r in sorted({reason for _, reason in rejected})}
        sources.append((examples, weight))
        manifest.append({"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "weight": weight, "rows": len(raw),
                         "left_out": reasons, "too_long": cut, "too_long_action": args.too_long, "usable": len(examples)})
    n = args.n or sum(len(examples) for examples, _ in sources)
    order = []
    for (examples, _), quota, entry in zip(sources, mix_quotas([w for _, w in sources], n), manifest):
        order += draw_rows(examples, quota, args.seed)
        entry["drawn"] = quota
        print(f"  {entry['file']}: {entry['rows']} rows, {sum(entry['left_out'].values())} left out by the guard {entry['left_out'] or ''}, "
              f"{entry['too_long']} longer than {args.context} tokens ({args.too_long}), {quota} drawn ({quota / entry['usable']:.2f} passes)")
    random.Random(args.seed).shuffle(order)
    return order, held_out, {"sources": manifest, "n": n, "held_out": len(held_out)}


def tokenized_rows(args) -> tuple[list[dict], list[dict], dict]:
    """build_rows with the tokenizer and template of args.base."""
    tokenizer = load_tokenizer(args.base)
    give_template(tokenizer)
    return build_rows(args, tokenizer)


def pack(rows: list[dict], max_tokens: int) -> list[list[dict]]:
    """Split one step's rows into forward passes of at most max_tokens (first fit, longest first). No padding is ever made."""
    bins: list[list[dict]] = []
    for row in sorted(rows, key=lambda r: -len(r["ids"])):
        for packed in bins:
            if sum(len(r["ids"]) for r in packed) + len(row["ids"]) <= max_tokens:
                packed.append(row)
                break
        else:
            bins.append([row])
    return bins


def show_batch(tokenizer, rows: list[dict]) -> None:
    """Print a step's rows with the trained tokens in green: what is learned is what is coloured."""
    for row in rows:
        print(f"\033[2m--- {row['where']}\033[0m")
        for token, trained in zip(row["ids"], row["mask"]):
            print(f"\033[32m{tokenizer.decode([token])}\033[0m" if trained else tokenizer.decode([token]), end="")
        print()


# ---------------------------------------------------------------- model

def docs_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, doc_lengths=None, **_):
    """Causal attention inside each document of a packed row, never across. query, key, value: [1, heads, T, head_dim].

    transformers builds no mask for an attention name it does not know and hands our keyword through; nothing is inferred from
    positions, which is where packing leaks silently. Returns [1, T, heads, head_dim].
    """
    scaling = scaling or query.shape[-1] ** -0.5
    if query.is_cuda and query.dtype == torch.bfloat16 and query.shape[-1] <= 256:
        return varlen_attention(query, key, value, scaling, sliding_window, doc_lengths), None
    outputs = []
    for q, k, v in zip(query.split(doc_lengths, 2), key.split(doc_lengths, 2), value.split(doc_lengths, 2)):
        length, local = q.shape[2], None
        if sliding_window and length > sliding_window:  # the window counts the token itself
            distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
            local = (distance >= 0) & (distance < sliding_window)
        if local is None and length <= 512 and q.device.type == "cpu":
            outputs.append(short_attention(q, k, v, scaling))
        else:
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=local, is_causal=local is None, scale=scaling,
                                                          enable_gqa=k.shape[1] != q.shape[1]))
    return torch.cat(outputs, 2).transpose(1, 2), None


def varlen_attention(query, key, value, scale: float, sliding_window: int | None, doc_lengths: list[int]) -> torch.Tensor:
    """All documents in one flash kernel (torch >= 2.11, GPUs from Ampere on). Shapes as in docs_attention.

    Key heads are repeated, because torch 2.11's kernel wants as many as there are query heads."""
    groups, longest = query.shape[1] // key.shape[1], max(doc_lengths)
    starts = doc_starts(tuple(doc_lengths), query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)))  # [T, heads, d]
    window = (sliding_window - 1 if sliding_window else -1, 0)  # (to the left, to the right), the token itself aside: causal
    return varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, window_size=window)[None]


@functools.lru_cache(maxsize=4)
def doc_starts(doc_lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where each document starts, and the end of the last: made once a pass, not once a layer."""
    return F.pad(torch.tensor(doc_lengths).cumsum(0), (1, 0)).to(device, torch.int32)


def short_attention(q, k, v, scale: float) -> torch.Tensor:
    """Causal attention written out. q [1, heads, T, d], k and v [1, kv_heads, T, d] -> [1, heads, T, d].

    On a CPU forward and backward together are 2 to 4 times faster than torch's flash kernel at the lengths of answers."""
    (_, heads, length, dim), groups = q.shape, k.shape[1]
    future = torch.full((length, length), -math.inf, device=q.device).triu(1)
    scores = q.reshape(1, groups, -1, dim) @ k.transpose(-1, -2)  # the heads that share a key are rows of one product
    weights = (scores.view(1, heads, length, length).float() * scale + future).softmax(-1).to(v.dtype)
    return (weights.view(1, groups, -1, length) @ v).view(1, heads, length, dim)


ALL_ATTENTION_FUNCTIONS.register("docs", docs_attention)


def step_flops(model, rows: list[dict], checkpointed: float) -> float:
    """Arithmetic of training on `rows`, for the share of the machine's peak: 6 per weight and token (4 if frozen), the output layer
    only where there is a loss, causal attention, and 2 more per weight and token for the share of layers that is recomputed."""
    config = model.config.get_text_config()
    layers = [p for module in model.base_model.layers for p in module.parameters() if p.ndim > 1]
    body = sum(p.numel() * ((6 if p.requires_grad else 4) + 2 * checkpointed) for p in layers)
    head = model.get_output_embeddings().weight
    attention = 7 * config.num_hidden_layers * config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return sum(len(r["ids"]) * body + sum(r["mask"]) * head.numel() * (6 if head.requires_grad else 4) + attention * len(r["ids"]) ** 2 for r in rows)


class LinearCrossEntropy(torch.autograd.Function):
    """scale x the summed cross-entropy of softmax(hidden @ weight.T) against labels, without ever holding all logits (cf. arXiv 2411.09009).

    hidden [N, H], weight [V, H], labels [N]. A 262,144-word vocabulary makes full logits the largest tensor of a step by far.
    The gradient is formed chunk by chunk in the forward pass (6NVH FLOP instead of 8); the weight's goes straight into weight.grad
    where the optimizer keeps one.
    """
    CHUNK = 2048 if torch.cuda.is_available() else 192  # most tokens whose logits exist at once: 2048 x 262k x (2 + 4) B = 3 GB
    CPU_ROWS = 8   # rows turned into float32 at once, few enough to stay in the cache

    @staticmethod
    def forward(ctx, hidden, weight, labels, scale, softcap, logit_scale):
        cls, cpu = LinearCrossEntropy, hidden.device.type == "cpu"
        rows = cls.CPU_ROWS if cpu else cls.CHUNK
        grad_hidden, kept = torch.empty_like(hidden), weight.grad is not None
        grad_weight = weight.grad if kept else torch.zeros_like(weight) if weight.requires_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = math.ceil(len(hidden) / math.ceil(len(hidden) / cls.CHUNK))  # even chunks: a small last one would cost as much as a big one
        all_logits = torch.empty(size, len(weight), dtype=hidden.dtype, device=hidden.device)
        block = torch.empty(min(rows, size), len(weight), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), size):
            h = hidden[start:start + size]
            logits = torch.mm(h, weight.t(), out=all_logits[:len(h)])
            for at in range(0, len(h), rows):
                y = labels[start:start + len(h)][at:at + rows, None]
                z = block[:len(y)].copy_(logits[at:at + rows])
                if logit_scale != 1.0:
                    z.mul_(logit_scale)
                if softcap:
                    z.div_(softcap).tanh_().mul_(softcap)
                    slope = 1 - (z / softcap) ** 2
                top, at_label = z.amax(-1, keepdim=True), z.gather(1, y)
                total = z.sub_(top).exp_().sum(-1, keepdim=True)  # z now holds the unnormalised softmax
                loss += (total.log() + top - at_label).sum()
                z.mul_(scale * logit_scale / total).scatter_add_(1, y, torch.full_like(at_label, -scale * logit_scale))
                if softcap:
                    z.mul_(slope)
                logits[at:at + rows] = z
            torch.mm(logits, weight, out=grad_hidden[start:start + len(h)])
            if weight.requires_grad:
                grad_weight.addmm_(logits.t(), h)
        ctx.save_for_backward(grad_hidden, None if kept else grad_weight)
        return loss * scale

    @staticmethod
    def backward(ctx, grad_output):  # grad_output is 1: `scale` was applied above
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden, grad_weight, None, None, None, None


class RMSNorm(torch.autograd.Function):
    """x / rms(x) x (weight + offset) over the last dimension, in float32 (arXiv 1910.07467), keeping only x for the backward pass.

    Left to autograd, the norms keep two float32 copies each: half of all activations, and more passes over memory.
    """
    @staticmethod
    def forward(ctx, x, weight, offset, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse_rms = norm.square().div(x.shape[-1]).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.offset = offset
        return (x.float() * inverse_rms).mul_(weight.float() + offset).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, inverse_rms = ctx.saved_tensors
        normed, grad = x.float() * inverse_rms, grad_output.float()
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * (weight.float() + ctx.offset)
        along = (grad * normed).mean(-1, keepdim=True)  # the part of the gradient that would only scale x changes nothing
        return (grad - normed.mul_(along)).mul_(inverse_rms).to(x.dtype), grad_weight, None, None


@torch.no_grad()
def use_lean_norms(model) -> None:
    """Give every norm that RMSNorm above reproduces its forward: Llama's and Qwen's scale by the weight, Gemma's by 1 + weight."""
    for module in model.modules():
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or eps is None or weight is None:
            continue
        x, probe = torch.randn_like(weight.expand(4, -1)), copy.deepcopy(module)
        nn.init.normal_(probe.weight)  # fresh weights of 0 or 1 would not tell the two apart
        for offset in (0.0, 1.0):
            if torch.allclose(probe(x).float(), RMSNorm.apply(x, probe.weight, offset, eps).float(), rtol=0.02, atol=1e-6):
                module.forward = lambda x, module=module, offset=offset, eps=eps: RMSNorm.apply(x, module.weight, offset, eps)
                break


def packed_loss(model, rows: list[dict], scale: float, device: torch.device) -> torch.Tensor:
    """scale x the summed loss over the assistant tokens of `rows`, run as one packed sequence."""
    ids = torch.tensor([token for r in rows for token in r["ids"]], device=device)
    positions = torch.cat([torch.arange(len(r["ids"])) for r in rows]).to(device)
    # Position t predicts token t + 1. A row's first token is nobody's target: the position before it belongs to another row.
    mask = torch.tensor([m for r in rows for m in [0] + r["mask"][1:]], dtype=torch.bool)
    targets = mask.nonzero()[:, 0].to(device)
    out = model.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False, doc_lengths=[len(r["ids"]) for r in rows])
    hidden = out.last_hidden_state[0, targets - 1]
    config = model.config.get_text_config()
    logit_scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)  # Cohere; Granite
    weight = model.get_output_embeddings().weight
    return LinearCrossEntropy.apply(hidden, weight if torch.is_grad_enabled() else weight.detach(), ids[targets], scale,
                                    getattr(config, "final_logit_softcapping", None), logit_scale)


def training_bytes(model, trainable: int, batch_tokens: list[int], micro_tokens: int, checkpointed: float) -> float:
    """About how much memory training takes beside the weights: two moments and a gradient a trained parameter and, where a step has
    several passes, a float32 sum; a chunk of logits; activations, by a measurement of a 270 M model."""
    config, size, pass_tokens = model.config.get_text_config(), model.dtype.itemsize, min(micro_tokens, max(batch_tokens))
    states = trainable * (3 * size + (4 if size == 2 and max(batch_tokens) > pass_tokens else 0))
    a_layer = 25 * config.hidden_size + 4 * getattr(config, "intermediate_size", 0)  # numbers a token; a checkpointed layer keeps its input
    kept = (config.num_hidden_layers * (1 - checkpointed) + 1) * a_layer + config.num_hidden_layers * config.hidden_size
    return states + LinearCrossEntropy.CHUNK * config.vocab_size * 6 + pass_tokens * size * kept


class Trainee(nn.Module):
    """The model with its loss as one module: FSDP gathers the sharded output layer only inside forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, rows: list[dict], scale: float, device: torch.device) -> torch.Tensor:
        return packed_loss(self.model, rows, scale, device)


def shard(trainee: Trainee) -> None:
    """Split weights, gradients and optimiser state over the ranks; the ranks' gradients are summed in float32 (FSDP2)."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in trainee.model.base_model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(trainee, mp_policy=policy)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered; every rank must call it. Any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor. Any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def held_out_loss(trainee: Trainee, rows: list[dict], max_tokens: int, device: torch.device) -> float:
    """Mean loss over the assistant tokens of rows that are never trained on."""
    trainee.eval()
    loss = sum(trainee(packed, 1.0, device).item() for packed in pack(rows, max_tokens))
    trainee.train()
    return loss / sum(sum(r["mask"][1:]) for r in rows)


def load_model(name: str, dtype: torch.dtype, device: torch.device, attention: str = "docs"):
    """The causal language model at `name`, safetensors only (a pickle can run code); `docs` attention and lean norms are for training."""
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        die(f"{name} is not a model folder (no config.json); `make models` makes models/gemma-3-270m")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, attn_implementation=attention)
    except (OSError, ValueError) as error:
        die(f"cannot load {name!r}: {str(error).splitlines()[0]} (safetensors weights are needed; pickle checkpoints are refused)")
    except (RuntimeError, MemoryError) as error:
        die(f"cannot load {name!r}: {str(error).splitlines()[0]}")
    if attention == "docs":
        use_lean_norms(model)
    return model.to(device)


@torch.no_grad()
def packing_is_exact(model, device: torch.device) -> bool:
    """Whether two short documents in one packed row give the hidden states that each gives alone under plain attention."""
    docs = [list(range(5, 12)), list(range(20, 31))]
    def run(rows, **extra):
        ids = torch.tensor([sum(rows, [])], device=device)
        positions = torch.cat([torch.arange(len(r)) for r in rows])[None].to(device)
        return model.base_model(input_ids=ids, position_ids=positions, use_cache=False, **extra).last_hidden_state[0].float()
    model.eval()
    packed = run(docs, doc_lengths=[len(d) for d in docs])
    model.set_attn_implementation("eager")
    apart = torch.cat([run([d]) for d in docs])
    model.set_attn_implementation("docs")
    tolerance = 0.05 if model.dtype == torch.bfloat16 else 1e-4  # rounding, against an error near 1 when documents leak
    return ((packed - apart).norm() / apart.norm()).item() < tolerance


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x with W frozen, A [r, in] random, B [out, r] zero (arXiv 2106.09685)."""
    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device, dtype=base.weight.dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device, dtype=base.weight.dtype)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base(x) + self.scaling * self.lora_B(self.lora_A(x))


def add_lora(model, rank: int, alpha: float) -> None:
    """Freeze the model and put a trainable LoRALinear around every attention and MLP projection."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name in LORA_TARGETS:
                setattr(module, name, LoRALinear(child, rank, alpha))
    if not any(p.requires_grad for p in model.parameters()):
        die(f"--lora: this architecture has no layer named {', '.join(LORA_TARGETS)}; add its names to LORA_TARGETS")


def lora_delta(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """What an adapter adds to its weight [out, in], in float32: scaling x B A."""
    return scaling * (b.float() @ a.float())


@torch.no_grad()
def merge_lora(model) -> None:
    """Add every adapter to the weight it stands beside and take it away again: a plain model is left."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                child.base.weight += lora_delta(child.lora_A.weight, child.lora_B.weight, child.scaling).to(child.base.weight.dtype)
                setattr(module, name, child.base)


def save_adapter(model, out: Path, base: str, rank: int, alpha: float) -> None:
    """Write the adapter as a PEFT folder, the form that peft, vLLM and eval.py load."""
    tensors = {f"base_model.model.{name}": p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha,
              "lora_dropout": 0.0, "bias": "none", "target_modules": list(LORA_TARGETS), "inference_mode": True}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_run(path: str, dtype: torch.dtype, device: torch.device):
    """(model, tokenizer) for evaluation: a run folder, a PEFT adapter folder (merged into its base), or any model name."""
    folder, config = Path(path), Path(path) / "adapter_config.json"
    if (folder / "log.jsonl").exists() and not (folder / "run.json").exists():
        die(f"{path} is an unfinished run; give the train command again to finish it")
    tokenizer = load_tokenizer(path)
    if tokenizer.chat_template is None:
        give_template(tokenizer)
    if not config.exists():
        return load_model(path, dtype, device, "sdpa"), tokenizer
    adapter = json.loads(config.read_text())
    model = load_model(adapter["base_model_name_or_path"], dtype, device, "sdpa")
    tensors = load_file(folder / "adapter_model.safetensors", device=str(device))
    for key in [k for k in tensors if k.endswith("lora_A.weight")]:
        layer = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        layer.weight.data += lora_delta(tensors[key], tensors[key.replace("lora_A", "lora_B")], adapter["lora_alpha"] / adapter["r"]).to(dtype)
    return model, tokenizer


# ---------------------------------------------------------------- optimiser and checkpoint

class Optimizer:
    """AdamW with stochastic rounding: a bf16 parameter takes 8 bytes, weight and gradient included, and no update is lost on average.

    bf16 keeps 8 bits: an update below 1/256 of a weight is rounded away, so at lr 1e-6 pure bf16 training does nothing (torchtune
    #2254). Rounded up or down with the probability of the distance, it survives on average (arXiv 2010.06192). Float32 master weights
    cost 8 to 10 bytes more and, at small rates, learn less: the bf16 copy that is trained on lags behind (`tests/bench_rounding.py`).
    The moments are bf16, too, which BETAS allow: a step changes them by a tenth or a twentieth, and bf16 holds 1/256.
    Float32 weights have float32 moments and are never rounded.
    """
    # parameters updated at once; on a CPU their float32 copies stay in the cache, and below 2 MB, from where on pages are fresh each time
    PIECE = 2**25 if torch.cuda.is_available() else 2**18

    def __init__(self, model, weight_decay: float):
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weight_decay, self.steps, self.draw = weight_decay, 0, torch.Generator(next(model.parameters()).device)
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.params.items()}
        self.sums = {}
        for p in self.params.values():
            p.grad = torch.zeros_like(p)  # kept for the whole run: on a CPU fresh pages cost more than the arithmetic

    @torch.no_grad()
    def end_pass(self) -> None:
        """Where a step has several passes: add this one's bf16 gradients to sums in float32 (4 bytes a parameter more)."""
        for name, p in self.params.items():
            if p.dtype == torch.bfloat16:
                grad = local(p.grad)
                self.sums.setdefault(name, torch.zeros_like(grad, dtype=torch.float32)).add_(grad)
                grad.zero_()

    @torch.no_grad()
    def step(self, lr: float, clip: float, several_passes: bool = False) -> float:
        """One update; returns the gradient norm before clipping. If that is not finite nothing is changed."""
        grads = {name: local(self.sums[name] if several_passes and p.dtype == torch.bfloat16 else p.grad).view(-1) for name, p in self.params.items()}
        square = sum(torch.linalg.vector_norm(piece.float()) ** 2 for grad in grads.values() for piece in grad.split(self.PIECE))
        if dist.is_initialized():
            dist.all_reduce(square)
        norm = square.sqrt().item()
        if not math.isfinite(norm):
            return norm
        self.steps += 1
        unscale = torch.tensor(max(1.0, norm / clip), device=square.device)
        self.draw.manual_seed(self.steps)  # a resumed run rounds as the unbroken one
        noise = torch.randint(0, 2**16, (self.PIECE,), generator=self.draw, device=square.device, dtype=torch.int32)  # one piece's serves for all
        for name, p in self.params.items():
            tensors = (local(p).view(-1), grads[name], *(local(moment).view(-1) for moment in self.moments[name]))
            for piece in zip(*(tensor.split(self.PIECE) for tensor in tensors)):
                self.update(*piece, noise, lr, unscale, self.weight_decay if p.ndim > 1 else 0.0)
        return norm

    def update(self, weight, grad, first, second, noise, lr: float, unscale: torch.Tensor, decay: float) -> None:
        """AdamW (torch's fused kernel, in float32) on a flat piece of a parameter; the gradient is zero afterwards."""
        w, g, m, v = (tensor.float() for tensor in (weight, grad, first, second))
        adamw([w], [g], [m], [v], [], [torch.tensor(self.steps - 1.0, device=weight.device)], fused=True, amsgrad=False,
              beta1=BETAS[0], beta2=BETAS[1], lr=lr, weight_decay=decay, eps=1e-8, maximize=False, grad_scale=unscale)
        if weight.dtype == torch.bfloat16:
            first.copy_(m)
            second.copy_(v)
            # bf16 is the upper half of float32: a random number below one unit of it is added and the lower half dropped
            weight.view(torch.int16).copy_(w.view(torch.int32).add_(noise[:len(w)]).bitwise_right_shift_(16))
        grad.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        tensors = {"steps": torch.tensor(self.steps)}
        for name, p in self.params.items():
            first, second = self.moments[name]
            tensors |= {f"weight.{name}": whole(p.detach()), f"exp_avg.{name}": whole(first), f"exp_avg_sq.{name}": whole(second)}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.steps = int(tensors["steps"])
        for name, p in self.params.items():
            for tensor, key in ((p, "weight"), *zip(self.moments[name], ("exp_avg", "exp_avg_sq"))):
                saved = tensors[f"{key}.{name}"].to(tensor.device)
                tensor.copy_(distribute_tensor(saved, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else saved)


def save_checkpoint(path: Path, optimizer: Optimizer, step: int, fingerprint: str, rank: int) -> None:
    """One file, renamed into place: a kill or a full disk leaves the older checkpoint whole."""
    partial, tensors = path.with_suffix(".partial"), optimizer.state()
    if rank:
        return
    try:
        save_file(tensors, partial, metadata={"step": str(step), "fingerprint": fingerprint})
    except Exception as error:  # safetensors raises its own error type for a full disk
        partial.unlink(missing_ok=True)
        die(f"could not write {path} ({error}); the checkpoint before it is kept: make room and give the same command again")
    os.replace(partial, path)


def learning_rate(step: int, steps: int, args) -> float:
    """Linear warm-up, then linear or cosine decay to a tenth."""
    warmup = max(1, round(args.warmup * steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    shape = 1 - progress if args.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return args.lr * (0.1 + 0.9 * shape)


def draw_loss(log: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 3.5))
    axis.plot([row["step"] for row in log], [row["loss"] for row in log], color="#4b6b7c", linewidth=1, label="training loss")
    held_out = [(row["step"], row["held_out_loss"]) for row in log if "held_out_loss" in row]
    if held_out:
        axis.plot(*zip(*held_out), "o-", color="#a63d2f", label="held-out loss")
    axis.set_xlabel("step")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def git_revision() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


# ---------------------------------------------------------------- main

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--base", required=True, help="model folder or hub name of a base model")
    data.add_argument("--data", required=True, nargs="+", metavar="FILE[=WEIGHT]", help="JSONL files, mixed in proportion to their weights")
    data.add_argument("--n", type=int, default=0, help="rows to train on in all (default: as many as the files hold)")
    data.add_argument("--context", type=int, default=1024, help="longest row, in tokens")
    data.add_argument("--too-long", choices=["truncate", "drop"], default="truncate", help="what to do with a longer row")
    data.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="share of the rows never trained on; their loss is logged at every checkpoint and at the end")
    data.add_argument("--show-batch", action="store_true", help="print the first step's rows with the trained tokens coloured, and stop")
    run = parser.add_argument_group("run")
    run.add_argument("--out", help="run folder to write (default runs/<arm>-s<seed>)")
    run.add_argument("--arm", default="mine", help="name of the arm in the results")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    opt = parser.add_argument_group("optimisation")
    opt.add_argument("--lr", type=float, default=4e-5, help="peak learning rate")
    opt.add_argument("--batch", type=int, default=16, help="rows a step: the same number of steps for every arm of n rows")
    opt.add_argument("--warmup", type=float, default=0.05, help="share of the steps spent warming up")
    opt.add_argument("--schedule", choices=["linear", "cosine"], default="linear")
    opt.add_argument("--weight-decay", type=float, default=0.01)
    opt.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    opt.add_argument("--freeze-embeddings", action="store_true", help="leave the word embeddings (and a tied output layer) as they are: "
                     "a third faster with a big vocabulary, and Adam cannot drag along the many words that never occur")
    opt.add_argument("--lora", type=int, default=0, metavar="RANK", help="train a LoRA adapter of this rank (default: all weights)")
    opt.add_argument("--lora-alpha", type=float, help="default: the rank")
    opt.add_argument("--merge", action="store_true", help="with --lora: write the whole model with the adapter added in, not the adapter")
    speed = parser.add_argument_group("speed and memory")
    speed.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: measured on this machine")
    speed.add_argument("--micro-tokens", type=int, default=4096, help="most tokens in one packed forward pass")
    speed.add_argument("--checkpointing", default="off", metavar="off|full|K", help="recompute activations of every layer or every K-th")
    speed.add_argument("--compile", action="store_true", help="torch.compile every layer (needs a C++ compiler on a CPU): a slow start, faster steps, less memory")
    args = parser.parse_args(argv)
    if args.merge and not args.lora:
        parser.error("--merge needs --lora")
    args.out = Path(args.out or f"runs/{args.arm}-s{args.seed}")
    args.lora_alpha = args.lora_alpha or float(args.lora)
    if args.checkpointing not in ("off", "full") and not args.checkpointing.isdigit():
        parser.error("--checkpointing takes off, full or a number")
    return args


def main() -> None:
    args = parse_args()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    torch.manual_seed(args.seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    # ------------------------------------------------------------ resume or refuse
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("show_batch", "save_every", "out")}
    try:
        hashes = [hashlib.sha256(parse_source(d)[0].read_bytes()).hexdigest() for d in args.data]
    except OSError as error:
        die(f"cannot read {error.filename}: {error.strerror}; generate it with gen.py or use data/starter/")
    fingerprint = hashlib.sha256(json.dumps([settings, hashes]).encode()).hexdigest()[:16]
    finished = args.out / "run.json"
    if finished.exists() and not args.show_batch:
        if json.loads(finished.read_text()).get("fingerprint") == fingerprint:
            print(f"{args.out} is complete already; delete it to train it again")
            return
        die(f"{args.out} holds a run with other settings or data; give another --out or delete it")

    # ------------------------------------------------------------ data
    print(f"{args.out}: base {args.base}", flush=True)
    # In a process of its own: a tokenizer of 262,144 words takes 0.3 GB and leaves a third of that behind. Ctrl-C is the parent's.
    try:
        with ProcessPoolExecutor(1, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as tokenizing:
            order, held_out, manifest = tokenizing.submit(tokenized_rows, args).result()
    except BrokenProcessPool:
        die("the process that tokenises the rows was killed, most likely for memory; give fewer rows or free some")
    batches = [order[i:i + args.batch] for i in range(0, len(order), args.batch)]
    if args.show_batch:
        show_batch(load_tokenizer(args.base), batches[0])
        return
    steps, n_trained = len(batches), sum(sum(r["mask"]) for r in order)
    batch_tokens = [sum(len(r["ids"]) for r in rows) for rows in batches]
    n_tokens = sum(batch_tokens)

    # ------------------------------------------------------------ model
    device = pick_device()
    if ranks > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype] or pick_dtype(device)
    peak = measure_gflops(dtype, device) * 1e9 * ranks
    model = load_model(args.base, dtype, device)
    exact = packing_is_exact(model, device)
    if not exact:
        print("  this architecture does not keep packed documents apart: one row a pass, plain attention")
        model.set_attn_implementation("eager")
    if args.lora:
        add_lora(model, args.lora, args.lora_alpha)
    elif args.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    elif ranks == 1:
        model.get_input_embeddings().sparse = True  # its gradient is a few hundred rows, not another matrix of the whole vocabulary
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = int({"off": 0, "full": 1}.get(args.checkpointing, args.checkpointing))
    checkpointed = 1 / every if every else 0.0  # share of the layers that is computed twice
    need = training_bytes(model, trainable, batch_tokens, args.micro_tokens, checkpointed)
    if need / ranks > available_bytes(device):
        fits = [*(["--checkpointing full"] if checkpointed < 1 else []), *([] if args.lora else ["--lora 16"]), "a smaller --batch or --micro-tokens", "a smaller base"]
        die(f"training needs about {need / 1e9:.0f} GB beside the model, {available_bytes(device) / 1e9:.0f} GB are free; use {' or '.join(fits)}")
    args.out.mkdir(parents=True, exist_ok=True)
    disk = trainable * 3 * dtype.itemsize + (0 if args.lora else sum(p.numel() for p in model.parameters()) * 2)
    if shutil.disk_usage(args.out).free < disk:
        die(f"{args.out} needs about {disk / 1e9:.1f} GB of disk for checkpoint and model; make room or give --out on another disk")
    if every:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for i, layer in enumerate(model.base_model.layers):
            layer.gradient_checkpointing = i % every == 0
        if args.lora or args.freeze_embeddings:  # a frozen embedding gives no gradient for the recomputation to start from
            model.enable_input_require_grads()
    if args.compile:
        ALL_ATTENTION_FUNCTIONS.register("docs", torch.compiler.disable(docs_attention))  # its document lengths differ in every pass
        for layer in model.base_model.layers:
            layer.compile(dynamic=True)
    trainee = Trainee(model).train()
    if ranks > 1:
        shard(trainee)
    optimizer = Optimizer(model, args.weight_decay)
    print(f"  {len(order)} rows, {n_tokens:,} tokens ({n_trained / n_tokens:.0%} trained on), {steps} steps of {args.batch} rows, "
          f"{trainable / 1e6:.1f} M parameters, {device.type} {str(dtype).removeprefix('torch.')}" + (f", {ranks} processes" if ranks > 1 else ""), flush=True)

    # ------------------------------------------------------------ where a killed run left off
    path, first = args.out / "checkpoint.safetensors", 0
    log_path = args.out / "log.jsonl"
    if path.exists():
        with safe_open(path, "pt") as f:
            saved = f.metadata()
        if saved["fingerprint"] != fingerprint:
            die(f"{path} belongs to a run with other settings or data; give another --out or delete {args.out}")
        optimizer.restore(load_file(path, device=str(device)))
        first = int(saved["step"])
        print(f"  continuing at step {first}")
    old_log = log_path.read_text().splitlines()[:first] if log_path.exists() else []
    log = open(log_path if rank == 0 else os.devnull, "w")
    log.writelines(line + "\n" for line in old_log)  # steps after the checkpoint are run again

    # ------------------------------------------------------------ loop
    start, max_tokens = time.time(), args.micro_tokens if exact else 1
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=f"train {args.arm}", unit="step", mininterval=1, disable=rank > 0)
    for step in bar:
        began = time.time()
        rows = batches[step]
        # One divisor for the whole step: a mean over tokens however the step is split (transformers #34191, torchtune #1917).
        targets = sum(sum(r["mask"][1:]) for r in rows)
        # Each rank has its share of the rows; all make the same number of passes, because each pass is a meeting of the ranks.
        passes = [pack(rows[r::ranks], max_tokens) for r in range(ranks)]
        loss, n_passes = torch.zeros(()), max(map(len, passes))
        for i in range(n_passes):
            packed, weight = (passes[rank][i], ranks / targets) if i < len(passes[rank]) else (rows[:1], 0.0)  # FSDP takes the mean over ranks
            part = trainee(packed, weight, device)
            part.backward()
            loss += part.item() / ranks
            if n_passes > 1:
                optimizer.end_pass()
        if ranks > 1:
            loss = loss.to(device)
            dist.all_reduce(loss)
        loss, lr = loss.item(), learning_rate(step, steps, args)
        norm = optimizer.step(lr, args.clip, n_passes > 1)
        if not math.isfinite(loss + norm):
            die(f"step {step}: loss {loss}, gradient norm {norm}; stopped, weights of this step not saved, the last checkpoint is kept. "
                f"Rows: {', '.join(r['where'] for r in rows)}. Try a lower --lr")
        tokens, seconds = batch_tokens[step], time.time() - began
        share = step_flops(model, rows, checkpointed) / seconds / peak
        line = {"step": step, "loss": loss, "grad_norm": norm, "lr": lr, "tokens": tokens, "trained": targets, "tokens_per_s": round(tokens / seconds, 1),
                "of_peak": round(share, 3), "memory_gb": round(used_gb(device), 2)}
        checkpoint_due = (step + 1) % args.save_every == 0 and step + 1 < steps
        if held_out and (checkpoint_due or step + 1 == steps):
            line["held_out_loss"] = held_out_loss(trainee, held_out, max_tokens, device)
        log.write(json.dumps(line) + "\n")
        log.flush()
        bar.set_postfix_str(f"loss {loss:.3f}, {line['tokens_per_s']:.0f} tokens/s, {share:.0%} of peak, {line['memory_gb']:.1f} GB")
        if checkpoint_due:
            save_checkpoint(path, optimizer, step + 1, fingerprint, rank)
    log.close()

    # ------------------------------------------------------------ save, run.json last
    if ranks > 1:
        weights = {name: whole(p.detach()).to(dtype) for name, p in model.named_parameters()}
        dist.barrier()
        dist.destroy_process_group()
        if rank:
            os._exit(0)  # not through the libraries' own teardown: their threads sometimes abort the process at its very end
        model = load_model(args.base, dtype, torch.device("cpu"))
        if args.lora:
            add_lora(model, args.lora, args.lora_alpha)
        model.load_state_dict(weights, strict=False)  # tied weights stand there once
    tokenizer = load_tokenizer(args.base)
    give_template(tokenizer)
    tokenizer.save_pretrained(args.out)
    if args.merge:
        merge_lora(model)
    if args.lora and not args.merge:
        save_adapter(model, args.out, args.base, args.lora, args.lora_alpha)
    else:
        # EOS alone ends an answer: a pad token listed here gives empty answers (transformers #48016)
        model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                                                   pad_token_id=tokenizer.pad_token_id)
        model.set_attn_implementation("sdpa")
        model.save_pretrained(args.out)
    lines = [json.loads(line) for line in log_path.read_text().splitlines()]
    draw_loss(lines, args.out / "loss.png")
    last = [line["loss"] for line in lines[-10:]]
    run = {"run": args.out.name, "arm": args.arm, "seed": args.seed, "fingerprint": fingerprint,
           "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, "data": manifest,
           "steps": steps, "tokens": n_tokens, "trained_tokens": n_trained, "trainable_parameters": trainable, "last_10_steps_loss": sum(last) / len(last),
           "held_out_loss": lines[-1].get("held_out_loss"), "memory_gb": lines[-1]["memory_gb"], "processes": ranks,
           "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(), "dtype": str(dtype),
           "wall_seconds": round(time.time() - start, 1), "git": git_revision(), "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
           "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}}
    finished.with_suffix(".partial").write_text(json.dumps(run, indent=2) + "\n")
    os.replace(finished.with_suffix(".partial"), finished)
    path.unlink(missing_ok=True)
    print(f"  wrote {args.out} (loss {run['last_10_steps_loss']:.3f} over the last 10 steps, {run['wall_seconds']:.0f} s)", flush=True)
    if ranks > 1:
        os._exit(0)


if __name__ == "__main__":
    run_main(main, die)
