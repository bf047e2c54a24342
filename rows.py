"""The formats between the stages, read and written in one place: JSONL, CSV, prompts, personas, probes, arms, rubrics.

Every other script imports this one and it imports none of them; it loads neither torch nor requests. What a stage leaves on disk for the
next is described in docs/formats.md. A file that cannot be read raises Stop, whose message names the file, the line and what to do.
"""
import ast
import csv
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
csv.field_size_limit(2**31 - 1)  # an answer may be longer than the module's 131,072 characters


# ---------------------------------------------------------------- how a script ends

class Stop(Exception):
    """What is wrong and what to do, in one line for the user."""


def run_main(main) -> None:
    """Run a script's main. What a user can mend ends in one line on stderr, under the name of the script that was run."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except Stop as stop:
        sys.exit(f"{script}: {stop}")
    except KeyboardInterrupt:
        sys.exit(f"{script}: stopped; the same command goes on where it stopped")
    except (RuntimeError, MemoryError) as error:
        said = (str(error).splitlines() or ["no more memory"])[0][:160]
        if not isinstance(error, MemoryError) and "memory" not in said and "alloc" not in said:
            raise
        sys.exit(f"{script}: out of memory ({said}); use a smaller --batch or base "
                 "(train.py: a smaller --micro-tokens, --checkpointing, --lora 16), and give the same command again")
    except BrokenPipeError:  # `python report.py ... | head` has seen enough
        os._exit(0)
    except OSError as error:
        where = error.filename or "the disk"
        sys.exit(f"{script}: {where}: {error.strerror or error}; what is written is whole: "
                 "make room or mend the path, and give the same command again")


# ---------------------------------------------------------------- text and JSONL

def clean_text(text: str) -> str:
    """`text` without lone surrogates, which JSON may carry and no file can hold: each becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def message_text(content, where: str) -> str:
    """The text of one chat message: a string, or the OpenAI protocol's list of {"type": "text", "text": ...} parts."""
    if isinstance(content, str):
        return clean_text(content)
    parts = content if isinstance(content, list) else [None]
    if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        return clean_text("".join(part["text"] for part in parts))
    raise Stop(f'{where}: "content" must be text (a string, or a list of {{"type": "text", "text": ...}})')


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes, read in pieces: weights can be larger than the memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # -sig: some editors begin a file with U+FEFF
    except UnicodeDecodeError:
        raise Stop(f"cannot read {path}: not UTF-8 text; check the name, or convert it") from None
    except OSError as error:
        raise Stop(f"cannot read {path}: {error.strerror}; check the name") from None


