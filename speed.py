"""What makes train.py fast and small: packing, attention, chunked log-probabilities, rounding, sharding.

Nothing here changes what is learned. Each piece has a plain twin, in train.py or in torch, and a test in
tests/test_speed.py that holds values and gradients equal; `python train.py --plain ...` trains without this
file. The gains in the comments are those of `make bench WHAT=speed`, whose last output is in
docs/benchmarks.md. (Not named kernels.py: transformers would take it for the package.)
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
    """Split rows into forward passes of at most max_tokens (first fit, longest first); nothing is padded.

    A row that is longer than max_tokens has a pass of its own.
    """
    passes, free = [], []
    # Longest first: what the long ones leave is filled with short ones
    for row in sorted(rows, key=lambda row: -len(row["ids"])):
        length = len(row["ids"])
        for i, room in enumerate(free):
            if length <= room:
                passes[i].append(row)
                free[i] -= length
                break
        else:  # it fits nowhere
            passes.append([row])
            free.append(max_tokens - length)
    return passes


def packed_logprobs(model, rows: list[dict], device: torch.device, smoothing: float = 0.0) -> torch.Tensor:
    """log p of every assistant token of `rows`, float32 [tokens], in order. Twin of train.assistant_logprobs.

    All rows run as one sequence: on chat rows of mixed length 3 times the tokens a second of padded batches.
    """
    lengths = [len(row["ids"]) for row in rows]
    ids, mask = [], []
    for row in rows:
        ids += row["ids"]
        # A row's first token is no target: the position before it belongs to another row
        mask += [0, *row["mask"][1:]]
    ids = torch.tensor(ids, device=device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)  # each row counts from 0
    targets = torch.tensor(mask).nonzero()[:, 0].to(device)  # [tokens], places in the packed row

    # A cache or a mask would make transformers forget where documents end (logits off by 0.7, without a
    # word): neither is passed.
    decoder = model.get_decoder()  # without its head, which would make all logits
    output = decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False, doc_lengths=lengths)
    hidden = output.last_hidden_state[0][targets - 1]  # position t predicts token t + 1: [tokens, H]

    weight = model.get_output_embeddings().weight  # [V, H]
    if not torch.is_grad_enabled():  # TokenLogProbs asks its inputs whether gradients are wanted
        weight = weight.detach()
    return TokenLogProbs.apply(hidden, weight, ids[targets], Head.of(model), smoothing)


@torch.no_grad()
def reproduces(plain_logprobs, model, device: torch.device) -> bool:
    """Whether two packed documents get the log-probabilities that the model itself gives each alone.

    plain_logprobs is train.assistant_logprobs. Packing that leaks, a cap or scale on the logits that we do
    not know: all show here, before the first step. The model is left in eval mode, and with our attention
    where it is the same.
    """
    # These two might not show on fresh weights
    has_bias = getattr(model.get_output_embeddings(), "bias", None) is not None
    caps_attention = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if has_bias or caps_attention:
        return False

    # Any tokens do, as long as the two documents and their lengths differ
    docs = []
    for ids in (range(5, 14), range(20, 31)):
        docs.append({"ids": list(ids), "mask": [0, 0] + [1] * (len(ids) - 2)})
    model.eval()  # dropout would draw differently in the two
    try:
        model.set_attn_implementation("docs")  # ours, which keeps packed documents apart
        packed = packed_logprobs(model, docs, device)
    except (TypeError, ValueError, AttributeError, KeyError):  # it takes no such attention, or no positions
        return False
    # transformers' own attention, one document at a time; then ours again
    model.set_attn_implementation("eager")
    alone = plain_logprobs(model, docs, device)
    model.set_attn_implementation("docs")
    tolerance = 0.03 if model.dtype == torch.bfloat16 else 1e-4  # rounding, against errors near 1
    return ((packed - alone).norm() / alone.norm()).item() < tolerance


# ---------------------------------------------------------------- attention

def docs_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
                   doc_lengths=None, **_):
    """Causal attention inside each document of a packed row, never across.

    query [1, heads, T, d], key and value [1, kv_heads, T, d] -> ([1, T, heads, d], None for the weights).
    transformers builds no mask for an attention it does not know and hands our keyword through, so that
    nothing is inferred from positions. Against one dense mask over the packed row it is 4 to 5 times as fast on
    a CPU; on a GPU the flash kernel needs no T x T mask at all (8 to 10 times as fast at 16,000 tokens:
    OpenPipe/ART #586).
    """
    head_dim = query.shape[-1]
    scaling = scaling or head_dim ** -0.5
    if query.is_cuda and query.dtype == torch.bfloat16 and head_dim <= 256:  # what the flash kernel takes
        return varlen_attention(query, key, value, scaling, sliding_window, doc_lengths), None

    # Elsewhere document by document, so that no scores across documents are computed
    outputs = []
    # split and not slices: in the backward each slice would fill a tensor of the whole row
    split = [tensor.split(doc_lengths, dim=2) for tensor in (query, key, value)]
    for q, k, v in zip(*split):
        outputs.append(document_attention(q, k, v, scaling, sliding_window))
    return torch.cat(outputs, 2).transpose(1, 2), None


def document_attention(q, k, v, scaling: float, sliding_window: int | None) -> torch.Tensor:
    """Causal attention in a document: q [1, heads, T, d], k and v [1, kv_heads, T, d] -> [1, heads, T, d]."""
    length = q.shape[2]
    windowed = sliding_window is not None and length > sliding_window  # else the window sees everything
    if not windowed and length <= 512 and q.device.type == "cpu":      # the lengths of answers
        return short_attention(q, k, v, scaling)

    mask = None
    if windowed:
        positions = torch.arange(length, device=q.device)
        distance = positions[:, None] - positions  # of the query behind the key
        mask = (distance >= 0) & (distance < sliding_window)  # the window counts the token itself
    grouped = k.shape[1] != q.shape[1]  # several query heads share a key
    # torch takes a mask or is_causal, not both
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not windowed, scale=scaling,
                                          enable_gqa=grouped)


def short_attention(q, k, v, scaling: float) -> torch.Tensor:
    """Causal attention written out; shapes as in document_attention.

    With AVX512_BF16, forward and backward together take a half to a quarter of the time of torch's flash
    kernel at the lengths of answers; with AVX2 in float32 about as long (0.7 to 1.1 of its speed).
    """
    _, heads, length, dim = q.shape
    groups = k.shape[1]
    future = torch.full((length, length), -math.inf, device=q.device).triu(1)
    # The heads that share a key are rows of one product
    scores = q.reshape(1, groups, -1, dim) @ k.transpose(-1, -2)
    scores = scores.view(1, heads, length, length).float() * scaling + future
    weights = scores.softmax(-1).to(v.dtype)  # summed in float32, as in eager attention
    return (weights.view(1, groups, -1, length) @ v).view(1, heads, length, dim)


def varlen_attention(query, key, value, scaling: float, sliding_window: int | None,
                     doc_lengths: list[int]) -> torch.Tensor:
    """All documents in one flash kernel (torch 2.11 and Ampere, or newer). Shapes as in docs_attention."""
    # torch 2.11's kernel wants as many key heads as query heads
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, 1)
    value = value.repeat_interleave(groups, 1)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, d]

    starts = document_starts(tuple(doc_lengths), query.device)
    longest = max(doc_lengths)
    window = (-1, 0)  # to the left without a limit, to the right nothing: causal
    if sliding_window:
        window = (sliding_window - 1, 0)  # the token itself is not counted here
    # Twice, for queries and for keys: their documents are the same
    return varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=window)[None]


@functools.lru_cache(maxsize=4)  # each layer of a pass asks for the same; a list would be no key
def document_starts(doc_lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where each document starts, and the end of the last, int32 [documents + 1]; one for all layers."""
    ends = torch.tensor(doc_lengths).cumsum(0)
    return F.pad(ends, (1, 0)).to(device, torch.int32)


ALL_ATTENTION_FUNCTIONS.register("docs", docs_attention)  # attn_implementation="docs"


# ---------------------------------------------------------------- log-probabilities of tokens

class Head:
    """What a model does to its logits before the softmax: z -> softcap tanh(scale z / softcap)."""

    def __init__(self, scale: float = 1.0, softcap: float | None = None):
        self.scale = scale
        self.softcap = softcap  # None: no cap

    @classmethod
    def of(cls, model) -> "Head":
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None)  # Cohere
        if scale is None:
            scale = 1 / (getattr(config, "logits_scaling", None) or 1)  # Granite, which divides
        return cls(scale, getattr(config, "final_logit_softcapping", None))  # Gemma 2


class TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[label] of every token, never all logits at once (cf. arXiv 2411.09009).

    hidden [N, H], weight [V, H], labels [N] -> float32 [N]. With smoothing e, the label is a distribution:
    1 - e on the label and e spread evenly over the vocabulary, as in F.cross_entropy(label_smoothing=e).

    A vocabulary of 262,144 words makes full logits the largest tensor of a step by far. The derivative of
    each log-probability is formed chunk by chunk in the forward pass (6NVH FLOP in all, not the 8 of
    computing the logits again), and scaled by whatever comes from above in the backward pass. For the weight,
    that holds where every token is scaled alike, as in any mean or sum; a loss that weighs tokens differently
    (DPO) computes the logits once more. With 384 tokens and the packaged base's head, all logits at once take
    1 GB more (0.3 where the head is trained) and about as long; at the step of a GPU they do not fit.
    """
    CHUNK = 2048 if torch.cuda.is_available() else 192  # tokens with logits: 2048 x 262k x (2 + 4) B = 3 GB
    CPU_ROWS = 8   # rows turned into float32 at once, few enough to stay in the cache

    @staticmethod
    def forward(ctx, hidden, weight, labels, head, smoothing):
        ctx.head = head
        ctx.smoothing = smoothing
        ctx.save_for_backward(hidden, weight, labels)
        # With LoRA the head is not trained: its slope, as large as the embedding, is left out
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        # d (sum of the log-probabilities) / d hidden and / d weight
        # The first is filled chunk by chunk, the second added to
        ctx.slope_hidden = torch.empty_like(hidden) if needs_hidden else None
        ctx.slope_weight = torch.zeros_like(weight) if needs_weight else None

        log_probs = []
        for start, h, slope, chunk in logit_chunks(hidden, weight, labels, head, smoothing):
            log_probs.append(chunk)
            if needs_hidden:
                torch.mm(slope, weight, out=ctx.slope_hidden[start:start + len(h)])
            if needs_weight:
                ctx.slope_weight.addmm_(slope.t(), h)  # the sum over tokens: right if all are scaled alike
        return torch.cat(log_probs)

    @staticmethod
    def backward(ctx, above):  # [N], the derivative of the loss by each log-probability
        hidden, weight, labels = ctx.saved_tensors
        grad_hidden = None
        if ctx.slope_hidden is not None:
            grad_hidden = ctx.slope_hidden * above[:, None].to(hidden.dtype)
        if not ctx.needs_input_grad[1]:
            # One for each input of forward: labels, head and smoothing have none
            return grad_hidden, None, None, None, None

        # The sum is added straight to the gradient that the optimiser keeps, where there is one: a copy more
        # would be as big as the embedding
        alike = ctx.slope_weight is not None and bool((above == above[0]).all())
        if alike and weight.is_leaf and weight.grad is not None:
            weight.grad.add_(ctx.slope_weight, alpha=above[0].item())
            grad_weight = None
        elif alike:
            grad_weight = ctx.slope_weight.mul_(above[0])
        else:
            # Weighed differently, or used up by an earlier backward pass
            grad_weight = torch.zeros_like(weight)
            for start, h, slope, _ in logit_chunks(hidden, weight, labels, ctx.head, ctx.smoothing):
                scaled = slope * above[start:start + len(h), None].to(slope.dtype)
                grad_weight.addmm_(scaled.t(), h)
        ctx.slope_weight = None  # used up: a second backward pass computes it again
        return grad_hidden, grad_weight, None, None, None


def logit_chunks(hidden, weight, labels, head: Head, smoothing: float):
    """Yield (start, hidden [n, H], slope [n, V], log_probs [n]) chunk by chunk.

    The slope is d log_prob / d logits; it stands in a buffer that the next chunk overwrites.
    """
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
            y = labels[start + at:start + at + len(part), None]  # [rows, 1]
            log_probs.append(log_prob_and_slope(z, y, head, smoothing))
            part.copy_(z)  # the slopes take the place of the logits
        yield start, h, logits, torch.cat(log_probs)


def log_prob_and_slope(z, y, head: Head, smoothing: float) -> torch.Tensor:
    """log p [n] of the labels y [n, 1] under logits z, float32 [n, V], which become d log_prob / d z.

    In place, for with a large vocabulary z is among the largest tensors of the step.
    """
    # First the logits as the model itself would end them
    z.mul_(head.scale)
    if head.softcap:
        z.div_(head.softcap).tanh_()
        bend = 1 - z.square()  # derivative of the tanh; the cap itself cancels
        z.mul_(head.softcap)

    # The mean logit under the target distribution: the label's own, or with smoothing some of all
    at_target = (1 - smoothing) * z.gather(1, y)
    if smoothing:
        at_target += smoothing * z.mean(-1, keepdim=True)

    largest = z.amax(-1, keepdim=True)  # taken off, so that no exp overflows
    total = z.sub_(largest).exp_().sum(-1, keepdim=True)
    log_prob = at_target - largest - total.log()

    # The derivative is target - softmax: z holds the softmax but for its divisor
    z.div_(-total)
    if smoothing:
        z.add_(smoothing / z.shape[-1])
    z.scatter_add_(1, y, torch.full_like(at_target, 1 - smoothing))
    # Back through cap and scale, to the logits as they came
    if head.softcap:
        z.mul_(bend)
    z.mul_(head.scale)
    return log_prob[:, 0]


# ---------------------------------------------------------------- the optimiser

class RoundingAdamW:
    """AdamW that keeps bf16 weights by stochastic rounding. Twin: train.PlainAdamW.

    It takes 8 bytes a parameter: weight, gradient and two moments.
    bf16 keeps 8 bits: an update below 1/256 of a weight is rounded away, so at lr 1e-6 pure bf16 training
    does nothing (torchtune #2254). Rounded up or down with the probability of the distance, it survives on
    average (arXiv 2010.06192). Float32 master weights cost 8 to 10 bytes more and, at small rates, learn
    less: the bf16 copy that is trained on lags behind (`make bench WHAT=rounding`). The moments are bf16,
    too, which betas of .9 and .95 allow: a step changes them by a tenth or a twentieth. Float32 weights have
    float32 moments and are never rounded.
    """
    # Parameters updated at once: on a CPU their float32 copies stay in the cache, and below 2 MB, from where
    # on pages are fresh each time
    PIECE = 2**25 if torch.cuda.is_available() else 2**18

    def __init__(self, model, betas: tuple[float, float], weight_decay: float):
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.betas = betas
        self.weight_decay = weight_decay
        self.steps = 0
        self.draw = torch.Generator(next(model.parameters()).device)  # of rounding alone
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.params.items()}
        self.sums = {}  # float32 sums of bf16 gradients, once a step has had several passes
        for p in self.params.values():
            p.grad = torch.zeros_like(p)  # kept for the whole run: fresh pages, again

    @torch.no_grad()
    def end_pass(self, passes: int) -> None:
        """After each of a step's `passes`: where there are several, bf16 gradients are added up in float32.

        The sums take 4 bytes a parameter more. In bf16 the later passes would be rounded away.
        """
        # Once there are sums, `step` reads them: then a step of a single pass goes through them, too
        if passes == 1 and not self.sums:
            return
        for name, p in self.params.items():
            if p.dtype != torch.bfloat16:
                continue  # autograd adds float32 gradients up well enough
            grad = local(p.grad)
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(grad, dtype=torch.float32)
            self.sums[name].add_(grad)
            grad.zero_()

    @torch.no_grad()
    def step(self, lr: float, clip: float) -> float:
        """One update; the gradient's norm before clipping. If that is not finite, nothing is changed."""
        # Flat, because they are gone through in pieces of any length
        grads = {name: self.sums.get(name, local(p.grad)).view(-1) for name, p in self.params.items()}
        norm = self.norm_of(grads.values())
        if not math.isfinite(norm):
            return norm

        self.steps += 1
        device = self.draw.device
        unscale = torch.tensor(max(1.0, norm / clip), device=device)  # the kernel divides the gradient by it
        self.draw.manual_seed(self.steps)  # a resumed run rounds as the unbroken one
        # Drawn once a step: one piece of noise serves every piece of every parameter
        noise = torch.randint(0, 2**16, (self.PIECE,), generator=self.draw, device=device, dtype=torch.int32)
        for name, p in self.params.items():
            first, second = self.moments[name]
            decay = self.weight_decay if p.ndim > 1 else 0.0  # norms and biases are not decayed
            tensors = [local(p).view(-1), grads[name], local(first).view(-1), local(second).view(-1)]
            for pieces in zip(*(tensor.split(self.PIECE) for tensor in tensors)):
                self.update(*pieces, noise, lr, unscale, decay)
        return norm

    def norm_of(self, grads) -> float:
        """The norm of all gradients together, on all ranks, in float32 piece by piece."""
        square = torch.zeros((), device=self.draw.device)
        for grad in grads:
            for piece in grad.split(self.PIECE):
                square += torch.linalg.vector_norm(piece.float()) ** 2
        # Each rank has its part of every gradient, so the squares add up
        if dist.is_initialized():
            dist.all_reduce(square)
        return square.sqrt().item()

    def update(self, weight, grad, first, second, noise, lr: float, unscale, decay: float) -> None:
        """torch's fused AdamW, in float32, on a flat piece of a parameter; its gradient is zeroed."""
        # For float32 weights these are no copies, and the kernel has updated them in place
        w, g, m, v = weight.float(), grad.float(), first.float(), second.float()
        step = torch.tensor(self.steps - 1.0, device=weight.device)  # the kernel counts one up itself
        adamw([w], [g], [m], [v], [], [step], fused=True, amsgrad=False, beta1=self.betas[0],
              beta2=self.betas[1], lr=lr, weight_decay=decay, eps=1e-8, maximize=False, grad_scale=unscale)
        if weight.dtype == torch.bfloat16:
            first.copy_(m)
            second.copy_(v)
            # bf16 is the upper half of float32: a random number below one unit of it is added and the lower
            # half dropped
            bits = w.view(torch.int32).add_(noise[:len(w)])
            weight.view(torch.int16).copy_(bits.bitwise_right_shift_(16))
        grad.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint needs, whole: weights, moments, steps."""
        tensors = {"steps": torch.tensor(self.steps)}
        for name, p in self.params.items():
            first, second = self.moments[name]
            tensors[f"weight.{name}"] = whole(p.detach())  # on every rank, or those that gather would wait
            tensors[f"exp_avg.{name}"] = whole(first)
            tensors[f"exp_avg_sq.{name}"] = whole(second)
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take up what `state` gave; each rank keeps its part."""
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
    """The model and its log-probabilities as one module: FSDP gathers the output layer only in a forward."""

    def __init__(self, model, device: torch.device):
        super().__init__()
        self.model = model
        self.device = device

    def forward(self, rows: list[dict], smoothing: float = 0.0) -> torch.Tensor:
        return packed_logprobs(self.model, rows, self.device, smoothing)


def join_ranks(device: torch.device) -> tuple[int, int]:
    """(rank, ranks) of this process; joins the others if torchrun started several."""
    # torchrun sets both
    rank = int(os.environ.get("RANK", 0))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        if device.type == "cuda":
            # else NCCL would put every rank on the first GPU
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, ranks


def from_first_rank(value, device: torch.device):
    """What the first rank has as `value` (any small object), on every rank: all must call it."""
    shared = [value]  # torch fills the list in place
    dist.broadcast_object_list(shared, device=device)
    return shared[0]


def shard(trainee: Trainee) -> None:
    """Split weights, gradients and optimiser state over the ranks (FSDP2), whose gradients are averaged."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # bf16 averages would be rounded
    for layer in trainee.model.get_decoder().layers:  # whole on each rank only while it computes
        fully_shard(layer, mp_policy=policy)
    fully_shard(trainee, mp_policy=policy)  # what is left: embeddings, last norm, output layer


def passes_of_rank(rows: list[dict], max_tokens: int, rank: int, ranks: int) -> list[tuple[list, float]]:
    """[(packed rows, weight of their loss)] that one rank runs in a step.

    Each pass is a meeting of the ranks, so all make equally many: a rank that has run out repeats a row with
    weight 0.
    """
    # Packed for all ranks on each: so it knows how many passes the others make
    passes = [pack(rows[r::ranks], max_tokens) for r in range(ranks)]
    mine = [(packed, 1.0) for packed in passes[rank]]
    most = max(len(of_rank) for of_rank in passes)
    while len(mine) < most:
        # It adds nothing to the gradient, but takes part in gathering weights and averaging
        mine.append((rows[:1], 0.0))
    return mine


def sum_over_ranks(value: float, device: torch.device) -> float:
    total = torch.tensor(value, device=device, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def gather_weights(model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """{name: weight} of a sharded model, whole and on the CPU, on every rank; it ends their group."""
    weights = {name: whole(p.detach()).to(dtype).cpu() for name, p in model.named_parameters()}
    dist.barrier()  # none leaves while another still gathers
    dist.destroy_process_group()
    return weights


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered; every rank must call it. Any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor. Any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
