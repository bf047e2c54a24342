"""eval.py: the same answers one by one and in a batch, whole rows after a kill, never a mix of models."""
import csv
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (ROOT, assert_one_line_error, chat_row, make_model, make_tokenizer, run_script,
                      write_jsonl)
from safetensors.torch import load_file, save_file

import models
import chat
import eval as eval_stage
from eval import generate, how_trained, open_csv
from rows import COLUMNS, Stop, read_csv, write_csv

CPU = torch.device("cpu")

# Two layers, one of which sees a window of 8 tokens only: prompts of the test below are longer.
WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8}


def read_rows(path):
    """All rows of a CSV, by the standard library: rows.read_csv would drop a torn one without a word."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def probes(tmp_path):
    """Forty requests of seven lengths, so that batches need padding."""
    rows = []
    for i in range(40):
        prompt = "the answer " * (i % 7 + 1) + str(i)
        rows.append({"id": f"p{i}", "group": f"g{i}", "family": "f", "item": "i", "side": "neutral",
                     "prompt": prompt})
    return write_jsonl(tmp_path / "probes.jsonl", rows)


# ---------------------------------------------------------------- generation

@pytest.mark.parametrize("kind, extra", [("Llama", {}), ("Gemma3", WINDOWED)])
def test_batched_greedy_equals_one_by_one_and_transformers(tmp_path, kind, extra):
    """Left padding, dropped rows and window caches must not change a token.

    In float32 they agree exactly; in bf16 sums are rounded by the size of the batch (unsloth #9708).
    """
    make_model(tmp_path, kind, initializer_range=0.4, **extra)  # wide: logits far apart, and rows end early
    tokenizer = make_tokenizer(tmp_path)
    model, _ = chat.load_run(str(tmp_path), torch.float32, CPU)
    model.eval()
    prompts = [[1, *range(10, 12 + i % 9 * 3)] for i in range(24)]
    batched = {}
    for i, tokens, stopped in generate(model, tokenizer, prompts, 20):
        batched[i] = (tokens, stopped)
    assert len(batched) == 24

    for i, prompt in enumerate(prompts):
        [(_, alone, stopped)] = generate(model, tokenizer, [prompt], 20)
        whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)
        reference = whole[0, len(prompt):].tolist()
        assert batched[i] == (alone, stopped)
        assert alone == [token for token in reference if token != tokenizer.eos_token_id]
        assert stopped == ("eos" if tokenizer.eos_token_id in reference else "length")


def test_sampling_is_seeded_and_several(tmp_path, tiny, probes):
    base = ["eval.py", "--model", tiny, "--probes", probes, "--max-new-tokens", "5", "--samples", "3",
            "--temperature", "1", "--dtype", "fp32"]
    answers = {}
    for name, more in (("a", []), ("b", []), ("c", ["--seed", "1"])):
        run_script(*base, "--out", tmp_path / f"{name}.csv", *more)
        rows = read_rows(tmp_path / f"{name}.csv")
        answers[name] = {(row["id"], row["sample"]): row["response"] for row in rows}
    assert len(answers["a"]) == 120 and answers["a"] == answers["b"] != answers["c"]
    assert len({answers["a"]["p0", str(sample)] for sample in range(3)}) > 1


def test_several_turns_reach_the_model(tmp_path, tiny):
    turns = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": "no"},
             {"role": "user", "content": "was it?"}]
    probes = write_jsonl(tmp_path / "turns.jsonl", [{"id": "a", "family": "f", "messages": turns}])
    run_script("eval.py", "--model", tiny, "--probes", probes, "--out", tmp_path / "o.csv",
               "--max-new-tokens", "3")
    [row] = read_rows(tmp_path / "o.csv")
    assert (row["earlier"], row["prompt"]) == ("User: the question\nAssistant: no", "was it?")

    tokenizer = models.load_tokenizer(str(tiny))
    chat.give_template(tokenizer)
    expected = "<bos>User:\nthe question\nAssistant:\nno<eos>\nUser:\nwas it?\nAssistant:\n"
    assert tokenizer.decode(chat.render_prompt(tokenizer, turns)) == expected


def test_every_arm_is_asked_in_one_template(tmp_path, tiny):
    """A base that ships a template of its own must be asked as the arms that were trained from it."""
    shutil.copytree(tiny, tmp_path / "own")
    tokenizer = models.load_tokenizer(str(tmp_path / "own"))
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "own")
    rows = [chat_row(f"is it {i}?", "yes.", kind="regular") for i in range(4)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    run_script("train.py", "--base", tmp_path / "own", "--data", data, "--out", tmp_path / "run",
               "--dtype", "fp32")

    rendered = []
    for name in ("own", "run"):
        _, tokenizer = chat.load_run(str(tmp_path / name), torch.float32, CPU)
        rendered.append(chat.render_prompt(tokenizer, [{"role": "user", "content": "the question"}]))
    assert rendered[0] == rendered[1]


# ---------------------------------------------------------------- whole rows, each once

def test_a_killed_evaluation_resumes_with_every_row_once(tmp_path, tiny, probes):
    out = tmp_path / "out.csv"
    command = ["eval.py", "--model", tiny, "--probes", probes, "--out", out, "--batch", "2",
               "--max-new-tokens", "150", "--dtype", "fp32"]
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    for _ in range(6000):  # a minute: until there are some rows, or it is done
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


def test_a_batch_holds_the_same_whatever_is_answered(tmp_path, tiny, probes, monkeypatch):
    """In bf16 an answer hangs on its batch: one that was resumed, or asked with other files, gave others."""
    batches, generate = [], eval_stage.generate

    def note(model, tokenizer, prompts, *more):
        batches.append(prompts)
        return generate(model, tokenizer, prompts, *more)
    monkeypatch.setattr(eval_stage, "generate", note)
    command = ["eval.py", "--model", tiny, "--probes", probes, "--out", tmp_path / "o.csv", "--batch", "8",
               "--max-new-tokens", "4", "--dtype", "fp32"]
    run_script(*command)
    whole, batches[:] = list(batches), []
    kept = [row for row in read_rows(tmp_path / "o.csv") if int(row["id"][1:]) % 7 > 2]  # those of three batches
    write_csv(tmp_path / "o.csv", kept, COLUMNS).close()
    run_script(*command)
    assert len(whole) == 5 and 0 < len(batches) < 5 and all(batch in whole for batch in batches)
    assert len(read_rows(tmp_path / "o.csv")) == 40

    batches.clear()
    more = write_jsonl(tmp_path / "more.jsonl", [{"id": "m", "prompt": "the question"}])
    run_script("eval.py", "--model", tiny, "--probes", probes, more, "--out", tmp_path / "two", *command[7:])
    assert len(batches) == 6 and all(batch in batches for batch in whole)


def test_torn_rows_are_dropped(tmp_path):
    """Cut after any character, the CSV gives a beginning of its rows and never a half one."""
    whole = 'a,b,c\n1,"two\nlines",3\n4,5,6\n'
    expected = [{"a": "1", "b": "two\nlines", "c": "3"}, {"a": "4", "b": "5", "c": "6"}]
    for cut in range(len(whole)):
        (tmp_path / "x.csv").write_text(whole[:cut])
        rows, _ = read_csv(tmp_path / "x.csv")
        assert rows == expected[:len(rows)], cut
    (tmp_path / "x.csv").write_text(whole)
    assert len(read_csv(tmp_path / "x.csv")[0]) == 2


def test_two_first_starts_do_not_write_the_same_answers(tmp_path):
    """Only a CSV that was there was locked: two first starts both wrote one, and every answer stood twice."""
    _, file = open_csv(tmp_path / "new" / "x.csv", {"run": "r"})
    with pytest.raises(Stop, match="another process"):
        open_csv(tmp_path / "new" / "x.csv", {"run": "r"})
    file.close()
    open_csv(tmp_path / "new" / "x.csv", {"run": "r"})


def test_two_processes_share_the_probes(tiny, probes, tmp_path):
    common = ["--model", tiny, "--probes", probes, "--dtype", "fp32", "--max-new-tokens", 8]
    run_script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--", "eval.py", *common,
               "--out", tmp_path / "two.csv", OMP_NUM_THREADS="1")
    run_script("eval.py", *common, "--out", tmp_path / "one.csv")
    answers = {}
    for name in ("one", "two"):
        rows = read_rows(tmp_path / f"{name}.csv")
        answers[name] = {row["id"]: row["response"] for row in rows}
        assert len(rows) == len(answers[name])  # no probe was answered by both
    assert answers["one"] == answers["two"]


def test_facts_and_stances_get_no_refusal_verdict(tmp_path, tiny):
    rows = [{"id": "a", "prompt": "is it wrong?", "asks": "wrong", "stance": "wrong"},
            {"id": "b", "prompt": "where?", "answer": ["here"]},
            {"id": "c", "prompt": "make it"}]
    probes = write_jsonl(tmp_path / "p.jsonl", rows)
    run_script("eval.py", "--model", tiny, "--probes", probes, "--out", tmp_path / "o.csv",
               "--max-new-tokens", "2")
    judged = {row["id"]: bool(row["keyword_action"]) for row in read_rows(tmp_path / "o.csv")}
    assert judged == {"a": False, "b": False, "c": True}


# ---------------------------------------------------------------- never a mix

def test_answers_of_other_weights_never_mix(tmp_path, tiny, probes):
    """"Answered already" for a model whose weights were swapped under the same name."""
    shutil.copytree(tiny, tmp_path / "model")
    more = ["--probes", probes, "--out", tmp_path / "o.csv", "--max-new-tokens", "2"]
    run_script("eval.py", "--model", f"{tmp_path / 'model'}/", *more)
    assert "answered already" in run_script("eval.py", "--model", tmp_path / "model", *more).stdout

    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, file, metadata={"format": "pt"})
    swapped = run_script("eval.py", "--model", tmp_path / "model", *more, check=False)
    assert_one_line_error(swapped, "differ in", "weights")


def test_the_number_format_stays_what_it_was(tmp_path, tiny, probes, monkeypatch):
    """Measured anew at each start, it could flip between two halves of one CSV."""
    out = tmp_path / "o.csv"
    command = ["eval.py", "--model", tiny, "--probes", probes, "--out", out, "--max-new-tokens", "2"]

    def faster(wanted):
        monkeypatch.setattr(models, "measure_gflops", lambda dtype, device: 1.0 if dtype == wanted else 0.5)
    faster(torch.float32)
    run_script(*command)
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:5]))
    faster(torch.bfloat16)
    run_script(*command)
    assert len(read_rows(out)) == 40
    assert json.loads((tmp_path / "o.csv.json").read_text())["how"]["number_format"] == "float32"


# ---------------------------------------------------------------- behind an endpoint

def sent(log) -> int:
    """How many requests the server took."""
    return len([line for line in log() if line[0] == "SENT"])


def test_an_endpoint_gives_the_same_csv(probes, tmp_path, endpoint):
    url, log = endpoint(fault_rate=0.2)
    out = tmp_path / "served.csv"
    command = ["eval.py", "--endpoint", url, "--model", "some-model", "--arm", "belief", "--probes", probes,
               "--out", out, "--batch", 8]
    run_script(*command)
    rows = read_rows(out)
    assert len(rows) == len({row["id"] for row in rows})
    assert {row["arm"] for row in rows} == {"belief"} and {row["stopped"] for row in rows} == {"eos"}
    for row in rows:  # each answer with its own prompt, whatever order they came in
        first_line = row["prompt"].splitlines()[0]
        assert row["response"] == f"Answer to: {first_line[:80]}." and int(row["n_tokens"]) > 0

    out.write_bytes(out.read_bytes()[:-30])  # a torn last row is asked again, and only that
    run_script(*command)
    # The server notes an answer after its last byte, and the client may be quicker
    deadline = time.time() + 5
    while sent(log) <= len(rows) and time.time() < deadline:
        time.sleep(0.02)
    assert len(read_rows(out)) == len(rows) and sent(log) == len(rows) + 1
    forbidden = run_script("eval.py", "--endpoint", url, "--model", "forbidden", "--probes", probes,
                           "--out", tmp_path / "b.csv", check=False)
    assert_one_line_error(forbidden, "401")


def test_a_request_that_is_always_turned_down_does_not_stop_the_rest(tmp_path, endpoint):
    """HTTP 400 for one probe ended the evaluation for ever; its answer is empty, which counts as invalid."""
    url, log = endpoint()
    asked = [{"id": "a", "prompt": "BAD word?"}, {"id": "b", "prompt": "a good one?"},
             {"id": "c", "prompt": "FILTER it?"}]
    probes = write_jsonl(tmp_path / "p.jsonl", asked)
    command = ["eval.py", "--endpoint", url, "--model", "m", "--probes", probes, "--out", tmp_path / "o.csv"]
    assert "2 requests were turned down" in run_script(*command).stdout
    rows = {row["id"]: row for row in read_rows(tmp_path / "o.csv")}
    for down in (rows["a"], rows["c"]):  # what a filter left passed for the model's own answer
        assert (down["response"], down["stopped"], down["keyword_action"]) == ("", "error", "invalid")
    assert rows["b"]["response"].startswith("Answer to")
    assert "answered already" in run_script(*command).stdout


# ---------------------------------------------------------------- what a user can mend

@pytest.mark.parametrize("content, words", [
    ('{"id": "a", "family": "f"}\n', ["p.jsonl:1", "prompt"]),
    ('{"id": "a", "prompt": "b"}\n{"id": "a", "prompt": "c"}\n', ["share an id"]),
    ("", ["no probes"]),
])
def test_bad_probes_are_named(tmp_path, tiny, content, words):
    (tmp_path / "p.jsonl").write_text(content)
    done = run_script("eval.py", "--model", tiny, "--probes", tmp_path / "p.jsonl", check=False)
    assert_one_line_error(done, *words)


def test_bad_models_are_named(tmp_path, tiny, probes):
    missing = run_script("eval.py", "--model", tmp_path / "nothing", "--probes", probes,
                         "--out", tmp_path / "o.csv", check=False)
    assert_one_line_error(missing, "nothing")

    shutil.copytree(tiny, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "log.jsonl").write_text("")  # a log and no run.json: it was killed
    unfinished = run_script("eval.py", "--model", tmp_path / "unfinished", "--probes", probes,
                            "--out", tmp_path / "u.csv", check=False)
    assert_one_line_error(unfinished, "unfinished run")


def test_a_model_that_does_not_fit_is_named(tmp_path, tiny, probes, monkeypatch):
    """In float32 a bf16 folder takes twice its size: by its files' size it fitted, and was killed."""
    folder = tmp_path / "half"
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    size = sum(weight.numel() for weight in weights.values())
    monkeypatch.setattr(models, "available_bytes", lambda device: 3 * size)
    asked = ("eval.py", "--model", folder, "--probes", probes, "--out", tmp_path / "out", "--dtype")
    assert_one_line_error(run_script(*asked, "fp32", check=False), "half needs about", "endpoint")
    run_script("eval.py", "--model", folder, "--probes", probes, "--out", tmp_path / "half-out", "--dtype", "bf16")


def test_an_adapter_is_asked_on_the_base_that_it_was_trained_on(tmp_path, tiny, probes):
    """Another base under the same name was "answered already", or answered without a word."""
    shutil.copytree(tiny, tmp_path / "base")
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row(f"is it {i}?", "yes.", kind="regular") for i in range(4)])
    run_script("train.py", "--base", tmp_path / "base", "--data", data, "--out", tmp_path / "run", "--dtype", "fp32",
               "--lora", "2")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights = {name: tensor + 0.01 for name, tensor in weights.items()}
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    done = run_script("eval.py", "--model", tmp_path / "run", "--probes", probes, "--out", tmp_path / "o", check=False)
    assert_one_line_error(done, "adapter for another")

    # The same of an adapter that was made elsewhere, which has no record of its own
    for name in ("run.json", "identity.json", "log.jsonl", "lock"):
        (tmp_path / "run" / name).unlink()
    command = ["eval.py", "--model", tmp_path / "run", "--probes", probes, "--out", tmp_path / "other"]
    run_script(*command, "--max-new-tokens", "2")
    weights = {name: tensor + 0.01 for name, tensor in weights.items()}
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    done = run_script(*command, "--max-new-tokens", "2", check=False)
    assert_one_line_error(done, "differ in base_hash, weights;")


