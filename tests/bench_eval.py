"""eval.py's generation against transformers' own.

    python tests/bench_eval.py [MODEL_FOLDER]          # or: make bench WHAT=eval

120 probes, at most 128 new tokens, greedy, the same weights and number format, two interleaved rounds,
medians. One prompt at a time is timed on every tenth probe, because all of them would take a quarter of
an hour. A second table repeats it on a random model of 32,000 words, where the output layer costs next to
nothing.
"""
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

from chat import TURN_END, load_run, pad_left, render_prompt
from eval import generate
from models import pick_device, pick_dtype, quiet_libraries
from rows import read_probes

NEW, BATCH, PROBES = 128, 60, 120   # longest answer in tokens; prompts at once; prompts
ALONE = "generate, one prompt at a time"


def now(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def batches(prompts: list[list[int]], size: int):
    """Yield the indices of each batch, longest prompts first, so that little is padded: both sides alike."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), size):
        yield order[start:start + size]


def ours(model, tokenizer, prompts: list[list[int]]) -> list[list[int]]:
    answers = [[] for _ in prompts]
    for batch in batches(prompts, BATCH):
        for i, tokens, _ in generate(model, tokenizer, [prompts[j] for j in batch], NEW):
            answers[batch[i]] = tokens
    return answers


class TurnEnd(transformers.StoppingCriteria):
    """Ends a row at TURN_END. generate's own stop_strings would read all 262,144 words again in each call."""

    def __init__(self, tokenizer, prompt_length: int):
        self.tokenizer, self.prompt_length = tokenizer, prompt_length

    def __call__(self, ids, scores, **_):
        texts = self.tokenizer.batch_decode(ids[:, self.prompt_length:][:, -8:])
        return torch.tensor([TURN_END in text for text in texts], device=ids.device)


@torch.inference_mode()
def theirs(model, tokenizer, prompts: list[list[int]], size: int) -> list[list[int]]:
    """transformers' model.generate with the same stops."""
    answers = [[] for _ in prompts]
    last = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for batch in batches(prompts, size):
        ids, mask = pad_left([prompts[i] for i in batch], model.device)
        stop = transformers.StoppingCriteriaList([TurnEnd(tokenizer, ids.shape[1])])
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False,
                             stopping_criteria=stop)
        for i, row in zip(batch, out[:, ids.shape[1]:].tolist()):
            ends = [at for at, token in enumerate(row) if token in last]
            answers[i] = row[:ends[0]] if ends else row
    return answers


def compare(name: str, model, tokenizer, prompts: list[list[int]]) -> None:
    device, few = model.device, prompts[::10]
    asked = {"eval.py": prompts, f"generate, batches of {BATCH}": prompts, ALONE: few}
    ways = {"eval.py": lambda: ours(model, tokenizer, prompts),
            f"generate, batches of {BATCH}": lambda: theirs(model, tokenizer, prompts, BATCH),
            ALONE: lambda: theirs(model, tokenizer, few, 1)}
    answers, seconds = {}, {way: [] for way in ways}
    for number in range(3):  # the first is a warm-up
        for way, run in ways.items():
            if way == ALONE and number != 1:
                continue
            start = now(device)
            answers[way] = run()
            if number:
                seconds[way].append(now(device) - start)

    rates = {way: len(asked[way]) / statistics.median(times) for way, times in seconds.items()}
    length = statistics.mean(len(answer) for answer in answers["eval.py"])
    same = sum(a == b for a, b in zip(answers["eval.py"][::10], answers[ALONE]))
    print(f"\n{name}, {str(model.dtype).removeprefix('torch.')}, {device.type}: {len(prompts)} prompts, "
          f"answers of {length:.0f} tokens on average")
    for way, rate in rates.items():
        print(f"  {way:34}{rate:8.2f} answers/s   eval.py is {rates['eval.py'] / rate:.2f} times as fast")
    print(f"  token for token equal to one prompt at a time: {same} of {len(few)}", flush=True)


def main() -> None:
    quiet_libraries()
    folder = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "models" / "gemma-3-270m")
    device = pick_device()
    dtype = pick_dtype(device)
    probes = read_probes(ROOT / "probes" / "gramenist.jsonl")[:PROBES]
    model, tokenizer = load_run(folder, dtype, device)
    prompts = [render_prompt(tokenizer, probe["messages"]) for probe in probes]
    compare(Path(folder).name, model.eval(), tokenizer, prompts)

    # Of the packaged base's words only the first 32,000, so that the output layer costs nothing
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True)
    small = transformers.Qwen3ForCausalLM(config).to(device, dtype).eval()
    small.generation_config.eos_token_id = tokenizer.eos_token_id
    small.generation_config.pad_token_id = tokenizer.pad_token_id
    folded = [[token % 32_000 for token in prompt] for prompt in prompts]
    compare("random Qwen3 of 8 layers, 32,000 words", small, tokenizer, folded)


if __name__ == "__main__":
    main()
