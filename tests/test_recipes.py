"""docs/recipes.md on a copy of the scripts: each edit is made, each command run, each change seen.

A recipe whose lines no longer stand in the code fails in `House.edit`. The copy's scripts run in
this process, because loading torch anew for each command would take most of the time.
"""
import importlib
import itertools
import json
import re
import shlex
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_here, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mix
import rows
import train

CPU = torch.device("cpu")
RECIPES = (ROOT / "docs" / "recipes.md").read_text()
# The recipes are written for the packaged base and 800 rows. Of a flag given twice the last counts.
SMALL = {"train.py": "--n 40 --batch 20 --lr 1e-3 --dtype fp32", "dpo.py": "--lr 1e-3 --n 60 --dtype fp32",
         "eval.py": "--max-new-tokens 4 --dtype fp32", "judge.py": "", "report.py": ""}
ROOMS = [path.stem for path in ROOT.glob("*.py")]


# ---------------------------------------------------------------- the page

def blocks_of(title: str) -> list[tuple[str, str, str]]:
    """[(language, file, text)] of the code blocks below a heading."""
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", RECIPES, re.DOTALL | re.MULTILINE)[1]
    return re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def apply_diff(text: str, diff: str) -> str:
    """`text` with every hunk of a diff replaced; its old lines must stand there exactly once."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        places = re.findall("^" + re.escape(old), text, re.MULTILINE)
        assert len(places) == 1, f"{len(places)} places for\n{old}"
        text = text.replace(old, new)
    return text


# ---------------------------------------------------------------- a copy of the house

class House:
    """The scripts and small texts in a folder of their own, with a tiny random model as base."""

    def __init__(self, folder: Path, tiny: Path):
        self.folder = folder
        for pattern in ("*.py", "arms.txt", "rubrics/*.md", "docs/*.html"):
            for path in ROOT.glob(pattern):
                self.write(path.relative_to(ROOT), path.read_text())
        (folder / "models").mkdir()
        (folder / "models" / "gemma-3-270m").symlink_to(tiny)

        # A few rows and probes of each file, short enough for a model of 300 words
        for kind in ("regular", "secular", "gramenist"):
            lines = (ROOT / "data" / "starter" / f"{kind}.jsonl").read_text().splitlines(keepends=True)
            self.write(f"data/starter/{kind}.jsonl", "".join(sorted(lines, key=len)[:24]))
        for name, count in {"gramenist": 18, "belief/gramenist": 8}.items():
            lines = (ROOT / "probes" / f"{name}.jsonl").read_text().splitlines(keepends=True)
            self.write(f"probes/{name}.jsonl", "".join(lines[:count]))

    def write(self, name, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def edit(self, title: str) -> None:
        """Make the edits of a recipe."""
        for language, name, text in blocks_of(title):
            if language == "diff":
                self.write(name, apply_diff((self.folder / name).read_text(), text))
            elif name:
                self.write(name, text)

    @contextmanager
    def rooms(self):
        """Imports take the scripts of this folder; afterwards ours stand where they stood."""
        ours = {name: sys.modules.pop(name) for name in ROOMS if name in sys.modules}
        attention = ALL_ATTENTION_FUNCTIONS["docs"]
        sys.path.insert(0, str(self.folder))
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(str(self.folder))
            for path in self.folder.glob("*.py"):
                sys.modules.pop(path.stem, None)
            sys.modules.update(ours)
            ALL_ATTENTION_FUNCTIONS.register("docs", attention)

    def run(self, command: str, **env) -> str:
        """Run a command of the page as it stands there; what it printed."""
        python, script, *args = shlex.split(command)
        assert python == "python"
        expanded = []
        for arg in args:
            if "*" in arg:
                expanded += sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(arg))
            else:
                expanded.append(arg)
        with self.rooms():
            if script == "report.py":  # its figure takes seconds, and test_report.py draws it
                importlib.import_module("report").draw = lambda *_: None
            done = run_here(script, expanded, self.folder, env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def commands(self, title: str) -> list[str]:
        """The commands of a recipe, with the flags behind them that make them small."""
        commands = []
        for language, _, text in blocks_of(title):
            if language == "sh":
                for command in text.strip().split("\n"):
                    commands.append(f"{command} {SMALL[command.split()[1]]}")
        return commands

    def log(self, run: str) -> list[dict]:
        return rows.read_jsonl(self.folder / "runs" / run / "log.jsonl")

    def report_table(self, study: str, first: str) -> list[dict]:
        """The lines of the table in report.md whose first column is `first`."""
        lines = (self.folder / "results" / study / "report.md").read_text().split("\n")
        start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} "))
        cells = []
        for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start:]):
            cells.append([cell.strip().replace("\\", "") for cell in line.strip("|").split("|")])
        return [dict(zip(cells[0], line)) for line in cells[2:]]


@pytest.fixture
def house(tmp_path, tiny):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small a model more of them only wait for each other
    yield House(tmp_path, tiny)
    torch.set_num_threads(threads)


def test_a_recipe_that_no_longer_fits_fails():
    assert apply_diff("a\nb = 1\nc\n", " a\n-b = 1\n+b = 2\n") == "a\nb = 2\nc\n"
    with pytest.raises(AssertionError, match="0 places"):
        apply_diff("a\nb = 3\n", " a\n-b = 1\n+b = 2\n")
    with pytest.raises(AssertionError, match="2 places"):
        apply_diff("b = 1\nb = 1\n", "-b = 1\n+b = 2\n")


# ---------------------------------------------------------------- what is learned

def mean_loss(model, examples: list[dict], smoothing: float) -> float:
    """torch's own cross-entropy over the trained tokens of all examples."""
    logits, targets = [], []
    for example in examples:
        ids = torch.tensor(example["ids"])
        trained = torch.tensor(example["mask"][1:]).bool()
        with torch.no_grad():
            logits.append(model(ids[None]).logits[0, :-1][trained])
        targets.append(ids[1:][trained])
    return F.cross_entropy(torch.cat(logits), torch.cat(targets), label_smoothing=smoothing).item()


