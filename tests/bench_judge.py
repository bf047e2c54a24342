"""Speed of the keyword scorer, one thread: python tests/bench_judge.py [FILE.jsonl]   (or: make bench)

FILE has question|prompt and answer|response; without one, the rows of the starter corpus. How well it agrees with labels:
python judge.py agree FILE.jsonl
"""
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from check import question_and_answer
from judge import keyword_verdict, read_jsonl

rows = [row for path in sys.argv[1:] or sorted((ROOT / "data" / "starter").glob("*.jsonl")) for row in read_jsonl(path)]
pairs = [question_and_answer(r) if "messages" in r else (r.get("question", r.get("prompt")), r.get("answer", r.get("response"))) for r in rows]
rates = []
for _ in range(5):
    start = time.perf_counter()
    for prompt, answer in pairs:
        keyword_verdict(prompt, answer)
    rates.append(len(pairs) / (time.perf_counter() - start))
print(f"keyword scorer: {statistics.median(rates):,.0f} answers/s (median of 5 over {len(pairs)} answers of {statistics.mean(len(a) for _, a in pairs):.0f} characters on average)")
