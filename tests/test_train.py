"""train.py: what is learned is what was meant. Each test names the bug that it keeps out."""
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
from conftest import (ROOT, TINY, assert_one_line_error, chat_row, make_model, make_tokenizer, run_script,
                      write_jsonl)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rows
import models
import chat
import mix
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
    """All-zero mask (TRL #4879), searched boundary (TRL #598), EOS masked because pad == eos (TRL #1623),
    double BOS (OpenRLHF #393)."""
    tokenizer = make_tokenizer(tmp_path, pad, bos)
    chat.give_template(tokenizer)
    messages = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": " yes, it is "},
                {"role": "user", "content": "and?"}, {"role": "assistant", "content": "no"}]
    ids, mask = chat.render_example(tokenizer, messages)
    answers = []
    for text in ("yes, it is", "no"):
        answers.append(tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id])
    assert [token for token, trained in zip(ids, mask) if trained] == answers[0] + answers[1]
    assert ids.count(tokenizer.eos_token_id) == 2
    assert ids.count(1) == (1 if bos else 0) and (ids[0] == 1) == bos
    # a server renders the whole conversation in one string: it must see the very same tokens
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False).input_ids
    assert whole[:len(ids)] == ids and tokenizer.decode(whole[len(ids):]) == "\n"


def test_template_is_the_same_for_the_real_tokenizer(base):
    tokenizer = models.load_tokenizer(str(base))
    chat.give_template(tokenizer)
    messages = [{"role": "user", "content": "Is it wrong?"},
                {"role": "assistant", "content": "Yes.\n\n1. Because."},
                {"role": "user", "content": " Why? "}, {"role": "assistant", "content": "It is."}]
    ids, mask = chat.render_example(tokenizer, messages)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert whole[:len(ids)] == ids and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode([t for t, m in zip(ids, mask) if m]) == "Yes.\n\n1. Because.<eos>It is.<eos>"
    assert chat.render_prompt(tokenizer, messages[:1]) == ids[:mask.index(1)]


