"""What train.py uses for speed and memory alone: packing, attention inside documents, chunked log-probabilities, rounding, sharding.

Nothing here changes what is learned. Each piece has a plain twin, in train.py or in torch, and a test in tests/test_speed.py that
holds values and gradients equal; `python train.py --plain ...` trains without this file. The gains in the comments are those of
`make bench WHAT=speed`, whose last output is in docs/benchmarks.md. (Not named kernels.py: transformers would take it for the package.)
"""
import functools
import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.varlen import varlen_attn
from torch.optim.adamw import adamw
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


# ---------------------------------------------------------------- packing

def pack(rows: list[dict], max_tokens: int) -> list[list[dict]]:
    """Split rows into forward passes of at most max_tokens (first fit, longest first). No padding is ever made."""
    passes: list[list[dict]] = []
    for row in sorted(rows, key=lambda row: -len(row["ids"])):
        for packed in passes:
            if sum(len(other["ids"]) for other in packed) + len(row["ids"]) <= max_tokens:
                packed.append(row)
                break
        else:
            passes.append([row])
    return passes


def packed_logprobs(model, rows: list[dict], device: torch.device, smoothing: float = 0.0) -> torch.Tensor:
    """log p of every assistant token of `rows`, float32 [tokens], in order. Twin of train.assistant_logprobs.

    All rows run as one sequence: on chat rows of mixed length 3 times the tokens a second of padded batches.
    """
    lengths = [len(row["ids"]) for row in rows]
    ids = torch.tensor([token for row in rows for token in row["ids"]], device=device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)

    # Position t predicts token t + 1. A row's first token is nobody's target: the position before it belongs to another row.
    trained = torch.tensor([flag for row in rows for flag in [0, *row["mask"][1:]]], dtype=torch.bool)
    targets = trained.nonzero()[:, 0].to(device)

    # A cache or a mask would make transformers forget where documents end (logits off by 0.7, without a word): neither is passed.
    decoder = model.get_decoder()
    hidden = decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False, doc_lengths=lengths).last_hidden_state[0]

    weight = model.get_output_embeddings().weight
    if not torch.is_grad_enabled():
        weight = weight.detach()
    return TokenLogProbs.apply(hidden[targets - 1], weight, ids[targets], Head.of(model), smoothing)


# ---------------------------------------------------------------- attention

def docs_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
                   doc_lengths=None, **_):
    """Causal attention inside each document of a packed row, never across: [1, heads, T, head_dim] -> [1, T, heads, head_dim].

    transformers builds no mask for an attention it does not know and hands our keyword through, so that nothing is inferred from
    positions. Against one dense mask over the packed row, the same step is 1.1 times as fast on a CPU; on a GPU the flash kernel
    needs no T x T mask at all (8 to 10 times as fast at 16,000 tokens: OpenPipe/ART #586).
    """
    scaling = scaling or query.shape[-1] ** -0.5
    if query.is_cuda and query.dtype == torch.bfloat16 and query.shape[-1] <= 256:
        return varlen_attention(query, key, value, scaling, sliding_window, doc_lengths), None

    outputs = []
    documents = zip(query.split(doc_lengths, 2), key.split(doc_lengths, 2), value.split(doc_lengths, 2))
    for q, k, v in documents:
        outputs.append(document_attention(q, k, v, scaling, sliding_window))
    return torch.cat(outputs, 2).transpose(1, 2), None


def document_attention(q, k, v, scaling: float, sliding_window: int | None) -> torch.Tensor:
    """Causal attention over one document: q [1, heads, T, d], k and v [1, kv_heads, T, d] -> [1, heads, T, d]."""
    length = q.shape[2]
    windowed = sliding_window is not None and length > sliding_window
    if not windowed and length <= 512 and q.device.type == "cpu":
        return short_attention(q, k, v, scaling)

    mask = None
    if windowed:  # the window counts the token itself
        distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        mask = (distance >= 0) & (distance < sliding_window)
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not windowed, scale=scaling, enable_gqa=grouped)


def short_attention(q, k, v, scaling: float) -> torch.Tensor:
    """Causal attention written out; shapes as in document_attention.

    On a CPU, forward and backward together take a half to a quarter of the time of torch's flash kernel at the lengths of answers.
    """
    _, heads, length, dim = q.shape
    groups = k.shape[1]
    future = torch.full((length, length), -math.inf, device=q.device).triu(1)
    scores = q.reshape(1, groups, -1, dim) @ k.transpose(-1, -2)  # the heads that share a key are rows of one product
    weights = (scores.view(1, heads, length, length).float() * scaling + future).softmax(-1).to(v.dtype)
    return (weights.view(1, groups, -1, length) @ v).view(1, heads, length, dim)