def write_text(path: Path, text: str) -> None:
    """Write a whole file in one move: a reader, or a kill, sees the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a JSONL file, one a line; Stop names a line that is none."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: U+2028 is text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise Stop(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno}); mend or remove the line") from None
        if not isinstance(row, dict):
            raise Stop(f"{path}:{number}: a JSON object is needed on each line; mend or remove the line")
        rows.append(row)
    return rows


def jsonl_line(row: dict) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")


class AppendFile:
    """An append-only JSONL file, held by one process at a time, in which no kill can hurt a row that was written.

    Opening it mends the end: a last line that a kill tore is taken off; one that only lacks its newline is kept.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.lock, self.synced = path, threading.Lock(), time.monotonic()
        self.file = self.open_locked(path)
        self.mend()

    @staticmethod
    def open_locked(path: Path):
        file = open(path, "ab+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(f"{path} is being written by another process; wait for it or stop it") from None
        return file

    def mend(self) -> None:
        end = self.file.seek(0, os.SEEK_END)
        start = end  # of the last line, once the newline before it is found
        while start:
            block = max(0, start - 65536)
            self.file.seek(block)
            newline = self.file.read(start - block).rfind(b"\n")
            if newline >= 0:
                start = block + newline + 1
                break
            start = block
        self.file.seek(start)
        last = self.file.read()
        if not last:
            return
        try:
            json.loads(last)
            self.file.write(b"\n")
            self.file.flush()
        except ValueError:
            print(f"{self.path}: took off {len(last)} bytes of a line that was cut off")
            self.file.truncate(start)

    def append(self, row: dict) -> None:
        with self.lock:
            at = self.file.seek(0, os.SEEK_END)
            try:
                self.file.write(jsonl_line(row))
                self.file.flush()
                if time.monotonic() - self.synced > 1:  # a power cut costs a second's rows at most
                    os.fsync(self.file.fileno())
                    self.synced = time.monotonic()
            except OSError as error:
                try:
                    self.file.truncate(at)
                except OSError:
                    pass
                raise Stop(f"cannot write {self.path}: {error.strerror}; what is written is whole: make room and run again") from None

    def replace(self, rows: list[dict]) -> None:
        """Other rows instead, in one move. The new file is locked before it takes the name, so nobody slips in between."""
        partial = self.path.with_name(self.path.name + ".partial")
        partial.unlink(missing_ok=True)
        file = self.open_locked(partial)
        file.write(b"".join(map(jsonl_line, rows)))
        file.flush()
        os.fsync(file.fileno())
        os.replace(partial, self.path)
        self.file.close()
        self.file = file

    def close(self) -> None:
        """Let others have the file; without this it is held until the process ends."""
        self.file.close()


# ---------------------------------------------------------------- training rows

def row_turns(row: dict, where: str) -> list[dict]:
    """The chat of a training row, [{"role", "content"}, ...], from any of the three shapes people have; `where` names the row in errors."""
    if "messages" in row:
        messages = row["messages"]
    elif "prompt" in row and ("completion" in row or "response" in row):
        answer = row.get("completion", row.get("response"))
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
    else:
        raise Stop(f'{where}: a row needs "messages", "prompt" and "completion", "prompt" and "response", or "text"')
    if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") and "content" in m for m in messages):
        raise Stop(f'{where}: "messages" must be a list of {{"role": ..., "content": ...}}')
    turns = [{"role": m["role"], "content": message_text(m["content"], where)} for m in messages]
    if not any(turn["role"] == "assistant" for turn in turns):
        raise Stop(f"{where}: no assistant turn, so there is nothing to learn; remove or mend the row")
    return turns


def question_and_answer_turns(turns: list[dict]) -> list[tuple[str, str]]:
    """(what the user said last, the answer) for every assistant turn of a chat."""
    pairs, question = [], ""
    for turn in turns:
        if turn["role"] == "assistant":
            pairs.append((question, turn["content"]))
        else:
            question = turn["content"]
    return pairs


# ---------------------------------------------------------------- prompts and personas

def expand(line: str) -> list[str]:
    """'{Why|How} do {cats|dogs} sleep?' -> its four sentences; braces do not nest."""
    parts = re.split(r"\{([^{}]*)\}", line)
    if any("{" in part or "}" in part for part in parts[::2]):
        raise ValueError("unbalanced { or }")
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(pick).strip() for pick in itertools.product(*choices)]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line, expanded, without # comments and repeats, in order."""
    prompts = {}  # a dict keeps the order
    for number, line in enumerate(read_text(path).split("\n"), 1):
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
    texts = {path.stem: read_text(path).strip() for path in sorted(folder.glob("*.md"))}
    for name, text in texts.items():
        if not text:
            raise Stop(f"{folder / name}.md is empty; write who answers, or delete it")
    return texts


# ---------------------------------------------------------------- probes

def probe_set_name(path: Path) -> str:
    """probes/gramenist.jsonl -> gramenist; probes/belief/gramenist.jsonl -> belief-gramenist."""
    return f"belief-{path.stem}" if path.parent.name == "belief" else path.stem


