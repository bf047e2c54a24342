"""train.py beside TRL's SFTTrainer, beside itself without speed.py, and beside an older revision of itself.

    python tests/bench_train.py [MODEL_FOLDER]         # or: make bench WHAT=train
    python tests/bench_train.py --old /tmp/old         # also a checkout of another revision, taking turns

Same model, same rows in the same order, as many optimiser steps, same learning rate, same rows a step;
each contender in a process of its own, so that its peak memory is its own. The first block of steps is a
warm-up. Losses of the first step must agree before any figure is printed (TRL's packing makes other steps
out of the same rows: speed alone). Tokens are real ones, never padding. CPU seconds stand beside wall
seconds, which other work on the machine lengthens more.

A second table repeats it on a random model with a small vocabulary; then comes LoRA on a random model of 1 B
weights. On a GPU the same command measures the GPU, with more rows a step, and trains bigger shapes, too.
"""
import argparse
import functools
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

GPU = shutil.which("nvidia-smi") is not None
BATCH = 64 if GPU else 8   # rows a step
BLOCK, BLOCKS = 2, 4       # steps a block; timed blocks, after one of warm-up (memory still grows in it)
STEPS = BLOCK * (1 + BLOCKS)
DATA = [str(ROOT / "data" / "starter" / f"{kind}.jsonl") for kind in ("regular", "gramenist")]

# train.py's arguments, or TRL's settings. TRL's default pads and recomputes activations (checkpointing)
OURS = "train.py"
LEAN = "train.py --checkpointing"
DEFAULT = "TRL default (padded, checkpointing)"
FREE = {"padding_free": True, "max_length": None}
CONTENDERS = {
    OURS: [],
    "train.py --plain": ["--plain"],
    LEAN: ["--checkpointing"],
    "TRL padded": {},
    "TRL padding-free": FREE,
    "TRL packing": {"packing": True, "packing_strategy": "bfd"},
    DEFAULT: {"gradient_checkpointing": True},
    "TRL padding-free, checkpointing": {**FREE, "gradient_checkpointing": True},
}
# torch's own settings, which TRL's users have; importing train.py would change them
TORCH_DEFAULTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}

# Shapes of random Qwen3 models: hidden, intermediate, layers, heads, key heads, head size, words
SMALL = (512, 1536, 8, 8, 4, 64, 32_000)
ONE_B = (1152, 6912, 26, 4, 1, 256, 262_144)  # Gemma 3 1B's, so that the packaged tokenizer fits
BIG = {
    "0.6 B, all weights": ((1024, 3072, 28, 16, 8, 128, 151_936), []),
    "4 B, all weights": ((2560, 9728, 36, 32, 8, 128, 151_936), ["--checkpointing"]),
    "12 B, all weights": ((5120, 14336, 40, 32, 8, 128, 131_072), ["--checkpointing"]),
    "12 B, LoRA": ((5120, 14336, 40, 32, 8, 128, 131_072),
                   ["--checkpointing", "--lora", "16", "--micro-tokens", "2048"]),
}


# ---------------------------------------------------------------- one contender, in a process of its own

class Gate:
    """Stands in for train.py's progress bar: a line in begins each block of steps, and a line out ends it.

    So every revision runs its own main(), unchanged, and two of them can take turns on one machine.
    """
    def __init__(self, steps, **_):
        self.steps = steps

    def __iter__(self):
        for start in range(0, len(self.steps), BLOCK):
            if not sys.stdin.readline():
                sys.exit("the benchmark has ended")
            clock = Clock()
            yield from self.steps[start:start + BLOCK]
            answer(clock.read())

    def set_postfix_str(self, text: str) -> None:
        pass

    @staticmethod
    def write(text: str) -> None:
        pass


class Clock:
    """Wall seconds, and CPU seconds of this process on all cores."""
    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict:
        if GPU:
            import torch
            torch.cuda.synchronize()
        return {"wall": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu}


def answer(figures: dict) -> None:
    print(json.dumps(figures), file=sys.__stdout__, flush=True)


def data_arguments(base: str) -> list[str]:
    return ["--base", base, "--data", *DATA, "--n", str(BATCH * STEPS)]


def run_ours(revision: str, base: str, out: Path, more: list[str]) -> None:
    """main() of the train.py in the folder `revision`, block by block; then its losses and peak memory."""
    sys.path.insert(0, revision)
    import train
    train.tqdm = Gate
    # The room that reads the rows: train.py itself in revisions before mix.py was there
    sys.modules.get("mix", train).reject_rows = keep_all
    sys.stdout = sys.stderr  # what train.py says is no answer
    sys.argv = ["train.py", *data_arguments(base), "--batch", str(BATCH), "--out", str(out), "--lr", "1e-5"]
    sys.argv += ["--micro-tokens", "65536"] * ("--micro-tokens" not in more) + more
    train.main()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    answer({"losses": [line["loss"] for line in log], "memory_gb": log[-1]["memory_gb"]})


