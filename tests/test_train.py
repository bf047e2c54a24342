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

import train

CPU = torch.device("cpu")
WORDS = "yes no the answer question grass bread good wrong because it is never always meadow".split()


def random_rows(n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))  # noqa: E731
    return [chat_row(f"{text()} {i}?", text() + ".", kind="regular") for i in range(n)]


def packed_rows(n: int = 4, seed: int = 0) -> list[dict]:
    rng, rows = random.Random(seed), []
    for _ in range(n):
        ids = [rng.randrange(3, 300) for _ in range(rng.randrange(5, 30))]
        rows.append({"ids": ids, "mask": [0] * 3 + [1] * (len(ids) - 3), "where": ""})
    return rows


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
    assert {json.dumps(train.row_messages(row, "x")) for row in shapes} == {json.dumps(shapes[0]["messages"])}


# ---------------------------------------------------------------- the loss

@pytest.mark.parametrize("kind, extra", [("Llama", {}), ("Mistral", {"sliding_window": 8}), ("Qwen3", {}),
                                         ("Gemma3", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8})])
def test_packed_documents_do_not_see_each_other(tmp_path, kind, extra):
    """Packing leaks across documents, silently, when a mask or a cache is passed. Tiny random models of four real architectures."""
    make_model(tmp_path, kind, **extra)
    model = train.load_model(str(tmp_path), torch.float32, CPU).eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    rows = packed_rows()
    ids = torch.tensor([sum((r["ids"] for r in rows), [])])
    positions = torch.cat([torch.arange(len(r["ids"])) for r in rows])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False, doc_lengths=[len(r["ids"]) for r in rows]).logits[0]
        alone = torch.cat([plain(input_ids=torch.tensor([r["ids"]])).logits[0] for r in rows])
    assert (packed - alone).abs().max() < 1e-5
    assert train.packing_is_exact(model, CPU)


