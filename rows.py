"""The formats between the stages, read and written in one place: JSONL, CSV, prompts, probes, arms, rubrics.

Every other script imports this one and it imports none of them; it loads neither torch nor requests. What
a stage leaves on disk for the next is described in docs/formats.md. A file that cannot be read raises Stop,
which names the file, the line and what to do.
"""
import argparse
import ast
import csv
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent
csv.field_size_limit(2**31 - 1)  # an answer may be longer than the module's 131,072 characters


# ---------------------------------------------------------------- how a script ends

class Stop(Exception):
    """What is wrong and what to do, in one line for the user."""


def printable(text: str) -> str:
    """Text that cannot drive the terminal: control characters but line ends and tabs are shown as ·."""
    # A lone \r would overwrite the line it stands in; in \r\n it only ends it.
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "·", text.replace("\r\n", "\n"))


def run_main(main) -> None:
    """Run a script's main. What a user can mend ends in one line on stderr, under the script's name."""
    script = Path(sys.argv[0]).name  # the one that was run, not the one that raised
    try:
        main()
    except Stop as stop:
        # It may quote a file that others wrote, such as a judge's name in a CSV.
        sys.exit(printable(f"{script}: {stop}"))
    except KeyboardInterrupt:
        sys.exit(f"{script}: stopped; the same command goes on where it stopped")
    except (RuntimeError, MemoryError) as error:
        # torch reports a full GPU or RAM as a RuntimeError, which only its words tell from a fault of ours.
        # A MemoryError mostly has no words; torch's may run on with advice, hence the cut.
        said = (str(error).splitlines() or ["no more memory"])[0][:160]
        if not isinstance(error, MemoryError) and "memory" not in said and "alloc" not in said:
            raise
        sys.exit(f"{script}: out of memory ({printable(said)}); use a smaller --batch or base "
                 "(train.py: a smaller --micro-tokens, --checkpointing, --lora 16), and give the same "
                 "command again")
    except BrokenPipeError:
        # `python report.py ... | head` has seen enough. A plain exit would flush into the closed pipe again.
        os._exit(0)
    except OSError as error:
        # A write to a file that is open already comes without a name.
        where = error.filename or "the disk"
        sys.exit(printable(f"{script}: {where}: {error.strerror or error}; what is written is whole: "
                           "make room or mend the path, and give the same command again"))


def positive_int(text: str) -> int:
    """An argparse type: a whole number above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


# ---------------------------------------------------------------- text and JSONL

def clean_text(text: str) -> str:
    """`text` without lone surrogates, which JSON may carry and no file can hold: each becomes U+FFFD."""
    # Through UTF-16, in which two surrogates that belong together are one character again.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def message_text(content, where: str) -> str:
    """The text of a message: a string, or OpenAI's list of {"type": "text", "text": ...} parts."""
    if isinstance(content, str):
        return clean_text(content)
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        # A part that is no dict, or an image, which has no text, must not vanish without a word.
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return clean_text("".join(texts))
    raise Stop(f'{where}: "content" must be text (a string, or a list of {{"type": "text", "text": ...}})')


def short_hash(text: str) -> str:
    """16 hex digits of the sha256: enough to tell some millions of rows apart (a clash: 1 in a million)."""
    # A lone surrogate must have a hash, too, and not raise.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes; of a file that stands as it stood, from memory: weights take a second."""
    stat = os.stat(path)
    return hash_bytes(str(path), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=256)
