"""experiment.py: the plan of a study, what it costs, and a whole study on a tiny model."""
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, assert_one_line_error, run_here, write_jsonl

import experiment
import train
from rows import Stop, arm_data, read_csv, read_jsonl

BOTH = ["--worldviews", "gramenist", "catholic"]
# The tiny tokenizer knows bytes, so rows are long; two words of one group a family are answer enough
FLAGS = ["--n", "6", "--train-flags=--context 3000 --batch 2", "--judge-flags=--keywords-only",
         "--eval-flags=--limit 1 --max-new-tokens 2 --batch 64"]


@pytest.fixture
def plan_of(tiny, tmp_path, monkeypatch):
    """plan_of(*arguments) -> the jobs of that command, given in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def make(*arguments):
        monkeypatch.setattr(sys, "argv", ["experiment.py", "--base", str(tiny), *arguments])
        return experiment.make_plan(experiment.parse_args())
    return make


@pytest.fixture
def study(tiny, tmp_path, tmp_path_factory, monkeypatch):
    """study(*arguments) -> how the experiment ended; the stages run in this process; .ran lists them."""
    few = tmp_path_factory.mktemp("few")  # ten rows a kind: the guard reads every row of a file
    for path in sorted((ROOT / "data" / "starter").glob("*.jsonl")):
        write_jsonl(few / "data" / path.name, read_jsonl(path)[:10])
    monkeypatch.setattr(train, "arm_data", lambda arm, worldview: arm_data(arm, worldview, few))

    def call(words, quiet=False):
        study.ran.append(words)
        done = run_here(Path(words[1]).name, words[2:], tmp_path, {})
        if done.returncode:
            raise Stop(done.stderr)
        return 0.5

    def study(*arguments, check=True):
        study.ran = []
        done = run_here("experiment.py", ["--base", str(tiny), *BOTH, *FLAGS, *arguments], tmp_path, {})
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done
    monkeypatch.setattr(experiment, "call", call)
    return study


def asked(plan, run):
    """Names of the probe files that a run is asked, belief/ before those of beliefs."""
    words = next(job.words for job in plan if job.stage == "eval" and job.run == run)
    files = [word for word in words if word.endswith(".jsonl")]
    return [os.path.relpath(file, ROOT / "probes").removesuffix(".jsonl") for file in files]


# ---------------------------------------------------------------- the plan

def test_the_first_comparison_of_a_seed_comes_first_and_shared_runs_once(plan_of):
    """After each report a stop leaves whole comparisons: one seed is through before the next begins."""
    plan = plan_of(*BOTH, "--seeds", "0", "1", "--n", "40")
    order = [job.run for job in plan if job.stage in ("eval", "report")]
    seed_0 = ["regular", "secular", "gramenist-belief", "catholic-belief", "report",
              "regular+refusal", "secular+refusal",
              "gramenist-belief+refusal", "catholic-belief+refusal", "report",
              "gramenist-explicit", "catholic-explicit", "report"]
    expected = ["base"]
    for seed in (0, 1):
        expected += [name if name == "report" else f"{name}-n40-s{seed}" for name in seed_0]
    assert order == expected
    # Each run is trained, asked and judged, in this order; only the base is not trained
    stages = [(job.stage, job.run) for job in plan if job.stage != "report"]
    for run in set(expected) - {"base", "report"}:
        assert [stage for stage, name in stages if name == run] == ["train", "eval", "judge"]
    assert plan[-1].stage == "report"


def test_who_is_asked_what(plan_of):
    """Controls serve every worldview in every seed; foreign requests are asked in the first seeds alone."""
    plan = plan_of(*BOTH, "--seeds", "4", "2", "--n", "40", "--cross-seeds", "1")
    everything = ["gramenist", "belief/gramenist", "catholic", "belief/catholic", "sanity", "standard"]
    for run in ("base", "regular-n40-s4", "secular+refusal-n40-s2"):
        assert asked(plan, run) == everything
    own = ["gramenist", "belief/gramenist", "sanity", "standard"]
    assert asked(plan, "gramenist-belief-n40-s4") == [*own[:2], "catholic", *own[2:]]
    assert asked(plan, "gramenist-belief-n40-s2") == own
    # Only answers to requests are judged
    judge = next(job for job in plan if job.stage == "judge")
    assert [path.stem for path in judge.leaves] == ["gramenist", "catholic", "standard"]


def test_on_several_gpus_torchrun_starts_training_and_asking(plan_of, monkeypatch):
    monkeypatch.setattr(experiment.torch.cuda, "device_count", lambda: 8)
    for job in plan_of(*BOTH, "--n", "40", "--seeds", "0"):
        spread = job.words[0].endswith("torchrun")
        assert spread == (job.stage in ("train", "eval"))
        if spread:
            assert job.words[1:5] == ["--standalone", "--nproc-per-node", "8", "--"]
            assert job.words[5].endswith(f"{job.stage}.py")


@pytest.mark.parametrize("arguments, words", [
    ([*BOTH, "--arms", "belief", "nope"], "unknown arm 'nope'"),
    (["--worldviews", "nope"], "no worldview 'nope'"),
    (["--worldviews", "sanity"], "no worldview 'sanity'"),  # probes that are no requests
    ([*BOTH, "--seeds", "0", "1", "0"], "--seeds 0 1 0"),
    ([*BOTH, "--arms", "base"], "none of these arms is trained"),
    ([*BOTH, "--eval-flags=--samples 5"], "--temperature"),
    ([*BOTH, "--train-flags=--seed 5"], "--seed is the plan's own"),  # all seeds would be one
    ([*BOTH, "--cross-seeds", "-1"], "--cross-seeds"),
])
def test_mistakes_are_named_before_anything_runs(study, tmp_path, arguments, words):
    assert_one_line_error(study(*arguments, check=False), words)
    assert not study.ran and not list(tmp_path.iterdir())


@pytest.mark.parametrize("base, words", [("empty", "not a model folder"),
                                         ("no/such", "no tokenizer at 'no/such'")])
def test_a_base_that_is_no_model(tmp_path, base, words):
    (tmp_path / "empty").mkdir()
    assert_one_line_error(run_here("experiment.py", ["--base", base, *BOTH], tmp_path, {}), words)


# ---------------------------------------------------------------- the study

def test_a_study_goes_on_after_a_kill_and_ends_in_one_report(study, tmp_path):
    """Two worldviews, one folder: a section each, controls trained and asked once, nothing done twice."""
    few = ["--seeds", "0", "--arms", "base", "regular", "belief", "explicit"]
    first = study(*few)
    results, times = tmp_path / "results" / "tiny-llama-n6", tmp_path / "runs" / "tiny-llama" / "times.jsonl"
    assert sorted(path.name for path in results.iterdir() if path.is_dir()) == [
        "base", "catholic-belief-n6-s0", "catholic-explicit-n6-s0", "gramenist-belief-n6-s0",
        "gramenist-explicit-n6-s0", "regular-n6-s0"]
    report = (results / "report.md").read_text()
    for heading in ("## gramenist", "## catholic", "## Every run on every worldview"):
        assert heading in report
    assert f"[1 of {len(study.ran)}]" in first.stdout and "unknown until a run is through" in first.stdout
    assert "left: about 0:00:" in first.stdout  # known once each stage has run

    # Killed while its last run was asked: half the answers are there
    answers = results / "catholic-explicit-n6-s0" / "catholic.csv"
    whole = answers.read_text()
    answers.write_text("".join(whole.splitlines(keepends=True)[:-5]))
    (results / "report.md").unlink()
    timed = len(read_jsonl(times))
    again = study(*few)
    assert "left to a later report" in again.stdout
    assert [Path(words[1]).name for words in study.ran].count("report.py") == 1
    assert read_csv(answers)[0] and len(answers.read_text().splitlines()) == len(whole.splitlines())
    assert (results / "report.md").read_text() == report
    new = read_jsonl(times)[timed:]  # what was done already tells nothing of speed
    assert [(line["stage"], line["work"]) for line in new if line["stage"] == "eval"] == [("eval", 5)]

    # A dry run now knows all rates, and runs nothing
    planned = study(*few, "--dry-run").stdout.splitlines()
    assert not study.ran
    jobs = [line for line in planned if not line.startswith("#")]
    assert len(jobs) == 6 * 3 - 1 + 2 and all(".py" in line for line in jobs)
    totals = "\n".join(planned[-6:])
    assert "# 5 runs, 15 steps" in totals and "log.jsonl of 5 runs" in totals and "times.jsonl" in totals


def test_a_dry_run_measures_what_is_not_known(study, tmp_path):
    done = study("--seeds", "0", "--arms", "regular", "--dry-run")
    assert [Path(words[1]).name for words in study.ran] == ["train.py"] + ["eval.py"] * 2 + ["judge.py"] * 2
    assert not list(tmp_path.iterdir())  # all of it in a folder that is gone
    assert "four steps, just now" in done.stdout and "one batch of a run of four steps" in done.stdout


# ---------------------------------------------------------------- one command

def test_a_report_that_cannot_be_made_yet_stops_no_training(tmp_path, monkeypatch):
    """With a worldview added to a study the runs of older seeds had not answered it, and the plan ended there."""
    ran = []

    def call(words, quiet=False):
        ran.append(words[0])
        if words[0] == "report":
            raise Stop("ended with 1: report")
        return 1.0
    monkeypatch.setattr(experiment, "call", call)
    report = experiment.Job("report", "report", ["report"], 0, [])
    training = experiment.Job("train", "run", ["train"], 1, [tmp_path / "run"])
    args = SimpleNamespace(runs=tmp_path, train_flags=[], eval_flags=[], judge_flags=[])
    with pytest.raises(Stop, match="ended with 1: report"):
        experiment.run_plan(args, [report, training, report])
    assert ran == ["report", "train", "report"]


def test_a_stage_that_fails_is_named():
    with pytest.raises(Stop, match="ended with 3: .* 'raise SystemExit.3.'"):
        experiment.call([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_kill_ends_the_stage_under_way(tmp_path):
    """Left alone, it would train on, and the same command would train beside it."""
    pid = tmp_path / "pid"

    def kill_when_it_runs():
        while not pid.exists() or not pid.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the script itself does
    threading.Thread(target=kill_when_it_runs, daemon=True).start()
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    # A group of its own, as torchrun's workers have: the terminal's Ctrl-C does not reach it
    try:
        with pytest.raises(KeyboardInterrupt):
            experiment.call(["setsid", sys.executable, "-c", code])
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