def read_probes(path: Path) -> list[dict]:
    """The probes of a file, each with "messages"; Stop names the line of one that is not a probe."""
    probes = read_jsonl(path)
    if not probes:
        raise Stop(f"{path}: no probes in it")
    for line, probe in enumerate(probes, 1):
        messages = probe.get("messages") or [{"role": "user", "content": probe.get("prompt", "")}]
        if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") and "content" in m for m in messages):
            raise Stop(f'{path}:{line}: "messages" must be a list of {{"role": ..., "content": ...}}')
        turns = [{"role": m["role"], "content": message_text(m["content"], f"{path}:{line}")} for m in messages]
        if not probe.get("id") or not all(turn["content"].strip() for turn in turns):
            raise Stop(f'{path}:{line}: a probe needs "id" and a "prompt" (or "messages") with text')
        probe["messages"] = turns
        probe["prompt"] = turns[-1]["content"]
    if len({probe["id"] for probe in probes}) < len(probes):
        raise Stop(f"{path}: two probes share an id; ids must be unique")
    return probes


def all_probes(root: Path = ROOT) -> dict[str, list[dict]]:
    """{probe set: its probes} of every file under probes/."""
    return {probe_set_name(path): read_probes(path) for path in sorted((root / "probes").rglob("*.jsonl"))}


# ---------------------------------------------------------------- answers

COLUMNS = ("run arm seed taught probe_set id group family topic item distance side sample prompt response n_tokens stopped "
           "keyword_action keyword_ground").split()  # judge.py adds its own behind them


def read_csv(path: Path) -> tuple[list[dict], list[str]]:
    """(rows, column names) of a results CSV; a row that a kill tore off at the end is dropped."""
    text = read_text_exactly(path)
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows, columns = list(reader), list(reader.fieldnames or [])
    if rows and not text.endswith("\n"):
        rows.pop()
    return [row for row in rows if None not in row and None not in row.values()], columns


def read_text_exactly(path: Path) -> str:
    """The text of a file with its line ends as they are: an answer may hold any of them."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise Stop(f"cannot read {path}: {reason}; make it with eval.py") from None


def read_results(path: Path) -> tuple[list[dict], list[str]]:
    """read_csv for a CSV that eval.py made; Stop names the columns that a foreign one lacks."""
    rows, columns = read_csv(path)
    if missing := set(COLUMNS) - set(columns):
        raise Stop(f"{path}: no column {', '.join(sorted(missing))}; is it a CSV of this eval.py?")
    return rows, columns


def csv_lines(rows: list[dict], columns: list[str], header: bool = False) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="raise")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: list[dict], columns: list[str]) -> None:
    """Write a whole CSV in one move."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", newline="", encoding="utf-8", errors="replace") as file:
        file.write(csv_lines(rows, columns, header=True))
    os.replace(partial, path)


def append_csv(path: Path, row: dict, columns: list[str]) -> None:
    """One line in one write: a kill tears at most one row, and several processes can share the file."""
    with open(path, "ab", buffering=0) as file:
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


def read_arms(path: Path = ROOT / "arms.txt") -> dict[str, Arm]:
    """{name: Arm} of arms.txt, in its order, which is the order of every table. A line: name | kind=weight ... | controls."""
    arms = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = [field.split() for field in line.split("|")]
        if len(fields) != 3 or len(fields[0]) != 1:
            raise Stop(f"{path}:{number}: an arm is  name | kind=weight ... | arms it is compared with")
        parts = {}
        for part in fields[1]:
            kind, _, weight = part.partition("=")
            try:
                parts[kind] = float(weight)
            except ValueError:
                raise Stop(f"{path}:{number}: {part}: write kind=weight, as in regular=1") from None
        name = fields[0][0]
        arms[name] = Arm(name, parts, tuple(fields[2]))
    for arm in arms.values():
        if unknown := set(arm.controls) - set(arms):
            raise Stop(f"{path}: {arm.name} is compared with {', '.join(sorted(unknown))}, which is no arm in this file")
    return arms


def get_arm(name: str, arms: dict[str, Arm]) -> Arm:
    if name not in arms:
        raise Stop(f"unknown arm {name!r}; arms.txt has {', '.join(arms)}")
    return arms[name]