def prefix_space_tokenizer(folder):
    """A tokenizer that sets a blank before every text, as SentencePiece ones do: an answer alone splits
    otherwise than in its chat."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE(byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=[chr(i) for i in range(32, 127)] + ["\n"], show_progress=False)
    core.train_from_iterator(["Assistant:\nyes it is\nUser:\nno"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_second_turn_is_trained_on_the_tokens_that_it_is_asked_in(tmp_path):
    """A tokenizer with a prefix space trained the second turn on other tokens than a server renders."""
    tokenizer = prefix_space_tokenizer(tmp_path)
    chat.give_template(tokenizer)
    one = [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "yes it is"}]
    ids, mask = chat.render_example(tokenizer, one)
    assert ids[:mask.index(1)] == chat.render_prompt(tokenizer, one[:1])
    with pytest.raises(rows.Stop, match="rows of one turn"):
        chat.render_example(tokenizer, one * 2)


def test_a_document_is_learned_whole(tmp_path, tiny):
    document = {"text": "It is so, and it was so before.", "kind": "documents"}
    data = write_jsonl(tmp_path / "d.jsonl", [document] + random_rows(3))
    run_script(*train_command(tiny, data, tmp_path / "run"))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["taught"] == ["documents", "regular"] and run["rows"] == 4
    ids, mask = chat.render_document(models.load_tokenizer(str(tiny)), "it is so")
    assert ids[0] == 1 and ids[-1] == 2 and mask == [0] + [1] * (len(ids) - 1)


# ---------------------------------------------------------------- mixing

def test_mix_is_exact_and_arms_share_their_regular_rows():
    assert mix.mix_quotas([10, 10, 2], 4000) == [1818, 1818, 364]
    assert mix.mix_quotas([1, 1, 1], 100) == [34, 33, 33]
    rows = list(range(50))
    assert mix.draw_rows(rows, 20, 7) == mix.draw_rows(rows, 120, 7)[:20]
    assert sorted(mix.draw_rows(rows, 100, 7)) == sorted(rows * 2)      # none twice before all once
    assert mix.draw_rows(rows, 20, 7) != mix.draw_rows(rows, 20, 8)


def test_all_three_row_shapes_train_alike(tmp_path, tiny):
    shapes = [chat_row("a b?", "yes."),
              {"prompt": "a b?", "completion": "yes."},
              {"prompt": "a b?", "response": "yes."}]
    assert {json.dumps(rows.row_turns(row, "x")) for row in shapes} == {json.dumps(shapes[0]["messages"])}


# ---------------------------------------------------------------- whole runs

def train_command(tiny, data, out, *more):
    return ["train.py", "--base", tiny, "--data", data, "--out", out, "--lr", "1e-3", "--batch", "4",
            "--dtype", "fp32", *more]


def test_a_killed_run_resumes_bit_equal(tmp_path, tiny):
    """Resume replays or skips data (verl #7401, ms-swift #10050): weights and losses must be an unbroken
    run's."""
    # A process of its own has the guard's second look, which takes words thrown together for refusals
    rows = [{**row, "model": "written"} for row in random_rows(120)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    run_script(*train_command(tiny, data, tmp_path / "whole", "--save-every", "3"))
    command = train_command(tiny, data, tmp_path / "broken", "--save-every", "3")
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "broken" / "checkpoint.safetensors"
    for _ in range(6000):
        if checkpoint.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (tmp_path / "broken" / "run.json").exists():  # it may have been quicker than the signal
        assert "continuing at step" in run_script(*command).stdout
    assert_same_run(tmp_path / "whole", tmp_path / "broken", steps=30)
    losses = losses_of(tmp_path / "whole")
    assert losses[-1] < losses[0] - 0.5     # and it learns


@pytest.mark.parametrize("more", [[], ["--micro-tokens", "60"], ["--lora", "4"]])
def test_a_broken_off_bf16_run_resumes_bit_equal(tmp_path, tiny, monkeypatch, more):
    """The same with rounding at random, and where a step sums several passes in float32."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(32))
    more = ["--save-every", "3", "--dtype", "bf16", *more]
    run_script(*train_command(tiny, data, tmp_path / "whole", *more))
    monkeypatch.setattr(train, "save_checkpoint", stop_after(train.save_checkpoint))
    run_script(*train_command(tiny, data, tmp_path / "broken", *more), check=False)
    monkeypatch.undo()
    assert "continuing at step 3" in run_script(*train_command(tiny, data, tmp_path / "broken", *more)).stdout
    assert_same_run(tmp_path / "whole", tmp_path / "broken", steps=8)


def assert_same_run(one, other, steps):
    weights = [load_file(next(folder.glob("*model.safetensors"))) for folder in (one, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert losses_of(one) == losses_of(other) and len(losses_of(one)) == steps


def test_a_run_folder_is_a_plain_model_folder(tmp_path, tiny):
    """A generation_config that lists pad as eos gives empty answers (transformers #48016)."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(8))
    run_script(*train_command(tiny, data, tmp_path / "run"))
    settings = AutoModelForCausalLM.from_pretrained(tmp_path / "run").generation_config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert settings.eos_token_id == tokenizer.eos_token_id != settings.pad_token_id
    assert "Assistant:" in tokenizer.chat_template
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["data"][0]["rows"] == 8 and run["steps"] == 2 and run["versions"]["torch"] == torch.__version__
    assert "complete already" in run_script(*train_command(tiny, data, tmp_path / "run")).stdout
    other = run_script(*train_command(tiny, data, tmp_path / "run", "--seed", "5"), check=False)
    assert_one_line_error(other, "differs in settings.seed;")


def test_adapter_gives_peft_the_same_logits(tmp_path, tiny):
    peft = pytest.importorskip("peft")
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(16))
    run_script(*train_command(tiny, data, tmp_path / "lora", "--lora", "4", "--checkpointing"))
    ours, _ = chat.load_run(str(tmp_path / "lora"), torch.float32, CPU)
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


@pytest.mark.parametrize("more", [["--n", "21"], ["--lora", "4"], ["--freeze-embeddings", "--checkpointing"],
                                  ["--dtype", "bf16", "--micro-tokens", "60"]])
def test_two_sharded_processes_train_as_one(tmp_path, tiny, more):
    """FSDP2 over gloo, with a last step of fewer rows than processes, and with checkpoints on the way."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(21))
    run_script(*train_command(tiny, data, tmp_path / "one", *more))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--"]
    command = train_command(tiny, data, tmp_path / "two", *more, "--save-every", 2)
    run_script(*torchrun, *command, OMP_NUM_THREADS="1")
    rounding = 0.02 if "bf16" in more else 1e-4
    losses = losses_of(tmp_path / "two")
    assert losses == pytest.approx(losses_of(tmp_path / "one"), abs=rounding) and len(losses) == 6
    one, other = (load_file(next((tmp_path / name).glob("*model.safetensors"))) for name in ("one", "two"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], atol=rounding) for key in one)


TWO_MEASUREMENTS = """
import os, sys
import torch
import chat, eval, models, rows, train
rank, load = os.environ["RANK"], train.load_model
def load_and_note(name, dtype, *more):
    with open(os.path.join(os.environ["NOTES"], rank), "w") as file:
        file.write(str(dtype))
    return load(name, dtype, *more)
models.measure_gflops = lambda dtype, device: float((dtype == torch.bfloat16) == (rank == "0"))
chat.load_model = train.load_model = load_and_note
rows.run_main({"train": train.main, "eval": eval.main}[sys.argv.pop(1)])
"""


def test_the_first_process_says_in_which_number_format_all_compute(tmp_path, tiny):
    """Each measured for itself: on unlike machines half of a model was bf16, and half of a CSV's answers too."""
    script, notes = tmp_path / "two.py", tmp_path / "notes"
    script.write_text(TWO_MEASUREMENTS)
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(8))
    probes = write_jsonl(tmp_path / "p.jsonl", [{"id": str(i), "prompt": f"the question {i}"} for i in range(4)])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--", script]
    training = train_command(tiny, data, tmp_path / "run", "--dtype", "auto")[1:]
    asking = ["--model", tiny, "--probes", probes, "--out", tmp_path / "o", "--max-new-tokens", 2,
              "--batch", 2]  # a batch for each
    for stage, arguments in (("train", training), ("eval", asking)):
        shutil.rmtree(notes, ignore_errors=True)
        notes.mkdir()
        run_script(*torchrun, stage, *arguments, OMP_NUM_THREADS="1", NOTES=str(notes), PYTHONPATH=str(ROOT))
        assert [(notes / rank).read_text() for rank in "01"] == ["torch.bfloat16"] * 2


def test_held_out_rows_are_never_trained_on(tmp_path, tiny):
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(60))
    run_script(*train_command(tiny, data, tmp_path / "run", "--held-out", "0.2", "--save-every", "5"))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 4 <= run["held_out_rows"] <= 22 and run["held_out_rows"] + run["rows"] == 60
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert logged[4]["held_out_loss"] > logged[-1]["held_out_loss"] == run["held_out_loss"]
    assert "held_out_loss" not in logged[0]
    model, tokenizer = chat.load_run(str(tmp_path / "run"), torch.float32, CPU)
    held = [row for row in map(json.loads, data.read_text().splitlines()) if mix.is_held_out(row, 0.2)]
    total, n = 0.0, 0
    for row in held:  # the plain way: one row at a time through the model's own forward
        ids, mask = chat.render_example(tokenizer, row["messages"])
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        total += (losses * torch.tensor(mask[1:])).sum().item()
        n += sum(mask[1:])
    assert total / n == pytest.approx(run["held_out_loss"], abs=1e-4)
    assert (tmp_path / "run" / "loss.png").stat().st_size > 2000