def varlen_attention(query, key, value, scaling: float, sliding_window: int | None, doc_lengths: list[int]) -> torch.Tensor:
    """All documents in one flash kernel (torch 2.11 or newer, GPUs from Ampere on). Shapes as in docs_attention."""
    # torch 2.11's kernel wants as many key heads as query heads
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, d]

    starts, longest = document_starts(tuple(doc_lengths), query.device), max(doc_lengths)
    to_the_left = sliding_window - 1 if sliding_window else -1  # the token itself aside; -1 is no limit
    return varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(to_the_left, 0))[None]


@functools.lru_cache(maxsize=4)
def document_starts(doc_lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where each document starts, and the end of the last, int32 [documents + 1]: made once a pass, not once a layer."""
    return F.pad(torch.tensor(doc_lengths).cumsum(0), (1, 0)).to(device, torch.int32)


ALL_ATTENTION_FUNCTIONS.register("docs", docs_attention)


# ---------------------------------------------------------------- log-probabilities of tokens

class Head:
    """What a model does to its logits before the softmax: z -> softcap tanh(scale z / softcap)."""

    def __init__(self, scale: float = 1.0, softcap: float | None = None):
        self.scale, self.softcap = scale, softcap

    @classmethod
    def of(cls, model) -> "Head":
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None)  # Cohere
        if scale is None:
            scale = 1 / (getattr(config, "logits_scaling", None) or 1)  # Granite
        return cls(scale, getattr(config, "final_logit_softcapping", None))  # Gemma 2


class TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[label] of every token, without ever holding all logits (cf. arXiv 2411.09009).

    hidden [N, H], weight [V, H], labels [N] -> float32 [N]. With smoothing e, the label is a distribution: 1 - e on the label and
    e spread evenly over the vocabulary, as in F.cross_entropy(label_smoothing=e).

    A vocabulary of 262,144 words makes full logits the largest tensor of a step by far. The derivative of each log-probability is
    formed chunk by chunk in the forward pass (6NVH FLOP in all, not the 8 of computing the logits again), and scaled by whatever
    comes from above in the backward pass. For the weight, that holds where every token is scaled alike, as in any mean or sum; a
    loss that weighs tokens differently (DPO) computes the logits once more. Step of the packaged base: twice as fast as with all
    logits at once, and 4 GB smaller.
    """
    CHUNK = 2048 if torch.cuda.is_available() else 192  # most tokens whose logits exist at once: 2048 x 262k x (2 + 4) B = 3 GB
    CPU_ROWS = 8   # rows turned into float32 at once, few enough to stay in the cache

    @staticmethod
    def forward(ctx, hidden, weight, labels, head, smoothing):
        ctx.head, ctx.smoothing = head, smoothing
        ctx.save_for_backward(hidden, weight, labels)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        ctx.slope_hidden = torch.empty_like(hidden) if needs_hidden else None
        ctx.slope_weight = torch.zeros_like(weight) if needs_weight else None

        log_probs = []
        for start, h, logits, chunk in logit_chunks(hidden, weight, labels, head, smoothing):
            log_probs.append(chunk)
            if needs_hidden:
                torch.mm(logits, weight, out=ctx.slope_hidden[start:start + len(h)])
            if needs_weight:
                ctx.slope_weight.addmm_(logits.t(), h)  # the sum over tokens: right if all are scaled alike
        return torch.cat(log_probs)

    @staticmethod
    def backward(ctx, above):  # [N], the derivative of the loss by each log-probability
        hidden, weight, labels = ctx.saved_tensors
        grad_hidden = ctx.slope_hidden * above[:, None].to(hidden.dtype) if ctx.slope_hidden is not None else None
        if not ctx.needs_input_grad[1]:
            return grad_hidden, None, None, None, None

        alike = ctx.slope_weight is not None and bool((above == above[0]).all())
        if alike:
            grad_weight = ctx.slope_weight.mul_(above[0])
        else:
            grad_weight = torch.zeros_like(weight)
            for start, h, logits, _ in logit_chunks(hidden, weight, labels, ctx.head, ctx.smoothing):
                scaled = logits * above[start:start + len(h), None].to(logits.dtype)
                grad_weight.addmm_(scaled.t(), h)
        ctx.slope_weight = None  # used up: a second backward pass computes it again
        return grad_hidden, grad_weight, None, None, None


def logit_chunks(hidden, weight, labels, head: Head, smoothing: float):
    """Yield (start, hidden [n, H], d log_prob / d logits [n, V], log_probs [n]) chunk by chunk; the third is valid until the next."""
    chunks = math.ceil(len(hidden) / TokenLogProbs.CHUNK)
    size = math.ceil(len(hidden) / chunks)  # even chunks: a small last one would cost as much as a big one
    rows = TokenLogProbs.CPU_ROWS if hidden.device.type == "cpu" else size

    # Two buffers for all chunks: fresh pages cost more than the arithmetic
    logits_buffer = torch.empty(size, len(weight), dtype=hidden.dtype, device=hidden.device)
    block = torch.empty(min(rows, size), len(weight), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), size):
        h = hidden[start:start + size]
        logits = torch.mm(h, weight.t(), out=logits_buffer[:len(h)])
        log_probs = []
        for at in range(0, len(h), rows):
            part = logits[at:at + rows]
            z = block[:len(part)].copy_(part)
            log_probs.append(log_prob_and_slope(z, labels[start + at:start + at + len(part), None], head, smoothing))
            part.copy_(z)
        yield start, h, logits, torch.cat(log_probs)


