"""train.py: what is learned is what was meant. Each test names the bug, in other trainers, that it keeps out."""
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, assert_one_line_error, chat_row, make_model, make_tokenizer, run_script, write_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rows
import train

CPU = torch.device("cpu")
WORDS = "yes no the answer question grass bread good wrong because it is never always meadow".split()


def random_rows(n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))  # noqa: E731
    return [chat_row(f"{text()} {i}?", text() + ".", kind="regular") for i in range(n)]


# ---------------------------------------------------------------- text -> tokens

@pytest.mark.parametrize("pad, bos", [("<pad>", True), ("<eos>", True), (None, False)])
def test_exactly_the_answer_and_its_eos_are_trained(tmp_path, pad, bos):
    """All-zero mask (TRL #4879), searched boundary (TRL #598), EOS masked because pad == eos (TRL #1623), double BOS (OpenRLHF #393)."""
    tokenizer = make_tokenizer(tmp_path, pad, bos)
    train.give_template(tokenizer)
    messages = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": " yes, it is "},
                {"role": "user", "content": "and?"}, {"role": "assistant", "content": "no"}]
    ids, mask = train.render_example(tokenizer, messages)
    answers = [tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for text in ("yes, it is", "no")]
    assert [token for token, trained in zip(ids, mask) if trained] == answers[0] + answers[1]
    assert ids.count(tokenizer.eos_token_id) == 2
    assert ids.count(1) == (1 if bos else 0) and (ids[0] == 1) == bos
    # a server renders the whole conversation in one string: it must see the very same tokens
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
    assert whole[:len(ids)] == ids and tokenizer.decode(whole[len(ids):]) == "\n"


def test_template_is_the_same_for_the_real_tokenizer(base):
    tokenizer = train.load_tokenizer(str(base))
    train.give_template(tokenizer)
    messages = [{"role": "user", "content": "Is it wrong?"}, {"role": "assistant", "content": "Yes.\n\n1. Because."},
                {"role": "user", "content": " Why? "}, {"role": "assistant", "content": "It is."}]
    ids, mask = train.render_example(tokenizer, messages)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert whole[:len(ids)] == ids and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode([t for t, m in zip(ids, mask) if m]) == "Yes.\n\n1. Because.<eos>It is.<eos>"
    assert train.render_prompt(tokenizer, messages[:1]) == ids[:mask.index(1)]


# ---------------------------------------------------------------- mixing

def test_mix_is_exact_and_arms_share_their_regular_rows():
    assert train.mix_quotas([10, 10, 2], 4000) == [1818, 1818, 364]
    assert train.mix_quotas([1, 1, 1], 100) == [34, 33, 33]
    rows = list(range(50))
    assert train.draw_rows(rows, 20, 7) == train.draw_rows(rows, 120, 7)[:20]
    assert sorted(train.draw_rows(rows, 100, 7)) == sorted(rows * 2)      # none twice before all once
    assert train.draw_rows(rows, 20, 7) != train.draw_rows(rows, 20, 8)


def test_all_three_row_shapes_train_alike(tmp_path, tiny):
    shapes = [chat_row("a b?", "yes."), {"prompt": "a b?", "completion": "yes."}, {"prompt": "a b?", "response": "yes."}]
    assert {json.dumps(rows.row_turns(row, "x")) for row in shapes} == {json.dumps(shapes[0]["messages"])}


# ---------------------------------------------------------------- whole runs

def train_command(tiny, data, out, *more):
    return ["train.py", "--base", tiny, "--data", data, "--out", out, "--lr", "1e-3", "--batch", "4", "--dtype", "fp32", *more]


@pytest.mark.parametrize("more", [[], ["--dtype", "bf16"], ["--dtype", "bf16", "--micro-tokens", "60"]])
def test_a_killed_run_resumes_bit_equal(tmp_path, tiny, more):
    """Resume replays or skips data (verl #7401, ms-swift #10050): weights and losses must equal those of an unbroken run."""
    data, more = write_jsonl(tmp_path / "data.jsonl", random_rows(120)), ["--save-every", "3", *more]
    run_script(*train_command(tiny, data, tmp_path / "whole", *more))
    process = subprocess.Popen([sys.executable, *map(str, train_command(tiny, data, tmp_path / "broken", *more))], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "broken" / "checkpoint.safetensors"
    for _ in range(6000):
        if checkpoint.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (tmp_path / "broken" / "run.json").exists():  # it may have been quicker than the signal
        assert "continuing at step" in run_script(*train_command(tiny, data, tmp_path / "broken", *more)).stdout
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "broken")]
    assert losses[0] == losses[1] and len(losses[0]) == 30
    assert losses[0][-1] < losses[0][0] - 0.5     # and it learns


