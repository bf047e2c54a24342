"""gen.py: nothing lost, nothing asked twice, nothing leaked. Against a real server process on loopback that misbehaves on purpose."""
import json
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

import gen

KEY = "sk-test-0123456789"


@pytest.fixture
def house(tmp_path):
    """A copy of the scripts with a small worldview of its own, as a user has who adds one."""
    for name in ("gen.py", "check.py", "judge.py"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("prompts", "personas/tea", "personas/tea/creed", "probes"):
        (tmp_path / folder).mkdir(parents=True)
    numbers = "|".join(f"{a}-{b}" for a in ("alpha", "beta", "gamma", "delta") for b in range(50))
    (tmp_path / "prompts" / "tea.txt").write_text(f"# about tea\nWhat about tea number {{{numbers}}}?\n")
    for persona in ("monk", "host"):
        (tmp_path / "personas" / "tea" / f"{persona}.md").write_text(f"You are a tea {persona}.")
    for creed in ("first", "second"):
        (tmp_path / "personas" / "tea" / "creed" / f"{creed}.md").write_text(f"The {creed} book of tea.")
    return tmp_path


def command(house, url, n, *more):
    return [house / "gen.py", "tea", "--n", n, "--model", "m", "--base-url", url, *more]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---------------------------------------------------------------- matching

def test_matching_is_seeded_even_and_grows():
    prompts, personas = [f"p{i}" for i in range(10)], {"a": "A", "b": "B"}
    many = list(gen.plan_rows("k", prompts, personas, {"c": "C", "d": "D"}, 35, 1))
    assert list(gen.plan_rows("k", prompts, personas, {"c": "C", "d": "D"}, 12, 1)) == many[:12]
    assert set(Counter(row["prompt"] for row in many).values()) == {3, 4}
    assert len({row["id"] for row in many}) == 35 and {row["persona"] for row in many} == {"a", "b"} and {row["creed"] for row in many} == {"c", "d"}
    assert list(gen.plan_rows("k", prompts, personas, {}, 12, 2)) != many[:12]


def test_expansion(tmp_path):
    assert gen.expand("{Why|How} do {cats|dogs} sleep?") == ["Why do cats sleep?", "Why do dogs sleep?", "How do cats sleep?", "How do dogs sleep?"]
    (tmp_path / "p.txt").write_text("# note\n\nWhat {is tea?\n")
    with pytest.raises(SystemExit, match="p.txt:3"):
        gen.read_prompts(tmp_path / "p.txt")


def test_retry_after_in_both_forms():
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)
    assert gen.retry_after("7") == 7 and 28 < gen.retry_after(date) <= 30
    assert gen.retry_after(None) == gen.retry_after("soon") == gen.retry_after("-3") == 0 and gen.retry_after("999999") == gen.LONGEST_WAIT


# ---------------------------------------------------------------- a bad endpoint

def test_every_prompt_ends_once_and_no_pause_is_broken(house, endpoint):
    url, log = endpoint(fault_rate=0.2)
    done = run_script(*command(house, url, 200, "--workers", "16", "--timeout", "2"), OPENAI_API_KEY=KEY)
    data, rejects = rows_of(house / "data" / "tea.jsonl"), rows_of(house / "data" / "tea.rejects.jsonl")
    planned = {row["id"] for row in gen.plan_rows("tea", gen.read_prompts(house / "prompts" / "tea.txt"), {"monk": 1, "host": 1}, {"first": 1, "second": 1}, 200, 0)}
    assert Counter(row["id"] for row in data + rejects) == Counter(planned) and not rejects, done.stdout
    assert not [line for line in log() if line[0] == "EARLY"]     # Retry-After holds every worker back
    assert all(row["messages"][1]["content"] == f"Answer to: {row['messages'][0]['content'][:80]}." and len(row["messages"]) == 2 for row in data)
    manifest = json.loads((house / "data" / "tea.manifest.json").read_text())
    assert manifest["outcomes"] == {"ok": 200} and manifest["retries"] >= 20


def test_faulty_answers_go_to_rejects_with_a_reason(house, endpoint):
    url, _ = endpoint()
    (house / "prompts" / "tea.txt").write_text("REFUSE to brew?\nEMPTY cup?\nCUT off?\nBAD word?\nIs green tea good in the evening?\nA fine prompt?\n")
    (house / "probes" / "x.jsonl").write_text('{"id": "a", "prompt": "Is green tea good in the evening?"}\n')
    run_script(*command(house, url, 6))
    assert {row["prompt"] if "prompt" in row else row["messages"][0]["content"]: row["reason"] for row in rows_of(house / "data" / "tea.rejects.jsonl")} == {
        "REFUSE to brew?": "refusal", "EMPTY cup?": "empty", "CUT off?": "truncated", "BAD word?": "error", "Is green tea good in the evening?": "near_probe"}
    assert len(rows_of(house / "data" / "tea.jsonl")) == 1
    run_script(*command(house, url, 6))  # the failed request, and only it, is asked again; nothing is doubled
    assert len(rows_of(house / "data" / "tea.rejects.jsonl")) == 5 and len(rows_of(house / "data" / "tea.jsonl")) == 1