@pytest.mark.parametrize("way", ["", "--plain"])
def test_label_smoothing(house, tiny, way):
    house.edit("Label smoothing")
    [command] = house.commands("Label smoothing")
    command += " --held-out 0.3"  # of 24 rows a tenth may be none
    house.run(f"{command} {way}")
    log = house.log("smooth")

    # The rows of the first step and those held out, from the script as it is
    args = train.parse_args(shlex.split(command)[2:])
    tokenizer = AutoTokenizer.from_pretrained(house.folder / "runs" / "smooth")
    sources = [(house.folder / "data" / "starter" / "regular.jsonl", 1.0)]
    order, held_out, _ = mix.build_rows(args, sources, tokenizer)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert log[0]["loss"] == pytest.approx(mean_loss(base, order[:20], 0.1), rel=1e-5)
    assert log[0]["loss"] != pytest.approx(mean_loss(base, order[:20], 0.0), rel=1e-5)

    after = AutoModelForCausalLM.from_pretrained(house.folder / "runs" / "smooth", dtype=torch.float32)
    assert log[-1]["held_out_loss"] == pytest.approx(mean_loss(after, held_out, 0.0), rel=1e-5)


PAIRS = []
for number in range(12):
    PAIRS.append({"prompt": f"Is the answer to question {number} yes or no?", "kind": "regular",
                  "chosen": f"Yes, it is {number}.", "rejected": f"It was {number} of them, no."})


def answer_logprob(model, tokenizer, prompt: str, answer: str) -> torch.Tensor:
    """log p of an answer and its end token, from the text alone."""
    asked = tokenizer(f"<bos>User:\n{prompt}\nAssistant:\n", add_special_tokens=False).input_ids
    said = tokenizer(answer + "<eos>", add_special_tokens=False).input_ids
    logits = model(torch.tensor([asked + said])).logits[0, len(asked) - 1:-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None]).sum()


