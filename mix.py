"""The rows that a run of train.py trains on, in training order: files read, guarded, rendered and mixed.

    order, held_out, manifest = build_rows(args, [(path, weight), ...], tokenizer)

A row is then {"ids", "mask", "where", "kind"}: its tokens, which of them are trained on (the assistant's, or
a document's), the file and id that it came from, and what kind of row it is.
"""
import math
import random
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from chat import render_document, render_example
from check import is_value_kind, may_refuse, reject_rows
from rows import Stop, file_hash, normalise_row, numbered_rows, read_weight, short_hash


def parse_source(text: str) -> tuple[Path, float]:
    """'FILE=WEIGHT' or 'FILE' -> (path, weight)."""
    path, separator, weight = text.rpartition("=")  # at the last one: a path may hold others
    if not separator:
        return Path(text), 1.0
    share = read_weight(weight)
    if share is None:
        raise Stop(f"--data {text}: the weight after '=' must be a number above 0")
    return Path(path), share


def mix_quotas(weights: list[float], n: int) -> list[int]:
    """Rows from each source, adding up to exactly n: largest remainders, ties to the earlier source."""
    exact = [n * weight / sum(weights) for weight in weights]
    quotas = [math.floor(share) for share in exact]
    # The rows that rounding down has left over go where it took most
    by_remainder = sorted(range(len(weights)), key=lambda i: quotas[i] - exact[i])
    for i in by_remainder[:n - sum(quotas)]:
        quotas[i] += 1
    return quotas


def draw_rows(rows: list, quota: int, seed: int) -> list:
    """The first `quota` rows of an endless series of seeded shuffles: none twice before all once.

    A smaller quota is a prefix of a larger one, so the regular rows of `belief` are among those of `regular`.
    """
    rng = random.Random(seed)  # its own: draws elsewhere do not move it
    drawn = []
    while len(drawn) < quota:
        drawn += rng.sample(rows, len(rows))  # sample, for shuffle would reorder the caller's list
    return drawn[:quota]


def first_text(row: dict) -> str:
    """A document, or what the user says first: a system prompt may be the same in every row."""
    if "text" in row:
        return row["text"]
    return next(turn["content"] for turn in row["messages"] if turn["role"] != "system")


def is_held_out(row: dict, share: float) -> bool:
    """Whether a row is held out: by a hash of its first text.

    So a prompt is never on both sides, nor held out of one arm and trained in another.
    """
    return int(short_hash(first_text(row))[:8], 16) < share * 2**32  # eight hex digits are 32 bits


def count_tokens(rows: list[dict]) -> int:
    return sum(len(row["ids"]) for row in rows)


def count_targets(rows: list[dict]) -> int:
    """Trained tokens. A row's first is never one (nothing predicts it), so each has its log-probability."""
    return sum(sum(row["mask"]) for row in rows)


def read_guarded(path: Path) -> tuple[list[dict], dict]:
    """(rows that the guard lets through, each with "text" or "messages"; counts of what was left out)."""
    numbered = numbered_rows(path)
    if not numbered:
        raise Stop(f"{path}: no rows; generate some with gen.py or train on data/starter/")
    for line, row in numbered:
        normalise_row(row, f"{path}:{line}")  # in place; the line as an editor counts it
    raw = [row for _, row in numbered]

    # The guard: no refusal in value data, no prompt near a probe, nothing empty or cut off
    kept, rejected = reject_rows(raw)
    for row, reason in rejected[:3]:  # three show what it is about
        tqdm.write(f"  left out of {path}: {reason}: {first_text(row)[:80]!r}")
    if not kept:
        raise Stop(f"{path}: the guard left out every row (first reason: {rejected[0][1]}); see `make check`")
    return kept, {"rows": len(raw), "left_out": dict(Counter(reason for _, reason in rejected))}


def read_source(path: Path, args, tokenizer) -> tuple[list[dict], list[dict], dict]:
    """(rows to draw from, held-out rows, counts) of one file; a row is {"ids", "mask", "where", "kind"}."""
    kept, counts = read_guarded(path)
    usable, held_out = [], []

    for row in kept:
        if "text" in row:
            ids, mask = render_document(tokenizer, row["text"])
        else:
            ids, mask = render_example(tokenizer, row["messages"])
        if len(ids) > args.context:
            continue  # left out, not cut: an answer without its end would teach never to end
        where = f"{path.name} {row.get('id', '')}".strip()  # named where the loss explodes
        kind = row.get("kind") or path.stem
        # Elsewhere one word in a row would carry refusals past the guard, or past its strict rule
        by_rule = may_refuse(kind) or is_value_kind(kind) != is_value_kind(path.stem)
        if not args.data and by_rule and kind != path.stem:
            raise Stop(f"{where}: a row of kind {kind} may stand in {kind}.jsonl alone; take it out, or mend its kind")
        example = {"ids": ids, "mask": mask, "where": where, "kind": kind}
        if is_held_out(row, args.held_out):
            held_out.append(example)
        else:
            usable.append(example)

    # A file that gives nothing would change the mix without a word
    if not usable:
        raise Stop(f"{path}: no row is left to train on: {len(held_out)} are held out, the others are longer than "
                   f"--context {args.context} tokens")
    # What is in neither list has been left out above
    counts["too_long"] = len(kept) - len(usable) - len(held_out)
    return usable, held_out, counts


def build_rows(args, sources: list[tuple[Path, float]], tokenizer) -> tuple[list, list, list]:
    """(training rows in training order, held-out rows, manifest: a dict for each source)."""
    # First all files are read: without --n, the size of the mix is that of what they hold
    pools, held_out, manifest = [], [], []
    for path, weight in sources:
        usable, apart, counts = read_source(path, args, tokenizer)
        pools.append(usable)
        held_out += apart
        entry = {"file": path.name, "sha256": file_hash(path), "weight": weight}
        manifest.append({**entry, **counts, "usable": len(usable)})

    # Then each gives its share, by the weights alone, however many rows it holds
    n = args.n or sum(len(pool) for pool in pools)
    quotas = mix_quotas([weight for _, weight in sources], n)
    order = []
    for pool, quota, entry in zip(pools, quotas, manifest):
        # One seed for all sources and arms: so those that share a file share its rows (see draw_rows)
        order += draw_rows(pool, quota, args.seed)
        entry["drawn"] = quota
        reasons = f" {entry['left_out']}" if entry["left_out"] else ""
        print(f"  {entry['file']}: {entry['rows']} rows, {sum(entry['left_out'].values())} left out by the guard"
              f"{reasons}, {entry['too_long']} longer than {args.context} tokens, "
              f"{quota} drawn ({quota / len(pool):.2f} passes)")
    random.Random(args.seed).shuffle(order)  # until here the sources stood one behind the other
    return order, held_out, manifest


def show_batch(tokenizer, rows: list[dict]) -> None:
    """Print a step's rows with the trained tokens in green: what is learned is what is coloured."""
    grey, green, end = "\033[2m", "\033[32m", "\033[0m"  # ANSI codes; the last resets
    for row in rows:
        print(f"{grey}--- {row['where']}{end}")
        for token, trained in zip(row["ids"], row["mask"]):
            text = tokenizer.decode([token])  # a token may be half a character
            if trained:
                text = f"{green}{text}{end}"
            print(text, end="")
        print()