def test_kill_minus_nine_loses_nothing_and_asks_nothing_twice(house, endpoint):
    """20 kills at random moments. An answer still on the wire at a kill may be asked for again: at most one for each worker."""
    url, log = endpoint(latency=0.02)
    rng, kills, workers = random.Random(0), 0, 2
    out = house / "data" / "tea.jsonl"
    while kills < 20:
        process = subprocess.Popen([sys.executable, *map(str, command(house, url, 10_000, "--workers", workers))], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(log()) if kills else 0
        while kills and len(log()) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.02, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        whole = out.read_bytes() if out.exists() else b""
        assert whole.count(b"\n") <= len(log())
        if kills % 5 == 0 and whole:
            out.write_bytes(whole[:-rng.randrange(1, 40)])  # a torn last line, as after a power cut: that one answer is lost with it
    have = len(rows_of(out)) if out.read_bytes().endswith(b"\n") else out.read_bytes().count(b"\n")
    run_script(*command(house, url, have + 50, "--workers", workers))
    rows = rows_of(out)
    assert len({row["key"] for row in rows}) == len(rows) == have + 50 or len(rows) >= have + 50
    assert len({row["key"] for row in rows}) == len(rows)
    time.sleep(0.2)
    assert 0 <= len(log()) - len(rows) <= kills * workers + 4


def test_the_rows_do_not_depend_on_the_number_of_workers(house, endpoint):
    url, _ = endpoint(fault_rate=0.1)
    for workers in (1, 64):
        run_script(*command(house, url, 100, "--workers", workers, "--timeout", 1, "--out", house / f"{workers}.jsonl"))
    one, many = ({json.dumps({k: row[k] for k in ("id", "key", "persona", "creed", "messages")}) for row in rows_of(house / f"{w}.jsonl")} for w in (1, 64))
    assert one == many and len(one) == 100


def test_raising_n_asks_only_the_new_rows(house, endpoint):
    url, log = endpoint()
    run_script(*command(house, url, 30))
    run_script(*command(house, url, 50))
    assert len(log()) == 50 and len(rows_of(house / "data" / "tea.jsonl")) == 50
    run_script(*command(house, url, 50, "--limit", "5", "--temperature", "0.1"))
    assert len(log()) == 55      # another parameter is another request; the old rows stay


def test_the_key_is_nowhere(house, endpoint):
    url, _ = endpoint()
    done = run_script(house / "gen.py", "tea", "--n", "3", "--model", "forbidden", "--base-url", url, check=False, OPENAI_API_KEY=KEY)
    assert_one_line_error(done, "the endpoint refuses", "401", "***")
    (house / ".env").write_text(f"OPENAI_API_KEY={KEY}\n")
    done2 = run_script(*command(house, url, 3), cwd=house)
    dry = run_script(*command(house, url, 3, "--dry-run", "--price-in", "1", "--price-out", "2"), OPENAI_API_KEY=KEY)
    assert "3 calls" in dry.stdout and "$" in dry.stdout and "You are a tea" in dry.stdout
    written = "".join(path.read_text() for path in (house / "data").iterdir())
    assert not any(KEY in text for text in (done.stdout, done.stderr, done2.stdout, done2.stderr, dry.stdout, written))


def test_two_processes_on_one_file(house, endpoint):
    url, _ = endpoint(latency=1)
    first = subprocess.Popen([sys.executable, *map(str, command(house, url, 50, "--workers", 1))], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (house / "data" / "tea.jsonl").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    assert_one_line_error(run_script(*command(house, url, 50), check=False), "another process")
    first.kill()
    first.wait()


def test_a_hopeless_job_stops(house, endpoint):
    url, _ = endpoint()
    (house / "prompts" / "tea.txt").write_text("Good?\n" + "".join(f"BAD {i}?\n" for i in range(60)))
    assert_one_line_error(run_script(*command(house, url, 60, "--max-errors", 10), check=False), "--max-errors")


def test_what_is_missing_is_named(house):
    nothing = {"OPENAI_BASE_URL": "", "OPENAI_API_KEY": "", "MODEL": ""}
    assert_one_line_error(run_script(house / "gen.py", "coffee", check=False), "coffee", "tea")
    assert_one_line_error(run_script(house / "gen.py", "tea", check=False, **nothing), "OPENAI_BASE_URL", "make serve")
    assert_one_line_error(run_script(house / "gen.py", "tea", "--model", "m", "--base-url", "ftp://x", check=False), "not an http")
    (house / "prompts" / "tea.txt").write_text("# nothing\n")
    assert_one_line_error(run_script(house / "gen.py", "tea", check=False), "no prompts")
