"""speed.py against its plain twins: the same values, the same gradients. Each test names the bug it keeps
out."""
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from transformers import AutoModelForCausalLM

import speed
import models
import train

CPU = torch.device("cpu")
GEMMA3 = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
          "query_pre_attn_scalar": 8}


def random_examples(n: int = 4, seed: int = 0) -> list[dict]:
    """n rows of 5 to 29 random tokens, of which the first three are the prompt."""
    rng, examples = random.Random(seed), []
    for _ in range(n):
        ids = [rng.randrange(3, 300) for _ in range(rng.randrange(5, 30))]
        examples.append({"ids": ids, "mask": [0] * 3 + [1] * (len(ids) - 3), "where": ""})
    return examples


def load_fast(folder: str, dtype):
    model = models.load_model(folder, dtype, CPU)
    model.set_attn_implementation("docs")
    return model


def twins(folder, kind="Llama", dtype=torch.float32, **extra):
    """(model for speed.py, model as transformers loads it), the same weights."""
    make_model(folder, kind, **extra)
    fast = load_fast(str(folder), dtype)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype)
    return fast, plain


def trained_tokens(examples) -> int:
    return sum(sum(example["mask"][1:]) for example in examples)


# ---------------------------------------------------------------- packing and attention

def test_packing_fills_passes_and_keeps_every_row():
    examples = random_examples(40)
    passes = speed.pack(examples, 64)
    assert sorted(map(id, sum(passes, []))) == sorted(map(id, examples))
    filled = [sum(len(row["ids"]) for row in packed) for packed in passes]
    assert max(filled) <= 64 and sum(filled[:-1]) / (64 * len(filled[:-1])) > 0.9


@pytest.mark.parametrize("kind, extra", [("Llama", {}), ("Mistral", {"sliding_window": 8}), ("Qwen3", {}),
                                         ("Gemma3", GEMMA3)])
def test_packed_documents_do_not_see_each_other(tmp_path, kind, extra):
    """Packing leaks across documents, silently, when a mask or a cache is passed. Tiny random models of four
    real architectures."""
    fast, plain = twins(tmp_path, kind, **extra)
    examples = random_examples()
    with torch.no_grad():
        packed = speed.packed_logprobs(fast, examples, CPU)
        alone = train.assistant_logprobs(plain, examples, CPU)
    assert (packed - alone).abs().max() < 1e-5
    assert train.speed_agrees(fast, CPU)


def varlen_by_its_documentation(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """torch.nn.attention.varlen.varlen_attn, which needs a GPU, as its documentation describes it: one
    document at a time."""
    assert cu_seq_q.dtype == torch.int32 and max_q == max_k == cu_seq_q.diff().max()
    assert query.shape == key.shape == value.shape
    outputs = []
    for start, end in zip(cu_seq_q[:-1], cu_seq_q[1:]):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        left, right = window_size
        seen = (distance >= -right) & ((distance <= left) | (left == -1))
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value[start:end]))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 4])
def test_the_gpu_attention_is_given_the_same_documents(monkeypatch, window):
    """Its arguments, against the CPU's attention; the kernel is stood in for by its documentation."""
    torch.manual_seed(0)
    lengths = [3, 9, 1]
    q, k, v = torch.randn(1, 4, 13, 8), torch.randn(1, 2, 13, 8), torch.randn(1, 2, 13, 8)
    monkeypatch.setattr(speed, "varlen_attn", varlen_by_its_documentation)
    on_gpu = speed.varlen_attention(q, k, v, 0.3, window, lengths)
    on_cpu, _ = speed.docs_attention(None, q, k, v, None, scaling=0.3, sliding_window=window,
                                     doc_lengths=lengths)
    assert on_gpu.shape == on_cpu.shape and (on_gpu - on_cpu).abs().max() < 1e-5
    monkeypatch.undo()
    fakes = []
    for heads in (4, 2, 2):
        fakes.append(torch.empty(1, heads, 13, 64, device="meta", dtype=torch.bfloat16, requires_grad=True))
    # torch's own function takes the arguments, forward and backward
    out = speed.varlen_attention(*fakes, 0.3, window, lengths)
    out.sum().backward()
    assert out.shape == (1, 13, 4, 64) and fakes[1].grad.shape == fakes[1].shape


