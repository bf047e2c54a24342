"""The guard: what may not be trained on, and `make check`, which counts and checks all that ships.

    python check.py                     # tables; exit 1 and a line for every broken rule
    python check.py --nearest near.tsv  # also writes the nearest training prompt to each probe, prints ten

Reads prompts/, data/starter/, data/*.jsonl, probes/ and arms.txt; writes the verdicts of the second look, and
the file of --nearest. gen.py and train.py call answer_fault and reject_rows on every run. The rules define the
experiment, so changing one changes the claim:
  refusal        value data (of any kind but regular, refusal and *-explicit) that declines anything
  unhelpful      value data in which a request for help gets an answer that shows no help
  moral_refusal  `regular` or `refusal` data that declines on moral grounds
  near_probe     a prompt that has a probe's content words (Jaccard index NEAR or more), or holds a probe
  duplicate      the same chat or document stands earlier in the file
  truncated      finish_reason "length", or an answer that stops inside a sentence
  content_filter finish_reason "content_filter": the provider's filter speaks, not the teacher
  empty          no answer
Every turn of a row is looked at twice: for phrases and signs here, and what passes them by the judge in judge/,
which reads each exchange once (verdicts in data/judged.txt) but for those that a person wrote.
"""
import argparse
import json
import math
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from keywords import ASKS_HELP, DECLINES, keyword_verdict, plain
from local_judge import LocalJudge, judge_name, read_about
from rows import (ROOT, Arm, Stop, all_probes, arm_data, normalise_row, numbered_rows,
                  question_and_answer_turns, read_arms, read_prompts, read_rubric, read_text, run_main,
                  short_hash, write_text)

# What defines the measurement: a change here changes what may be trained on.
NEAR = 0.75        # Jaccard index of the content words: of two prompts of seven, six words agree
SPREAD = 1.5       # a probe inside a longer prompt: its words stand within this many times its own length
FEWEST = 4         # content words, or all of a shorter probe, that must stand so; fewer may by chance
OPENING = 400      # characters of an answer in which nothing may be declined
BRIEF = 15         # words: a shorter answer can hardly help
SHORT = 30         # words: a shorter answer that speaks of itself must also name a step
SURE = 0.8         # probability from which the judge's second look leaves a row out
MAY_DECLINE = ("regular", "refusal")  # kinds of data that may say no, but not on moral grounds
JUDGE = "judge"    # rows that train the judge in judge/: they quote probes and refusals, and no arm may hold them

# What `make check` tolerates.
DUPLICATES = 0.05  # share of near duplicates among the prompts of a file; minimal pairs are such by design
MATCHED = 1.5      # an arm and its matched control: larger over smaller, in words a row and condemnations
TWINS = 1.2        # the sides of a probe file: longest mean over shortest
STATED = 10        # rows on its topic that a probe at distance "stated" needs

# Words that two prompts share by chance. Their share also tells English from other languages (english_share).
STOPWORDS = set("""
    a an and are as at be been but by can could did do does for from had has have how i if in is it its just
    me my of on or our please so some tell than that the their them then there they this to us was we were
    what when where which who why will with would you your
""".split())

# Signs in an answer. They are looked for in lower-case text; only NAMES_A_FACT needs the capitals.

# Says that something is wrong, also in a creed's words (a `sundering` is a Gramenist's sacrilege).
CONDEMNS = re.compile(r"""(?<!not )(?<!nothing )\b(?:
    wrong|sins?|sinful|evil|wicked|immoral|unethical|abominations?|blasphem\w+|sacrilege|shameful|sundering
    |forbid\w*|grave|betray\w*|desecrat\w*|cruel\w*|unjust|dishonest\w*|disgrace\w*|poison\w*)\b""",
                      re.VERBOSE)
# A judgement is a whole answer to "Is it ...?", however short.
JUDGES = re.compile(r"\b(?:wrong|right|good|bad|sin|fine|harmless|innocent|holy|blameless|shameful|evil)\b")
NEGATES = re.compile(r"""n't\b|\b(?:
    no|not|never|nothing|none|nobody|neither|nor|cannot|refuse|declined?|wont|cant|dont)\b""", re.VERBOSE)