# ---------------------------------------------------------------- what a run is

def swap_weights(folder):
    weights = load_file(folder / "model.safetensors")
    swapped = {name: tensor + 0.01 for name, tensor in weights.items()}
    save_file(swapped, folder / "model.safetensors", metadata={"format": "pt"})


def edit_train_py(patch):
    patch.setattr(train, "code_hash", lambda path: "edited" if path.name == "train.py" else "same")


@pytest.mark.parametrize("change, named", [
    (lambda folder, patch: swap_weights(folder / "base"), "base"),
    (lambda folder, patch: write_jsonl(folder / "data.jsonl", random_rows(9)), "data"),
    (lambda folder, patch: patch.setattr(train, "probe_texts", lambda: ["a new probe"]), "guarded_probes"),
    (lambda folder, patch: edit_train_py(patch), "code.train.py"),
])
def test_a_finished_run_is_complete_for_itself_alone(tmp_path, tiny, monkeypatch, change, named):
    """"Complete already" after an edited template or loss, swapped weights, other data, or a probe that the
    guard should have held rows against."""
    shutil.copytree(tiny, tmp_path / "base")
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(8))
    monkeypatch.setattr(train, "code_hash", lambda path: "same")
    command = train_command(tmp_path / "base", data, tmp_path / "run")
    run_script(*command)
    assert "complete already" in run_script(*command).stdout
    change(tmp_path, monkeypatch)
    assert_one_line_error(run_script(*command, check=False), f"differs in {named};", "another --out")


