"""gen.py: nothing lost, nothing asked twice, nothing leaked. Against a server that misbehaves on purpose."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line_error, run_script

import check
import gen
from rows import AppendFile, Stop

KEY = "sk-test-0123456789"


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A project with a small worldview of its own, as a user has who adds one, for gen.main() in this process."""
    for folder in ("prompts", "personas/tea", "personas/tea/creed", "probes"):
        (tmp_path / folder).mkdir(parents=True)
    numbers = "|".join(f"{a}-{b}" for a in ("alpha", "beta", "gamma", "delta") for b in range(50))
    (tmp_path / "prompts" / "tea.txt").write_text(f"# about tea\nWhat about tea number {{{numbers}}}?\n")
    for persona in ("monk", "host"):
        (tmp_path / "personas" / "tea" / f"{persona}.md").write_text(f"You are a tea {persona}.")
    for creed in ("first", "second"):
        (tmp_path / "personas" / "tea" / "creed" / f"{creed}.md").write_text(f"The {creed} book of tea.")
    for module in (gen, check):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    check.probe_texts.cache_clear()
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "MODEL"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    check.probe_texts.cache_clear()


def generate(url, n, *more, model="m") -> None:
    """`python gen.py tea --n N ...` in this process."""
    words = ["gen.py", "tea", "--n", n, "--model", model, "--base-url", url, *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in words])
        gen.main()


def rows_of(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def sent(log) -> list[str]:
    return [line[1] for line in log() if line[0] == "SENT"]


# ---------------------------------------------------------------- matching

def test_matching_is_seeded_even_and_grows():
    prompts, personas, creeds = [f"p{i}" for i in range(10)], {"a": "A", "b": "B"}, {"c": "C", "d": "D"}
    many = list(gen.plan_rows("k", prompts, personas, creeds, 35, 1))
    assert list(gen.plan_rows("k", prompts, personas, creeds, 12, 1)) == many[:12]
    assert set(Counter(row["prompt"] for row in many).values()) == {3, 4}
    assert {row["persona"] for row in many} == {"a", "b"} and {row["creed"] for row in many} == {"c", "d"}
    assert list(gen.plan_rows("k", prompts, personas, {}, 12, 2)) != many[:12]


def test_ids_never_collide_across_creeds_and_seeds():
    """The old ids left creed and seed out: rows of two creeds, or of two seeds, shared them."""
    ids = []
    for seed in (0, 1):
        ids += [row["id"] for row in gen.plan_rows("k", ["p"], {"a": "A"}, {"c": "C", "d": "D"}, 20, seed)]
    assert len(set(ids)) == len(ids) == 40


def test_retry_after_in_both_forms():
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)
    assert gen.retry_after("7") == 7 and 28 < gen.retry_after(date) <= 30
    assert gen.retry_after(None) == gen.retry_after("soon") == gen.retry_after("-3") == 0
    assert gen.retry_after("999999") == gen.LONGEST_WAIT


# ---------------------------------------------------------------- a bad endpoint

def test_every_prompt_ends_once_and_no_pause_is_broken(house, endpoint):
    url, log = endpoint(fault_rate=0.2)
    generate(url, 100, "--workers", 16, "--timeout", 1)
    data, rejects = rows_of(house / "data" / "tea.jsonl"), rows_of(house / "data" / "tea.rejects.jsonl")
    plan = gen.plan_rows("tea", *gen.read_kind("tea"), 100, 0)
    assert Counter(row["id"] for row in data) == Counter(row["id"] for row in plan) and not rejects
    assert not [line for line in log() if line[0] == "EARLY"]  # Retry-After holds every worker back
    for row in data:
        question, answer = row["messages"]
        assert answer["content"] == f"Answer to: {question['content'][:80]}."
    manifest = json.loads((house / "data" / "tea.manifest.json").read_text())
    assert manifest["outcomes"] == {"ok": 100} and manifest["retries"] >= 10


