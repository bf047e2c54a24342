"""train.py against TRL's SFTTrainer: python tests/bench_train.py [MODEL_FOLDER]   (or: make bench WHAT=train)

Same model, same rows in the same order, same number of optimiser steps, learning rate and rows a step; each contender in its own
process, so that the peak memory is its own. The first steps are a warm-up. Losses of the first step must agree before any figure
is printed (TRL's packing makes other steps out of the same rows and is compared by speed alone). Tokens are real ones, never padding.
TRL's default pads and recomputes activations (gradient checkpointing); the other rows say when they do the latter.
A second table repeats it on a random model with a small vocabulary (32,000 words).
On a GPU the same command measures the GPU, with more rows a step, and a third table trains random models of big shapes.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
GPU = shutil.which("nvidia-smi") is not None
BATCH, WARM_UP, STEPS = 64 if GPU else 8, 2, 8   # rows a step, steps not timed, steps timed (memory grows over the first ones)
CONTENDERS = {"train.py": ["--micro-tokens", "65536"], "train.py, compiled": ["--micro-tokens", "65536", "--compile"],
              "TRL padded": {}, "TRL padding-free": {"padding_free": True, "max_length": None}, "TRL packing": {"packing": True, "packing_strategy": "bfd"},
              "train.py, checkpointing": ["--micro-tokens", "65536", "--checkpointing", "full"],
              "TRL default (padded, checkpointing)": {"gradient_checkpointing": True},
              "TRL padding-free, checkpointing": {"padding_free": True, "max_length": None, "gradient_checkpointing": True}}
# torch's own settings, which TRL's users have: importing train.py would change them
TORCH_DEFAULTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
# random weights of real shapes: hidden, intermediate, layers, heads, key heads, head size, words; and how train.py is to train them
SHAPES = {"0.6 B, all weights": ((1024, 3072, 28, 16, 8, 128, 151_936), []),
          "4 B, all weights": ((2560, 9728, 36, 32, 8, 128, 151_936), ["--checkpointing", "full"]),
          "12 B, all weights": ((5120, 14336, 40, 32, 8, 128, 131_072), ["--checkpointing", "full"]),
          "12 B, LoRA": ((5120, 14336, 40, 32, 8, 128, 131_072), ["--checkpointing", "full", "--lora", "16", "--micro-tokens", "2048"])}


def data_arguments() -> list[str]:
    return ["--data", *(str(ROOT / "data" / "starter" / f"{kind}.jsonl") for kind in ("regular", "gramenist")), "--n", str(BATCH * (WARM_UP + STEPS))]


def rows_in_order(base: str) -> list[dict]:
    """The rows as train.py draws and tokenises them."""
    import train
    return train.tokenized_rows(train.parse_args(["--base", base, *data_arguments()]))[0]


def run_ours(base: str, out: Path, more: list[str]) -> dict:
    import train
    import torch
    slots = []   # what the embedding is really asked for, padding and all; the self-test's 18 tokens aside
    torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: slots.append(inputs[0].numel()) if isinstance(module, torch.nn.Embedding) and inputs[0].numel() > 18 else None)
    sys.argv = ["train.py", "--base", base, *data_arguments(), "--batch", str(BATCH), "--out", str(out), "--lr", "1e-5", *more]
    train.main()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    timed, device = log[WARM_UP:], train.pick_device()
    return {"losses": [line["loss"] for line in log], "memory_gb": log[-1]["memory_gb"], "of_peak": statistics.median(line["of_peak"] for line in timed),
            "tokens_per_s": sum(line["tokens"] for line in timed) / sum(line["tokens"] / line["tokens_per_s"] for line in timed),
            "slots": sum(line["tokens"] for line in log) / sum(slots), "device": device.type, "dtype": str(train.pick_dtype(device)), "torch": torch.__version__}


def run_trl(base: str, out: Path, more: dict) -> dict:
    import train
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    rows = rows_in_order(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=train.pick_dtype(train.pick_device()))

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        times = [time.time()]

        def on_step_end(self, *_, **__):
            if GPU:
                torch.cuda.synchronize()
            self.times.append(time.time())
    config = SFTConfig(output_dir=str(out), per_device_train_batch_size=1 if more.get("packing") else BATCH, num_train_epochs=1, learning_rate=1e-5, logging_steps=1,
                       report_to="none", save_strategy="no", use_cpu=not GPU, max_grad_norm=1.0, weight_decay=0.01, disable_tqdm=True,
                       completion_only_loss=True, **{"max_length": 1024, "gradient_checkpointing": False, **more})
    data = Dataset.from_dict({"input_ids": [r["ids"] for r in rows], "completion_mask": [r["mask"] for r in rows]})
    trainer = InOrder(model=model, args=config, train_dataset=data, processing_class=train.load_tokenizer(base), callbacks=[Clock])
    trainer.train()
    times, losses = Clock.times, [line["loss"] for line in trainer.state.log_history if "loss" in line]
    per_step = sum(len(r["ids"]) for r in rows) / len(losses)   # packing makes fewer, longer steps of the same rows
    warm = WARM_UP if len(losses) > WARM_UP + 1 else 1
    timed = len(losses) - warm
    tokens = sum(len(r["ids"]) for r in rows[WARM_UP * BATCH:]) if len(losses) == WARM_UP + STEPS else per_step * timed
    return {"losses": losses, "memory_gb": train.used_gb(train.pick_device()), "tokens_per_s": tokens / (times[-1] - times[-1 - timed])}


def measure(name: str, base: str, more: list[str] = ()) -> dict:
    """Run one contender in a process of its own."""
    environment = os.environ | (TORCH_DEFAULTS if "TRL" in name else {})
    done = subprocess.run([sys.executable, __file__, base, "--only", name, *more], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"bench_train.py: {name} failed: {done.stderr[-1500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(title: str, base: str, rounds: int) -> None:
    results = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            results[name].append(measure(name, base))
    ours = results["train.py"][0]
    for name, runs in results.items():
        assert "packing" in name or abs(runs[0]["losses"][0] - ours["losses"][0]) < 0.02 * ours["losses"][0], (name, runs[0]["losses"], ours["losses"])
    speed = {name: statistics.median(run["tokens_per_s"] for run in runs) for name, runs in results.items()}
    memory = {name: max(run["memory_gb"] for run in runs) for name, runs in results.items()}
    print(f"\n{title}: {ours['device']}, {ours['dtype']}, torch {ours['torch']}; {ours['of_peak']:.0%} of the measured matrix rate, {ours['slots']:.1%} of the slots filled, "
          f"{rounds} rounds of {STEPS} steps of {BATCH} rows; x: how often train.py's figure")
    print(f"  {'':36}{'real tokens/s':>14}{'x':>7}{'peak GB':>9}{'x':>7}{'first loss':>12}")
    for name in CONTENDERS:
        print(f"  {name:36}{speed[name]:14.0f}{speed[name] / speed['train.py']:7.2f}{memory[name]:9.1f}{memory[name] / memory['train.py']:7.2f}{results[name][0]['losses'][0]:12.3f}")
    lean, default = "train.py, checkpointing", "TRL default (padded, checkpointing)"
    fastest, leanest = max(value for name, value in speed.items() if "TRL" in name), min(value for name, value in memory.items() if "TRL" in name)
    print(f"  train.py is {speed['train.py'] / speed[default]:.1f} x TRL's default, {speed['train.py'] / speed['TRL padded']:.1f} x the same without checkpointing, "
          f"{speed['train.py'] / fastest:.1f} x its fastest. With checkpointing it is {speed[lean] / speed[default]:.1f} x TRL's default and takes "
          f"{memory[lean] / memory[default]:.2f} of its memory, {memory[lean] / leanest:.2f} of TRL's least", flush=True)


def big_shapes(folder: Path) -> None:
    """train.py alone: share of the machine's matrix rate (arithmetic with recomputation) and peak memory."""
    print(f"\nrandom Qwen3 models of real shapes, {BATCH} rows a step")
    for name, (shape, more) in SHAPES.items():
        base = random_model(folder / "shape", *shape)
        run = measure("train.py", base, more)
        print(f"  {name:22}{run['tokens_per_s']:9.0f} tokens/s{run['of_peak']:6.0%} of the matrix rate{run['memory_gb']:8.1f} GB", flush=True)
        shutil.rmtree(base)