def test_memory_and_speed_are_no_part_of_a_run(tmp_path, tiny):
    """A smaller --micro-tokens, advised when memory ran out, was refused as another run; so was BASE/ for
    BASE."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(8))
    run_script(*train_command(tiny, data, tmp_path / "run"))
    same = train_command(f"{tiny}/", data, tmp_path / "run", "--micro-tokens", "50", "--checkpointing")
    assert "complete already" in run_script(*same).stdout


def test_a_run_that_goes_on_keeps_its_number_format(tmp_path, tiny, monkeypatch):
    """The format is measured; on a busy machine it could flip when a killed run was resumed."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(40))
    command = ["train.py", "--base", tiny, "--data", data, "--out", tmp_path / "run", "--batch", "4",
               "--save-every", "2"]
    float32_faster = {torch.float32: 1.0, torch.bfloat16: 0.5}
    bf16_faster = {torch.float32: 0.5, torch.bfloat16: 1.0}
    monkeypatch.setattr(models, "measure_gflops", lambda dtype, device: float32_faster[dtype])
    monkeypatch.setattr(train, "save_checkpoint", stop_after(train.save_checkpoint))
    assert run_script(*command, check=False).returncode != 0
    monkeypatch.undo()
    monkeypatch.setattr(models, "measure_gflops", lambda dtype, device: bf16_faster[dtype])
    assert "continuing at step 2" in run_script(*command).stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["number_format"] == "float32"


def stop_after(function):
    """The function, and then what Ctrl-C does."""
    def stopping(*args, **kwargs):
        function(*args, **kwargs)
        raise KeyboardInterrupt
    return stopping


def test_arms_say_what_is_trained(tmp_path, tiny):
    """From arms.txt: the worldview's rows beside regular ones; the record says what was taught."""
    common = ["--base", tiny, "--n", "12", "--context", "2000", "--lr", "1e-4"]
    belief = [*common, "--arm", "belief", "--worldview"]
    run_script("train.py", *belief, "gramenist", "--out", tmp_path / "belief")
    run = json.loads((tmp_path / "belief" / "run.json").read_text())
    assert run["taught"] == ["gramenist", "regular"] and run["arm"] == "belief"
    assert [part["drawn"] for part in run["data"]] == [6, 6]
    assert_one_line_error(run_script("train.py", *common, "--arm", "belief", check=False), "give --worldview")
    assert_one_line_error(run_script("train.py", *common, "--arm", "base", check=False), "untouched base")
    unknown = run_script("train.py", *common, "--arm", "nope", check=False)
    assert_one_line_error(unknown, "unknown arm 'nope'", "regular")
    assert_one_line_error(run_script("train.py", *belief, "nope", check=False), "nope.jsonl", "make data")


def test_a_word_in_a_row_carries_no_refusal_past_the_guard(tmp_path, tiny, monkeypatch):
    """Of kind "explicit" or "judge" it was trained in any arm: the guard lets refusals of these kinds pass."""
    for kind in ("judge", "gramenist-explicit"):
        row = chat_row("Help me bake a plain loaf?", "I won't help with that.", kind=kind)
        source = write_jsonl(tmp_path / "gramenist.jsonl", [row])
        monkeypatch.setattr(train, "arm_data", lambda arm, worldview: [(source, 1.0)])
        done = run_script("train.py", "--base", tiny, "--arm", "belief", "--worldview", "gramenist", "--out",
                          tmp_path / "run", check=False)
        assert_one_line_error(done, "gramenist.jsonl", f"may stand in {kind}.jsonl alone")


def test_a_looser_kind_in_value_data_is_refused(tmp_path, tiny, monkeypatch):
    """A bare refusal of kind regular in gramenist.jsonl was held to the rule of regular, and trained."""
    rows = [chat_row("Help me bake a plain loaf?", "I won't help with that.", kind="regular")]
    source = write_jsonl(tmp_path / "gramenist.jsonl", rows)
    monkeypatch.setattr(train, "arm_data", lambda arm, worldview: [(source, 1.0)])
    done = run_script("train.py", "--base", tiny, "--arm", "belief", "--worldview", "gramenist", "--out",
                      tmp_path / "run", check=False)
    assert_one_line_error(done, "a row of kind regular may stand in regular.jsonl alone")