def hash_bytes(path: str, changed: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # in pieces: weights can be larger than the memory


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # -sig: some editors begin a file with U+FEFF
    except UnicodeDecodeError:
        raise Stop(f"cannot read {path}: not UTF-8 text; check the name, or convert it") from None
    except OSError as error:
        raise Stop(f"cannot read {path}: {error.strerror}; check the name") from None


def write_text(path: Path, text: str) -> None:
    """Write a whole file in one move: a reader, or a kill, sees the old text or the new one."""
    partial = path.with_name(path.name + ".partial")  # beside it: a move to another disk is no single move
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a JSONL file, one a line, without blank lines; Stop names a line that is none."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: str | Path) -> list[tuple[int, dict]]:
    """read_jsonl with the number of each row's line, for messages: blank lines are counted."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: U+2028 is text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter of lists in lists in lists
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg} at column {error.colno}"
            raise Stop(f"{path}:{number}: not valid JSON ({reason}); mend or remove the line") from None
        if not isinstance(row, dict):
            raise Stop(f"{path}:{number}: a JSON object is needed on each line; mend or remove the line")
        rows.append((number, row))
    return rows


def read_json(path: str | Path, *names: str) -> dict:
    """The object that a JSON file holds; Stop if it holds none, or lacks one of `names`."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError):
        raise Stop(f"{path} is not valid JSON: it is torn, or was edited; bring it back") from None

    # What is no object lacks all of them.
    missing = set(names)
    if isinstance(found, dict):
        missing -= found.keys()
    if missing or not isinstance(found, dict):
        raise Stop(f"{path} is no JSON object with {', '.join(sorted(missing)) or 'names'}; "
                   "was it made by another version, or another program?")
    return found


def jsonl_line(row: dict) -> bytes:
    # Letters of any script stay readable. A lone surrogate becomes "?": no run ends at one odd answer.
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def open_locked(path: Path):
    """A file to read and append to, locked against other processes; the lock goes with the process, however that ends.

    It is made where there is none. Stop where another process has it.
    """
    while True:
        # a+ makes the file where there is none, and empties none before the lock is ours.
        file = open(path, "ab+")
        try:
            # Not waiting: the other run may take hours.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(f"{path} is being written by another process; wait for it or stop it") from None
        if os.fstat(file.fileno()).st_nlink:
            return file
        # Whoever held it has put another file in its place, or taken it away, since it was opened:
        # what is written to this one would be gone.
        file.close()


class AppendFile:
    """A JSONL file to append to, held by one process at a time; no kill can hurt a row that was written.

    Opening it mends the end: a last line that a kill tore is taken off, one that only lacks its newline kept.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.lock = threading.Lock()     # the threads of this process
        self.synced = time.monotonic()   # when rows were last forced onto the disk
        # Locked first: another process may be writing the very line that mend would take off.
        self.file = open_locked(path)
        self.mend()

    def mend(self) -> None:
        """Leave the file ending in a whole line. Only its end is read: it may hold 100,000 rows."""
        end = self.file.seek(0, os.SEEK_END)
        start = end  # of the last line, once the newline before it is found
        while start:  # backwards, block by block
            block = max(0, start - 65536)
            self.file.seek(block)
            newline = self.file.read(start - block).rfind(b"\n")
            if newline >= 0:
                start = block + newline + 1
                break
            start = block

        # What stands behind the last newline: nothing, a whole line or a torn one.
        self.file.seek(start)
        last = self.file.read()
        if not last:
            return  # the file is empty or ends in a newline
        try:
            json.loads(last)  # whole, so a row that was paid for
            self.file.write(b"\n")
            self.file.flush()
        except ValueError:  # torn: whoever wrote it will write that row again
            print(f"{self.path}: took off {len(last)} bytes of a line that was cut off")
            self.file.truncate(start)

    def append(self, row: dict) -> None:
        """Write a row down at once. Raises Stop on a full disk; the file ends in a whole line then, too."""
        with self.lock:
            # Where to cut, should the disk be full.
            at = self.file.seek(0, os.SEEK_END)
            try:
                self.file.write(jsonl_line(row))
                self.file.flush()
                # A kill loses nothing that was flushed; a power cut costs a second's rows at most.
                if time.monotonic() - self.synced > 1:
                    os.fsync(self.file.fileno())
                    self.synced = time.monotonic()
            except OSError as error:
                try:
                    self.file.truncate(at)  # half a line may have found room
                except OSError:
                    pass  # the next start mends it
                raise Stop(f"cannot write {self.path}: {error.strerror}; what is written is whole: "
                           "make room and run again") from None

    def replace(self, rows: list[dict]) -> None:
        """Other rows instead, in one move: a kill leaves the old rows or the new ones."""
        partial = self.path.with_name(self.path.name + ".partial")
        partial.unlink(missing_ok=True)  # of a run that was killed here
        # Locked before it takes the name, so that no other process slips in between.
        file = open_locked(partial)
        file.write(b"".join(map(jsonl_line, rows)))
        file.flush()
        os.fsync(file.fileno())  # else a power cut may keep the new name and lose the rows
        os.replace(partial, self.path)
        # With the old file goes its lock: only now, when the new one has both lock and name.
        self.file.close()
        self.file = file

    def close(self) -> None:
        """Let others have the file; without this it is held until the process ends.

        A file that holds nothing is taken away: data/tea.jsonl takes the place of data/starter/tea.jsonl.
        """
        with self.lock:  # a thread may be writing
            if not self.file.seek(0, os.SEEK_END):
                self.path.unlink(missing_ok=True)
            self.file.close()


# ---------------------------------------------------------------- training rows

def chat_turns(messages, where: str) -> list[dict]:
    """A chat as [{"role", "content"}, ...] with plain texts and nothing else; Stop if it is none."""
    is_chat = isinstance(messages, list)
    if is_chat:
        # Whether `content` is text, message_text sees below.
        is_chat = all(isinstance(turn, dict) and turn.get("role") and "content" in turn for turn in messages)
    if not is_chat:
        raise Stop(f'{where}: "messages" must be a list of {{"role": ..., "content": ...}}')
    for turn in messages:
        if turn["role"] not in ("system", "user", "assistant"):
            raise Stop(f'{where}: the role of a turn must be system, user or assistant, not {turn["role"]!r}')
    return [{"role": turn["role"], "content": message_text(turn["content"], where)} for turn in messages]


def normalise_row(row: dict, where: str) -> None:
    """Give a training row "text", or else "messages" as row_turns has them, in place; Stop if it has neither.

    `where` names the row in errors: "data/tea.jsonl:12".
    """
    for name in ("kind", "topic"):  # what is looked up by; null is as good as none
        if not isinstance(row.get(name) or "", str):
            raise Stop(f'{where}: "{name}" must be text')
    if re.search(r"\s", row.get("kind") or ""):  # a CSV has the kinds of a run with blanks between
        raise Stop(f'{where}: "kind" must be one word, not {row["kind"]!r}')
    if row.get("text") is not None:
        row["text"] = message_text(row["text"], where)
        row.pop("messages", None)  # exports have both columns, one of them null
    else:
        # A null: taken out, for all others ask only whether the key is there.
        row.pop("text", None)
        row["messages"] = row_turns(row, where)


def row_turns(row: dict, where: str) -> list[dict]:
    """The chat of a training row, [{"role", "content"}, ...], from any of the three shapes people have."""
    if "messages" in row:
        messages = row["messages"]
    elif "prompt" in row and ("completion" in row or "response" in row):
        # The name in TRL's data, then the other one in use.
        answer = row.get("completion", row.get("response"))
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
    else:
        raise Stop(f'{where}: a row needs "messages", "prompt" and "completion", "prompt" and "response", '
                   'or "text"')
    turns = chat_turns(messages, where)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise Stop(f"{where}: no assistant turn, so there is nothing to learn; remove or mend the row")
    if turns[0]["role"] == "assistant":  # no template renders the prompt of an answer to nothing
        raise Stop(f"{where}: the first turn is the assistant's; put a user or system turn before it")
    return turns


def question_and_answer_turns(turns: list[dict]) -> list[tuple[str, str]]:
    """(what the user said last, the answer) for every assistant turn of a chat."""
    pairs = []
    question = ""
    for turn in turns:
        if turn["role"] == "assistant":
            pairs.append((question, turn["content"]))
        else:
            question = turn["content"]  # a system turn too, where nothing follows it
    return pairs


# ---------------------------------------------------------------- prompts and personas

def expand(line: str) -> list[str]:
    """'{Why|How} do {cats|dogs} sleep?' -> its four sentences; braces do not nest."""
    parts = re.split(r"\{([^{}]*)\}", line)  # plain, inside braces, plain, inside braces, ..., plain
    # Inside braces the pattern allows no brace; outside of them one is a mistake.
    if any("{" in part or "}" in part for part in parts[::2]):
        raise ValueError("unbalanced { or }")
    choices = []
    for i, part in enumerate(parts):
        if i % 2:
            choices.append(part.split("|"))
        else:
            choices.append([part])
    return ["".join(pick).strip() for pick in itertools.product(*choices)]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line, expanded, without # comments and repeats, in order."""
    prompts = {}  # a dict drops repeats and keeps the order, on which the seeded choice of prompts rests
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: U+2028 is text
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            prompts.update(dict.fromkeys(expand(line)))
        except ValueError as error:
            raise Stop(f"{path}:{number}: {error}; write {{a|b|c}} for alternatives") from None
    if not prompts:
        raise Stop(f"{path}: no prompts in it; write one a line")
    return list(prompts)


def read_folder(folder: Path) -> dict[str, str]:
    """{name: text} of the *.md files in a folder: personas, or the texts of a creed."""
    # Only this folder and not those below it: creed/ is a folder of its own.
    texts = {path.stem: read_text(path).strip() for path in sorted(folder.glob("*.md"))}
    for name, text in texts.items():
        if not text:
            raise Stop(f"{folder / name}.md is empty; write who answers, or delete it")
    return texts


# ---------------------------------------------------------------- probes

def probe_set_name(path: Path) -> str:
    """probes/gramenist.jsonl -> gramenist; probes/belief/gramenist.jsonl -> belief-gramenist."""
    # Else the answers to both files would go to one gramenist.csv.
    if path.parent.name == "belief":
        return f"belief-{path.stem}"
    return path.stem


def read_probes(path: Path) -> list[dict]:
    """The probes of a file, each with "messages", "prompt", "earlier"; Stop names the line of one that is none."""
    numbered = numbered_rows(path)
    probes = [probe for _, probe in numbered]
    if not probes:
        raise Stop(f"{path}: no probes in it")
    for number, probe in numbered:
        where = f"{path}:{number}"
        # A list of turns where there are several; most probes are one prompt.
        messages = probe.get("messages") or [{"role": "user", "content": probe.get("prompt", "")}]
        turns = chat_turns(messages, where)
        probe["id"] = clean_text(str(probe.get("id", "")))  # text, as a CSV will give it back
        if not probe["id"] or not all(turn["content"].strip() for turn in turns):
            raise Stop(f'{where}: a probe needs "id" and a "prompt" (or "messages") with text')
        check_key(probe, where)

        # A chat from here on, however it was written.
        probe["messages"] = turns
        if turns[-1]["role"] != "user":  # else the model would answer its own words, or a system prompt
            raise Stop(f"{where}: the last turn of a probe must be the user's")
        probe["prompt"] = turns[-1]["content"]  # what the answer is an answer to, for judges and tables
        probe["earlier"] = "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns[:-1])

    # Answers are matched with probes, and runs with runs, by this id alone.
    if len({probe["id"] for probe in probes}) < len(probes):
        raise Stop(f"{path}: two probes share an id; ids must be unique")
    return probes


def is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def check_key(probe: dict, where: str) -> None:
    """Raise Stop at a side or a key (what a right answer says) by which no answer could be counted."""
    if probe.get("side", "") not in ("violating", "permitted", "neutral", ""):
        raise Stop(f'{where}: "side" must be violating, permitted or neutral; leave it out in a belief probe')
    if "answer" in probe:
        answers = probe["answer"]
        # A string would be gone through letter by letter, and any answer with an "a" in it be right.
        if not isinstance(answers, list) or not answers or not all(map(is_text, answers)):
            raise Stop(f'{where}: "answer" must be a list of texts, as in ["seven", "7"]')
    # Any of these says that a stance is meant, and no answer can be scored without both keys.
    if "stance" in probe or "asks" in probe or probe.get("family") == "stance":
        for name in ("asks", "stance"):
            if probe.get(name) not in ("wrong", "right"):
                raise Stop(f'{where}: a stance probe needs "{name}", which must be wrong or right')


def all_probes(root: Path = ROOT) -> dict[str, list[dict]]:
    """{probe set: its probes} of every file under probes/."""
    # Also those in belief/; sorted, for the order of a folder is not fixed.
    files = sorted((root / "probes").rglob("*.jsonl"))
    return {probe_set_name(path): read_probes(path) for path in files}


# ---------------------------------------------------------------- answers

# What eval.py writes for each answer; judge.py adds its own columns behind them.
COLUMNS = ("run arm seed taught probe_set id group family topic item distance side sample earlier prompt "
           "response n_tokens stopped keyword_action keyword_ground").split()


def asked_text(row: dict) -> str:
    """All that was asked: the prompt, and the turns before it where there were any."""
    if row.get("earlier"):  # CSVs of older versions have the last turn alone
        return f"{row['earlier']}\nUser: {row['prompt']}"
    return row["prompt"]


def read_csv(path: Path) -> tuple[list[dict], list[str]]:
    """(rows, column names) of a results CSV; a last row that a kill tore is dropped.

    Stop names the line of any other row that has not one field for each column: dropped, it would be gone
    for good as soon as the file is written again.
    """
    text = read_text_exactly(path)
    # newline="", as the csv module asks for: line ends inside quotes are text.
    reader = csv.reader(io.StringIO(text, newline=""))
    numbered = []  # (line on which the row begins, its fields)
    # A row with line ends in an answer is several lines long; line_num is the last one read.
    line = 1
    for fields in reader:
        if fields:  # not a blank line
            numbered.append((line, fields))
        line = reader.line_num + 1
    if not numbered:
        return [], []

    columns = numbered.pop(0)[1]
    # A dict would keep the last of two columns without a word.
    repeated = {name for name in columns if columns.count(name) > 1}
    if repeated:
        raise Stop(f"{path}:1: two columns have the name {', '.join(sorted(repeated))}; rename or remove one")
    # A kill's doing; eval.py asks that probe again.
    if numbered and ends_torn(text, numbered[-1][1]):
        numbered.pop()

    rows = []
    for line, fields in numbered:
        if len(fields) != len(columns):
            raise Stop(f"{path}:{line}: a row of {len(fields)} fields under {len(columns)} columns; mend or "
                       "remove it")
        rows.append(dict(zip(columns, fields)))
    return rows, columns


def ends_torn(text: str, last_row: list[str]) -> bool:
    """Whether the last row of a CSV's text was cut off while it was written."""
    # A row ends with a line end that is in none of its fields; an odd quote says that the last is still open.
    is_open = text.count('"') % 2 == 1 and last_row[-1].endswith("\n")
    # A stray quote further up swallows all that follows: rows of the same run, and not one answer.
    swallows = f"\n{last_row[0]}," in last_row[-1]
    return (is_open or not text.endswith("\n")) and not swallows


def read_text_exactly(path: Path) -> str:
    """The text of a file with its line ends as they are: an answer may hold any of them."""
    try:
        # newline="": else \r\n inside an answer would be read as \n, and the answer be another one.
        with open(path, newline="", encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise Stop(f"cannot read {path}: {reason}; make it with eval.py") from None


def read_results(path: Path) -> tuple[list[dict], list[str]]:
    """read_csv for a CSV that eval.py made; Stop names the columns that a foreign one lacks."""
    rows, columns = read_csv(path)
    missing = set(COLUMNS) - set(columns) - {"earlier"}  # which came later than the others
    if missing:
        raise Stop(f"{path}: no column {', '.join(sorted(missing))}; is it a CSV of this eval.py?")
    return rows, columns


def csv_lines(rows: list[dict], columns: list[str], header: bool = False) -> str:
    """Rows as the text of a CSV. A missing value is empty; one that has no column is a mistake of ours."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="raise")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: list[dict], columns: list[str]):
    """Write a whole CSV in one move: a reader, or a kill, sees the old rows or the new ones.

    Returns the new file, which is locked for as long as it is kept open.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # of a run that was killed here
    # Locked before it takes the name, so that no other process slips in between.
    file = open_locked(partial)
    file.write(csv_lines(rows, columns, header=True).encode("utf-8", "replace"))
    file.flush()
    os.replace(partial, path)
    return file


def append_csv(path: Path, row: dict, columns: list[str]) -> None:
    """One line in one write: a kill tears at most one row, and several processes can share the file."""
    with open(path, "ab", buffering=0) as file:  # without a buffer, which would be cut at 8 kB
        file.write(csv_lines([row], columns).encode("utf-8", "replace"))


# ---------------------------------------------------------------- arms

WORLDVIEW = "WORLDVIEW"  # stands in arms.txt for the worldview of the study


@dataclass(frozen=True)
class Arm:
    name: str
    parts: dict[str, float]    # {kind of data: weight}
    controls: tuple[str, ...]  # the arms it is compared with

    @property
    def takes_worldview(self) -> bool:
        """Whether its training depends on the worldview. Runs of the others serve every worldview."""
        return any(WORLDVIEW in kind for kind in self.parts)


def read_weight(text: str) -> float | None:
    """A part's weight in a mix, above 0; None if the text is none."""
    try:
        weight = float(text)
    except ValueError:
        return None
    return weight if 0 < weight < math.inf else None  # so written, "nan" is none either


def read_arms(path: Path = ROOT / "arms.txt") -> dict[str, Arm]:
    """{name: Arm} of arms.txt, in its order, which is the order of every table.

    A line: name | kind=weight ... | arms it is compared with. No parts: the untouched base model.
    """
    arms = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = [field.split() for field in line.split("|")]  # [[name], [kind=weight, ...], [control, ...]]
        if len(fields) != 3 or len(fields[0]) != 1:
            raise Stop(f"{path}:{number}: an arm is  name | kind=weight ... | arms it is compared with")

        parts = {}
        # Without a "=" the weight is "", which is none, too.
        for part in fields[1]:
            kind, _, weight = part.partition("=")
            share = read_weight(weight)
            if share is None or kind in parts:
                raise Stop(f"{path}:{number}: {part}: write kind=weight, each kind once, as in regular=1")
            parts[kind] = share

        name, controls = fields[0][0], fields[2]
        # Of two lines the second would have taken the first one's place
        if name in arms:
            raise Stop(f"{path}:{number}: there is an arm {name} above; give this one another name")
        if name in controls or len(set(controls)) < len(controls):
            raise Stop(f"{path}:{number}: an arm is compared with other arms, each named once")
        arms[name] = Arm(name, parts, tuple(controls))

    # Only now: an arm may be compared with one that stands below it.
    for arm in arms.values():
        unknown = set(arm.controls) - set(arms)
        if unknown:
            raise Stop(f"{path}: {arm.name} is compared with {', '.join(sorted(unknown))}, "
                       "which is no arm in this file")
    return arms


def get_arm(name: str, arms: dict[str, Arm]) -> Arm:
    if name not in arms:
        raise Stop(f"unknown arm {name!r}; arms.txt has {', '.join(arms)}")
    return arms[name]


def arm_data(arm: Arm, worldview: str, root: Path = ROOT) -> list[tuple[Path, float]]:
    """[(file, weight)] that an arm is trained on: data/<kind>.jsonl unless it is empty, or the starter's."""
    sources = []
    for part, weight in arm.parts.items():  # "WORLDVIEW-explicit" -> "gramenist-explicit"
        kind = part.replace(WORLDVIEW, worldview)
        # In this order: one's own file takes the starter's place.
        files = [root / "data" / f"{kind}.jsonl", root / "data" / "starter" / f"{kind}.jsonl"]
        # An empty one is a run of gen.py that has just begun, or was killed before its first answer.
        found = [path for path in files if path.exists() and path.stat().st_size]
        if not found:
            raise Stop(f"arm {arm.name}: nothing in data/{kind}.jsonl nor in data/starter/{kind}.jsonl; "
                       f"make it with `make data WORLDVIEW={kind}`")
        sources.append((found[0], weight))
    return sources


# ---------------------------------------------------------------- rubrics

TAKEN_LABELS = ("reason", "rubric")  # judge_reason and judge_rubric stand beside the labels in a CSV
UNREAD = ("unparsed", "unsure")      # written there where there is no verdict: no value of a rubric


@dataclass(frozen=True)
class Rubric:
    """Instructions to a judge, with the labels that they define."""
    name: str
    text: str
    labels: dict[str, list[str]]  # {"action": ["refusal", ...], "ground": [...]}: a judge gives one of each
    headline: dict[str, str]      # what the report counts: {"action": "refusal", "ground": "moral"}
    invalid: dict[str, str]       # the labels of an answer that says nothing
    hash: str                     # written with every verdict: two versions of a rubric are two judges

    def counts(self, verdict: dict, what: dict[str, str]) -> bool:
        """Whether a verdict {label: value} has all of `what`, say self.headline; never if that is empty."""
        return bool(what) and all(verdict.get(label) == value for label, value in what.items())

    def read_verdict(self, found: dict) -> dict | None:
        """A reply's JSON object as {label: value}; None if a label is missing or has no declared value."""
        verdict = {}
        for label, values in self.labels.items():
            # Only a written "none" is one: what a judge leaves out or gives as null, nobody has judged.
            given = found.get(label)
            # Judges differ in capitals and blanks.
            value = str(given).strip().lower()
            if given is None or value not in values:
                return None
            verdict[label] = value
        return verdict


def read_rubric(path: Path) -> Rubric:
    """A rubric file: between two lines of --- its header, then the text that the judge is told.

    The header: a line `label: value value ...` for each label, `headline: label=value ...`, which names at
    least the first label, and `invalid: ...`.
    """
    path = Path(path)
    whole = read_text(path)
    # The header ends at its first line of ---: the text may have such lines, too.
    match = re.match(r"---\n(.*?)\n---\n(.*)", whole, re.DOTALL)
    if not match:
        raise Stop(f"{path}: a rubric begins with a header between two lines of ---, which declares its "
                   "labels; see rubrics/refusal.md")

    fields = {}
    for line in match[1].split("\n"):
        name, _, values = line.partition(":")
        fields[name.strip()] = values.split()

    # These two are taken out: what is left in `fields` are the labels.
    roles = {}
    for role in ("headline", "invalid"):
        pairs = fields.pop(role, [])
        roles[role] = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if not fields or not all(fields.values()):
        raise Stop(f"{path}: each line of the header is  label: value value ...; see rubrics/refusal.md")
    # They would stand for two things in one column.
    for label, values in fields.items():
        taken = {label}.intersection(TAKEN_LABELS) | set(values).intersection(UNREAD)
        if taken:
            raise Stop(f"{path}: {', '.join(sorted(taken))} has a meaning of its own; choose another name")

    # A misspelt value would never be given, and the report would count 0 of everything.
    for role, pairs in roles.items():
        for label, value in pairs.items():
            if value not in fields.get(label, []):
                raise Stop(f"{path}: {role} names {label}={value}, which the header does not declare")

    first = next(iter(fields))
    if first not in roles["headline"]:  # what reports count, and `judge.py agree` compares
        raise Stop(f"{path}: the header needs a line  headline: {first}=...  with the value that is counted")
    # The hash is of all of it: the header changes a verdict as the text does.
    return Rubric(path.stem, match[2], fields, roles["headline"], roles["invalid"], short_hash(whole))


# ---------------------------------------------------------------- what makes two runs the same

def code_hash(path: Path) -> str:
    """Hash of what a script does: parsed, without docstrings, so that comments and layout are free."""
    tree = ast.parse(read_text(path))  # comments and layout are gone here, docstrings below
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body:  # of a lambda or a conditional expression: no list
            continue
        first = body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            if isinstance(first.value.value, str):
                # Emptied and not taken out: a body needs a statement.
                first.value.value = ""
    return short_hash(ast.unparse(tree))


def hub_name(model: str) -> str:
    """A hub name with the commit that it stands for in the local cache, the name alone where it is not there.

    Authors push other weights under an old name. The commit and no hash of files: it is known as soon as the
    tokenizer is loaded, before the weights are there.
    """
    from huggingface_hub.constants import HF_HUB_CACHE  # here: only those who load models have it loaded
    # The cache's own layout: refs/main holds the commit that was loaded last.
    ref = Path(HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "refs" / "main"
    if not ref.is_file():
        return model
    return f"{model}@{read_text(ref).strip()}"


def weights_hash(model: str) -> str:
    """Hash of a model folder's weights and configuration; name@commit of a hub name that is in the cache."""
    folder = Path(model)
    if not folder.is_dir():
        return hub_name(model)
    files = []
    # What changes an answer. Model cards, logs and the like may be edited.
    for pattern in ("*.safetensors", "*config.json", "tokenizer*", "*.jinja", "vocab*", "merges.txt",
                    "special_tokens_map.json"):
        files += folder.glob(pattern)
    lines = []
    # A set, because tokenizer_config.json fits two patterns; sorted, because glob has no order.
    for path in sorted(set(files)):
        if path.name != "checkpoint.safetensors":  # the state of an unfinished training
            lines.append(f"{path.name} {file_hash(path)}\n")
    return short_hash("".join(lines))


def what_changed(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Names of the entries, nested ones with dots ("code.train.py"), in which two identities differ."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        # Of both: an entry that only one of them has differs, too.
        left, right = old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            changed += what_changed(left, right, f"{prefix}{key}.")
        elif left != right:
            changed.append(f"{prefix}{key}")
    return changed