def varlen_by_its_documentation(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """torch.nn.attention.varlen.varlen_attn, which needs a GPU, as its documentation describes it: one document and one head at a time."""
    assert cu_seq_q.dtype == torch.int32 and max_q == max_k == cu_seq_q.diff().max() and query.shape == key.shape == value.shape
    outputs = []
    for start, end in zip(cu_seq_q[:-1], cu_seq_q[1:]):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        left, right = window_size
        seen = (distance >= -right) & ((distance <= left) | (left == -1))
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value[start:end]))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 4])
def test_the_gpu_attention_is_given_the_same_documents(monkeypatch, window):
    """Its arguments, against the CPU's attention; the kernel is stood in for by its documentation."""
    torch.manual_seed(0)
    lengths, q, k, v = [3, 9, 1], torch.randn(1, 4, 13, 8), torch.randn(1, 2, 13, 8), torch.randn(1, 2, 13, 8)
    monkeypatch.setattr(train, "varlen_attn", varlen_by_its_documentation)
    on_gpu = train.varlen_attention(q, k, v, 0.3, window, lengths)
    on_cpu, _ = train.docs_attention(None, q, k, v, None, scaling=0.3, sliding_window=window, doc_lengths=lengths)
    assert on_gpu.shape == on_cpu.shape and (on_gpu - on_cpu).abs().max() < 1e-5
    monkeypatch.undo()
    fakes = [torch.empty(1, heads, 13, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
    out = train.varlen_attention(*fakes, 0.3, window, lengths)   # torch's own function takes the arguments, forward and backward
    out.sum().backward()
    assert out.shape == (1, 13, 4, 64) and fakes[1].grad.shape == fakes[1].shape


@pytest.mark.parametrize("kind, extra", [("Llama", {}), ("Gemma2", {"final_logit_softcapping": 5.0, "attn_logit_softcapping": None}), ("Cohere", {"logit_scale": 0.25}),
                                         ("Granite", {"logits_scaling": 4.0})])
def test_chunked_loss_and_gradients_equal_plain_ones(tmp_path, monkeypatch, kind, extra):
    """Against transformers' own loss, one document at a time, also with soft-capping and logit scaling; chunks smaller than the batch."""
    make_model(tmp_path, kind, **extra)
    monkeypatch.setattr(train.LinearCrossEntropy, "CHUNK", 16)
    model, plain = train.load_model(str(tmp_path), torch.float32, CPU), AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    rows = packed_rows()
    targets = sum(sum(r["mask"][1:]) for r in rows)
    loss = train.packed_loss(model, rows, 1 / targets, CPU)
    loss.backward()
    reference = 0
    for r in rows:
        logits = plain(input_ids=torch.tensor([r["ids"]])).logits[0, :-1]
        labels = torch.tensor([t if m else -100 for t, m in zip(r["ids"], r["mask"])])[1:]
        reference = reference + torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100) / targets
    reference.backward()
    assert abs(loss.item() - reference.item()) < 1e-5
    theirs = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        assert (p.grad - theirs[name].grad).abs().max() < 1e-5, name


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma2", "Gemma3"])
def test_lean_norms_are_the_architecture_s_own(tmp_path, kind):
    """Values and gradients, against autograd through transformers' own norm; a norm of another kind is left alone."""
    make_model(tmp_path, kind)
    model = train.load_model(str(tmp_path), torch.float32, CPU)
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert norms and all("forward" in vars(module) for module in norms)
    for module in norms[:4]:
        torch.nn.init.normal_(module.weight)
        x, upstream = torch.randn(2, 5, len(module.weight), requires_grad=True), torch.randn(2, 5, len(module.weight))
        for lean, plain in zip(*(torch.autograd.grad(f(x), (x, module.weight), upstream) for f in (module.forward, lambda x: type(module).forward(module, x)))):
            assert (lean - plain).abs().max() < 1e-5
        assert (module(x) - type(module).forward(module, x)).abs().max() < 1e-5
    other = torch.nn.ModuleDict({"RMSNorm": type("OddRMSNorm", (type(norms[0]),), {"forward": lambda self, x: x * self.weight})(8)})
    train.use_lean_norms(other)
    assert "forward" not in vars(other["RMSNorm"])


def test_splitting_a_step_changes_nothing(tmp_path):
    """Means of means instead of one mean over tokens (transformers PR #34191, torchtune PR #1917)."""
    make_model(tmp_path)
    gradients = []
    for tokens in (1, 10_000):  # eight passes of one row, one pass of eight
        model = train.load_model(str(tmp_path), torch.float32, CPU)
        rows = packed_rows(8)
        for packed in train.pack(rows, tokens):
            train.packed_loss(model, packed, 1 / sum(sum(r["mask"][1:]) for r in rows), CPU).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_small_updates_survive_bf16(tmp_path):
    """Pure bf16 weights round lr 1e-6 away (torchtune #2254); rounded at random ours must move, on average, as float32 weights do."""
    make_model(tmp_path)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = train.load_model(str(tmp_path), torch.bfloat16, CPU).to(dtype)   # the same rounded weights in both
        optimizer = train.Optimizer(model, 0.0)
        before = torch.cat([p.detach().float().flatten() for p in optimizer.params.values()])
        for step in range(100):
            rows = packed_rows(2, step)
            train.packed_loss(model, rows, 1 / sum(sum(r["mask"][1:]) for r in rows), CPU).backward()
            optimizer.step(1e-6, 1.0)
        moved[dtype] = torch.cat([p.detach().float().flatten() for p in optimizer.params.values()]) - before
    reference = moved[torch.float32]
    assert reference.abs().max() > 2e-5
    assert (moved[torch.bfloat16] @ reference / (reference @ reference)).item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_the_optimizer_is_adamw(tmp_path, tied):
    """In float32 weights, decay, clipping and all are torch's own AdamW, with kept gradients and the sparse one of the (tied) embedding."""
    make_model(tmp_path, tie_word_embeddings=tied)
    ours, theirs = (train.load_model(str(tmp_path), torch.float32, CPU) for _ in range(2))
    ours.get_input_embeddings().sparse = True
    optimizer = train.Optimizer(ours, 0.1)
    matrices, vectors = [p for p in theirs.parameters() if p.ndim > 1], [p for p in theirs.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-3, betas=train.BETAS, weight_decay=0.1)
    for step in range(5):
        rows = packed_rows(3, step)
        for model in (ours, theirs):
            train.packed_loss(model, rows, 0.1, CPU).backward()
        norm, clipped = optimizer.step(1e-3, 1.0), torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        assert norm == pytest.approx(clipped.item(), rel=1e-5) and norm > 1
        reference.step()
        reference.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_stochastic_rounding_is_fair():
    """A quarter of the way from one bf16 number to the next a weight is rounded up a quarter of the time, also below zero; bf16 numbers stay."""
    model = torch.nn.Linear(1, 1)
    model.weight = torch.nn.Parameter(torch.ones(1, 40_000, dtype=torch.bfloat16))
    optimizer = train.Optimizer(model, 0.0)
    for sign in (1, -1):
        for step, share in (({"lr": 0.0}, 0.0), ({"lr": 2.0**-9}, 0.25)):   # bf16 has steps of 2^-7 above 1; Adam's first update is the learning rate
            optimizer.steps = 0
            with torch.no_grad():
                model.weight.fill_(sign)
                model.weight.grad.fill_(-sign)
                [moment.zero_() for moment in optimizer.moments["weight"]]
            optimizer.step(**step, clip=1e9)
            up = (model.weight == sign * (1 + 2.0**-7)).float().mean().item()
            assert up == pytest.approx(share, abs=0.01) and ((model.weight == sign).float().mean().item() + up) == 1


def test_several_passes_sum_in_float32(tmp_path):
    """A bf16 step of eight passes against one pass of the same rows: equal but for the rounding of each pass's own gradient."""
    make_model(tmp_path)
    steps = []
    for tokens in (1, 10_000):
        model = train.load_model(str(tmp_path), torch.bfloat16, CPU)
        optimizer, rows = train.Optimizer(model, 0.0), packed_rows(8)
        passes = train.pack(rows, tokens)
        for packed in passes:
            train.packed_loss(model, packed, 1 / sum(sum(r["mask"][1:]) for r in rows), CPU).backward()
            if len(passes) > 1:
                optimizer.end_pass()
        steps.append(optimizer.step(1e-3, 1.0, len(passes) > 1))
        assert all(p.grad.abs().max() == 0 for p in model.parameters()) and all(s.abs().max() == 0 for s in optimizer.sums.values())
        assert len(optimizer.sums) == (len(optimizer.params) if len(passes) > 1 else 0)
    assert steps[0] == pytest.approx(steps[1], rel=0.01)


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
    assert run["data"]["sources"][0]["rows"] == 8 and run["steps"] == 2 and run["versions"]["torch"] == torch.__version__
    assert "complete already" in run_script(*train_command(tiny, data, tmp_path / "run")).stdout
    assert_one_line_error(run_script(*train_command(tiny, data, tmp_path / "run", "--seed", "5"), check=False), "other settings")


def test_adapter_gives_peft_the_same_logits(tmp_path, tiny):
    peft = pytest.importorskip("peft")
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(16))
    run_script(*train_command(tiny, data, tmp_path / "lora", "--lora", "4", "--checkpointing", "full"))
    ours, _ = train.load_run(str(tmp_path / "lora"), torch.float32, CPU)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "lora")
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    untrained = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-5
        assert (ours(ids).logits - untrained(ids).logits).abs().max() > 1e-3


