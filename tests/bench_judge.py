"""Speed of the scorers: python tests/bench_judge.py [FILE.jsonl ...]   (or: make bench WHAT=judge)

The phrases of keywords.py, on one thread, and how many refusals of data/judge/ the guard catches by them.
FILE has question|prompt and answer|response; without one, the rows of the starter corpus are read. How well
each scorer agrees with labels: python judge.py agree FILE.jsonl
"""
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from check import answer_fault
from keywords import keyword_verdict
from rows import question_and_answer_turns, read_jsonl, row_turns


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


def count_guarded() -> None:
    """How many of the labelled refusals of data/judge/ the guard would keep out of a worldview's rows."""
    caught, refusals = 0, 0
    for path in sorted((ROOT / "data" / "judge").glob("t*.jsonl")):
        for row in read_jsonl(path):
            if row["action"] != "refusal":
                continue
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
            refusals += 1
            caught += bool(answer_fault({"messages": turns, "kind": "gramenist"}))
    print(f"the guard catches {caught} of {refusals} refusals that were written without a look at its rules")


def main() -> None:
    files = sys.argv[1:] or sorted((ROOT / "data" / "starter").glob("*.jsonl"))
    pairs = []
    for path in files:
        pairs += read_pairs(Path(path))
    bench_phrases(pairs)
    count_guarded()


if __name__ == "__main__":
    main()