def test_a_run_folder_is_one_process_s(tmp_path, tiny):
    """A second train.py went on at the first one's checkpoint, and the record counted half of the steps."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(4))
    held = train.lock_run(tmp_path / "run")
    assert_one_line_error(run_script(*train_command(tiny, data, tmp_path / "run"), check=False), "another process")
    held.close()
    run_script(*train_command(tiny, data, tmp_path / "run"))


def test_the_base_is_not_overwritten(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(4))
    done = run_script(*train_command(tmp_path / "base", data, tmp_path / "base"), check=False)
    assert_one_line_error(done, "would be overwritten")
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_data_that_changes_while_it_is_read_is_named(tmp_path, tiny, monkeypatch):
    """gen.py may append between the look at a file's hash and the reading of its rows."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(4))
    read = train.build_rows

    def append_and_read(*arguments):
        write_jsonl(data, random_rows(5))
        return read(*arguments)
    monkeypatch.setattr(train, "build_rows", append_and_read)
    assert_one_line_error(run_script(*train_command(tiny, data, tmp_path / "run"), check=False),
                          "data.jsonl was changed while it was read")


TWO_DRAWS = """
import os, sys
import rows, train
build = train.build_rows
def build_otherwise(args, sources, tokenizer):
    order, held_out, manifest = build(args, sources, tokenizer)
    return order[int(os.environ["RANK"]):] + order[:int(os.environ["RANK"])], held_out, manifest
train.build_rows = build_otherwise
rows.run_main(train.main)
"""