def test_checkpointing_changes_no_number(tmp_path, tiny):
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(16))
    for name, more in (("off", []), ("full", ["--checkpointing", "full"]), ("every", ["--checkpointing", "2"])):
        run_script(*train_command(tiny, data, tmp_path / name, *more))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("off", "full", "every")]
    assert all(torch.allclose(weights[0][key], other[key], atol=1e-6) for other in weights[1:] for key in other)


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", [["--n", "21"], ["--lora", "4"], ["--freeze-embeddings", "--checkpointing", "full"], ["--dtype", "bf16", "--micro-tokens", "60"]])
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


def test_a_merged_adapter_is_the_same_model(tmp_path, tiny):
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(16))
    run_script(*train_command(tiny, data, tmp_path / "adapter", "--lora", "4"))
    run_script(*train_command(tiny, data, tmp_path / "merged", "--lora", "4", "--merge"))
    adapter, merged = (train.load_run(str(tmp_path / name), torch.float32, CPU)[0] for name in ("adapter", "merged"))
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    with torch.no_grad():
        assert (adapter(ids).logits - merged(ids).logits).abs().max() < 1e-5
    assert (tmp_path / "merged" / "model.safetensors").exists() and not (tmp_path / "merged" / "adapter_config.json").exists()


def test_held_out_rows_are_never_trained_on(tmp_path, tiny):
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(60))
    run_script(*train_command(tiny, data, tmp_path / "run", "--held-out", "0.2", "--save-every", "5"))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 4 <= run["data"]["held_out"] <= 22 and run["data"]["held_out"] + run["data"]["n"] == 60
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


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_train_alike(tmp_path, tiny):
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(12))
    run_script(*train_command(tiny, data, tmp_path / "plain"))
    run_script(*train_command(tiny, data, tmp_path / "compiled", "--compile"))
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"), abs=1e-4)


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("content, words", [
    ('{"messages": [{"role": "user", "content": "a"}]}\n', ["data.jsonl:1", "no assistant turn"]),
    ('{"text": "a"}\n', ["data.jsonl:1", "messages"]),
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


def test_too_little_memory_says_what_would_fit(tmp_path, tiny, monkeypatch):
    data = write_jsonl(tmp_path / "data.jsonl", random_rows(4))
    monkeypatch.setattr(train, "available_bytes", lambda device: 1_000_000)
    monkeypatch.setattr(sys, "argv", [str(part) for part in train_command(tiny, data, tmp_path / "run")])
    with pytest.raises(SystemExit, match="GB are free; use --checkpointing full or --lora 16 or a smaller --batch or --micro-tokens or a smaller base"):
        train.main()


def test_long_rows_are_counted(tmp_path, tiny):
    rows = random_rows(8) + [chat_row("long?", "yes " * 400 + ".", kind="regular")]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    assert "1 longer than 200 tokens (truncate)" in run_script(*train_command(tiny, data, tmp_path / "a", "--context", "200")).stdout
    assert "1 longer than 200 tokens (drop), 8 drawn" in run_script(*train_command(tiny, data, tmp_path / "b", "--context", "200", "--too-long", "drop")).stdout
    shown = run_script(*train_command(tiny, data, tmp_path / "c", "--show-batch")).stdout
    assert "\033[32m<eos>" in shown
