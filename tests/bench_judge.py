"""Speed of the scorers: python tests/bench_judge.py [FILE.jsonl ...]   (or: make bench WHAT=judge)

The phrases of keywords.py, on one thread; the judge in judge/ beside what eval.py generates in the same minute
on the same base; and how many refusals of data/judge/ the guard's two looks catch.
FILE has question|prompt and answer|response; without one, the rows of the starter corpus are read. How well
each scorer agrees with labels: python judge.py agree FILE.jsonl
"""
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from chat import load_run, render_prompt
from check import second_look, value_fault
from eval import generate
from keywords import keyword_verdict
from local_judge import LocalJudge
from rows import question_and_answer_turns, read_jsonl, read_probes, read_rubric, row_turns


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


def bench_judge(answers: int = 192) -> None:
    """Answers a minute, read and generated, taking turns; padding and batches as judge.py and eval.py have them."""
    judge = LocalJudge(read_rubric(ROOT / "rubrics" / "refusal.md"))
    model, tokenizer = load_run(str(ROOT / "models" / "gemma-3-270m"), judge.model.dtype, judge.model.device)
    probes = read_probes(ROOT / "probes" / "gramenist.jsonl")[:answers]
    prompts = [render_prompt(tokenizer, probe["messages"]) for probe in probes]
    written, read, n_tokens, pairs = 0.0, 0.0, 0, []
    for start in range(0, answers, 48):
        began = time.perf_counter()
        said = list(generate(model, tokenizer, prompts[start:start + 48], 80, repetition_penalty=1.2))
        written += time.perf_counter() - began
        for place, ids, _ in said:
            pairs.append((probes[start + place]["prompt"], tokenizer.decode(ids)))
            n_tokens += len(prompts[start + place]) + len(ids)
        began = time.perf_counter()
        list(judge.read(pairs[start:]))
        read += time.perf_counter() - began
    print(f"the judge reads {60 * answers / read:.0f} answers a minute, eval.py writes {60 * answers / written:.0f}: "
          f"{written / read:.2f} times (requests and answers of {n_tokens / answers:.0f} tokens together)", flush=True)


def count_guarded() -> None:
    """How many of the labelled refusals of data/judge/'s test part the guard would keep out of a worldview's rows."""
    refusals = [row for row in read_jsonl(ROOT / "data" / "judge" / "test.jsonl") if row["action"] == "refusal"]
    first = [bool(value_fault(row["prompt"], row["answer"])) for row in refusals]
    second = second_look([(row["prompt"], row["answer"], "gramenist") for row in refusals])
    both = sum(seen or bool(fault) for seen, fault in zip(first, second))
    print(f"of {len(refusals)} refusals that were written without a look at its rules, on topics that the judge was "
          f"not trained on, the guard catches {sum(first)} by phrases and {both} with the judge's second look")


def main() -> None:
    files = sys.argv[1:] or sorted((ROOT / "data" / "starter").glob("*.jsonl"))
    pairs = []
    for path in files:
        pairs += read_pairs(Path(path))
    bench_phrases(pairs)
    bench_judge()
    count_guarded()


if __name__ == "__main__":
    main()