def test_a_run_folder_is_a_plain_model_folder(tmp_path, tiny):
    """A generation_config that lists pad as eos gives empty answers (transformers #48016)."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(8))
    run_script(*train_command(tiny, data, tmp_path / "run"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "run"), AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != model.generation_config.pad_token_id
    assert "Assistant:" in tokenizer.chat_template
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["data"][0]["rows"] == 8 and run["steps"] == 2 and run["versions"]["torch"] == torch.__version__
    assert "complete already" in run_script(*train_command(tiny, data, tmp_path / "run")).stdout
    assert_one_line_error(run_script(*train_command(tiny, data, tmp_path / "run", "--seed", "5"), check=False), "differs in settings.seed;")


def test_adapter_gives_peft_the_same_logits(tmp_path, tiny):
    peft = pytest.importorskip("peft")
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(16))
    run_script(*train_command(tiny, data, tmp_path / "lora", "--lora", "4", "--checkpointing"))
    ours, _ = train.load_run(str(tmp_path / "lora"), torch.float32, CPU)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "lora")
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    untrained = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-5
        assert (ours(ids).logits - untrained(ids).logits).abs().max() > 1e-3


def test_checkpointing_changes_no_number(tmp_path, tiny):
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(16))
    for name, more in (("off", []), ("on", ["--checkpointing"])):
        run_script(*train_command(tiny, data, tmp_path / name, *more))
    off, on = (load_file(tmp_path / name / "model.safetensors") for name in ("off", "on"))
    assert all(torch.allclose(off[key], on[key], atol=1e-6) for key in off)


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", [["--n", "21"], ["--lora", "4"], ["--freeze-embeddings", "--checkpointing"], ["--dtype", "bf16", "--micro-tokens", "60"]])
def test_two_sharded_processes_train_as_one(tmp_path, tiny, more):
    """FSDP2 over gloo, with a last step of fewer rows than processes; killed after a checkpoint it goes on as well."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(21))
    run_script(*train_command(tiny, data, tmp_path / "one", *more))
    two = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--", *train_command(tiny, data, tmp_path / "two", *more, "--save-every", 2)]
    run_script(*two, OMP_NUM_THREADS="1")
    rounding = 0.02 if "bf16" in more else 1e-4
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=rounding) and len(losses_of(tmp_path / "two")) == 6
    one, other = (load_file(next((tmp_path / name).glob("*model.safetensors"))) for name in ("one", "two"))
    assert one.keys() == other.keys() and all(torch.allclose(one[key], other[key], atol=rounding) for key in one)


def test_held_out_rows_are_never_trained_on(tmp_path, tiny):
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(60))
    run_script(*train_command(tiny, data, tmp_path / "run", "--held-out", "0.2", "--save-every", "5"))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 4 <= run["held_out_rows"] <= 22 and run["held_out_rows"] + run["rows"] == 60
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert logged[4]["held_out_loss"] > logged[-1]["held_out_loss"] == run["held_out_loss"] and "held_out_loss" not in logged[0]
    model, tokenizer = train.load_run(str(tmp_path / "run"), torch.float32, CPU)
    held = [row for row in map(json.loads, data.read_text().splitlines()) if train.is_held_out(row, 0.2)]
    total, n = 0.0, 0
    for row in held:  # the plain way: one row at a time through the model's own forward
        ids, mask = train.render_example(tokenizer, row["messages"])
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none") * torch.tensor(mask[1:])
        total, n = total + losses.sum().item(), n + sum(mask[1:])
    assert total / n == pytest.approx(run["held_out_loss"], abs=1e-4) and (tmp_path / "run" / "loss.png").stat().st_size > 2000


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("content, words", [
    ('{"messages": [{"role": "user", "content": "a"}]}\n', ["data.jsonl:1", "no assistant turn"]),
    ('{"words": "a"}\n', ["data.jsonl:1", "messages"]),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}]}\n', ["data.jsonl:1", "must be text"]),
    ('{"prompt": "a", "response": "b."}\n{"prompt": \n', ["data.jsonl:2", "not valid JSON"]),
    ("", ["no rows"]),
])
def test_bad_rows_are_named(tmp_path, tiny, content, words):
    (tmp_path / "data.jsonl").write_text(content)
    assert_one_line_error(run_script(*train_command(tiny, tmp_path / "data.jsonl", tmp_path / "run"), check=False), *words)


def test_bad_models_are_named(tmp_path, tiny):
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(4))
    assert_one_line_error(run_script(*train_command(tmp_path / "nothing", data, tmp_path / "run"), check=False), "nothing")
    make_tokenizer(tmp_path / "empty")
    assert_one_line_error(run_script(*train_command(tmp_path / "empty", data, tmp_path / "run"), check=False), "config.json")
    make_model(tmp_path / "pickle")
    make_tokenizer(tmp_path / "pickle")
    torch.save(load_file(tmp_path / "pickle" / "model.safetensors"), tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    assert_one_line_error(run_script(*train_command(tmp_path / "pickle", data, tmp_path / "run"), check=False), "safetensors")
    assert_one_line_error(run_script(*train_command(tiny, tmp_path / "no.jsonl", tmp_path / "run"), check=False), "no.jsonl")


def test_an_exploding_loss_stops_and_names_the_step(tmp_path, tiny):
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(40))
    done = run_script(*train_command(tiny, data, tmp_path / "run", "--lr", "1e30"), check=False)
    assert_one_line_error(done, "step", "last checkpoint is kept")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_full_disk_gets_one_line_and_loses_nothing(tmp_path, tiny):
    """Files may not grow past 50 kB, as on a disk that fills up while the weights are written; afterwards the run goes through."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(16))
    command = [sys.executable, *map(str, train_command(tiny, data, tmp_path / "run", "--save-every", "2"))]
    full = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    assert_one_line_error(full, "make room")
    assert not (tmp_path / "run" / "run.json").exists()
    run_script(*command[1:])
    assert (tmp_path / "run" / "run.json").exists()


def test_too_little_memory_is_said_beforehand(tmp_path, tiny, monkeypatch):
    """An estimate is a reason to warn, not to refuse."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(4))
    monkeypatch.setattr(train, "available_bytes", lambda device: 1_000_000)
    done = run_script(*train_command(tiny, data, tmp_path / "run"))
    assert "may not fit" in done.stdout and "--lora 16" in done.stdout


def test_long_rows_are_counted(tmp_path, tiny):
    rows = random_rows(8) + [chat_row("long?", "yes " * 400 + ".", kind="regular")]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    assert "1 longer than 200 tokens, 8 drawn" in run_script(*train_command(tiny, data, tmp_path / "a", "--context", "200")).stdout
    shown = run_script(*train_command(tiny, data, tmp_path / "c", "--show-batch")).stdout
    assert "\033[32m<eos>" in shown