def keep_all(rows: list[dict]) -> tuple[list[dict], list]:
    """In the place of the guard: another revision's leaves out other rows, and then draws others."""
    return rows, []


@functools.cache
def rows_in_order(base: str) -> list[dict]:
    """The rows as train.py draws and tokenises them."""
    import train  # before torch: it sets oneDNN's caches
    import chat
    import mix
    import models
    args = train.parse_args(data_arguments(base))
    mix.reject_rows = keep_all
    tokenizer = models.load_tokenizer(base)
    chat.give_template(tokenizer)
    with redirect_stdout(io.StringIO()):
        return mix.build_rows(args, train.find_sources(args), tokenizer)[0]


def run_trl(base: str, out: Path, settings: dict) -> None:
    """TRL's trainer on the same rows; answers with the time of all timed steps, losses and peak memory."""
    import models
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    sys.stdout = sys.stderr
    rows, device = rows_in_order(base), models.pick_device()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=models.pick_dtype(device))
    clocks = []  # one started after each step

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class AfterStep(TrainerCallback):
        def on_step_end(self, *_, **__):
            if GPU:
                torch.cuda.synchronize()
            clocks.append(Clock())

    # With packing a row of TRL's is a whole pass
    rows_a_step = 1 if "packing" in settings else BATCH
    config = SFTConfig(**{
        "output_dir": str(out), "per_device_train_batch_size": rows_a_step, "num_train_epochs": 1,
        "learning_rate": 1e-5, "weight_decay": 0.01, "max_grad_norm": 1.0, "completion_only_loss": True,
        "max_length": 1024, "gradient_checkpointing": False, "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "use_cpu": not GPU, "disable_tqdm": True, **settings})
    columns = {"input_ids": [row["ids"] for row in rows], "completion_mask": [row["mask"] for row in rows]}
    trainer = InOrder(model=model, args=config, train_dataset=Dataset.from_dict(columns),
                      processing_class=models.load_tokenizer(base), callbacks=[AfterStep])
    trainer.train()
    warm_up = min(BLOCK, len(clocks) // 2)
    figures = clocks[warm_up - 1].read()

    # Packing makes fewer, longer steps of the same rows: their tokens are known on average only
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    tokens = sum(len(row["ids"]) for row in rows[warm_up * BATCH:])
    if len(clocks) != STEPS:
        tokens = sum(len(row["ids"]) for row in rows) * (len(clocks) - warm_up) / len(clocks)
    answer({**figures, "tokens": tokens, "losses": losses, "memory_gb": models.used_gb(device)})


class Worker:
    """One contender's process, which does something each time that it is asked."""

    def __init__(self, *arguments, **environment):
        self.errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, __file__, *map(str, arguments)]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, env={**os.environ, **environment})

    def ask(self) -> dict:
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, well or badly: what it said tells
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.errors.seek(0)
        name = " ".join(self.process.args[2:])
        sys.exit(f"bench_train.py: {name} failed: {self.errors.read()[-1500:]}")

    def close(self) -> None:
        self.process.communicate()


# ---------------------------------------------------------------- tables

def timed_rows(base: str) -> list[dict]:
    return rows_in_order(base)[BATCH * BLOCK:]


def training_flops(base: str, rows: list[dict], more: list[str]) -> float:
    """Arithmetic of training on `rows` with train.py's arguments `more`.

    6 a weight and token, 4 where the weight is frozen, 2 more where its layer is recomputed; the output layer
    only where there is a loss; causal attention. No weight is loaded for it.
    """
    import models
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.from_pretrained(base).get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if "--lora" in more:
            models.add_lora(model, 16, 16)

    body = 0
    for p in model.get_decoder().layers.parameters():
        if p.ndim > 1:
            body += p.numel() * ((6 if p.requires_grad else 4) + 2 * ("--checkpointing" in more))
    head = model.get_output_embeddings().weight
    head_flops = head.numel() * (6 if head.requires_grad else 4)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 7 * config.num_hidden_layers * config.num_attention_heads * head_dim

    total = 0.0
    for row in rows:
        total += len(row["ids"]) * body + sum(row["mask"]) * head_flops + len(row["ids"]) ** 2 * attention
    return total


def measure(base: str, contender: list[str] | dict, folder: Path) -> dict:
    """{"wall", "cpu", "tokens", "losses", "memory_gb"} of one contender's timed steps."""
    out = folder / "run"
    if isinstance(contender, dict):
        worker = Worker("--trl", base, out, json.dumps(contender), **TORCH_DEFAULTS)
        figures = worker.ask()
    else:
        worker = Worker("--ours", ROOT, base, out, *contender)
        blocks = [worker.ask() for _ in range(1 + BLOCKS)][1:]
        figures = worker.ask()
        figures["wall"] = sum(block["wall"] for block in blocks)
        figures["cpu"] = sum(block["cpu"] for block in blocks)
        figures["tokens"] = sum(len(row["ids"]) for row in timed_rows(base))
    worker.close()
    shutil.rmtree(out, ignore_errors=True)
    return figures


def compare(title: str, base: str, folder: Path, rounds: int) -> None:
    """Run every contender, hold that they do the same work, and print the table."""
    results = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, contender in CONTENDERS.items():
            results[name].append(measure(base, contender, folder))

    expected = results[OURS][0]["losses"][0]
    for name, runs in results.items():
        loss = runs[0]["losses"][0]
        if "packing" not in name and abs(loss - expected) > 0.02 * expected:
            sys.exit(f"bench_train.py: first loss of {name} is {loss:.4f}, of train.py {expected:.4f}")

    speed, of_cpu, memory = {}, {}, {}
    for name, runs in results.items():
        speed[name] = statistics.median(run["tokens"] / run["wall"] for run in runs)
        of_cpu[name] = statistics.median(run["tokens"] / run["cpu"] for run in runs)
        memory[name] = max(run["memory_gb"] for run in runs)
    print_header(title, base, rounds)
    for name in CONTENDERS:
        recomputes = ["--checkpointing"] * ("checkpointing" in name)
        rate = matrix_share(base, recomputes, speed[name])
        print(f"  {name:36}{speed[name]:9.0f}{speed[name] / speed[OURS]:6.2f}"
              f"{of_cpu[name]:9.0f}{of_cpu[name] / of_cpu[OURS]:6.2f}"
              f"{memory[name]:9.1f}{memory[name] / memory[OURS]:6.2f}{rate:6.0%}"
              f"{results[name][0]['losses'][0]:12.3f}")
    print_summary(speed, memory)


@functools.cache
def matrix_rate() -> float:
    """FLOP/s of this machine's matrix products, in the number format that train.py chooses."""
    import models
    device = models.pick_device()
    return models.measure_gflops(models.pick_dtype(device), device) * 1e9


def matrix_share(base: str, more: list[str], tokens_per_s: float) -> float:
    """Arithmetic that the work needs (padding is not needed) ÷ what the machine could do in that time."""
    rows = timed_rows(base)
    flops_a_token = training_flops(base, rows, more) / sum(len(row["ids"]) for row in rows)
    return tokens_per_s * flops_a_token / matrix_rate()


def print_header(title: str, base: str, rounds: int) -> None:
    import models
    device = models.pick_device()
    dtype = str(models.pick_dtype(device)).removeprefix("torch.")
    rows = timed_rows(base)
    length = statistics.mean(len(row["ids"]) for row in rows)
    print(f"\n{title}: {device.type}, {dtype}, matrix products at {matrix_rate() / 1e9:,.0f} GFLOP/s; "
          f"{rounds} x {BLOCK * BLOCKS} steps of {BATCH} rows of {length:.0f} tokens")
    print("  x: how often train.py's figure; rate: arithmetic needed ÷ measured matrix rate")
    print(f"  {'':36}{'tokens/s':>9}{'x':>6}{'a CPU s':>9}{'x':>6}{'peak GB':>9}{'x':>6}{'rate':>6}"
          f"{'first loss':>12}")


def print_summary(speed: dict[str, float], memory: dict[str, float]) -> None:
    fastest = max(value for name, value in speed.items() if "TRL" in name)
    leanest = min(value for name, value in memory.items() if "TRL" in name)
    print(f"  train.py is {speed[OURS] / speed[DEFAULT]:.1f} x TRL's default, "
          f"{speed[OURS] / speed['TRL padded']:.1f} x the same without checkpointing, "
          f"{speed[OURS] / fastest:.1f} x its fastest.\n"
          f"  With checkpointing it is {speed[LEAN] / speed[DEFAULT]:.1f} x TRL's default and takes "
          f"{memory[LEAN] / memory[DEFAULT]:.2f} of its memory, {memory[LEAN] / leanest:.2f} of TRL's least",
          flush=True)


def beside_old(title: str, base: str, folder: Path, old: Path) -> None:
    """This train.py and another revision's in turn, block by block: what else runs here slows both."""
    workers = {}
    for name, revision in (("here", ROOT), ("old", old)):
        workers[name] = Worker("--ours", revision, base, folder / name)
    blocks = {name: [] for name in workers}
    for _ in range(1 + BLOCKS):
        for name, worker in workers.items():
            blocks[name].append(worker.ask())
    ends = {name: worker.ask() for name, worker in workers.items()}
    for name, worker in workers.items():
        worker.close()
        shutil.rmtree(folder / name)

    print(f"\n{title}: train.py ÷ that of {old}, {BLOCKS} blocks of {BLOCK} steps of {BATCH} rows in turn")
    for kind in ("wall", "cpu"):
        here = [block[kind] / BLOCK for block in blocks["here"][1:]]
        there = [block[kind] / BLOCK for block in blocks["old"][1:]]
        ratios = sorted(a / b for a, b in zip(here, there))
        print(f"  {kind:4} s a step  {statistics.median(here):8.3f} and {statistics.median(there):8.3f}; "
              f"ratio {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})")
    here, there = ends["here"]["memory_gb"], ends["old"]["memory_gb"]
    print(f"  peak GB        {here:8.2f} and {there:8.2f}; ratio {here / there:.2f}")
    here, there = ends["here"]["losses"][0], ends["old"]["losses"][0]
    print(f"  first loss     {here:8.4f} and {there:8.4f}", flush=True)


def one_model(name: str, base: str, more: list[str], folder: Path) -> None:
    """One line on train.py alone."""
    run, steps = measure(base, more, folder), BLOCK * BLOCKS
    tokens_per_s = run["tokens"] / run["wall"]
    print(f"  {name:20}{run['wall'] / steps:8.2f} s a step ({run['cpu'] / steps:.2f} CPU s)"
          f"{tokens_per_s:9.0f} tokens/s{matrix_share(base, more, tokens_per_s):6.0%} of the matrix rate"
          f"{run['memory_gb']:7.1f} GB", flush=True)


def lora_on_one_b(base: str, folder: Path) -> None:
    """LoRA where all weights would not fit: the base's tokenizer, so that rows are as long as the base's."""
    import models
    device = models.pick_device()
    size = models.pick_dtype(device).itemsize
    needed = 1.0e9 * 3 * size  # weights, activations, and the file that they are loaded from
    print(f"\nrandom Qwen3 of 1.0 B weights, --lora 16, {BATCH} rows a step")
    if models.available_bytes(device) < needed or shutil.disk_usage(folder).free < 2 * needed:
        print(f"  left out: it needs {needed / 1e9:.0f} GB of memory and twice that of disk")
        return
    one_b = random_model(folder / "one-b", ONE_B, models.load_tokenizer(base))
    one_model("1 B, LoRA", one_b, ["--lora", "16"], folder)
    shutil.rmtree(one_b)


def random_model(folder: Path, shape: tuple, tokenizer=None) -> str:
    """A Qwen3 of random weights; its tokenizer, unless given, is one of bytes: rows four times as long."""
    import torch
    import transformers
    from conftest import make_tokenizer
    if tokenizer is None:
        tokenizer = make_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    transformers.logging.disable_progress_bar()
    hidden, inner, layers, heads, key_heads, head_dim, words = shape
    config = transformers.Qwen3Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, head_dim=head_dim, vocab_size=words,
        tie_word_embeddings=words > 140_000, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if GPU else "cpu"):
        model = transformers.Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return str(folder)


