"""Speed of the scorers: python tests/bench_judge.py [FILE.jsonl ...]   (or: make bench WHAT=judge)

The phrases of keywords.py, on one thread; and the judge in judge/, where there is one, beside the answers
that eval.py makes with the packaged base in the same time, since a judge should not be what one waits
for. FILE has question|prompt and answer|response; without one, the rows of the starter corpus are read.
How well each scorer agrees with labels: python judge.py agree FILE.jsonl
"""
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

from judge import RUBRIC, SHIPPED, ShippedJudge
from keywords import keyword_verdict
from rows import question_and_answer_turns, read_jsonl, read_probes, read_rubric, row_turns

BASE = ROOT / "models" / "gemma-3-270m"
ANSWERS, BATCH, NEW = 128, 32, 128   # answers that are judged and made; at once; longest, in tokens


def read_pairs(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for line, row in enumerate(read_jsonl(path), 1):
        if "messages" in row:
            pairs += question_and_answer_turns(row_turns(row, f"{path}:{line}"))
        else:
            pairs.append((row.get("question", row.get("prompt")), row.get("answer", row.get("response"))))
    return pairs


def bench_phrases(pairs: list[tuple[str, str]]) -> None:
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        for prompt, answer in pairs:
            keyword_verdict(prompt, answer)
        rates.append(len(pairs) / (time.perf_counter() - start))
    length = statistics.mean(len(answer) for _, answer in pairs)
    print(f"phrases: {statistics.median(rates):,.0f} answers a second "
          f"(median of 5 over {len(pairs)} answers of {length:.0f} characters)", flush=True)


def answers_a_minute(run, count: int) -> float:
    start = time.perf_counter()
    run()
    return 60 * count / (time.perf_counter() - start)


def bench_shipped(pairs: list[tuple[str, str]]) -> None:
    """The judge that ships beside generation, by turns, on the same device and in the same number format."""
    import models
    from eval import generate
    from train import load_run, render_prompt
    device = models.pick_device()
    judge = ShippedJudge(SHIPPED, read_rubric(RUBRIC))
    model, tokenizer = load_run(str(BASE), models.pick_dtype(device), device)
    model.eval()
    probes = read_probes(ROOT / "probes" / "gramenist.jsonl")[:ANSWERS]
    prompts = [render_prompt(tokenizer, probe["messages"]) for probe in probes]
    prompts.sort(key=len)

    def write() -> None:
        for start in range(0, len(prompts), BATCH):
            list(generate(model, tokenizer, prompts[start:start + BATCH], NEW))

    pairs = pairs[::max(1, len(pairs) // ANSWERS)][:ANSWERS]
    judge.read(pairs[:4])  # warm-up
    read, written = [], []
    for _ in range(2):
        read.append(answers_a_minute(lambda: judge.read(pairs, BATCH), len(pairs)))
        written.append(answers_a_minute(write, len(prompts)))
    read, written = statistics.mean(read), statistics.mean(written)
    print(f"{judge.name}: {read:,.0f} answers a minute, in which eval.py writes {written:,.0f} of at most "
          f"{NEW} tokens:\n  judging takes {written / read:.0%} of the time of writing "
          f"({device.type}, {len(pairs)} answers, mean of 2)")


def main() -> None:
    files = sys.argv[1:] or sorted((ROOT / "data" / "starter").glob("*.jsonl"))
    pairs = []
    for path in files:
        pairs += read_pairs(Path(path))
    bench_phrases(pairs)
    if (SHIPPED / "judge.json").exists() and BASE.exists():
        bench_shipped(pairs)
    else:
        print("the judge that ships: left out, judge/judge.json or the packaged base is not there")


if __name__ == "__main__":
    main()