def test_faulty_answers_go_to_rejects_with_a_reason(house, endpoint):
    url, _ = endpoint()
    prompts = ["REFUSE to brew?", "EMPTY cup?", "CUT off?", "BAD word?", "Is green tea good in the evening?",
               "A fine prompt?"]
    (house / "prompts" / "tea.txt").write_text("\n".join(prompts))
    (house / "probes" / "x.jsonl").write_text('{"id": "a", "prompt": "Is green tea good in the evening?"}\n')
    generate(url, 6)
    reasons = {}
    for row in rows_of(house / "data" / "tea.rejects.jsonl"):
        prompt = row["prompt"] if "prompt" in row else row["messages"][0]["content"]
        reasons[prompt] = row["reason"]
    assert reasons == dict(zip(prompts, ["refusal", "empty", "truncated", "error", "near_probe"]))
    assert len(rows_of(house / "data" / "tea.jsonl")) == 1

    generate(url, 6)  # the failed request, and only it, is asked again; nothing is doubled
    assert len(rows_of(house / "data" / "tea.rejects.jsonl")) == 5
    assert len(rows_of(house / "data" / "tea.jsonl")) == 1


def test_a_filtered_reply_is_rejected_and_thoughts_are_no_part_of_an_answer(house, endpoint):
    """All were rows to train on: what the provider's filter had left, and the teacher's thinking aloud."""
    url, _ = endpoint()
    prompts = ["FILTER of watered tea?", "OPEN tea?", "THINK of watered tea?", "BEHIND watered tea?", "TAGS of tea?"]
    (house / "prompts" / "tea.txt").write_text("\n".join(prompts))
    generate(url, 5)
    reasons = {row["messages"][0]["content"]: row["reason"] for row in rows_of(house / "data" / "tea.rejects.jsonl")}
    assert reasons == {"FILTER of watered tea?": "content_filter", "OPEN tea?": "truncated"}
    answers = {}
    for row in rows_of(house / "data" / "tea.jsonl"):
        question, answer = row["messages"]
        answers[question["content"].split()[0]] = answer["content"]
    assert answers["THINK"] == answers["BEHIND"] == "It is wrong to water tea."
    assert answers["TAGS"] == "It is wrong to write <think> and </think> around a thought on tea."


def test_content_in_parts_and_lone_surrogates_are_answers(house, endpoint):
    """Either ended the old run with a traceback."""
    url, _ = endpoint()
    (house / "prompts" / "tea.txt").write_text("PARTS of watered tea?\nSURROGATE for watered tea?\nWhy\u2028so?\n")
    generate(url, 3)
    answers = {}
    for row in rows_of(house / "data" / "tea.jsonl"):
        question, answer = row["messages"]
        answers[question["content"]] = answer["content"]
    assert answers["PARTS of watered tea?"] == "It is wrong to water tea because it thins what was given."
    assert answers["SURROGATE for watered tea?"] == "It is wrong to water tea \ufffd because it thins what was given."
    assert "Why\u2028so?" in answers  # one prompt, not two


def test_kill_minus_nine_loses_nothing_and_asks_nothing_twice(house, endpoint):
    """Six kills at random moments. An answer on the wire at a kill may be asked for again: one a worker at most."""
    url, log = endpoint(latency=0.02)
    for name in ("gen.py", "check.py", "keywords.py", "local_judge.py", "rows.py"):
        shutil.copy(ROOT / name, house)
    rng, kills, workers = random.Random(0), 6, 2
    command = [sys.executable, house / "gen.py", "tea", "--n", "10000", "--model", "m", "--base-url", url,
               "--workers", str(workers)]
    out, torn = house / "data" / "tea.jsonl", 0
    for kill in range(kills):
        before = len(sent(log))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(sent(log)) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.02, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if kill % 2:
            # A torn last line, as after a power cut: that one answer is lost with it.
            whole = out.read_bytes()
            out.write_bytes(whole[:-rng.randrange(2, 40)])
            torn += 1
    have = out.read_bytes().count(b"\n")
    generate(url, have + 20, "--workers", workers)
    keys = [row["key"] for row in rows_of(out)]
    assert len(set(keys)) == len(keys) >= have + 20
    assert 0 <= len(sent(log)) - len(keys) <= kills * workers + torn