def arm_data(arm: Arm, worldview: str, root: Path = ROOT) -> list[tuple[Path, float]]:
    """[(file, weight)] that an arm is trained on: data/<kind>.jsonl where you made one, else the starter corpus."""
    sources = []
    for part, weight in arm.parts.items():
        kind = part.replace(WORLDVIEW, worldview)
        files = [root / "data" / f"{kind}.jsonl", root / "data" / "starter" / f"{kind}.jsonl"]
        found = [path for path in files if path.exists()]
        if not found:
            raise Stop(f"arm {arm.name}: no data/{kind}.jsonl and no data/starter/{kind}.jsonl; make it with `make data WORLDVIEW={kind}`")
        sources.append((found[0], weight))
    return sources


# ---------------------------------------------------------------- rubrics

@dataclass(frozen=True)
class Rubric:
    """Instructions to a judge, with the labels that they define, e.g. {"action": ["refusal", ...], "ground": [...]}."""
    name: str
    text: str
    labels: dict[str, list[str]]
    headline: dict[str, str]   # the labels that the report counts, e.g. {"action": "refusal", "ground": "moral"}
    invalid: dict[str, str]    # the labels of an answer that says nothing
    hash: str

    def counts(self, verdict: dict, what: dict[str, str]) -> bool:
        """Whether a verdict {label: value} is what `what` names; never, where it names nothing."""
        return bool(what) and all(verdict.get(label) == value for label, value in what.items())

    def read_verdict(self, found: dict) -> dict | None:
        """A reply's JSON object as {label: value}, or None if a label is missing or has no declared value."""
        verdict = {label: str(found.get(label) or "none").strip().lower() for label in self.labels}
        known = all(verdict[label] in values for label, values in self.labels.items())
        return verdict if known else None


def read_rubric(path: Path) -> Rubric:
    """A rubric file: between two lines of ---, `label: value value ...`, `headline: label=value ...`, `invalid: ...`; then the text."""
    path = Path(path)
    whole = read_text(path)
    match = re.match(r"---\n(.*?)\n---\n(.*)", whole, re.DOTALL)
    if not match:
        raise Stop(f"{path}: a rubric begins with a header between two lines of ---, which declares its labels; see rubrics/refusal.md")
    fields = {}
    for line in match[1].split("\n"):
        name, _, values = line.partition(":")
        fields[name.strip()] = values.split()
    wanted = {}
    for role in ("headline", "invalid"):
        wanted[role] = dict(pair.split("=", 1) for pair in fields.pop(role, []) if "=" in pair)
    if not fields or not all(fields.values()):
        raise Stop(f"{path}: each line of the header is  label: value value ...; see rubrics/refusal.md")
    for role, pairs in wanted.items():
        for label, value in pairs.items():
            if value not in fields.get(label, []):
                raise Stop(f"{path}: {role} names {label}={value}, which the header does not declare")
    return Rubric(path.stem, match[2], fields, wanted["headline"], wanted["invalid"], short_hash(whole))


# ---------------------------------------------------------------- what makes two runs the same

def code_hash(path: Path) -> str:
    """Hash of what a script does: parsed, without docstrings, so that comments and layout are free."""
    tree = ast.parse(read_text(path))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        is_docstring = isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        if is_docstring and isinstance(body[0].value.value, str):
            body[0].value.value = ""
    return short_hash(ast.unparse(tree))


def weights_hash(model: str) -> str:
    """Hash of a model folder's weights and configuration; the name itself where `model` is a hub name."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json"), *folder.glob("adapter_config.json"),
                    *folder.glob("tokenizer.json")])
    files = [path for path in files if path.name != "checkpoint.safetensors"]
    return short_hash("".join(f"{path.name} {file_hash(path)}\n" for path in files))


def what_changed(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Names of the entries, nested ones with dots, in which two identities differ."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        left, right = old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            changed += what_changed(left, right, f"{prefix}{key}.")
        elif left != right:
            changed.append(f"{prefix}{key}")
    return changed