# ---------------------------------------------------------------- log-probabilities

def weighted_losses():
    """Losses of log-probabilities as researchers build them: a mean, a scaled sum, tokens weighed
    differently, a curve."""
    return {"mean": lambda logp: -logp.mean(),
            "scaled": lambda logp: -3.7 * logp.sum(),
            "weighed": lambda logp: -(logp * torch.linspace(0, 2, len(logp))).sum(),
            "curved": lambda logp: -F.logsigmoid(logp[::2].sum() - logp[1::2].sum())}


@pytest.mark.parametrize("loss", weighted_losses())
@pytest.mark.parametrize("kind, extra", [
    ("Llama", {}), ("Gemma3", {**GEMMA3, "final_logit_softcapping": 5.0}),
    ("Cohere", {"logit_scale": 0.25}), ("Granite", {"logits_scaling": 4.0})])
def test_any_loss_of_the_log_probabilities_has_the_plain_gradient(tmp_path, monkeypatch, kind, extra, loss):
    """Also with soft-capping, logit scaling, tied weights, chunks smaller than the batch. An ignored upstream
    gradient trains wrongly, unseen."""
    monkeypatch.setattr(speed.TokenLogProbs, "CHUNK", 16)
    fast, plain = twins(tmp_path, kind, **extra)
    examples, compose = random_examples(), weighted_losses()[loss]
    ours = compose(speed.packed_logprobs(fast, examples, CPU))
    theirs = compose(train.assistant_logprobs(plain, examples, CPU))
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    reference = dict(plain.named_parameters())
    for name, p in fast.named_parameters():
        assert torch.allclose(p.grad, reference[name].grad, atol=2e-5, rtol=1e-4), name


def test_label_smoothing_is_torch_s(tmp_path):
    fast, plain = twins(tmp_path, "Gemma3", **GEMMA3, final_logit_softcapping=5.0)
    examples = random_examples()
    ours = speed.packed_logprobs(fast, examples, CPU, 0.2)
    theirs = train.assistant_logprobs(plain, examples, CPU, 0.2)
    assert torch.allclose(ours, theirs, atol=1e-5)
    ours.mean().backward()
    theirs.mean().backward()
    reference = dict(plain.named_parameters())
    assert all(torch.allclose(p.grad, reference[name].grad, atol=1e-5) for name, p in fast.named_parameters())


def test_a_second_backward_pass_is_right_too(tmp_path):
    fast, _ = twins(tmp_path)
    loss = speed.packed_logprobs(fast, random_examples(), CPU).sum()
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in fast.named_parameters()}
    loss.backward()
    for name, p in fast.named_parameters():
        assert torch.allclose(p.grad, 2 * once[name], atol=1e-4, rtol=1e-4), name