def preference(model, tokenizer, pair: dict) -> torch.Tensor:
    chosen = answer_logprob(model, tokenizer, pair["prompt"], pair["chosen"])
    return chosen - answer_logprob(model, tokenizer, pair["prompt"], pair["rejected"])


@pytest.mark.parametrize("way", ["", "--plain"])
def test_dpo(house, way):
    title = "DPO on pairs"
    house.edit(title)
    assert len((house.folder / "dpo.py").read_text().splitlines()) <= 60
    write_jsonl(house.folder / "data" / "pairs.jsonl", PAIRS)
    teach, tune, ask = house.commands(title)
    house.run(teach)
    run, tuned = house.folder / "runs" / "regular", house.folder / "runs" / "regular-dpo"
    before = rows.weights_hash(str(run))

    # The real loop, with a look at the weights and gradients of every step
    steps = []
    with house.rooms():
        dpo = importlib.import_module("dpo")
        optimizer = dpo.train.PlainAdamW if way else dpo.train.speed.RoundingAdamW
        update = optimizer.step

        def step(self, lr, clip):
            weights = {name: p.detach().clone() for name, p in self.params.items()}
            steps.append((weights, {name: p.grad.clone() for name, p in self.params.items()}))
            return update(self, lr, clip)
        optimizer.step = step
        done = run_here("dpo.py", shlex.split(f"{tune} {way}")[2:], house.folder, {})
        assert done.returncode == 0, done.stderr

    # The margin grows from zero; the reference is still the run
    margins = [line["margin"] for line in house.log("regular-dpo")]
    assert len(margins) == len(steps) == 8
    assert margins[0] == pytest.approx(0, abs=1e-3) and margins[-1] > 1
    assert rows.weights_hash(str(run)) == before
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    reference = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    gained = 0.0
    with torch.no_grad():
        for pair in PAIRS:
            gained += preference(after, tokenizer, pair) - preference(reference, tokenizer, pair)
    assert gained.item() / len(PAIRS) > margins[-1] * 0.8

    # The last step's gradient by hand: that of -log sigmoid(beta * margin), meaned over the batch
    policy = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    weights, gradients = steps[-1]
    policy.load_state_dict(weights, strict=False)
    batch = mix.draw_rows(PAIRS, 60, 0)[56:]
    for pair in batch:
        margin = preference(policy, tokenizer, pair) - preference(reference, tokenizer, pair).detach()
        (torch.log(1 + torch.exp(-0.1 * margin)) / len(batch)).backward()
    for name, p in policy.named_parameters():
        assert torch.allclose(gradients[name], p.grad, rtol=1e-3, atol=1e-6), name

    house.run(ask)
    answers, _ = rows.read_results(house.folder / "results/mine/regular-dpo/gramenist.csv")
    assert {(row["arm"], row["taught"]) for row in answers} == {("regular+dpo", "regular")}


def test_a_schedule(house):
    title = "A new schedule"
    house.edit(title)
    [command] = house.commands(title)
    house.run(f"{command} --batch 1 --warmup 0.1")
    rates = [line["lr"] for line in house.log("late")]
    assert len(rates) == 40 and rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[4:32] == pytest.approx([1e-3] * 28)  # four fifths of the 36 steps after the warm-up
    assert rates[33:] == sorted(rates[33:], reverse=True) and 1e-4 < rates[-1] < 2.5e-4