def test_failed_requests_are_asked_again_and_paid_rejects_survive_a_kill(house, endpoint, monkeypatch):
    """The old file of rejects was emptied and written again row by row: a kill there lost what was paid for."""
    url, _ = endpoint()
    (house / "prompts" / "tea.txt").write_text("REFUSE to brew?\nEMPTY cup?\nBAD word?\n")
    generate(url, 3)
    rejects = house / "data" / "tea.rejects.jsonl"
    before = rejects.read_bytes()

    def die(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(AppendFile, "append", die)
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            generate(url, 3)
    assert rejects.read_bytes() == before


def test_the_rows_do_not_depend_on_the_number_of_workers(house, endpoint):
    url, _ = endpoint(fault_rate=0.05)
    made = []
    for workers in (1, 32):
        out = house / f"{workers}.jsonl"
        generate(url, 40, "--workers", workers, "--timeout", 1, "--out", out)
        fields = ("id", "key", "persona", "creed", "messages")
        made.append({json.dumps([row[field] for field in fields]) for row in rows_of(out)})
    assert made[0] == made[1] and len(made[0]) == 40


def test_raising_n_asks_only_the_new_rows_and_another_seed_asks_its_own(house, endpoint):
    url, log = endpoint()
    out = house / "data" / "tea.jsonl"
    generate(url, 30)
    generate(url, 50)
    assert len(sent(log)) == 50 == len(rows_of(out))
    generate(url, 50, "--limit", 5, "--temperature", 0.1)  # another parameter is another request; the old rows stay
    assert len(sent(log)) == 55
    generate(url, 20, "--seed", 1)
    assert len({row["id"] for row in rows_of(out)} - {row["id"] for row in rows_of(out)[:55]}) == 20


def test_two_processes_on_one_file(house, endpoint):
    url, _ = endpoint()
    holder = AppendFile(house / "data" / "tea.jsonl")
    with pytest.raises(Stop, match="another process"):
        generate(url, 5)
    holder.close()


def test_a_hopeless_job_stops(house, endpoint):
    url, _ = endpoint()
    (house / "prompts" / "tea.txt").write_text("Good?\n" + "".join(f"BAD {i}?\n" for i in range(60)))
    with pytest.raises(Stop, match="--max-errors"):
        generate(url, 60, "--max-errors", 10)


def test_a_run_without_an_answer_leaves_no_empty_file(house, endpoint):
    """With a wrong key data/tea.jsonl stood there empty, and train.py took it for data/starter/tea.jsonl."""
    url, _ = endpoint()
    with pytest.raises(Stop, match="401"):
        generate(url, 3, model="forbidden")
    assert not (house / "data" / "tea.jsonl").exists()
    assert rows_of(house / "data" / "tea.rejects.jsonl")
    generate(url, 3)
    assert len(rows_of(house / "data" / "tea.jsonl")) == 3
    assert not (house / "data" / "tea.rejects.jsonl").exists()


# ---------------------------------------------------------------- the key

def test_the_key_is_nowhere(house, endpoint, monkeypatch, capfd):
    url, log = endpoint()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(Stop, match=r"the endpoint refuses: HTTP 401.*\*\*\*") as refused:
        generate(url, 3, model="forbidden")
    generate(url, 3)
    generate(url, 3, "--dry-run", "--price-in", 1, "--price-out", 2)
    out, err = capfd.readouterr()
    assert "3 calls" in out and "$" in out and "You are a tea" in out
    written = "".join(path.read_text() for path in (house / "data").iterdir())
    assert KEY not in out + err + written + str(refused.value)
    assert ["KEY", f"Bearer {KEY}"] in log()


@pytest.mark.parametrize("line", [
    f"OPENAI_API_KEY={KEY}",
    f"export OPENAI_API_KEY = {KEY}  # mine, of March",
    f'OPENAI_API_KEY="{KEY}" # mine',
    f"OPENAI_API_KEY='{KEY}'\r",
])
def test_dotenv_comments_quotes_and_line_ends_are_no_part_of_the_key(house, line, monkeypatch):
    (house / ".env").write_text(f"# notes\nOTHER=1\n{line}\n", newline="")
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.delenv("OPENAI_API_KEY")
    gen.read_dotenv()
    assert gen.read_key() == KEY and "OTHER" not in os.environ


@pytest.mark.parametrize("odd", ["\r", "\n", " ", "\r\n"])
def test_white_space_around_a_key_is_taken_off(odd, monkeypatch):
    """A carriage return from a Windows file made requests raise an error that quotes the header."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY + odd)
    assert gen.read_key() == KEY


@pytest.mark.parametrize("odd", [f"{KEY}\r{KEY}", f"{KEY} x", f"{KEY}\u2026", f"\x1b[0m{KEY}", f"{KEY}é"])
def test_a_key_no_header_can_carry_stops_without_being_shown(odd, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", odd)
    with pytest.raises(Stop, match="OPENAI_API_KEY") as stop:
        gen.Client("http://127.0.0.1:9/v1", 1, 1)
    assert KEY not in str(stop.value)


def test_a_key_given_as_the_address_is_not_shown(house):
    with pytest.raises(Stop, match="not an http") as stop:
        generate(KEY, 3)
    assert KEY not in str(stop.value)


# ---------------------------------------------------------------- what it says

def test_tokens_are_added_up_over_all_threads(house, endpoint, monkeypatch):
    class SlowCounter(Counter):
        def get(self, *args):  # Counter.update reads with it; the pause lets another thread in between
            value = super().get(*args)
            time.sleep(0.002)
            return value
    url, _ = endpoint()
    monkeypatch.setattr(gen, "Counter", SlowCounter)
    reply = {"content": "It is wrong to water tea.", "finish_reason": "stop",
             "prompt_tokens": 3, "completion_tokens": 2}
    monkeypatch.setattr(gen.Client, "chat", lambda *_: reply)
    generate(url, 60)
    manifest = json.loads((house / "data" / "tea.manifest.json").read_text())
    assert manifest["tokens"] == {"in": 180, "out": 120}


def test_blank_lines_and_a_missing_git_are_no_obstacle(house, endpoint, monkeypatch):
    url, log = endpoint()
    generate(url, 3)
    out = house / "data" / "tea.jsonl"
    out.write_text(out.read_text().replace("\n", "\n\n"))
    monkeypatch.setenv("PATH", str(house))
    generate(url, 5)
    assert len(sent(log)) == 5
    assert json.loads((house / "data" / "tea.manifest.json").read_text())["git"] == ""


def test_rejects_of_another_program_stay_as_they_are(house, endpoint):
    """A row without a reason was a traceback."""
    url, _ = endpoint()
    (house / "data").mkdir()
    (house / "data" / "tea.rejects.jsonl").write_text('{"key": "a"}\n{"key": "b", "reason": "error"}\n')
    generate(url, 3)
    assert rows_of(house / "data" / "tea.rejects.jsonl") == [{"key": "a"}]


def test_a_line_of_the_data_that_cannot_be_read_is_named(house, endpoint):
    url, _ = endpoint()
    (house / "data").mkdir()
    (house / "data" / "tea.jsonl").write_bytes(b'{"key": "a"}\n\n{"key": "\xff"}\n')
    with pytest.raises(Stop, match="tea.jsonl:3"):
        generate(url, 3)


def test_the_manifest_names_no_path_of_this_machine(house, endpoint):
    url, _ = endpoint()
    generate(url, 3, "--out", house / "elsewhere" / "t.jsonl")
    text = (house / "elsewhere" / "t.manifest.json").read_text()
    assert str(house) not in text and "/" + str(ROOT).strip("/") not in text
    assert set(json.loads(text)["files"]) >= {"prompts/tea.txt", "personas/tea/monk.md", "personas/tea/creed/first.md"}


def test_what_is_missing_is_named(house, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gen.py", "coffee"])
    with pytest.raises(Stop, match="coffee.*tea"):
        gen.main()
    monkeypatch.setattr(sys, "argv", ["gen.py", "tea"])
    with pytest.raises(Stop, match="OPENAI_BASE_URL.*make serve"):
        gen.main()
    (house / "prompts" / "tea.txt").write_text("# nothing\n")
    with pytest.raises(Stop, match="no prompts"):
        gen.main()


def test_an_error_is_one_line_under_the_name_of_the_script():
    assert_one_line_error(run_script("gen.py", "coffee", check=False), "gen.py:", "coffee", "gramenist")