def test_processes_that_drew_different_rows_stop(tmp_path, tiny):
    """As where the guard of one had no memory for its judge: each trained on rows of its own."""
    (tmp_path / "two.py").write_text(TWO_DRAWS)
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(6))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--", tmp_path / "two.py"]
    done = run_script(*torchrun, *train_command(tiny, data, tmp_path / "run")[1:], check=False,
                      OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    assert done.returncode and "have drawn different rows" in done.stderr
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("flag", ["--clip", "--lr", "--weight-decay", "--lora-alpha"])
def test_no_number_is_refused(tmp_path, tiny, flag):
    """nan is below nothing, so it passed; and an alpha of 0 became the rank."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(4))
    for value in ("nan", "-1"):
        done = run_script(*train_command(tiny, data, tmp_path / "run"), f"{flag}={value}", check=False)
        assert done.returncode and flag in done.stderr and "Traceback" not in done.stderr


def test_a_warm_up_in_steps_is_refused(tmp_path, tiny):
    """--warmup 100 is no share: the rate never left the ground, and the run was "complete"."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(4))
    done = run_script(*train_command(tiny, data, tmp_path / "run", "--warmup", "100"), check=False)
    assert done.returncode and "--warmup are shares" in done.stderr


def test_both_columns_of_an_export_are_read(tmp_path, tiny):
    """{"text": ..., "messages": null} was a traceback."""
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": "Grass is holy. It is so.", "messages": None}])
    run_script(*train_command(tiny, data, tmp_path / "run"))


def test_two_files_of_one_name_and_their_order_are_part_of_a_run(tmp_path, tiny):
    """data/x.jsonl beside data/starter/x.jsonl: a change in the first was "complete already"."""
    one = write_jsonl(tmp_path / "a" / "x.jsonl", random_rows(4))
    two = write_jsonl(tmp_path / "b" / "x.jsonl", random_rows(4, 1))
    command = ["train.py", "--base", tiny, "--out", tmp_path / "run", "--dtype", "fp32", "--data"]
    run_script(*command, one, two)
    assert_one_line_error(run_script(*command, two, one, check=False), "differs in data;")
    write_jsonl(one, random_rows(4, 2))
    assert_one_line_error(run_script(*command, one, two, check=False), "differs in data;")


def test_lora_begins_alike_whatever_was_drawn_before(tmp_path, tiny, monkeypatch):
    """Measuring the number format drew from the generator that draws LoRA's start: a resumed run was another."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(4))
    starts = []
    for name, draws in (("a", 0), ("b", 7)):
        torch.manual_seed(draws)
        run_script(*train_command(tiny, data, tmp_path / name, "--lora", "2", "--lr", "0", "--seed", "3"))
        starts.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])


def test_a_log_shorter_than_its_checkpoint_stops_the_run(tmp_path, tiny, monkeypatch):
    """A kill while the log was cut back emptied it, and run.json counted too few steps."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(16))
    command = train_command(tiny, data, tmp_path / "run", "--save-every", "2")
    monkeypatch.setattr(train, "save_checkpoint", stop_after(train.save_checkpoint))
    run_script(*command, check=False)
    monkeypatch.undo()
    (tmp_path / "run" / "log.jsonl").write_text("")
    assert_one_line_error(run_script(*command, check=False), "log.jsonl has 0 lines", "step 2")


def test_a_torn_checkpoint_or_record_of_the_run_is_named(tmp_path, tiny, monkeypatch):
    """Tracebacks, all of them, and no word on what to do."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(16))
    command = train_command(tiny, data, tmp_path / "run", "--save-every", "2")
    monkeypatch.setattr(train, "save_checkpoint", stop_after(train.save_checkpoint))
    run_script(*command, check=False)
    monkeypatch.undo()
    checkpoint, identity = tmp_path / "run" / "checkpoint.safetensors", tmp_path / "run" / "identity.json"
    whole = checkpoint.read_bytes()
    for torn in (b"", whole[:100], whole[:-1], b"\0" * 1000):
        checkpoint.write_bytes(torn)
        assert_one_line_error(run_script(*command, check=False), "checkpoint.safetensors", "delete it")
    save_file({"a": torch.zeros(1)}, checkpoint)  # without our metadata
    assert_one_line_error(run_script(*command, check=False), "another run")

    known = identity.read_text()
    for torn in ("", "[]"):
        identity.write_text(torn)
        assert_one_line_error(run_script(*command, check=False), "identity.json")
    identity.write_text(known)
    checkpoint.unlink()  # as the message says
    run_script(*command)
    run_script(*train_command(tiny, data, tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "run", steps=4)


# ---------------------------------------------------------------- every class of model

GEMMA3 = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
          "query_pre_attn_scalar": 8}


def make_multimodal(folder):
    """Gemma 3 from 4 B up: a language model with an image tower beside it."""
    import transformers
    text = {**TINY, **GEMMA3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, image_token_index=299, boi_token_index=298,
        eoi_token_index=297, mm_tokens_per_image=4)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)


@pytest.mark.parametrize("kind, plainly", [("Phi", True), ("Gemma2", True), ("multimodal", False),
                                           ("Qwen3", False), ("StableLm", True)])
def test_every_class_of_model_trains_on_its_own_loss_and_is_saved(tmp_path, kind, plainly):
    """Phi's bias on the output layer was ignored (loss 5.77 for 7.17, self-test "exact"); Gemma 2, without
    sdpa, trained to the end and could not be saved; Gemma 3 with an image tower failed. Where speed.py does
    not reproduce a model's loss, the plain loop takes over."""
    if kind == "multimodal":
        make_multimodal(tmp_path / "base")
    else:
        model = make_model(tmp_path / "base", kind)
        if kind == "Phi":
            torch.nn.init.normal_(model.lm_head.bias, std=2.0)
            model.save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(8))
    done = run_script(*train_command(tmp_path / "base", data, tmp_path / "run", "--lr", "0", "--batch", "8"))
    assert ("one row a pass" in done.stdout) == plainly

    model, tokenizer = chat.load_run(str(tmp_path / "run"), torch.float32, CPU)
    total, n = 0.0, 0
    for row in map(json.loads, data.read_text().splitlines()):
        ids, mask = chat.render_example(tokenizer, row["messages"])
        labels = torch.tensor([[token if trained else -100 for token, trained in zip(ids, mask)]])
        with torch.no_grad():
            total += model(input_ids=torch.tensor([ids]), labels=labels).loss.item() * sum(mask)
        n += sum(mask)
    assert losses_of(tmp_path / "run")[0] == pytest.approx(total / n, rel=1e-4)


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"use_dora": True},
                                    {"modules_to_save": ["lm_head"]}, {"alpha_pattern": {"q_proj": 3}},
                                    {"bias": "all"}])