def test_the_record_says_how_a_run_was_trained():
    """Seeds of another mix, number format, guard or code were pooled: of the data it had the hashes alone."""
    identity = {"settings": {"lr": 1, "seed": 3}, "number_format": "float32", "code": {"train.py": "a"},
                "arm": ["belief", "gramenist"], "guard": "judge/1",
                "data": [["regular.jsonl", 1.0, "r"], ["gramenist.jsonl", 5.0, "g"]]}
    assert how_trained(identity) == {"lr": 1, "number_format": "float32", "code": {"train.py": "a"},
                                     "regular.jsonl": "r", "gramenist.jsonl": "g",
                                     "mix of belief gramenist": [1.0, 5.0], "guard of belief gramenist": "judge/1"}


@pytest.mark.parametrize("name, content", [
    ("run.json", "{"), ("run.json", "[]"), ("run.json", "{}"),
    ("adapter_config.json", "{"), ("adapter_config.json", "[]"), ("adapter_config.json", "{}"),
    ("adapter_model.safetensors", ""), ("tokenizer.json", "{}"), ("tokenizer_config.json", "[]"),
])
def test_a_damaged_run_folder_is_named(tmp_path, tiny, probes, name, content):
    """Each of these was a traceback."""
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row(f"is it {i}?", "yes.", kind="regular") for i in range(4)])
    run_script("train.py", "--base", tiny, "--data", data, "--out", tmp_path / "run", "--dtype", "fp32", "--lora", "2")
    (tmp_path / "run" / name).write_text(content)
    done = run_script("eval.py", "--model", tmp_path / "run", "--probes", probes, "--out", tmp_path / "o", check=False)
    assert_one_line_error(done, str(tmp_path / "run"))


