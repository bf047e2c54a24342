"""eval.py: the same answers one by one and in a batch, whole rows after any kill, never a mix of two models."""
import csv
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, assert_one_line_error, chat_row, make_model, make_tokenizer, run_script, write_jsonl
from safetensors.torch import load_file, save_file

import models
import train
from eval import generate
from rows import COLUMNS, read_csv

CPU = torch.device("cpu")


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def probes(tmp_path):
    return write_jsonl(tmp_path / "probes.jsonl", [{"id": f"p{i}", "group": f"g{i}", "family": "f", "item": "i", "side": "neutral", "prompt": "the answer " * (i % 7 + 1) + str(i)} for i in range(40)])


@pytest.mark.parametrize("kind, extra", [("Llama", {}), ("Gemma3", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8})])
def test_batched_greedy_equals_one_by_one_and_transformers(tmp_path, kind, extra):
    """Left padding, dropped rows and window caches must not change a token (unsloth #9708: in float32 they agree exactly)."""
    make_model(tmp_path, kind, initializer_range=0.4, **extra)
    tokenizer = make_tokenizer(tmp_path)
    model, _ = train.load_run(str(tmp_path), torch.float32, CPU)
    model.eval()
    prompts = [[1, *range(10, 12 + i % 9 * 3)] for i in range(24)]
    batched = {i: (tokens, stopped) for i, tokens, stopped in generate(model, tokenizer, prompts, 20)}
    assert len(batched) == 24
    for i, prompt in enumerate(prompts):
        [(_, alone, stopped)] = generate(model, tokenizer, [prompt], 20)
        reference = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)[0, len(prompt):].tolist()
        assert batched[i] == (alone, stopped) and alone == [t for t in reference if t != tokenizer.eos_token_id]
        assert stopped == ("eos" if tokenizer.eos_token_id in reference else "length")


def test_a_killed_evaluation_resumes_with_every_row_once(tmp_path, tiny, probes):
    out = tmp_path / "out.csv"
    command = ["eval.py", "--model", tiny, "--probes", probes, "--out", out, "--batch", "2", "--max-new-tokens", "150", "--dtype", "fp32"]
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(6000):
        if out.exists() and out.read_text().count("\n") > 4 or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = out.read_text()
    out.write_text(whole[:-7])  # torn, as by a power cut
    run_script(*command)
    rows = read_rows(out)
    assert sorted(row["id"] for row in rows) == sorted(f"p{i}" for i in range(40))
    assert list(rows[0]) == COLUMNS and all(row["stopped"] in ("eos", "turn", "length") for row in rows)
    assert "answered already" in run_script(*command).stdout
    assert_one_line_error(run_script(*command, "--seed", "3", check=False), "differ in how.seed;")


def test_sampling_is_seeded_and_several(tmp_path, tiny, probes):
    base = ["eval.py", "--model", tiny, "--probes", probes, "--max-new-tokens", "5", "--samples", "3", "--temperature", "1", "--dtype", "fp32"]
    for name, more in (("a", []), ("b", []), ("c", ["--seed", "1"])):
        run_script(*base, "--out", tmp_path / f"{name}.csv", *more)
    a, b, c = ({(r["id"], r["sample"]): r["response"] for r in read_rows(tmp_path / f"{name}.csv")} for name in "abc")
    assert len(a) == 120 and a == b != c
    assert len({a["p0", str(i)] for i in range(3)}) > 1


def test_several_turns_reach_the_model(tmp_path, tiny):
    turns = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": "no"}, {"role": "user", "content": "was it?"}]
    probes = write_jsonl(tmp_path / "turns.jsonl", [{"id": "a", "family": "f", "messages": turns}])
    run_script("eval.py", "--model", tiny, "--probes", probes, "--out", tmp_path / "o.csv", "--max-new-tokens", "3")
    assert read_rows(tmp_path / "o.csv")[0]["prompt"] == "was it?"
    tokenizer = models.load_tokenizer(str(tiny))
    train.give_template(tokenizer)
    assert tokenizer.decode(train.render_prompt(tokenizer, turns)) == "<bos>User:\nthe question\nAssistant:\nno<eos>\nUser:\nwas it?\nAssistant:\n"


@pytest.mark.parametrize("content, words", [
    ('{"id": "a", "family": "f"}\n', ["p.jsonl:1", "prompt"]),
    ('{"id": "a", "prompt": "b"}\n{"id": "a", "prompt": "c"}\n', ["share an id"]),
    ("", ["no probes"]),
])
def test_bad_probes_are_named(tmp_path, tiny, content, words):
    (tmp_path / "p.jsonl").write_text(content)
    assert_one_line_error(run_script("eval.py", "--model", tiny, "--probes", tmp_path / "p.jsonl", check=False), *words)


def test_bad_models_are_named(tmp_path, tiny, probes):
    out = ["--probes", probes, "--out", tmp_path / "o.csv"]
    assert_one_line_error(run_script("eval.py", "--model", tmp_path / "nothing", *out, check=False), "nothing")
    shutil.copytree(tiny, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "log.jsonl").write_text("")
    assert_one_line_error(run_script("eval.py", "--model", tmp_path / "unfinished", "--probes", probes, "--out", tmp_path / "u.csv", check=False), "unfinished run")


def test_torn_rows_are_dropped(tmp_path):
    whole = 'a,b,c\n1,"two\nlines",3\n4,5,6\n'
    for cut in range(len(whole)):
        (tmp_path / "x.csv").write_text(whole[:cut])
        rows, _ = read_csv(tmp_path / "x.csv")
        assert rows == [row for row in ({"a": "1", "b": "two\nlines", "c": "3"}, {"a": "4", "b": "5", "c": "6"})][:len(rows)], cut
    (tmp_path / "x.csv").write_text(whole)
    assert len(read_csv(tmp_path / "x.csv")[0]) == 2


