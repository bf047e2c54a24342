"""train.py against TRL's SFTTrainer: python tests/bench_train.py [MODEL_FOLDER]   (or: make bench)

Same model, same rows in the same order, same number of optimiser steps, learning rate and rows a step; each contender in its own
process, so that the peak memory is its own. The first steps are a warm-up. Losses of the first step must agree before any figure
is printed (TRL's packing makes other steps out of the same rows and is compared by speed alone). Tokens are real ones, never padding.
A second table repeats it on a random model with a small vocabulary (32,000 words). On a GPU the same command measures the GPU.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
BATCH, WARM_UP, STEPS = 8, 2, 4   # rows a step, steps not timed, steps timed
DATA = ["--data", *(str(ROOT / "data" / "starter" / f"{kind}.jsonl") for kind in ("regular", "gramenist")), "--n", str(BATCH * (WARM_UP + STEPS))]
CONTENDERS = {"train.py": None, "TRL default": {}, "TRL padding-free": {"padding_free": True, "max_length": None}, "TRL packing": {"packing": True, "packing_strategy": "bfd"}}


def rows_in_order(base: str) -> list[dict]:
    """The rows as train.py draws and tokenises them."""
    import train
    tokenizer = train.load_tokenizer(base)
    train.give_template(tokenizer)
    return train.build_rows(train.parse_args(["--base", base, *DATA]), tokenizer)[0]


def run_ours(base: str, out: Path) -> dict:
    import train
    import torch
    slots = []   # what the embedding is really asked for, padding and all; the self-test's 18 tokens aside
    torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: slots.append(inputs[0].numel()) if isinstance(module, torch.nn.Embedding) and inputs[0].numel() > 18 else None)
    sys.argv = ["train.py", "--base", base, *DATA, "--batch", str(BATCH), "--out", str(out), "--lr", "1e-5"]
    train.main()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    timed, device = log[WARM_UP:], train.pick_device()
    return {"losses": [line["loss"] for line in log], "memory_gb": log[-1]["memory_gb"], "of_peak": statistics.median(line["of_peak"] for line in timed),
            "tokens_per_s": sum(line["tokens"] for line in timed) / sum(line["tokens"] / line["tokens_per_s"] for line in timed),
            "slots": sum(line["tokens"] for line in log) / sum(slots), "device": device.type, "dtype": str(train.pick_dtype(device)), "torch": torch.__version__}


def run_trl(base: str, out: Path, more: dict) -> dict:
    import torch
    import train
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    rows, cpu = rows_in_order(base), not torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=train.pick_dtype(train.pick_device()))

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        times = [time.time()]

        def on_step_end(self, *_, **__):
            if not cpu:
                torch.cuda.synchronize()
            self.times.append(time.time())
    config = SFTConfig(output_dir=str(out), per_device_train_batch_size=1 if more.get("packing") else BATCH, num_train_epochs=1, learning_rate=1e-5, logging_steps=1,
                       report_to="none", save_strategy="no", use_cpu=cpu, gradient_checkpointing=False, max_grad_norm=1.0, weight_decay=0.01, disable_tqdm=True,
                       completion_only_loss=True, **{"max_length": 1024, **more})
    data = Dataset.from_dict({"input_ids": [r["ids"] for r in rows], "completion_mask": [r["mask"] for r in rows]})
    trainer = InOrder(model=model, args=config, train_dataset=data, processing_class=train.load_tokenizer(base), callbacks=[Clock])
    trainer.train()
    times, losses = Clock.times, [line["loss"] for line in trainer.state.log_history if "loss" in line]
    per_step = sum(len(r["ids"]) for r in rows) / len(losses)   # packing makes fewer, longer steps of the same rows
    warm = WARM_UP if len(losses) > WARM_UP + 1 else 1
    timed = len(losses) - warm
    tokens = sum(len(r["ids"]) for r in rows[WARM_UP * BATCH:]) if len(losses) == WARM_UP + STEPS else per_step * timed
    return {"losses": losses, "memory_gb": train.used_gb(train.pick_device()), "tokens_per_s": tokens / (times[-1] - times[-1 - timed])}


def measure(name: str, base: str) -> dict:
    """Run one contender in a process of its own."""
    done = subprocess.run([sys.executable, __file__, base, "--only", name], capture_output=True, text=True)
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
    print(f"\n{title}: {ours['device']}, {ours['dtype']}, torch {ours['torch']}; {ours['of_peak']:.0%} of the measured matrix rate, {ours['slots']:.0%} of the slots filled, "
          f"first loss {ours['losses'][0]:.3f}, {rounds} rounds of {STEPS} steps of {BATCH} rows")
    print(f"  {'':18}{'real tokens/s':>14}{'train.py is':>13}{'peak GB':>9}{'train.py needs':>16}{'first loss':>12}")
    for name in CONTENDERS:
        print(f"  {name:18}{speed[name]:14.0f}{speed['train.py'] / speed[name]:11.1f} x{memory[name]:9.1f}{memory['train.py'] / memory[name]:14.2f} x{results[name][0]['losses'][0]:12.3f}")
    sys.stdout.flush()


def small_vocabulary_model(folder: Path) -> str:
    """A random Qwen3 with a byte-level tokenizer trained on the starter corpus."""
    import torch
    import transformers
    from conftest import make_tokenizer
    torch.manual_seed(0)
    make_tokenizer(folder)
    config = transformers.Qwen3Config(vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
                                      head_dim=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=str(ROOT / "models" / "gemma-3-270m"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=CONTENDERS, help="run one contender and print its figures (what the benchmark calls)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.only:
            more = CONTENDERS[args.only]
            print(json.dumps(run_ours(args.base, folder / "run") if more is None else run_trl(args.base, folder / "run", more)))
            return
        compare(Path(args.base).name, args.base, args.rounds)
        compare("random Qwen3 of 8 layers, 32,000 words", small_vocabulary_model(folder / "small"), args.rounds)


if __name__ == "__main__":
    main()