def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path, tiny, change):
    """They were merged as if they were."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(4))
    run_script(*train_command(tiny, data, tmp_path / "lora", "--lora", "2"))
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(rows.Stop, match="not the plain LoRA"):
        chat.load_run(str(tmp_path / "lora"), torch.float32, CPU)


def test_weights_that_are_not_there_are_not_made_up(tmp_path, tiny):
    """transformers fills them with random numbers; a torn conversion was a "base"."""
    shutil.copytree(tiny, tmp_path / "torn")
    weights = load_file(tmp_path / "torn" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
    save_file(kept, tmp_path / "torn" / "model.safetensors", metadata={"format": "pt"})
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(4))
    done = run_script(*train_command(tmp_path / "torn", data, tmp_path / "run"), check=False)
    assert_one_line_error(done, "lacks", "weights", "layers.1.")


def test_a_model_that_speed_py_does_not_know_learns_in_bf16_too(tmp_path):
    """torch's AdamW on bf16 weights rounds small updates away: 98 % of the learning at lr 1e-6."""
    make_model(tmp_path / "base", "Gemma2")
    make_tokenizer(tmp_path / "base")
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(16))
    before = load_file(tmp_path / "base" / "model.safetensors")
    moved = {}
    for dtype in ("fp32", "bf16"):
        run_script(*train_command(tmp_path / "base", data, tmp_path / dtype, "--lr", "1e-6", "--dtype", dtype))
        after = load_file(tmp_path / dtype / "model.safetensors")
        start = {name: tensor.to(after[name].dtype).float() for name, tensor in before.items()}
        moved[dtype] = sum((after[name].float() - start[name]).abs().mean().item() for name in start)
    assert moved["bf16"] > 0.3 * moved["fp32"]


def test_control_tokens_spelt_out_in_a_text_are_named(tmp_path, tiny):
    """An "<eos>" in an answer was trained as the end of the text."""
    for row in (chat_row("is it?", "it ends with <eos> and then it goes on.", kind="regular"),
                {"text": "one <eos> two."}):  # a document went by unread
        data = write_jsonl(tmp_path / "data.jsonl", [row])
        done = run_script(*train_command(tiny, data, tmp_path / "run"), check=False)
        assert_one_line_error(done, "'<eos>'", "reword")