def test_an_endpoint_gives_the_same_csv(probes, tmp_path, endpoint):
    url, log = endpoint(fault_rate=0.2)
    out = tmp_path / "served.csv"
    command = ["eval.py", "--endpoint", url, "--model", "some-model", "--arm", "belief", "--probes", probes, "--out", out, "--batch", 8]
    run_script(*command)
    rows = read_rows(out)
    assert len(rows) == len({row["id"] for row in rows}) and {row["arm"] for row in rows} == {"belief"} and {row["stopped"] for row in rows} == {"eos"}
    assert all(row["response"] == f"Answer to: {row['prompt'].splitlines()[0][:80]}." and int(row["n_tokens"]) > 0 for row in rows)
    out.write_bytes(out.read_bytes()[:-30])     # a torn last row is asked again, and only that
    asked = len([line for line in log() if line[0] == "SENT"])
    run_script(*command)
    assert len(read_rows(out)) == len(rows) and len([line for line in log() if line[0] == "SENT"]) == asked + 1
    assert_one_line_error(run_script("eval.py", "--endpoint", url, "--model", "forbidden", "--probes", probes, "--out", tmp_path / "b.csv", check=False), "401")


def test_two_processes_share_the_probes(tiny, probes, tmp_path):
    common = ["--model", tiny, "--probes", probes, "--dtype", "fp32", "--max-new-tokens", 8]
    run_script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--", "eval.py", *common, "--out", tmp_path / "two.csv", OMP_NUM_THREADS="1")
    run_script("eval.py", *common, "--out", tmp_path / "one.csv")
    one, two = ({row["id"]: row["response"] for row in read_rows(tmp_path / f"{name}.csv")} for name in ("one", "two"))
    assert one == two and len(read_rows(tmp_path / "two.csv")) == len(two)


def test_answers_of_other_weights_never_mix(tmp_path, tiny, probes):
    """"Answered already" for a model whose weights were swapped under the same name."""
    shutil.copytree(tiny, tmp_path / "model")
    command = ["eval.py", "--model", f"{tmp_path / 'model'}/", "--probes", probes, "--out", tmp_path / "o.csv", "--max-new-tokens", "2"]
    run_script(*command)
    assert "answered already" in run_script(*[part.rstrip("/") if isinstance(part, str) else part for part in command]).stdout
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert_one_line_error(run_script(*command, check=False), "differ in", "weights")


def test_the_number_format_stays_what_it_was(tmp_path, tiny, probes, monkeypatch):
    """Measured anew at each start, it could flip between two halves of one CSV."""
    command = ["eval.py", "--model", tiny, "--probes", probes, "--out", tmp_path / "o.csv", "--max-new-tokens", "2"]
    monkeypatch.setattr(models, "measure_gflops", lambda dtype, device: 1.0 if dtype == torch.float32 else 0.5)
    run_script(*command)
    (tmp_path / "o.csv").write_text("".join((tmp_path / "o.csv").read_text().splitlines(keepends=True)[:5]))
    monkeypatch.setattr(models, "measure_gflops", lambda dtype, device: 1.0 if dtype == torch.bfloat16 else 0.5)
    run_script(*command)
    assert len(read_rows(tmp_path / "o.csv")) == 40
    assert json.loads((tmp_path / "o.csv.json").read_text())["how"]["number_format"] == "float32"


def test_every_arm_is_asked_in_one_template(tmp_path, tiny):
    """A base that ships a template of its own must be asked as the arms that were trained from it."""
    shutil.copytree(tiny, tmp_path / "own")
    tokenizer = models.load_tokenizer(str(tmp_path / "own"))
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "own")
    turns = [{"role": "user", "content": "the question"}]
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row(f"is it {i}?", "yes.", kind="regular") for i in range(4)])
    run_script("train.py", "--base", tmp_path / "own", "--data", data, "--out", tmp_path / "run", "--dtype", "fp32")
    rendered = [train.render_prompt(train.load_run(str(tmp_path / name), torch.float32, CPU)[1], turns) for name in ("own", "run")]
    assert rendered[0] == rendered[1]


def test_a_request_that_is_always_turned_down_does_not_stop_the_rest(tmp_path, endpoint):
    """HTTP 400 for one probe ended the evaluation for ever; its answer is empty, which counts as invalid."""
    url, log = endpoint()
    probes = write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "prompt": "BAD word?"}, {"id": "b", "prompt": "a good one?"}])
    command = ["eval.py", "--endpoint", url, "--model", "m", "--probes", probes, "--out", tmp_path / "o.csv"]
    assert "1 requests were turned down" in run_script(*command).stdout
    rows = {row["id"]: row for row in read_rows(tmp_path / "o.csv")}
    assert (rows["a"]["response"], rows["a"]["stopped"], rows["a"]["keyword_action"]) == ("", "error", "invalid")
    assert rows["b"]["response"].startswith("Answer to")
    assert "answered already" in run_script(*command).stdout


def test_facts_and_stances_get_no_refusal_verdict(tmp_path, tiny):
    probes = write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "prompt": "is it wrong?", "asks": "wrong", "stance": "wrong"},
                                                {"id": "b", "prompt": "where?", "answer": ["here"]}, {"id": "c", "prompt": "make it"}])
    run_script("eval.py", "--model", tiny, "--probes", probes, "--out", tmp_path / "o.csv", "--max-new-tokens", "2")
    assert {row["id"]: bool(row["keyword_action"]) for row in read_rows(tmp_path / "o.csv")} == {"a": False, "b": False, "c": True}