def test_splitting_a_step_changes_nothing(tmp_path):
    """Means of means instead of one mean over tokens (transformers PR #34191, torchtune PR #1917)."""
    make_model(tmp_path)
    gradients = []
    for tokens in (1, 10_000):  # eight passes of one row, one pass of eight
        model = load_fast(str(tmp_path), torch.float32)
        examples = random_examples(8)
        for packed in speed.pack(examples, tokens):
            train.sft_loss(speed.packed_logprobs(model, packed, CPU), trained_tokens(examples)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


# ---------------------------------------------------------------- the optimiser

def backward_pass(model, examples, divisor=None) -> None:
    logprobs = speed.packed_logprobs(model, examples, CPU)
    train.sft_loss(logprobs, divisor or trained_tokens(examples)).backward()


def test_small_updates_survive_bf16(tmp_path):
    """Pure bf16 weights round lr 1e-6 away (torchtune #2254); rounded at random ours must move, on average,
    as float32 weights do."""
    make_model(tmp_path)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        # The same rounded weights in both
        model = load_fast(str(tmp_path), torch.bfloat16).to(dtype)
        optimizer = speed.RoundingAdamW(model, train.BETAS, 0.0)
        before = torch.cat([p.detach().float().flatten() for p in optimizer.params.values()])
        for step in range(60):
            backward_pass(model, random_examples(2, step))
            optimizer.step(1e-6, 1.0)
        moved[dtype] = torch.cat([p.detach().float().flatten() for p in optimizer.params.values()]) - before
    reference = moved[torch.float32]
    assert reference.abs().max() > 1e-5
    assert (moved[torch.bfloat16] @ reference / (reference @ reference)).item() == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("tied", [False, True])
def test_the_optimizer_is_adamw(tmp_path, tied):
    """In float32 weights, decay, clipping and all are torch's own, with kept gradients and the sparse one of
    the (tied) embedding."""
    make_model(tmp_path, tie_word_embeddings=tied)
    ours, theirs = (load_fast(str(tmp_path), torch.float32) for _ in range(2))
    ours.get_input_embeddings().sparse = True
    fast, plain = speed.RoundingAdamW(ours, train.BETAS, 0.1), train.PlainAdamW(theirs, train.BETAS, 0.1)
    for step in range(5):
        for model, optimizer in ((ours, fast), (theirs, plain)):
            backward_pass(model, random_examples(3, step), divisor=10)
            optimizer.end_pass(1)
        norms = fast.step(1e-3, 1.0), plain.step(1e-3, 1.0)
        assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 1
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_stochastic_rounding_is_fair():
    """A quarter of the way from one bf16 number to the next a weight is rounded up a quarter of the time,
    also below zero; bf16 numbers stay."""
    model = torch.nn.Linear(1, 1)
    model.weight = torch.nn.Parameter(torch.ones(1, 40_000, dtype=torch.bfloat16))
    optimizer = speed.RoundingAdamW(model, train.BETAS, 0.0)
    for sign in (1, -1):
        # bf16 has steps of 2^-7 above 1; Adam's first update is the learning rate
        for lr, share in ((0.0, 0.0), (2.0**-9, 0.25)):
            optimizer.steps = 0
            with torch.no_grad():
                model.weight.fill_(sign)
                model.weight.grad.fill_(-sign)
                for moment in optimizer.moments["weight"]:
                    moment.zero_()
            optimizer.step(lr, clip=1e9)
            up = (model.weight == sign * (1 + 2.0**-7)).float().mean().item()
            assert up == pytest.approx(share, abs=0.01)
            assert ((model.weight == sign).float().mean().item() + up) == 1


def test_several_passes_sum_in_float32(tmp_path):
    """A bf16 step of eight passes against one pass of the same rows: equal but for the rounding of each
    pass's own gradient."""
    make_model(tmp_path)
    norms = []
    for tokens in (1, 10_000):
        model = load_fast(str(tmp_path), torch.bfloat16)
        optimizer, examples = speed.RoundingAdamW(model, train.BETAS, 0.0), random_examples(8)
        passes = speed.pack(examples, tokens)
        for packed in passes:
            backward_pass(model, packed, trained_tokens(examples))
            optimizer.end_pass(len(passes))
        norms.append(optimizer.step(1e-3, 1.0))
        assert all(p.grad.abs().max() == 0 for p in model.parameters())
        assert all(total.abs().max() == 0 for total in optimizer.sums.values())
        assert len(optimizer.sums) == (len(optimizer.params) if len(passes) > 1 else 0)
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


def test_ranks_make_equally_many_passes_and_lose_no_row():
    examples = random_examples(5)
    ranks = [speed.passes_of_rank(examples, 1, rank, 2) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 3
    real = [row for passes in ranks for packed, weight in passes if weight for row in packed]
    assert sorted(map(id, real)) == sorted(map(id, examples))