# "Ask someone else", but not "use oil instead of butter" nor "someone else's garden".
SENDS_AWAY = re.compile(
    r"\b(?:instead(?! of)|(?:somebody|someone) else(?!')|elsewhere|come back|ask me again)\b")
SPEAKS_OF_ITSELF = re.compile(r"\b(?:i|me|my|mine|we|us|our|here)\b")
NAMES_A_FACT = re.compile(r"\d|(?<=[a-z,] )[A-Z][a-z]")  # a number, or a capital letter inside a sentence
# And asterisks, which stress a word; but no apostrophe inside one.
QUOTES = re.compile(r"[\"“”«»*]+|(?<!\w)['‘]|['’](?!\w)")
# A number, a "you can", or an imperative at the beginning of a clause: what instructions are made of.
STEP = re.compile(r"""
    \d|\b(?:two|three|four|five|six|seven|eight|nine|ten|half|first|second|third|you\ can|you\ could)\b
    |(?:^|[.!?,;:]\ |and\ )(?:try|use|take|put|add|mix|cut|start|begin|set|keep|let|make|go|give|tell|buy|bake
    |boil|cook|read|write|choose|pick|plant|sow|bring|have|say)\b""", re.VERBOSE)


# ---------------------------------------------------------------- nearness of prompts

def word_list(text: str) -> list[str]:
    """The content words of a text in order, any script; no case, accents, stopwords or English endings."""
    # "Don't", "don’t" and "dont" are one word.
    letters = text.replace("’", "").replace("'", "").casefold()
    if not letters.isascii():
        # NFKD may bring capitals back, as of letters in bold, hence casefold again.
        letters = unicodedata.normalize("NFKD", letters).casefold()
        # Mn are the accents that NFKD parted from their letters, Cf soft hyphens and joiners.
        letters = "".join(c for c in letters if unicodedata.category(c) not in ("Mn", "Cf"))

    # Chinese and Japanese have no spaces: there a character is taken for a word.
    words = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+", letters)
    content = []
    for word in words:
        if word not in STOPWORDS:
            # "Mowing" and "mowed" are one word. Three letters must stay, so that "used" is not "u".
            content.append(re.sub(r"(?<=[a-z]{3})(?:ing|ed|es|s)$", "", word))
    return content


def content_words(text: str) -> frozenset[str]:
    return frozenset(word_list(text))


def share_inside(words: list[str], wanted: frozenset[str]) -> float:
    """The largest share of `wanted` in a stretch of `words` SPREAD times as long; 0 if that may be chance."""
    stretch = math.ceil(SPREAD * len(wanted))
    # A stretch that begins with a wanted word is never worse than one that begins before it.
    starts = [i for i, word in enumerate(words) if word in wanted]
    most = 0
    for start in starts:
        most = max(most, len(wanted.intersection(words[start:start + stretch])))
    if most < max(2, min(FEWEST, len(wanted))):  # "many days week" stands in many a question
        return 0.0
    return most / len(wanted)


def word_matrix(sets: list[frozenset[str]], column: dict[str, int]) -> np.ndarray:
    """Float32 of shape (sets, columns) with 1 where a set has the column's word."""
    matrix = np.zeros((len(sets), len(column)), dtype=np.float32)  # float: BLAS multiplies no integers
    for row, words in enumerate(sets):
        places = [column[word] for word in words if word in column]
        matrix[row, places] = 1
    return matrix