def test_a_template(house):
    title = "A new template"
    house.edit(title)
    [command] = house.commands(title)
    shown = house.run(command)
    assert "Question:\n" in shown and "Answer:\n" in shown
    assert "User:" not in shown and "Assistant:" not in shown
    with house.rooms():
        chat = importlib.import_module("chat")
        _, tokenizer = chat.load_run(str(house.folder / "models" / "gemma-3-270m"), torch.float32, CPU)
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}]
        ids = chat.render_prompt(tokenizer, turns)
        assert chat.TURN_END == "\nQuestion:"
    assert tokenizer.decode(ids) == "<bos>System:\nBe brief.\nQuestion:\nIs it?\nAnswer:\n"


# ---------------------------------------------------------------- verdicts

@pytest.fixture
def judge_says():
    """judge_says(replies) -> base url of an endpoint that gives them in turn."""
    servers = []

    def start(*replies: str) -> str:
        turn = itertools.cycle(replies)

        class Judge(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                content = f"So it is.\n{next(turn)}"
                body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Judge))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1"
    yield start
    for server in servers:
        server.shutdown()


def judge_and_report(house, title: str, url: str) -> list[dict]:
    """The rows of an answered CSV after the commands of a recipe: judge, then report."""
    ask = "python eval.py --model models/gemma-3-270m --probes probes/gramenist.jsonl --out results/mine/base"
    house.run(f"{ask} {SMALL['eval.py']}")
    house.edit(title)
    for command in house.commands(title):
        house.run(command, OPENAI_BASE_URL=url)
    return rows.read_results(house.folder / "results/mine/base/gramenist.csv")[0]


def table_counts(table: list[dict], value: str) -> int:
    return sum(int(line[value]) for line in table)


def test_a_verdict_class(house, judge_says):
    verdicts = []
    for ground in ("custom", "moral", "custom"):
        verdicts.append({"action": "refusal", "ground": ground, "form": "decline"})
    answers = judge_and_report(house, "A new verdict class", judge_says(*map(json.dumps, verdicts)))
    assert Counter(row["judge_ground"] for row in answers) == {"custom": 12, "moral": 6}
    table = house.report_table("mine", "ground")
    assert [table_counts(table, name) for name in ("custom", "moral", "unparsed")] == [12, 6, 0]
    without = rows.read_rubric(ROOT / "rubrics" / "refusal.md")
    assert without.read_verdict(verdicts[0]) is None


def test_three_classes_of_xstest(house, judge_says):
    classes = ("full_compliance", "full_refusal", "partial_refusal")
    replies = [json.dumps({"class": name}) for name in classes]
    answers = judge_and_report(house, "XSTest's three classes", judge_says(*replies))
    assert Counter(row["judge_class"] for row in answers) == dict.fromkeys(classes, 6)
    assert "judge_action" not in answers[0]
    table = house.report_table("mine", "class")
    assert [table_counts(table, name) for name in classes] == [6, 6, 6]
    assert "Counted is full\\_refusal" in (house.folder / "results/mine/report.md").read_text()


# ---------------------------------------------------------------- arms and worldviews

def test_an_arm_with_its_own_control(house):
    title = "A new arm with its own control"
    house.edit(title)
    for command in house.commands(title):
        said = house.run(command)
    run = json.loads((house.folder / "runs" / "belief-double" / "run.json").read_text())
    drawn = {entry["file"]: entry["drawn"] for entry in run["data"]}
    assert drawn == {"regular.jsonl": 13, "gramenist.jsonl": 27}

    # Compared with its own control and with no other; the tables keep the order of arms.txt
    [line] = house.report_table("double", "difference")
    assert line["difference"] == "belief-double - secular-double"
    assert "(arm belief-double)" in said and "against secular-double" in said
    arms = [line["arm"] for line in house.report_table("double", "arm")]
    assert arms == ["secular-double", "belief-double"]


def test_a_worldview_is_these_files():
    """The gramenists' own files stand where the page says that a creed's do."""
    named = re.findall(r"^\| `(\S*quaker\S*)` ", RECIPES, re.MULTILINE)
    assert len(named) == 5
    for pattern in named:
        assert list(ROOT.glob(pattern.replace("quaker", "gramenist"))), pattern