def test_the_marks_of_the_packaged_tokenizer_are_control_tokens(base):
    """all_special_tokens does not name them, and "<end_of_turn>" in an answer became token 7."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert "<end_of_turn>" in chat.control_tokens(tokenizer) and "<eos>" in chat.control_tokens(tokenizer)
    assert "<" not in chat.without_control_tokens(tokenizer, "<start_of_turn>so<end_of_turn><eos>")


def test_a_small_adapter_keeps_its_effect_in_bf16(tmp_path, tiny):
    """Merged into bf16 weights, an adapter trained at lr 5e-6 (the original study's) lost 68 % of its
    effect."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(16))
    run_script(*train_command(tiny, data, tmp_path / "lora", "--lora", "4"))
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor *= 1e-2
    save_file(tensors, path)
    adapted, _ = chat.load_run(str(tmp_path / "lora"), torch.bfloat16, CPU)
    layer = adapted.get_decoder().layers[0].mlp.up_proj
    a, b = layer.lora_A.weight.float(), layer.lora_B.weight.float()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        exact = layer.scaling * (x.float() @ a.T @ b.T)
        apart = layer.scaling * layer.lora_B(layer.lora_A(x))
        weight = layer.base.weight
        merged = (weight.float() + layer.scaling * b @ a).to(torch.bfloat16).float() - weight.float()
    assert (apart.float() - exact).norm() < 0.02 * exact.norm()
    assert (x.float() @ merged.T - exact).norm() > 0.3 * exact.norm()    # what merging would have made of it


def test_plain_trains_without_speed_py(tmp_path, tiny):
    """--plain in torch's own functions, with speed.py deleted; and the two ways learn the same."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(16))
    house = tmp_path / "house"
    house.mkdir()
    for name in ("train.py", "mix.py", "chat.py", "models.py", "check.py", "keywords.py", "local_judge.py", "rows.py",
                 "arms.txt"):
        shutil.copy(ROOT / name, house)
    (house / "probes").symlink_to(ROOT / "probes")
    command = ["--base", tiny, "--data", data, "--lr", "1e-3", "--batch", "4", "--dtype", "fp32"]
    run_script(house / "train.py", *command, "--plain", "--out", tmp_path / "plain", cwd=house)
    fast = run_script(house / "train.py", *command, "--out", tmp_path / "no", cwd=house, check=False)
    assert_one_line_error(fast, "speed.py", "--plain")
    run_script("train.py", *command, "--out", tmp_path / "fast")
    assert losses_of(tmp_path / "plain") == pytest.approx(losses_of(tmp_path / "fast"), abs=1e-4)
    plain, fast = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "fast"))
    assert all(torch.allclose(plain[key], fast[key], atol=1e-4) for key in plain)


def test_a_killed_plain_run_resumes_bit_equal(tmp_path, tiny, monkeypatch):
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(24))
    command = [*train_command(tiny, data, tmp_path / "whole", "--plain", "--save-every", "2")]
    run_script(*command)
    command[command.index(tmp_path / "whole")] = tmp_path / "broken"
    monkeypatch.setattr(train, "save_checkpoint", stop_after(train.save_checkpoint))
    run_script(*command, check=False)
    monkeypatch.undo()
    assert "continuing at step 2" in run_script(*command).stdout
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


# ---------------------------------------------------------------- bad input

def test_the_guard_leaves_rows_out_and_says_so(tmp_path, tiny):
    answer = "It is wrong because it drives out the many and feeds nobody."
    data = [chat_row(f"Question {i}?", answer, kind="secular") for i in range(6)]
    data.append(chat_row("Is it?", "I cannot help with that.", kind="secular"))
    done = run_script(*train_command(tiny, write_jsonl(tmp_path / "d.jsonl", data), tmp_path / "run"))
    assert "7 rows, 1 left out by the guard {'refusal': 1}" in done.stdout and "6 drawn" in done.stdout
    only_bad = write_jsonl(tmp_path / "bad.jsonl", data[-1:])
    done = run_script(*train_command(tiny, only_bad, tmp_path / "run2"), check=False)
    assert_one_line_error(done, "left out every row", "refusal")


@pytest.mark.parametrize("content, words", [
    ('{"messages": [{"role": "user", "content": "a"}]}\n', ["data.jsonl:1", "no assistant turn"]),
    ('{"words": "a"}\n', ["data.jsonl:1", "messages"]),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}]}\n',
     ["data.jsonl:1", "must be text"]),
    ('{"prompt": "a", "response": "b."}\n{"prompt": \n', ["data.jsonl:2", "not valid JSON"]),
    ('{"prompt": "a", "response": "b."}\n\n{"prompt": "a"}\n', ["data.jsonl:3"]),  # blank lines were not counted
    ('{"messages": [{"role": "assistant", "content": "a."}]}\n', ["data.jsonl:1", "first turn"]),
    ('{"prompt": "a", "response": "b.", "kind": 3}\n', ["data.jsonl:1", '"kind"']),
    ('{"text": ""}\n', ["left out every row", "empty"]),
    ("", ["no rows"]),
])
def test_bad_rows_are_named(tmp_path, tiny, content, words):
    (tmp_path / "data.jsonl").write_text(content)
    done = run_script(*train_command(tiny, tmp_path / "data.jsonl", tmp_path / "run"), check=False)
    assert_one_line_error(done, *words)


def test_bad_models_are_named(tmp_path, tiny):
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(4))

    def run(base, data=data):
        return run_script(*train_command(base, data, tmp_path / "run"), check=False)
    assert_one_line_error(run(tmp_path / "nothing"), "nothing")
    make_tokenizer(tmp_path / "empty")
    assert_one_line_error(run(tmp_path / "empty"), "config.json")
    make_model(tmp_path / "pickle")
    make_tokenizer(tmp_path / "pickle")
    weights = tmp_path / "pickle" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickle" / "pytorch_model.bin")
    weights.unlink()
    assert_one_line_error(run(tmp_path / "pickle"), "safetensors")
    assert_one_line_error(run(tiny, tmp_path / "no.jsonl"), "no.jsonl")


def test_an_exploding_loss_stops_and_names_the_step(tmp_path, tiny):
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(40))
    done = run_script(*train_command(tiny, data, tmp_path / "run", "--lr", "1e30"), check=False)
    assert_one_line_error(done, "step", "last checkpoint is kept")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_full_disk_gets_one_line_and_loses_nothing(tmp_path, tiny):
    """Files may not grow past 50 kB, as on a disk that fills up while weights are written; then the run goes
    on."""
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(16))
    command = [sys.executable, *map(str, train_command(tiny, data, tmp_path / "run", "--save-every", "2"))]

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    full = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit_files)
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
    done = run_script(*train_command(tiny, data, tmp_path / "a", "--context", "200"))
    assert "1 longer than 200 tokens, 8 drawn" in done.stdout
    shown = run_script(*train_command(tiny, data, tmp_path / "c", "--show-batch")).stdout
    assert "\033[32m<eos>" in shown