def main() -> None:
    # What Worker starts
    if sys.argv[1:2] == ["--ours"]:
        revision, base, out, *more = sys.argv[2:]
        return run_ours(revision, base, Path(out), more)
    if sys.argv[1:2] == ["--trl"]:
        base, out, settings = sys.argv[2:]
        return run_trl(base, Path(out), json.loads(settings))

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("base", nargs="?", default=str(ROOT / "models" / "gemma-3-270m"))
    parser.add_argument("--rounds", type=int, default=1, help="how often every contender runs (medians)")
    parser.add_argument("--old", type=Path, metavar="FOLDER", help="a checkout of another revision")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = random_model(folder / "small", SMALL)
        bases = {Path(args.base).name: args.base, "random Qwen3 of 8 layers, 32,000 words": small}
        if args.old:
            for title, base in bases.items():
                beside_old(title, base, folder, args.old.resolve())
        for title, base in bases.items():
            compare(title, base, folder, args.rounds)
        lora_on_one_b(args.base, folder)
        if GPU:
            print(f"\nrandom Qwen3 models of bigger shapes, {BATCH} rows a step")
            for title, (shape, more) in BIG.items():
                big = random_model(folder / "big", shape)
                one_model(title, big, more, folder)
                shutil.rmtree(big)


if __name__ == "__main__":
    main()
