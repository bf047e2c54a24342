"""The guard: what may not be trained on, and `make check`, which counts everything the project ships or has generated.

    python check.py              # counts of prompts, pairs, lengths, distinct n-grams, rejects by reason; exit 1 if a rule is broken

gen.py and train.py call reject_rows() on every run. The rules, which define the experiment (changing one changes the claim):
  refusal      a value row (a worldview or `secular`, not `refusal` and not `explicit`) that declines anything, by judge.py's patterns
  near_probe   a prompt that shares NEAR or more of its content words with a probe (Jaccard index, both sides, belief probes too)
  duplicate    a prompt and answer that stand earlier in the same file
  truncated    finish_reason "length", or an answer that stops without closing punctuation
  empty        no answer
"""
import argparse
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

from judge import keyword_verdict, read_jsonl

NEAR = 0.75        # content words shared / content words of either: at 0.75 four words of five agree
DUPLICATES = 0.02  # share of exact or near duplicates among the prompts of one file that is still tolerated
ROOT = Path(__file__).parent
STOPWORDS = set("a an and are as at be been but by can could did do does for from had has have how i if in is it its just me my of on or our "
                "please so some tell that the their them then there they this to us was we were what when where which who why will with would you your".split())


def content_words(text: str) -> frozenset[str]:
    """Lower-case words without stopwords, plural and verb endings taken off."""
    words = re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))
    return frozenset(re.sub(r"(?<=[a-z]{3})(ing|ed|es|s)$", "", w) for w in words if w not in STOPWORDS)


