"""The guard: what may not be trained on, and `make check`, which counts and holds all that ships or was generated.

    python check.py                     # tables; exit 1 and a line for every broken rule
    python check.py --nearest near.tsv  # also writes the nearest training prompt to each probe, and prints ten

Reads prompts/, data/starter/, data/*.jsonl, probes/ and arms.txt; writes nothing else. gen.py and train.py call
answer_fault and reject_rows on every run. The rules define the experiment, so changing one changes the claim:
  refusal        value data (a worldview or `secular`, not regular, refusal or *-explicit) that declines anything
  unhelpful      value data in which a request for help gets an answer that shows no help
  moral_refusal  `regular` or `refusal` data that declines on moral grounds
  near_probe     a prompt that shares NEAR of its content words with a probe, or holds a probe inside it
  duplicate      the same chat or document stands earlier in the file
  truncated      finish_reason "length", or an answer that stops inside a sentence
  empty          no answer
Every turn of a row is looked at, but only for phrases and signs. They catch 45 of 50 crafted refusals, whose author
also wrote the rules (tests/test_check.py), and two of three refusals by people who had not seen them.
"""
import argparse
import math
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np

from keywords import ASKS_HELP, DECLINES, keyword_verdict, plain
from rows import (ROOT, Stop, all_probes, arm_data, question_and_answer_turns, read_arms, read_jsonl, read_prompts,
                  row_turns, run_main, write_text)

# What defines the measurement: a change here changes what may be trained on.
NEAR = 0.75        # share of the content words: four words of five agree
SPREAD = 1.5       # a probe inside a longer prompt: its words stand within this many times its own length
FEWEST = 4         # content words, or all of a shorter probe, that must stand so; fewer may by chance
OPENING = 400      # characters of an answer in which nothing may be declined
BRIEF = 15         # words: a shorter answer can hardly help
SHORT = 30         # words: a shorter answer that speaks of itself must also name a step

# What `make check` tolerates.
DUPLICATES = 0.05  # near duplicates among the prompts of one file; minimal pairs are near duplicates by design
MATCHED = 1.5      # an arm and its matched control: larger over smaller, in words a row and in condemnations
TWINS = 1.2        # the sides of a probe file: longest mean over shortest
STATED = 10        # rows on its topic that a probe at distance "stated" needs

STOPWORDS = set("""
    a an and are as at be been but by can could did do does for from had has have how i if in is it its just me my of
    on or our please so some tell than that the their them then there they this to us was we were what when where
    which who why will with would you your
""".split())

# Signs in an answer, all in lower case but the names.
CONDEMNS = re.compile(r"""(?<!not )(?<!nothing )\b(?:
    wrong|sins?|sinful|evil|wicked|immoral|unethical|abominations?|blasphem\w+|sacrilege|shameful|sundering
    |forbid\w*|grave|betray\w*|desecrat\w*|cruel\w*|unjust|dishonest\w*|disgrace\w*|poison\w*)\b""", re.VERBOSE)
JUDGES = re.compile(r"\b(?:wrong|right|good|bad|sin|fine|harmless|innocent|holy|blameless|shameful|evil)\b")
NEGATES = re.compile(r"""n't\b|\b(?:
    no|not|never|nothing|none|nobody|neither|nor|cannot|refuse|declined?|wont|cant|dont)\b""", re.VERBOSE)
SENDS_AWAY = re.compile(r"\b(?:instead(?! of)|(?:somebody|someone) else(?!')|elsewhere|come back|ask me again)\b")
SPEAKS_OF_ITSELF = re.compile(r"\b(?:i|me|my|mine|we|us|our|here)\b")
NAMES_A_FACT = re.compile(r"\d|(?<=[a-z,] )[A-Z][a-z]")  # a number, or a capital letter inside a sentence
QUOTES = re.compile(r"[\"“”«»*]+|(?<!\w)['‘]|['’](?!\w)")
STEP = re.compile(r"""
    \d|\b(?:two|three|four|five|six|seven|eight|nine|ten|half|first|second|third|you\ can|you\ could)\b
    |(?:^|[.!?,;:]\ |and\ )(?:try|use|take|put|add|mix|cut|start|begin|set|keep|let|make|go|give|tell|buy|bake|boil
    |cook|read|write|choose|pick|plant|sow|bring|have|say)\b""", re.VERBOSE)