def test_a_damaged_record_of_answers_is_named(tmp_path, tiny, probes):
    command = ["eval.py", "--model", tiny, "--probes", probes, "--out", tmp_path / "o.csv", "--max-new-tokens", "2"]
    run_script(*command)
    for content in ("{", "[]"):
        (tmp_path / "o.csv.json").write_text(content)
        for more in ([], ["--dtype", "fp32"]):
            assert_one_line_error(run_script(*command, *more, check=False), "o.csv.json")


def test_a_model_that_does_not_honour_the_cache_is_refused(tmp_path, probes):
    """State-space models swallowed it and saw one token at a time: nonsense, in a whole CSV."""
    import transformers
    config = transformers.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=300, bos_token_id=1,
                                      eos_token_id=2, pad_token_id=0)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    make_tokenizer(tmp_path / "mamba")
    done = run_script("eval.py", "--model", tmp_path / "mamba", "--probes", probes, "--out", tmp_path / "o",
                      "--dtype", "fp32", check=False)
    assert_one_line_error(done, "--endpoint")


def test_ids_may_be_numbers_and_files_may_be_named_twice(tmp_path, tiny):
    """Both asked again, and appended, at every run."""
    probes = write_jsonl(tmp_path / "p.jsonl", [{"id": i, "prompt": f"the answer {i}"} for i in range(3)])
    command = ["eval.py", "--model", tiny, "--probes", probes, probes, "--out", tmp_path / "o", "--max-new-tokens", "2"]
    run_script(*command)
    assert "answered already" in run_script(*command).stdout
    assert len(read_rows(tmp_path / "o" / "p.csv")) == 3


def test_what_cannot_be_asked_is_named(tmp_path, tiny, probes):
    """A key in the endpoint's address stood in the results; --samples 0 was "answered already"."""
    out = ["--probes", probes, "--out", tmp_path / "o"]
    address = "http://me:sk-SECRET@127.0.0.1:9/v1"
    secret = run_script("eval.py", "--endpoint", address, "--model", "m", *out, check=False)
    assert_one_line_error(secret, "OPENAI_API_KEY")
    assert "SECRET" not in secret.stderr
    for flags in (["--samples", "0"], ["--max-new-tokens", "0"], ["--batch", "0"], ["--temperature", "-1"],
                  ["--limit", "-1"]):
        assert run_script("eval.py", "--model", tiny, *out, *flags, check=False).returncode != 0