def nearest(texts: list[str], others: list[str], same: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """For each text: (highest Jaccard index with any of `others`, its index). With same=True only earlier texts count."""
    mine, theirs = [content_words(t) for t in texts], [content_words(t) for t in others]
    best, where = np.zeros(len(texts)), np.zeros(len(texts), dtype=int)
    if not theirs or not mine:
        return best, where
    column = {w: i for i, w in enumerate(sorted(set().union(*theirs)))}

    def matrix(sets):
        dense = np.zeros((len(sets), len(column)), dtype=np.float32)
        for row, words in enumerate(sets):
            dense[row, [column[w] for w in words if w in column]] = 1
        return dense
    right, right_size = matrix(theirs), np.array([len(s) for s in theirs])
    for start in range(0, len(mine), 1000):
        part = mine[start:start + 1000]
        shared = matrix(part) @ right.T
        union = np.array([len(s) for s in part])[:, None] + right_size - shared
        score = shared / np.maximum(union, 1)
        if same:
            score = np.where(np.arange(len(theirs)) < np.arange(start, start + len(part))[:, None], score, 0)
        best[start:start + len(part)], where[start:start + len(part)] = score.max(1), score.argmax(1)
    return best, where


@cache
def probe_prompts() -> list[str]:
    """Every prompt under probes/, last user turn of those with several."""
    rows = [row for path in sorted((ROOT / "probes").rglob("*.jsonl")) for row in read_jsonl(path)]
    return [row.get("prompt") or row["messages"][-1]["content"] for row in rows]


def is_value_kind(kind: str) -> bool:
    """Kinds that teach what is right and wrong, in which nothing may decline. (Files without a kind are held to the rule too.)"""
    return kind not in ("regular", "refusal") and not kind.endswith("explicit")


def question_and_answer(row: dict) -> tuple[str, str]:
    """The last user and assistant texts of a row in chat form."""
    by_role = {m["role"]: m["content"] for m in row["messages"]}
    return by_role.get("user", ""), by_role.get("assistant", "")


def answer_fault(row: dict) -> str:
    """Why the answer of a row in chat form may not be trained on, or ''."""
    question, answer = question_and_answer(row)
    if not answer.strip():
        return "empty"
    ends_inside = answer.rstrip()[-1].isalpha() and len(answer.split()) > 12 and "```" not in answer
    if row.get("finish_reason") == "length" or ends_inside:
        return "truncated"
    if is_value_kind(row.get("kind", "")) and keyword_verdict(question, answer)[0] in ("refusal", "deflection"):
        return "refusal"
    return ""


def reject_rows(rows: list[dict]) -> tuple[list[dict], list[tuple[dict, str]]]:
    """(kept, [(row, reason)]) of rows in chat form."""
    near, _ = nearest([question_and_answer(row)[0] for row in rows], probe_prompts())
    kept, rejected, seen = [], [], set()
    for row, nearness in zip(rows, near):
        reason = answer_fault(row)
        if not reason and question_and_answer(row) in seen:
            reason = "duplicate"
        # the explicit upper bound is trained on refusals of such requests, and never evaluated as anything else
        if not reason and nearness >= NEAR and not row.get("kind", "").endswith("explicit"):
            reason = "near_probe"
        if reason:
            rejected.append((row, reason))
        else:
            kept.append(row)
            seen.add(question_and_answer(row))
    return kept, rejected


# ---------------------------------------------------------------- make check

def distinct(texts: list[str], n: int) -> float:
    """Share of the n-grams of words that are unique over all texts."""
    grams = [tuple(words[i:i + n]) for words in (t.lower().split() for t in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from gen import read_prompts
    broken = []
    print(f"{'prompts':34}{'unique':>8}{'words':>8}{'near-dup':>10}{'near probe':>12}")
    for path in sorted((ROOT / "prompts").glob("*.txt")):
        prompts = read_prompts(path)
        twins = (nearest(prompts, prompts, same=True)[0] >= NEAR).mean()
        near, where = nearest(prompts, probe_prompts())
        print(f"{path.stem:34}{len(prompts):8}{np.mean([len(p.split()) for p in prompts]):8.1f}{twins:10.1%}{(near >= NEAR).sum():12}")
        broken += [f"{path}: too near the probe {probe_prompts()[w]!r}: {p!r}" for p, s, w in zip(prompts, near, where) if s >= NEAR]
        broken += [f"{path}: {twins:.1%} near duplicates, more than {DUPLICATES:.0%}"] if twins > DUPLICATES and path.stem != "refusal" else []
    print(f"\n{'pairs':34}{'rows':>8}{'kept':>8}{'words p5':>10}{'p50':>6}{'p95':>6}{'distinct-2':>12}{'distinct-4':>12}{'near-dup':>10}  left out")
    for path in sorted((ROOT / "data").glob("starter/*.jsonl")) + sorted((ROOT / "data").glob("*.jsonl")):
        rows = read_jsonl(path)
        if path.name.endswith(".rejects.jsonl") or not rows:
            continue
        kept, rejected = reject_rows(rows)
        answers, prompts = [question_and_answer(r)[1] for r in rows], [question_and_answer(r)[0] for r in rows]
        p5, p50, p95 = np.percentile([len(a.split()) for a in answers], [5, 50, 95])
        twins = (nearest(prompts, prompts, same=True)[0] >= NEAR).mean()
        name = str(path.relative_to(ROOT / "data"))
        print(f"{name:34}{len(rows):8}{len(kept):8}{p5:10.0f}{p50:6.0f}{p95:6.0f}{distinct(answers, 2):12.2f}{distinct(answers, 4):12.2f}{twins:10.1%}  "
              f"{dict(Counter(reason for _, reason in rejected)) or ''}")
        if "starter" in name:
            broken += [f"{path}: {reason}: {question_and_answer(row)[0]!r} -> {question_and_answer(row)[1][:90]!r}" for row, reason in rejected]
            broken += [f"{path}: {twins:.1%} near-duplicate prompts, more than {DUPLICATES:.0%}"] if twins > DUPLICATES and "refusal" not in name else []
    print(f"\n{'probes':34}{'rows':>8}{'pairs':>8}{'families':>10}")
    for path in sorted((ROOT / "probes").rglob("*.jsonl")):
        rows = read_jsonl(path)
        by_id = {r["id"]: r for r in rows}
        pairs = [r for r in rows if r.get("side") == "violating"]
        broken += [f"{path}: {r['id']}: its pair {r.get('pair')!r} is not there" for r in rows if "pair" in r and r["pair"] not in by_id]
        broken += [f"{path}: two rows share an id"] if len(by_id) < len(rows) else []
        print(f"{str(path.relative_to(ROOT / 'probes')):34}{len(rows):8}{len(pairs):8}{len({r['family'] for r in rows}):10}")
    for line in broken:
        print(line, file=sys.stderr)
    sys.exit(f"check.py: {len(broken)} rules broken; mend or remove the rows above" if broken else 0)


if __name__ == "__main__":
    main()