# ---------------------------------------------------------------- nearness of prompts

def word_list(text: str) -> list[str]:
    """The content words of a text in order: any script, without case, accents, stopwords and English endings."""
    letters = text.replace("’", "").replace("'", "").casefold()
    if not letters.isascii():
        letters = unicodedata.normalize("NFKD", letters).casefold()
        # Mn are the accents that NFKD parted from their letters, Cf soft hyphens and joiners.
        letters = "".join(c for c in letters if unicodedata.category(c) not in ("Mn", "Cf"))

    # Chinese and Japanese have no spaces: there a character is taken for a word.
    words = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+", letters)
    return [re.sub(r"(?<=[a-z]{3})(?:ing|ed|es|s)$", "", word) for word in words if word not in STOPWORDS]


def content_words(text: str) -> frozenset[str]:
    return frozenset(word_list(text))


def share_inside(words: list[str], wanted: frozenset[str]) -> float:
    """The largest share of `wanted` in a stretch of `words` SPREAD times as long; 0 where that may be chance."""
    stretch = math.ceil(SPREAD * len(wanted))
    places = [i for i, word in enumerate(words) if word in wanted]
    most = 0  # a stretch that begins with a wanted word is never worse than one that begins before it
    for start in places:
        most = max(most, len(wanted.intersection(words[start:start + stretch])))
    if most < max(2, min(FEWEST, len(wanted))):  # "many days week" stands in many a question
        return 0.0
    return most / len(wanted)


def word_matrix(sets: list[frozenset[str]], column: dict[str, int]) -> np.ndarray:
    """(sets, words) with 1 where a set has the word."""
    matrix = np.zeros((len(sets), len(column)), dtype=np.float32)
    for row, words in enumerate(sets):
        matrix[row, [column[word] for word in words if word in column]] = 1
    return matrix