def random_model(folder: Path, hidden: int, inner: int, layers: int, heads: int, key_heads: int, head_dim: int, words: int) -> str:
    """A Qwen3 of random weights, with a byte-level tokenizer of 300 words (rows become about four times as long)."""
    import torch
    import transformers
    from conftest import make_tokenizer
    make_tokenizer(folder)
    transformers.logging.disable_progress_bar()
    config = transformers.Qwen3Config(vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
                                      head_dim=head_dim, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=words > 140_000)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if GPU else "cpu"):
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=str(ROOT / "models" / "gemma-3-270m"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=CONTENDERS, help="run one contender and print its figures (what the benchmark calls)")
    args, more = parser.parse_known_args()  # what follows --only goes to train.py
    if more and not args.only:
        parser.error(f"unknown arguments: {' '.join(more)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.only:
            settings = CONTENDERS[args.only]
            print(json.dumps(run_trl(args.base, folder / "run", settings) if isinstance(settings, dict) else run_ours(args.base, folder / "run", settings + more)))
            return
        compare(Path(args.base).name, args.base, args.rounds)
        compare("random Qwen3 of 8 layers, 32,000 words", random_model(folder / "small", 512, 1536, 8, 8, 4, 64, 32_000), args.rounds)
        if GPU:
            big_shapes(folder)


if __name__ == "__main__":
    main()