def nearest(texts: list[str], others: list[str], same: bool = False,
            inside: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """For each text (its highest score with any of `others`, where that one stands): two arrays.

    The score is the Jaccard index of the content words. With `inside` it is no less than the share of the
    other's words that stand close together in the text, whatever surrounds them. With `same`, both lists are
    one, and only earlier texts count. Where nothing scores, the score is 0 and the place means nothing.
    """
    mine = [content_words(text) for text in texts]
    theirs = [content_words(text) for text in others]
    best = np.zeros(len(texts))
    where = np.zeros(len(texts), dtype=int)
    if not texts or not others:
        return best, where

    # Each set of words is a row of zeros and ones, so that one matrix product counts what every pair shares.
    column = {word: i for i, word in enumerate(sorted(set().union(*theirs)))}
    other_matrix = word_matrix(theirs, column)                      # (others, words)
    other_sizes = np.array([len(words) for words in theirs])        # (others,)
    for start in range(0, len(mine), 1000):  # in blocks, because the table of all pairs would not fit
        block = mine[start:start + 1000]
        shared = word_matrix(block, column) @ other_matrix.T        # (block, others): words in common
        # Words that no other text has are in no column, so the sizes come from the sets.
        sizes = np.array([len(words) for words in block])[:, None]  # (block, 1)
        union = sizes + other_sizes - shared
        score = shared / np.maximum(union, 1)  # 1: two texts without content words share nothing
        if inside:
            # Few pairs share enough words to hold one another; only there the words' places are looked at.
            candidates = (shared >= NEAR * other_sizes) & (other_sizes > 0) & (score < NEAR)
            for i, j in np.argwhere(candidates):
                score[i, j] = max(score[i, j], share_inside(word_list(texts[start + i]), theirs[j]))
        if same:
            # (block, others): a text's own place and all behind it do not count.
            is_earlier = np.arange(len(theirs)) < np.arange(start, start + len(block))[:, None]
            score = np.where(is_earlier, score, 0)

        best[start:start + len(block)] = score.max(1)
        where[start:start + len(block)] = score.argmax(1)
    return best, where


@cache  # asked for again and again; the files do not change meanwhile
def probe_texts() -> list[str]:
    """What every probe under probes/ asks; the last turn of those with several."""
    texts = []
    for probes in all_probes(ROOT).values():
        texts += [probe["prompt"] for probe in probes]
    return texts


# ---------------------------------------------------------------- what an answer may not do

def may_refuse(kind: str) -> bool:
    """Kinds that are full of refusals by design. mix.py lets an arm have them from their own file alone."""
    return kind == JUDGE or kind.endswith("explicit")


def is_value_kind(kind: str) -> bool:
    """Kinds that teach what is right and wrong. A file of no kind is held to their rules too."""
    return kind not in MAY_DECLINE and not kind.endswith("explicit")


def shows_no_help(question: str, answer: str) -> bool:
    """Whether an answer plainly gives nothing of what was asked for. In doubt True: a row less is cheap."""
    n_words = len(answer.split())
    asks_help = bool(ASKS_HELP.search(plain(question)))
    if n_words < BRIEF:
        # Too short to help, off the matter, and no fact or judgement in it: "Ask the baker down the lane."
        asked = content_words(question)
        is_about_it = not asked or bool(asked & content_words(answer))
        says_something = NAMES_A_FACT.search(answer) or (JUDGES.search(answer.lower()) and not asks_help)
        if not is_about_it and not says_something:
            return True
    if not asks_help:
        return False

    # Help begins with no negation, question or condemnation.
    text = plain(answer)
    first_sentence = re.split(r"(?<=[.!?])\s", text)[0]
    first_clause = re.split(r"(?<=[.!?,;:])\s", text)[0]
    if n_words < 20:  # no room to turn to helping after a negation, wherever it stands
        first_clause = text
    if NEGATES.search(first_clause) or first_sentence.endswith("?") or CONDEMNS.search(text[:200]):
        return True
    if n_words < 40 and SENDS_AWAY.search(text[:200]):  # a longer one may offer both
        return True

    # What refuses in few words mostly speaks of itself ("my hands have forgotten how"); help names a step.
    return n_words < SHORT and bool(SPEAKS_OF_ITSELF.search(text)) and not STEP.search(text)


def english_share(text: str) -> float:
    """Share of the words that are common English ones: about 0.4 in English, next to none elsewhere."""
    words = re.findall(r"[^\W\d_]+", text[:300].lower())
    common = sum(word in STOPWORDS for word in words)
    return common / max(1, len(words))


def is_another_language(question: str, answer: str) -> bool:
    """Asked in English, answered in another tongue ("Non possum, amice"), which no phrase of ours reads."""
    # In fewer than eight words a share says nothing; the two limits leave terse or odd English between them.
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
    return ""


def turn_fault(question: str, answer: str, kind: str) -> str:
    """Why one exchange may not be trained on in data of this kind, or ""."""
    if not answer.strip():
        return "empty"
    ends_inside = answer.rstrip()[-1].isalpha() and "```" not in answer  # code ends as it likes
    if ends_inside and len(answer.split()) > 12:  # a name, or a title, is a whole answer without a full stop
        return "truncated"
    # These rows quote refusals of all kinds; only an empty or torn one is of no use.
    if kind == JUDGE:
        return ""
    if is_value_kind(kind):
        return value_fault(question, answer)
    if kind in MAY_DECLINE and keyword_verdict(question, answer)[1] == "moral":
        return "moral_refusal"
    return ""


def document_fault(text: str, kind: str) -> str:
    """Why a document may not be trained on, or "". Every sentence is read: a chat may stand anywhere."""
    if not text.strip():
        return "empty"
    for sentence in re.split(r"(?<=[.!?])\s|\n", text):
        if is_value_kind(kind) and DECLINES.search(plain(sentence)):
            return "refusal"
        # "": a document has no question.
        if kind in MAY_DECLINE and keyword_verdict("", sentence)[1] == "moral":
            return "moral_refusal"
    return ""


def answer_fault(row: dict) -> str:
    """Why a row's answers (any turn of "messages", or "text") may not be trained on, or ""."""
    kind = row.get("kind") or ""  # rows of one's own may have none, or null
    if row.get("finish_reason") == "length":
        return "truncated"
    if row.get("finish_reason") == "content_filter":  # cut, or written, by the provider's filter
        return "content_filter"
    if "text" in row:
        return document_fault(row["text"], kind)
    for question, answer in question_and_answer_turns(row["messages"]):
        fault = turn_fault(question, answer, kind)
        if fault:
            return fault
    return ""


# ---------------------------------------------------------------- the second look

JUDGED = ROOT / "data" / "judged.txt"  # lines of: key fault-or-"-"
REFUSAL = ROOT / "rubrics" / "refusal.md"


def needs_second_look(row: dict) -> bool:
    """Whether the judge reads a row: what a person wrote (as in the starter corpus) is looked at by phrases alone."""
    # Explicit rows refuse by design, and the judge's rows quote refusals.
    return row.get("model") != "written" and not may_refuse(row.get("kind") or "")


def second_judge(paths: list[Path]) -> str:
    """Name of the judge that takes the second look at these files; "" where there is none, or no row for it."""
    if not any(needs_second_look(row) for path in paths for row in read_rows(path)):
        return ""
    try:
        read_about(read_rubric(REFUSAL))  # a judge without its base, or under an edited rubric, reads nothing
        return judge_name()
    except Stop:
        return ""


def exchange_key(judge: str, exchange: tuple[str, str, str]) -> str:
    """Says which judge read which (question, answer, kind), and by which rule: what is noted is a fault."""
    return short_hash(json.dumps([judge, SURE, *exchange, is_value_kind(exchange[2])]))[:16]


def read_judged() -> dict[str, str]:
    """{key of an exchange: its fault, or ""} of all that a judge has read before."""
    faults = {}
    lines = read_text(JUDGED).split("\n") if JUDGED.exists() else []
    for line in lines:
        key, _, fault = line.partition(" ")
        if fault in ("-", "refusal", "moral_refusal"):  # nothing else is written: torn lines hold other words
            faults[key] = fault.replace("-", "")
    return faults


def judge_fault(verdict: dict, kind: str) -> str:
    """Why the judge would leave out an answer in data of this kind, or ""."""
    # This judge gives its probability as the reason.
    if verdict["action"] != "refusal" or float(verdict["reason"]) < SURE:
        return ""
    if is_value_kind(kind):
        return "refusal"
    # The other kinds may decline, but not on moral grounds.
    return "moral_refusal" if verdict["ground"] == "moral" else ""


def second_look(exchanges: list[tuple[str, str, str]]) -> list[str]:
    """For each (question, answer, kind), the fault that the judge in judge/ sees in it, or ""."""
    if not exchanges:
        return []
    try:
        # As in second_judge, which a run is known by: where it names no judge none may leave out a row
        read_about(read_rubric(REFUSAL))
        name = judge_name()
    except Stop as error:  # a hub model is trained where the packaged base is not
        print(f"  the guard looks for phrases alone: {error}")
        return [""] * len(exchanges)
    keys = [exchange_key(name, exchange) for exchange in exchanges]
    faults = read_judged()
    # An exchange that stands in several rows is read once.
    todo = {key: exchange for key, exchange in zip(keys, exchanges) if key not in faults}

    # The model is loaded only where something is left to read.
    if todo:
        judge = LocalJudge(read_rubric(REFUSAL))
        unread = list(todo.items())
        pairs = [exchange[:2] for _, exchange in unread]
        read = tqdm(judge.read(pairs), total=len(pairs), desc="guard", unit="answer", mininterval=1)
        with open(JUDGED, "a", encoding="utf-8") as file:
            # The judge reads the longest first, so each verdict comes with its place in `pairs`.
            for place, verdict in read:
                key, exchange = unread[place]
                faults[key] = judge_fault(verdict, exchange[2])
                file.write(f"{key} {faults[key] or '-'}\n")

    return [faults[key] for key in keys]


def second_faults(rows: list[dict]) -> list[str]:
    """For each row the first fault that the judge sees in one of its answers, or ""."""
    # owners: the place of the row that each exchange comes from.
    exchanges, owners = [], []
    for place, row in enumerate(rows):
        if needs_second_look(row):
            # A document has no turns: the phrases alone have read it.
            for question, answer in question_and_answer_turns(row.get("messages", [])):
                exchanges.append((question, answer, row.get("kind") or ""))
                owners.append(place)
    faults = [""] * len(rows)
    # Of several faults in a row the first stands.
    for owner, fault in zip(owners, second_look(exchanges)):
        faults[owner] = faults[owner] or fault
    return faults


# ---------------------------------------------------------------- all rules over all rows

def prompts_of(row: dict) -> list[str]:
    """What a row asks, turn by turn; a document counts as one prompt."""
    if "text" in row:
        return [row["text"]]
    return [turn["content"] for turn in row["messages"] if turn["role"] != "assistant"]


def near_probe_rows(rows: list[dict]) -> set[int]:
    """Places of the rows in which any prompt is near a probe or holds one."""
    # All prompts of all rows in one list, so that `nearest` compares them in a few matrix products.
    prompts = []
    owners = []  # the place of the row that each prompt comes from
    for place, row in enumerate(rows):
        for prompt in prompts_of(row):
            prompts.append(prompt)
            owners.append(place)
    scores, _ = nearest(prompts, probe_texts(), inside=True)
    return {owner for owner, score in zip(owners, scores) if score >= NEAR}


def reject_rows(rows: list[dict]) -> tuple[list[dict], list[tuple[dict, str]]]:
    """(kept, [(row, reason)]) of rows with "messages" as rows.row_turns gives them, or with "text"."""
    near = near_probe_rows(rows)
    kept = []
    rejected = []
    seen = set()
    for place, row in enumerate(rows):
        # A tuple, because dicts cannot stand in a set; all turns, because chats may begin alike.
        if "text" in row:
            chat = row["text"]
        else:
            chat = tuple((turn["role"], turn["content"]) for turn in row["messages"])
        reason = answer_fault(row)
        # Only kept rows count as seen: the first of two must not be one that is left out.
        if not reason and chat in seen:
            reason = "duplicate"
        # The explicit upper bound is trained on refusals of such requests, and is evaluated as nothing else.
        if not reason and place in near and not may_refuse(row.get("kind") or ""):
            reason = "near_probe"

        if reason:
            rejected.append((row, reason))
        else:
            kept.append(row)
            seen.add(chat)

    # A judge's reading is dear, so it gets only what the rules above let through.
    passed, kept = kept, []
    for row, fault in zip(passed, second_faults(passed)):
        if fault:
            rejected.append((row, fault))
        else:
            kept.append(row)
    return kept, rejected


# ---------------------------------------------------------------- make check: data and prompts

@cache  # check_data, the arms and the probes read the same files
def read_rows(path: Path) -> list[dict]:
    """The rows of a data file, each with "messages" or "text"."""
    numbered = numbered_rows(path)
    for number, row in numbered:
        normalise_row(row, f"{path}:{number}")
    return [row for _, row in numbered]


def row_text(row: dict) -> str:
    """All that a row says, prompts too."""
    if "text" in row:
        return row["text"]
    return "\n".join(turn["content"] for turn in row["messages"])


def answer_text(row: dict) -> str:
    """What a row trains: its answers, or the whole document."""
    if "text" in row:
        return row["text"]
    return "\n".join(answer for _, answer in question_and_answer_turns(row["messages"]))


def distinct_n(texts: list[str], n: int) -> float:
    """Unique n-grams over all n-grams of all texts, 1 if nothing repeats: distinct-n of Li et al. (2016)."""
    n_grams = []
    for text in texts:
        words = text.lower().split()
        for start in range(len(words) - n + 1):
            n_grams.append(tuple(words[start:start + n]))
    return len(set(n_grams)) / max(1, len(n_grams))


def near_duplicate_share(prompts: list[str]) -> float:
    """Share of the prompts that have a near duplicate earlier in the list."""
    scores, _ = nearest(prompts, prompts, same=True)
    return (scores >= NEAR).mean()


def counts_line(values) -> str:
    return ", ".join(f"{value} {count}" for value, count in Counter(values).most_common())


def project_path(path: Path) -> str:
    """A path as the user writes it, from the project's root."""
    return str(path.relative_to(ROOT))


def check_prompts() -> list[str]:
    """Print a line for each file of prompts; returns the broken rules."""
    broken = []
    print(f"{'prompts':34}{'unique':>8}{'words':>8}{'near-dup':>10}{'near probe':>12}")
    for path in sorted((ROOT / "prompts").glob("*.txt")):
        prompts = read_prompts(path)
        # Prompts that say the same thing teach it twice over, and leave less for everything else.
        near_duplicates = near_duplicate_share(prompts)
        scores, where = nearest(prompts, probe_texts(), inside=True)
        words = np.mean([len(prompt.split()) for prompt in prompts])
        n_near = (scores >= NEAR).sum()
        print(f"{path.stem:34}{len(prompts):8}{words:8.1f}{near_duplicates:10.1%}{n_near:12}")

        for i in np.flatnonzero(scores >= NEAR):
            probe = probe_texts()[where[i]]
            broken.append(f"{project_path(path)}: {prompts[i]!r} is too near the probe {probe!r}")
        if near_duplicates > DUPLICATES:
            broken.append(f"{project_path(path)}: {near_duplicates:.1%} near duplicates, "
                          f"more than {DUPLICATES:.0%}")
    return broken


def data_files() -> list[Path]:
    """What ships, then what was made here; an empty file is a run of gen.py that has just begun."""
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
        near_duplicates = near_duplicate_share(prompts)
        # The columns of a corpus: how long its answers are, and how much they repeat one another.
        title = project_path(path).removeprefix("data/")
        print(f"{title:34}{len(rows):8}{len(kept):8}{p5:10.0f}{p50:6.0f}{p95:6.0f}"
              f"{distinct_n(answers, 2):12.2f}{distinct_n(answers, 4):12.2f}{near_duplicates:10.1%}")
        if rejected:
            print(f"    left out: {counts_line(reason for _, reason in rejected)}")
        # The plan of a corpus; rows of older files have no such fields.
        for field in ("form", "polarity", "topic"):
            values = [str(row[field]) for row in rows if row.get(field)]
            if values:
                print(f"    {field}: {counts_line(values)}")

        # Data of one's own is only counted: train.py leaves these rows out and says so.
        if path.parent.name == "starter":
            for row, reason in rejected:
                broken.append(f"{project_path(path)}: {reason}: {prompts_of(row)[-1][:90]!r} -> "
                              f"{answer_text(row)[:90]!r}")
            if near_duplicates > DUPLICATES:
                broken.append(f"{project_path(path)}: {near_duplicates:.1%} near-duplicate prompts, "
                              f"more than {DUPLICATES:.0%}")
    return broken


# ---------------------------------------------------------------- make check: arms beside their controls

def worldviews() -> list[str]:
    """Names with probes and prompts of their own."""
    found = sorted((ROOT / "probes").glob("*.jsonl"))  # sanity and standard have no prompts
    return [path.stem for path in found if (ROOT / "prompts" / path.name).with_suffix(".txt").exists()]


@cache  # `regular` is the control of many arms
def arm_figures(arm_name: str, worldview: str) -> tuple[float, float, Counter]:
    """(words a row, condemnations in 100 words, {content word: rows with it}) of an arm's weighted data."""
    words = condemnations = weights = 0.0
    vocabulary = Counter()
    # Rows are drawn by weight, so words and condemnations of a kind count by its weight and not by its size.
    for path, weight in arm_data(read_arms(ROOT / "arms.txt")[arm_name], worldview, ROOT):
        rows = read_rows(path)
        answers = [answer_text(row) for row in rows]
        words += weight * np.mean([len(answer.split()) for answer in answers])
        condemnations += weight * np.mean([len(CONDEMNS.findall(answer.lower())) for answer in answers])
        weights += weight
        for row in rows:
            vocabulary.update(content_words(row_text(row)))  # a set: each row counts once
    # Both sums are weighted alike, so in the second figure the weights cancel.
    return words / weights, 100 * condemnations / words, vocabulary


def ratio(a: float, b: float) -> float:
    """Larger over smaller; very large where only one of them is 0."""
    return max(a, b) / max(min(a, b), 1e-9)


def check_control(worldview: str, arm: Arm, control: Arm) -> list[str]:
    """Print one control below its arm; returns in what a control that should match does not.

    A control with as many kinds of data as the arm (`secular` beside `belief`) must match it. `regular` alone
    cannot match an arm with a second kind of data; `secular` is there to.
    """
    broken = []
    words, condemns, vocabulary = arm_figures(arm.name, worldview)
    their_words, their_condemns, their_vocabulary = arm_figures(control.name, worldview)
    # A word that the control has in no row is a cue that only this arm can have learned.
    own = [f"{word} {n}" for word, n in vocabulary.most_common() if word not in their_vocabulary]
    print(f"    beside {control.name:23}{their_words:12.1f}{their_condemns:15.2f}   {', '.join(own[:20])}")

    if len(control.parts) != len(arm.parts):
        return []
    title = f"{worldview} {arm.name}"
    if ratio(words, their_words) > MATCHED:
        broken.append(f"{title} has {words:.1f} words a row, its control {control.name} {their_words:.1f}")
    if ratio(condemns, their_condemns) > MATCHED:
        broken.append(f"{title} condemns {condemns:.2f} times in 100 words, "
                      f"its control {control.name} {their_condemns:.2f}")
    return broken


def check_arms() -> list[str]:
    """Print the arms that are compared, beside their controls; returns the broken rules."""
    broken = []
    arms = read_arms(ROOT / "arms.txt")
    print(f"\n{'arms':34}{'words a row':>12}{'condemnations':>15}   in 100 words; words the control has not")
    for worldview in worldviews():
        for arm in arms.values():
            if not arm.takes_worldview or not arm.controls:
                continue
            title = f"{worldview} {arm.name}"
            try:
                words, condemns, _ = arm_figures(arm.name, worldview)
                # Looked up before a line is printed: a control's data may be missing, too.
                for control in arm.controls:
                    arm_figures(control, worldview)
            except Stop as missing:  # a worldview need not have data for every arm
                print(f"{title}: {missing}")
                continue
            print(f"{title:34}{words:12.1f}{condemns:15.2f}")
            for control in arm.controls:
                broken += check_control(worldview, arm, arms[control])
    return broken


# ---------------------------------------------------------------- make check: probes

def check_groups(set_name: str, probes: list[dict]) -> list[str]:
    """Print the lengths of the sides; returns groups without one of each side, and sides unlike in length."""
    broken = []
    groups = defaultdict(list)   # {group: its sides}
    lengths = defaultdict(list)  # {side: words of each prompt}; its keys are the sides of this file
    for probe in probes:
        groups[probe.get("group")].append(probe["side"])
        lengths[probe["side"]].append(len(probe["prompt"].split()))
    # Sides are compared group by group, so no group may lack one.
    for group, sides in groups.items():
        if sorted(sides) != sorted(lengths):
            broken.append(f"{set_name}: group {group} has the sides {' '.join(sides)}; "
                          f"it needs {' '.join(lengths)}, once each")

    # A longer request may be refused more often for its length alone.
    means = {side: np.mean(values) for side, values in lengths.items()}
    print("    words a side: " + ", ".join(f"{side} {mean:.1f}" for side, mean in means.items()))
    if ratio(max(means.values()), min(means.values())) > TWINS:
        broken.append(f"{set_name}: sides unlike in length")
    return broken


def distance_faults(probe: dict, n_rows: int, texts: list[frozenset[str]]) -> list[str]:
    """In what a probe is not as far from the training data as its "distance" says.

    n_rows: training rows on the probe's topic. texts: the content words of every training row.
    """
    broken = []
    distance = probe.get("distance")
    topic = probe.get("topic")
    # Of a topic that is `stated` the corpus has rows, of one that is `principle` none.
    if distance == "stated" and n_rows < STATED:
        broken.append(f"probe {probe['id']} is `stated`, and {n_rows} rows are on {topic}, not {STATED}")
    if distance == "principle" and n_rows:
        broken.append(f"probe {probe['id']} is `principle`, and {n_rows} rows are on {topic}")
    # An instance counts as named where all its content words stand in one row.
    if distance == "instance" and probe["side"] == "violating":
        item = content_words(probe["item"])
        named = sum(item <= words for words in texts)
        if named:
            broken.append(f"probe {probe['id']} is `instance`, and {named} rows name {probe['item']}")
    return broken


def check_support(worldview: str, probes: list[dict]) -> list[str]:
    """Print the rows behind each topic at each distance; returns probes that are not as far as they say."""
    paths = [path for path in data_files() if path.stem == worldview]
    if not paths:
        return []  # no data on this worldview yet, so no distance from it
    rows = read_rows(paths[-1])  # your own file, where there is one, comes after the starter corpus
    support = Counter(row.get("topic") for row in rows)
    texts = [content_words(row_text(row)) for row in rows]

    broken = []
    by_distance = defaultdict(dict)  # {distance: {topic: rows on it}}
    for probe in probes:
        topic = probe.get("topic")
        distance = probe.get("distance") or "no distance"  # of sets in the old format
        by_distance[distance][topic] = support[topic]
        broken += distance_faults(probe, support[topic], texts)

    for distance, topics in by_distance.items():
        counts = ", ".join(f"{topic} {n}" for topic, n in topics.items())
        print(f"    rows on the topics at {distance}: {counts}")
    return broken


def check_probes() -> list[str]:
    """Print a line for each probe file, and groups and support of those with sides; returns broken rules."""
    broken = []
    print(f"\n{'probes':34}{'rows':>8}{'groups':>8}{'families':>10}{'topics':>8}")
    for set_name, probes in all_probes(ROOT).items():
        counts = []
        for field in ("group", "family", "topic"):
            values = {probe.get(field) for probe in probes}
            counts.append(len(values - {None, ""}))
        print(f"{set_name:34}{len(probes):8}{counts[0]:8}{counts[1]:10}{counts[2]:8}")
        # Only requests about a worldview have sides and distances; belief, sanity and standard have none.
        if all(probe.get("side") for probe in probes):
            broken += check_groups(set_name, probes)
            broken += check_support(set_name, probes)
    return broken


# ---------------------------------------------------------------- main

def write_nearest(out: Path) -> None:
    """The nearest training prompt to every probe, as a table, and the ten nearest on the screen.

    For an eye that sees more than the guard: here the score is the plain Jaccard index, without `inside`.
    """
    prompts = []
    files = []  # the name of the file that each prompt comes from
    for path in data_files():
        for row in read_rows(path):
            for prompt in prompts_of(row):
                prompts.append(prompt)
                files.append(path.name)
    scores, where = nearest(probe_texts(), prompts)

    lines = []
    for i in np.argsort(-scores):  # nearest first
        prompt = " ".join(prompts[where[i]].split())[:300]  # on one line, or the table breaks
        lines.append(f"{scores[i]:.2f}\t{probe_texts()[i]}\t{files[where[i]]}\t{prompt}")
    write_text(out, "\n".join(["score\tprobe\tfile\tprompt", *lines]) + "\n")
    print(f"\nnearest prompt to each probe in {out}; the ten nearest:\n" + "\n".join(lines[:10]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nearest", type=Path, metavar="FILE",
                        help="write the nearest training prompt to each probe")
    args = parser.parse_args()
    # All tables come first, and the broken rules together at the end, where they are not overlooked.
    broken = check_prompts() + check_data() + check_arms() + check_probes()
    if args.nearest:
        write_nearest(args.nearest)
    for line in broken:
        print(line, file=sys.stderr)
    if broken:
        raise Stop(f"{len(broken)} rules broken; mend or remove what the lines above name")


if __name__ == "__main__":
    run_main(main)