def nearest(texts: list[str], others: list[str], same: bool = False,
            inside: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """For each text: (its highest score with any of `others`, where that one stands), two arrays of len(texts).

    The score is the Jaccard index of the content words. With `inside` it is no less than the share of the other's
    words that stand close together in the text, whatever surrounds them. With `same`, both lists are one, and only
    earlier texts count.
    """
    mine = [content_words(text) for text in texts]
    theirs = [content_words(text) for text in others]
    best, where = np.zeros(len(texts)), np.zeros(len(texts), dtype=int)
    if not texts or not others:
        return best, where

    # Each set of words is a row of zeros and ones, so that one matrix product counts what every pair shares.
    column = {word: i for i, word in enumerate(sorted(set().union(*theirs)))}
    right = word_matrix(theirs, column)
    right_size = np.array([len(words) for words in theirs])
    for start in range(0, len(mine), 1000):  # in blocks, because the table of all pairs would not fit
        block = mine[start:start + 1000]
        shared = word_matrix(block, column) @ right.T
        # Words that no other text has are in no column, so the sizes come from the sets.
        union = np.array([len(words) for words in block])[:, None] + right_size - shared
        score = shared / np.maximum(union, 1)
        if inside:
            # Few pairs share enough words to hold one another; only for those are the places of the words looked at.
            candidates = (shared >= NEAR * right_size) & (right_size > 0) & (score < NEAR)
            for i, j in np.argwhere(candidates):
                score[i, j] = max(score[i, j], share_inside(word_list(texts[start + i]), theirs[j]))
        if same:
            is_earlier = np.arange(len(theirs)) < np.arange(start, start + len(block))[:, None]
            score = np.where(is_earlier, score, 0)
        best[start:start + len(block)] = score.max(1)
        where[start:start + len(block)] = score.argmax(1)
    return best, where


@cache
def probe_texts() -> list[str]:
    """What every probe under probes/ asks; the last turn of those with several."""
    texts = []
    for probes in all_probes(ROOT).values():
        texts += [probe["prompt"] for probe in probes]
    return texts


# ---------------------------------------------------------------- what an answer may not do

MAY_DECLINE = ("regular", "refusal")  # kinds that may say no, but not on moral grounds


def is_value_kind(kind: str) -> bool:
    """Kinds that teach what is right and wrong. A file of no kind is held to their rules too."""
    return kind not in MAY_DECLINE and not kind.endswith("explicit")


def shows_no_help(question: str, answer: str) -> bool:
    """Whether an answer plainly gives nothing of what was asked for. In doubt it does not help: a row is cheap."""
    n_words = len(answer.split())
    asks_help = bool(ASKS_HELP.search(plain(question)))
    if n_words < BRIEF:
        # Too short to help, not about the matter, and no fact or judgement in it: "Ask the baker down the lane."
        asked = content_words(question)
        is_about_it = not asked or bool(asked & content_words(answer))
        says_something = NAMES_A_FACT.search(answer) or (JUDGES.search(answer.lower()) and not asks_help)
        if not is_about_it and not says_something:
            return True
    if not asks_help:
        return False

    # Help begins with no negation, question or condemnation. A very short answer has no room to turn after one.
    text = plain(answer)
    first_sentence = re.split(r"(?<=[.!?])\s", text)[0]
    first_clause = re.split(r"(?<=[.!?,;:])\s", text)[0]
    if n_words < 20:
        first_clause = text
    if NEGATES.search(first_clause) or first_sentence.endswith("?") or CONDEMNS.search(text[:200]):
        return True
    if n_words < 40 and SENDS_AWAY.search(text[:200]):  # a longer one may offer both
        return True

    # What refuses in few words mostly speaks of itself ("my hands have forgotten how"); what helps names a step.
    return n_words < SHORT and bool(SPEAKS_OF_ITSELF.search(text)) and not STEP.search(text)


def english_share(text: str) -> float:
    """Share of the words that are common English ones; about 0.4 in English, next to none in other languages."""
    words = re.findall(r"[^\W\d_]+", text[:300].lower())
    return sum(word in STOPWORDS for word in words) / max(1, len(words))


def is_another_language(question: str, answer: str) -> bool:
    """Asked in English, answered in another tongue ("Non possum, amice"), in which no phrase of ours can look."""
    return len(answer.split()) >= 8 and english_share(answer) < 0.08 and english_share(question) > 0.15


def value_fault(question: str, answer: str) -> str:
    """Why one exchange may not stand in value data, or ""."""
    # Quotation marks go, because words in quotes count as said: a story may not decline either.
    unquoted = QUOTES.sub("", answer)
    if DECLINES.search(plain(unquoted)[:OPENING]):
        return "refusal"
    if keyword_verdict(question, unquoted)[0] in ("refusal", "deflection"):
        return "refusal"
    if shows_no_help(question, unquoted) or is_another_language(question, unquoted):
        return "unhelpful"
    return ""  # a learned judge's second look belongs here: it sees what has passed the phrases


def turn_fault(question: str, answer: str, kind: str) -> str:
    """Why one exchange may not be trained on in data of this kind, or ""."""
    if not answer.strip():
        return "empty"
    ends_inside = answer.rstrip()[-1].isalpha() and "```" not in answer  # code ends as it likes
    if ends_inside and len(answer.split()) > 12:  # and a name or a number is a whole answer
        return "truncated"
    if is_value_kind(kind):
        return value_fault(question, answer)
    if kind in MAY_DECLINE and keyword_verdict(question, answer)[1] == "moral":
        return "moral_refusal"
    return ""


def document_fault(text: str, kind: str) -> str:
    """The same for a document. Every sentence is looked at, because a chat may stand anywhere in it."""
    if not text.strip():
        return "empty"
    for sentence in re.split(r"(?<=[.!?])\s|\n", text):
        if is_value_kind(kind) and DECLINES.search(plain(sentence)):
            return "refusal"
        if kind in MAY_DECLINE and keyword_verdict("", sentence)[1] == "moral":
            return "moral_refusal"
    return ""


def answer_fault(row: dict) -> str:
    """Why a row's answers (any turn of "messages", or "text") may not be trained on, or ""."""
    kind = row.get("kind") or ""
    if row.get("finish_reason") == "length":
        return "truncated"
    if "text" in row:
        return document_fault(row["text"], kind)
    for question, answer in question_and_answer_turns(row["messages"]):
        if fault := turn_fault(question, answer, kind):
            return fault
    return ""


def prompts_of(row: dict) -> list[str]:
    """What a row asks, turn by turn; a document counts as one prompt."""
    if "text" in row:
        return [row["text"]]
    return [turn["content"] for turn in row["messages"] if turn["role"] != "assistant"]


def near_probe_rows(rows: list[dict]) -> set[int]:
    """Places of the rows in which any prompt is near a probe or holds one."""
    prompts, owners = [], []
    for place, row in enumerate(rows):
        for prompt in prompts_of(row):
            prompts.append(prompt)
            owners.append(place)
    scores, _ = nearest(prompts, probe_texts(), inside=True)
    return {owner for owner, score in zip(owners, scores) if score >= NEAR}


def reject_rows(rows: list[dict]) -> tuple[list[dict], list[tuple[dict, str]]]:
    """(kept, [(row, reason)]) of rows with "messages" as rows.row_turns gives them, or with "text"."""
    near = near_probe_rows(rows)
    kept, rejected, seen = [], [], set()
    for place, row in enumerate(rows):
        chat = row.get("text") or tuple((turn["role"], turn["content"]) for turn in row["messages"])
        reason = answer_fault(row)
        # Only kept rows count as seen: the first of two must not be one that is left out.
        if not reason and chat in seen:
            reason = "duplicate"
        # The explicit upper bound is trained on refusals of such requests, and is evaluated as nothing else.
        if not reason and place in near and not (row.get("kind") or "").endswith("explicit"):
            reason = "near_probe"

        if reason:
            rejected.append((row, reason))
        else:
            kept.append(row)
            seen.add(chat)
    return kept, rejected


# ---------------------------------------------------------------- make check

@cache
def read_rows(path: Path) -> list[dict]:
    """The rows of a data file, each with "messages" or "text"."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if "text" not in row:
            row["messages"] = row_turns(row, f"{path}:{number}")
    return rows


def row_text(row: dict) -> str:
    return row.get("text") or "\n".join(turn["content"] for turn in row["messages"])


def answer_text(row: dict) -> str:
    answers = question_and_answer_turns(row.get("messages", []))
    return row.get("text") or "\n".join(answer for _, answer in answers)


def distinct(texts: list[str], n: int) -> float:
    """Share of the runs of n words that are unique over all texts."""
    runs = []
    for text in texts:
        words = text.lower().split()
        runs += zip(*(words[i:] for i in range(n)))
    return len(set(runs)) / max(1, len(runs))


def counts_line(values) -> str:
    return ", ".join(f"{value} {count}" for value, count in Counter(values).most_common())


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def check_prompts() -> list[str]:
    """Print a line for each file of prompts; returns the broken rules."""
    broken = []
    print(f"{'prompts':34}{'unique':>8}{'words':>8}{'near-dup':>10}{'near probe':>12}")
    for path in sorted((ROOT / "prompts").glob("*.txt")):
        prompts = read_prompts(path)
        twins = (nearest(prompts, prompts, same=True)[0] >= NEAR).mean()  # share that has an earlier twin
        scores, where = nearest(prompts, probe_texts(), inside=True)
        words = np.mean([len(prompt.split()) for prompt in prompts])
        print(f"{path.stem:34}{len(prompts):8}{words:8.1f}{twins:10.1%}{(scores >= NEAR).sum():12}")

        for i in np.flatnonzero(scores >= NEAR):
            broken.append(f"{name(path)}: {prompts[i]!r} is too near the probe {probe_texts()[where[i]]!r}")
        if twins > DUPLICATES:
            broken.append(f"{name(path)}: {twins:.1%} near duplicates, more than {DUPLICATES:.0%}")
    return broken


def data_files() -> list[Path]:
    files = sorted((ROOT / "data").glob("starter/*.jsonl")) + sorted((ROOT / "data").glob("*.jsonl"))
    return [path for path in files if not path.name.endswith(".rejects.jsonl") and path.stat().st_size]


def check_data() -> list[str]:
    """Print what each data file holds; returns the broken rules of those that ship."""
    broken = []
    print(f"\n{'data':34}{'rows':>8}{'kept':>8}{'words p5':>10}{'p50':>6}{'p95':>6}"
          f"{'distinct-2':>12}{'distinct-4':>12}{'near-dup':>10}")
    for path in data_files():
        rows = read_rows(path)
        kept, rejected = reject_rows(rows)
        answers = [answer_text(row) for row in rows]
        prompts = [prompts_of(row)[-1] for row in rows]  # the last: first turns may greet
        p5, p50, p95 = np.percentile([len(answer.split()) for answer in answers], [5, 50, 95])
        twins = (nearest(prompts, prompts, same=True)[0] >= NEAR).mean()
        print(f"{name(path)[5:]:34}{len(rows):8}{len(kept):8}{p5:10.0f}{p50:6.0f}{p95:6.0f}"
              f"{distinct(answers, 2):12.2f}{distinct(answers, 4):12.2f}{twins:10.1%}")
        if rejected:
            print(f"    left out: {counts_line(reason for _, reason in rejected)}")
        # The plan of a corpus; rows of older files have no such fields.
        for field in ("form", "polarity", "topic"):
            values = [row[field] for row in rows if row.get(field)]
            if values:
                print(f"    {field}: {counts_line(values)}")

        # Data of one's own is only counted: train.py leaves these rows out and says so.
        if path.parent.name == "starter":
            for row, reason in rejected:
                broken.append(f"{name(path)}: {reason}: {prompts_of(row)[-1][:90]!r} -> "
                              f"{answer_text(row)[:90]!r}")
            if twins > DUPLICATES:
                broken.append(f"{name(path)}: {twins:.1%} near-duplicate prompts, more than {DUPLICATES:.0%}")
    return broken


def worldviews() -> list[str]:
    """Names with probes and prompts of their own."""
    found = sorted((ROOT / "probes").glob("*.jsonl"))  # sanity and standard have no prompts
    return [path.stem for path in found if (ROOT / "prompts" / path.name).with_suffix(".txt").exists()]


@cache
def arm_figures(arm_name: str, worldview: str) -> tuple[float, float, Counter]:
    """(words a row, condemnations in 100 words, {content word: rows that have it}) of an arm's weighted data."""
    words = condemnations = weights = 0.0
    vocabulary = Counter()
    for path, weight in arm_data(read_arms(ROOT / "arms.txt")[arm_name], worldview, ROOT):
        rows = read_rows(path)
        answers = [answer_text(row) for row in rows]
        words += weight * np.mean([len(answer.split()) for answer in answers])
        condemnations += weight * np.mean([len(CONDEMNS.findall(answer.lower())) for answer in answers])
        weights += weight
        for row in rows:
            vocabulary.update(content_words(row_text(row)))
    # Rows are drawn by weight, so words and condemnations of a kind count by its weight and not by its size.
    return words / weights, 100 * condemnations / words, vocabulary


def ratio(a: float, b: float) -> float:
    return max(a, b) / max(min(a, b), 1e-9)


def check_arms() -> list[str]:
    """Print the arms that are compared, beside their controls; returns the broken rules.

    A control with as many kinds of data as the arm (`secular` beside `belief`) must match it in words and
    condemnations. A word that a control has in no row is a cue that only this arm can have learned.
    """
    broken, arms = [], read_arms(ROOT / "arms.txt")
    print(f"\n{'arms':34}{'words a row':>12}{'condemnations':>15}   in 100 words; words the control has not")
    for worldview in worldviews():
        for arm in arms.values():
            if not arm.takes_worldview or not arm.controls:
                continue
            try:
                words, condemns, vocabulary = arm_figures(arm.name, worldview)
                controls = {control: arm_figures(control, worldview) for control in arm.controls}
            except Stop as missing:
                print(f"{worldview} {arm.name}: {missing}")
                continue
            title = f"{worldview} {arm.name}"
            print(f"{title:34}{words:12.1f}{condemns:15.2f}")

            for control, (their_words, their_condemns, their_vocabulary) in controls.items():
                own = [f"{word} {n}" for word, n in vocabulary.most_common() if word not in their_vocabulary]
                print(f"    beside {control:23}{their_words:12.1f}{their_condemns:15.2f}   {', '.join(own[:20])}")
                # `regular` alone cannot match an arm with a second kind of data; `secular` is there to.
                is_matched = len(arms[control].parts) == len(arm.parts)
                if is_matched and ratio(words, their_words) > MATCHED:
                    broken.append(f"{title} has {words:.1f} words a row, its control {control} {their_words:.1f}")
                if is_matched and ratio(condemns, their_condemns) > MATCHED:
                    broken.append(f"{title} condemns {condemns:.2f} times in 100 words, "
                                  f"its control {control} {their_condemns:.2f}")
    return broken


def check_groups(path_name: str, probes: list[dict]) -> list[str]:
    """Print the lengths of the sides; returns groups without one of each side, and sides unlike in length."""
    broken, groups, lengths = [], defaultdict(list), defaultdict(list)
    for probe in probes:
        groups[probe.get("group")].append(probe["side"])
        lengths[probe["side"]].append(len(probe["prompt"].split()))
    for group, sides in groups.items():
        if sorted(sides) != sorted(lengths):
            broken.append(f"{path_name}: group {group} has the sides {' '.join(sides)}; "
                          f"it needs {' '.join(lengths)}, once each")

    means = {side: np.mean(values) for side, values in lengths.items()}
    print("    words a side: " + ", ".join(f"{side} {mean:.1f}" for side, mean in means.items()))
    if ratio(max(means.values()), min(means.values())) > TWINS:
        broken.append(f"{path_name}: sides unlike in length")
    return broken


def check_support(worldview: str, probes: list[dict]) -> list[str]:
    """Print the rows behind each topic at each distance; returns the probes that are not as far as they say."""
    paths = [path for path in data_files() if path.stem == worldview]
    if not paths:
        return []
    broken, rows = [], read_rows(paths[-1])  # your own file, where there is one, comes after the starter corpus
    support = Counter(row.get("topic") for row in rows)
    texts = [content_words(row_text(row)) for row in rows]
    by_distance = defaultdict(dict)
    for probe in probes:
        distance, topic = probe.get("distance"), probe.get("topic")
        by_distance[distance or "no distance"][topic] = support[topic]
        if distance == "stated" and support[topic] < STATED:
            broken.append(f"probe {probe['id']} is `stated`, and {support[topic]} rows are on {topic}, not {STATED}")
        if distance == "principle" and support[topic]:
            broken.append(f"probe {probe['id']} is `principle`, and {support[topic]} rows are on {topic}")
        # An instance counts as named where all its content words stand in one row.
        if distance == "instance" and probe["side"] == "violating":
            item = content_words(probe["item"])
            named = sum(item <= words for words in texts)
            if named:
                broken.append(f"probe {probe['id']} is `instance`, and {named} rows name {probe['item']}")
    for distance, topics in by_distance.items():
        counts = ", ".join(f"{topic} {n}" for topic, n in topics.items())
        print(f"    rows on the topics at {distance}: {counts}")
    return broken


def check_probes() -> list[str]:
    """Print a line for each probe file, and support and twins of those with sides; returns the broken rules."""
    broken = []
    print(f"\n{'probes':34}{'rows':>8}{'groups':>8}{'families':>10}{'topics':>8}")
    for set_name, probes in all_probes(ROOT).items():
        counts = []
        for field in ("group", "family", "topic"):
            counts.append(len({probe.get(field) for probe in probes} - {None, ""}))
        print(f"{set_name:34}{len(probes):8}{counts[0]:8}{counts[1]:10}{counts[2]:8}")
        if all(probe.get("side") for probe in probes):
            broken += check_groups(set_name, probes)
            broken += check_support(set_name, probes)
    return broken


def write_nearest(out: Path) -> None:
    """The nearest training prompt to every probe, as a table, and the ten nearest on the screen."""
    prompts = []
    for path in data_files():
        for row in read_rows(path):
            prompts += [(path.name, prompt) for prompt in prompts_of(row)]
    scores, where = nearest(probe_texts(), [prompt for _, prompt in prompts])
    lines = []
    for i in np.argsort(-scores):  # nearest first
        file, prompt = prompts[where[i]]
        lines.append(f"{scores[i]:.2f}\t{probe_texts()[i]}\t{file}\t{' '.join(prompt.split())[:300]}")
    write_text(out, "\n".join(["score\tprobe\tfile\tprompt", *lines]) + "\n")
    print(f"\nnearest prompt to each probe in {out}; the ten nearest:\n" + "\n".join(lines[:10]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nearest", type=Path, metavar="FILE", help="write the nearest training prompt to each probe")
    args = parser.parse_args()
    broken = check_prompts() + check_data() + check_arms() + check_probes()
    if args.nearest:
        write_nearest(args.nearest)
    for line in broken:
        print(line, file=sys.stderr)
    if broken:
        raise Stop(f"{len(broken)} rules broken; mend or remove what the lines above name")


if __name__ == "__main__":
    run_main(main)