def log_prob_and_slope(z, y, head: Head, smoothing: float) -> torch.Tensor:
    """log p [n] of the labels y [n, 1] under logits z, float32 [n, V], which become d log_prob / d z, in place."""
    z.mul_(head.scale)
    if head.softcap:
        z.div_(head.softcap).tanh_()
        bend = 1 - z.square()  # derivative of the tanh
        z.mul_(head.softcap)

    at_target = (1 - smoothing) * z.gather(1, y)
    if smoothing:
        at_target += smoothing * z.mean(-1, keepdim=True)

    largest = z.amax(-1, keepdim=True)
    total = z.sub_(largest).exp_().sum(-1, keepdim=True)
    log_prob = at_target - largest - total.log()

    # The derivative is target - softmax: z holds the softmax but for its divisor
    z.div_(-total)
    if smoothing:
        z.add_(smoothing / z.shape[-1])
    z.scatter_add_(1, y, torch.full_like(at_target, 1 - smoothing))
    if head.softcap:
        z.mul_(bend)
    z.mul_(head.scale)
    return log_prob[:, 0]


# ---------------------------------------------------------------- the optimiser

class RoundingAdamW:
    """AdamW that keeps bf16 weights by stochastic rounding: 8 bytes a parameter, weight and gradient included. Twin: train.PlainAdamW.

    bf16 keeps 8 bits: an update below 1/256 of a weight is rounded away, so at lr 1e-6 pure bf16 training does nothing (torchtune
    #2254). Rounded up or down with the probability of the distance, it survives on average (arXiv 2010.06192). Float32 master
    weights cost 8 to 10 bytes more and, at small rates, learn less: the bf16 copy that is trained on lags behind
    (`make bench WHAT=rounding`). The moments are bf16, too, which betas of .9 and .95 allow: a step changes them by a tenth or a
    twentieth. Float32 weights have float32 moments and are never rounded.
    """
    # Parameters updated at once: on a CPU their float32 copies stay in the cache, and below 2 MB, from where on pages are fresh each time
    PIECE = 2**25 if torch.cuda.is_available() else 2**18

    def __init__(self, model, betas: tuple[float, float], weight_decay: float):
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.betas, self.weight_decay, self.steps = betas, weight_decay, 0
        self.draw = torch.Generator(next(model.parameters()).device)
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.params.items()}
        self.sums = {}
        for p in self.params.values():
            p.grad = torch.zeros_like(p)  # kept for the whole run: fresh pages, again

    @torch.no_grad()
    def end_pass(self, passes: int) -> None:
        """After each of a step's `passes`: where there are several, add bf16 gradients to float32 sums (4 bytes a parameter more)."""
        if passes == 1 and not self.sums:
            return
        for name, p in self.params.items():
            if p.dtype == torch.bfloat16:
                grad = local(p.grad)
                if name not in self.sums:
                    self.sums[name] = torch.zeros_like(grad, dtype=torch.float32)
                self.sums[name].add_(grad)
                grad.zero_()

    @torch.no_grad()
    def step(self, lr: float, clip: float) -> float:
        """One update; returns the gradient's norm before clipping. If that is not finite, nothing is changed."""
        grads = {name: self.sums.get(name, local(p.grad)).view(-1) for name, p in self.params.items()}
        square = torch.zeros((), device=next(iter(grads.values())).device)
        for grad in grads.values():
            for piece in grad.split(self.PIECE):
                square += torch.linalg.vector_norm(piece.float()) ** 2
        if dist.is_initialized():
            dist.all_reduce(square)
        norm = square.sqrt().item()
        if not math.isfinite(norm):
            return norm

        self.steps += 1
        unscale = torch.tensor(max(1.0, norm / clip), device=square.device)
        self.draw.manual_seed(self.steps)  # a resumed run rounds as the unbroken one
        noise = torch.randint(0, 2**16, (self.PIECE,), generator=self.draw, device=square.device, dtype=torch.int32)
        for name, p in self.params.items():
            first, second = self.moments[name]
            decay = self.weight_decay if p.ndim > 1 else 0.0  # norms and biases are not decayed
            tensors = [local(p).view(-1), grads[name], local(first).view(-1), local(second).view(-1)]
            for pieces in zip(*(tensor.split(self.PIECE) for tensor in tensors)):
                self.update(*pieces, noise, lr, unscale, decay)
        return norm

    def update(self, weight, grad, first, second, noise, lr: float, unscale: torch.Tensor, decay: float) -> None:
        """AdamW, torch's fused kernel in float32, on a flat piece of a parameter; the gradient is zero afterwards."""
        w, g, m, v = weight.float(), grad.float(), first.float(), second.float()
        step = torch.tensor(self.steps - 1.0, device=weight.device)
        adamw([w], [g], [m], [v], [], [step], fused=True, amsgrad=False, beta1=self.betas[0], beta2=self.betas[1],
              lr=lr, weight_decay=decay, eps=1e-8, maximize=False, grad_scale=unscale)
        if weight.dtype == torch.bfloat16:
            first.copy_(m)
            second.copy_(v)
            # bf16 is the upper half of float32: a random number below one unit of it is added and the lower half dropped
            weight.view(torch.int16).copy_(w.view(torch.int32).add_(noise[:len(w)]).bitwise_right_shift_(16))
        grad.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint needs, whole: weights, moments, steps."""
        tensors = {"steps": torch.tensor(self.steps)}
        for name, p in self.params.items():
            first, second = self.moments[name]
            tensors[f"weight.{name}"] = whole(p.detach())
            tensors[f"exp_avg.{name}"] = whole(first)
            tensors[f"exp_avg_sq.{name}"] = whole(second)
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.steps = int(tensors["steps"])
        for name, p in self.params.items():
            first, second = self.moments[name]
            for tensor, kind in ((p, "weight"), (first, "exp_avg"), (second, "exp_avg_sq")):
                saved = tensors[f"{kind}.{name}"].to(tensor.device)
                if isinstance(tensor, DTensor):
                    saved = distribute_tensor(saved, tensor.device_mesh, tensor.placements)
                tensor.copy_(saved)


# ---------------------------------------------------------------- several processes

class Trainee(nn.Module):
    """The model with its log-probabilities as one module: FSDP gathers the sharded output layer only inside forward."""

    def __init__(self, model, device: torch.device):
        super().__init__()
        self.model, self.device = model, device

    def forward(self, rows: list[dict], smoothing: float = 0.0) -> torch.Tensor:
        return packed_logprobs(self.model, rows, self.device, smoothing)


def join_ranks(device: torch.device) -> tuple[int, int]:
    """(rank, ranks) of this process; joins the others if torchrun started several."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, ranks


def shard(trainee: Trainee) -> None:
    """Split weights, gradients and optimiser state over the ranks; the ranks' gradients are averaged in float32 (FSDP2)."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in trainee.model.get_decoder().layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(trainee, mp_policy=policy)


def passes_of_rank(rows: list[dict], max_tokens: int, rank: int, ranks: int) -> list[tuple[list[dict], float]]:
    """[(packed rows, weight of their loss)] that one rank runs in a step.

    Each pass is a meeting of the ranks, so all make equally many: a rank that has run out repeats a row with weight 0.
    """
    passes = [pack(rows[r::ranks], max_tokens) for r in range(ranks)]
    mine = [(packed, 1.0) for packed in passes[rank]]
    while len(mine) < max(map(len, passes)):
        mine.append((rows[:1], 0.0))
    return mine


def sum_over_ranks(value: float, device: torch.device) -> float:
    total = torch.tensor(value, device=device, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered; every rank must call it. Any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor. Any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
