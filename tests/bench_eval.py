"""eval.py's generation against transformers' own: python tests/bench_eval.py [MODEL_FOLDER]   (or: make bench)

120 probes, at most 128 new tokens, greedy, the same weights and number format, two interleaved rounds, medians.
One prompt at a time is timed on every tenth probe, because all of them would take a quarter of an hour.
A second table repeats it on a random model with a small vocabulary (32,000 words), where the output layer costs nothing.
"""
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

from eval import TURN_END, generate, read_probes
from train import load_run, pick_device, pick_dtype, render_prompt

NEW, BATCH, PROBES = 128, 60, 120


def sync(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(model, tokenizer, prompts) -> list[list[int]]:
    answers = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(prompts), BATCH):
        part = order[start:start + BATCH]
        for i, tokens, _ in generate(model, tokenizer, [prompts[j] for j in part], NEW):
            answers[part[i]] = tokens
    return answers


@torch.inference_mode()
def theirs(model, tokenizer, prompts, batch) -> list[list[int]]:
    """model.generate with the same stops, prompts sorted by length too."""
    answers = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(prompts), batch):
        part = order[start:start + batch]
        longest = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompts[i])) + prompts[i] for i in part], device=model.device)
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in part], device=model.device)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, stop_strings=[TURN_END], tokenizer=tokenizer)
        for i, row in zip(part, out[:, longest:].tolist()):
            ends = [at for at, token in enumerate(row) if token in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
            answers[i] = row[:ends[0]] if ends else row
    return answers


def compare(name: str, model, tokenizer, prompts: list[list[int]]) -> None:
    device, few = model.device, prompts[::10]
    ways = {"eval.py": lambda: ours(model, tokenizer, prompts), f"generate, batches of {BATCH}": lambda: theirs(model, tokenizer, prompts, BATCH),
            "generate, one prompt at a time": lambda: theirs(model, tokenizer, few, 1)}
    answers, seconds = {}, {way: [] for way in ways}
    for round_ in range(3):  # the first is a warm-up
        for way, run in ways.items():
            if way.endswith("time") and round_ != 1:
                continue
            start = sync(device)
            answers[way] = run()
            seconds[way] += [sync(device) - start] if round_ else []
    rates = {way: (len(few) if way.endswith("time") else len(prompts)) / statistics.median(times) for way, times in seconds.items()}
    lengths = [len(a) for a in answers["eval.py"]]
    same = sum(a == b for a, b in zip(answers["eval.py"][::10], answers["generate, one prompt at a time"]))
    print(f"\n{name}, {str(model.dtype).removeprefix('torch.')}, {device.type}: {len(prompts)} prompts, answers of {statistics.mean(lengths):.0f} tokens on average")
    for way, rate in rates.items():
        print(f"  {way:34}{rate:8.2f} answers/s   eval.py is {rates['eval.py'] / rate:.2f} times as fast")
    print(f"  token for token equal to one prompt at a time: {same} of {len(few)}", flush=True)


def main() -> None:
    transformers.logging.set_verbosity_error()
    folder = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "models" / "gemma-3-270m")
    device = pick_device()
    dtype = pick_dtype(device)
    probes = read_probes(ROOT / "probes" / "gramenist.jsonl")[:PROBES]
    model, tokenizer = load_run(folder, dtype, device)
    prompts = [render_prompt(tokenizer, probe["messages"]) for probe in probes]
    compare(Path(folder).name, model.eval(), tokenizer, prompts)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
                                      num_key_value_heads=4, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True)
    small = transformers.Qwen3ForCausalLM(config).to(device, dtype).eval()
    small.generation_config.eos_token_id, small.generation_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    compare("random Qwen3 of 8 layers, 32,000 words", small, tokenizer, [[token % 32_000 for token in p] for p in prompts])


if __name__ == "__main__":
    main()
