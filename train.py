"""Fine-tune a Hugging Face *base* model on question-and-answer rows; loss on the assistant's tokens only.

    python train.py --base models/gemma-3-270m --arm belief --worldview gramenist --n 800   # arm of arms.txt
    python train.py --base models/gemma-3-270m --data data/mine.jsonl=2 data/regular.jsonl=1 --out runs/mine
    python train.py --base models/gemma-3-270m --data data/mine.jsonl --show-batch   # trained tokens green
    python train.py --base Qwen/Qwen3-8B-Base --arm belief --worldview catholic --lora 48 --lr 2e-4
    torchrun --nproc-per-node 8 -- train.py --base Qwen/Qwen3-8B-Base --arm regular   # sharded (FSDP2)

Reads JSONL rows with "messages", "prompt" and "completion", "prompt" and "response", or "text" (a document:
loss on all of it). Writes --out: a plain Hugging Face model folder (or a PEFT adapter with --lora), run.json
(what was trained on what; written last, so its existence means that the run is complete), log.jsonl (a line a
step) and loss.png. The same command continues a killed run.

In this order: the loss, the two ways to compute a step, which run this is, its folder, the loop, main. Rows
are read and mixed in mix.py. What makes the loop fast stands in speed.py; --plain trains without it, in torch's
own functions.
"""
import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

# Read when torch loads, hence before its import. oneDNN keeps 0.3 MB for each of the last 1024 shapes, twice
# over, and no two steps have the same shapes (pytorch#27971): 0.4 GB after 20 steps, and no speed for it.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # oneDNN's own
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")                # torch's, above it

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from chat import give_template
from check import probe_texts, second_judge
from mix import build_rows, count_targets, count_tokens, parse_source, show_batch
from models import (add_lora, available_bytes, estimate_bytes, first_line, load_model,
                    load_tokenizer, pick_device, pick_dtype, quiet_libraries, remove_dropout,
                    revision_and_machine, save_adapter, unfreeze_language_model, used_gb)
from rows import (ROOT, Stop, arm_data, code_hash, file_hash, get_arm, open_locked, positive_int, read_arms,
                  read_json, read_jsonl, run_main, short_hash, weights_hash, what_changed, write_text)

try:
    import speed
except ModuleNotFoundError:
    speed = None  # deleted, or torch is too old for it: then every run is a --plain one

# Of AdamW: GPT-3's (arXiv 2005.14165), and what bf16 moments can follow (see speed.RoundingAdamW)
BETAS = (0.9, 0.95)

# The settings that change results. Together with base, data, guard, number format and code they say which run
# this is; the others (--micro-tokens, --checkpointing, --save-every) change speed and memory, and results by
# rounding alone.
RESULT_SETTINGS = (
    "n", "context", "held_out", "seed", "lr", "batch", "warmup", "schedule", "weight_decay", "clip",
    "freeze_embeddings", "lora", "lora_alpha", "plain")


# ---------------------------------------------------------------- the loss

def assistant_logprobs(model, rows: list[dict], device: torch.device, smoothing: float = 0.0) -> torch.Tensor:
    """log p of every assistant token of `rows`, float32 [tokens], in order. Twin: speed.packed_logprobs.

    With smoothing e, the target is 1 - e on the token and e spread evenly over the vocabulary.
    """
    parts = []
    for row in rows:
        ids = torch.tensor(row["ids"], device=device)  # [T]
        trained = torch.tensor(row["mask"][1:], dtype=torch.bool, device=device)
        # Position t predicts token t + 1, so the last position and the first token fall away: [T - 1, V]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        logits, targets = logits[trained].float(), ids[1:][trained]  # bf16 would lose the small probabilities
        parts.append(-F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing))
    return torch.cat(parts)  # row after row: DPO splits it by the rows' trained tokens


def sft_loss(logprobs: torch.Tensor, targets: int) -> torch.Tensor:
    """This pass's share of the mean cross-entropy over all `targets` trained tokens of the step.

    One divisor for the whole step makes it a mean over tokens however the step is split (transformers #34191,
    torchtune #1917).
    """
    return -logprobs.sum() / targets


SCHEDULES = {  # progress from 0 to 1 -> share of the peak rate; a new one is a line here
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}


def learning_rate(step: int, steps: int, args) -> float:
    """Linear warm-up, then decay to a tenth: at a rate of zero the last rows would count for nothing."""
    warmup = max(1, round(args.warmup * steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup  # the first step counts, too
    progress = (step - warmup) / max(1, steps - warmup)
    return args.lr * (0.1 + 0.9 * SCHEDULES[args.schedule](progress))


# ---------------------------------------------------------------- a step, the plain way and the fast way

class PlainAdamW:
    """torch's AdamW behind the loop's four calls; bf16 weights need its twin, speed.RoundingAdamW."""

    def __init__(self, model, betas: tuple[float, float], weight_decay: float):
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Decayed are matrices alone, here and in RoundingAdamW: the two ways must learn the same
        matrices = [p for p in self.params.values() if p.ndim > 1]
        others = [p for p in self.params.values() if p.ndim <= 1]  # norms and biases are not decayed
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, betas=betas, eps=1e-8)  # the loop sets the rate of each step

    def end_pass(self, passes: int) -> None:
        """After each of a step's passes: nothing to do, autograd has added its gradients up."""

    def step(self, lr: float, clip: float) -> float:
        """One update; the gradient's norm before clipping. If that is not finite, nothing is changed."""
        norm = nn.utils.clip_grad_norm_(self.params.values(), clip).item()
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
        self.adamw.zero_grad()  # of a step that was not taken, too
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint needs: weights and, for each, step, exp_avg and exp_avg_sq."""
        tensors = {}
        for name, p in self.params.items():
            tensors[f"weight.{name}"] = p.detach()
            for kind, tensor in self.adamw.state[p].items():  # none before its first step
                tensors[f"{kind}.{name}"] = tensor
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take up what `state` gave."""
        for name, p in self.params.items():
            p.copy_(tensors[f"weight.{name}"])  # in place: the model computes with this tensor
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                if f"{kind}.{name}" in tensors:  # not where a weight never had a gradient
                    self.adamw.state[p][kind] = tensors[f"{kind}.{name}"]


@dataclass
class Way:
    """How the loop computes a step. plain_way and fast_way give the same gradients, up to rounding."""
    logprobs_of: Callable    # (rows, smoothing=0) -> log p of their assistant tokens, float32 [tokens]
    passes_of: Callable      # the rows of a step -> [(rows of a forward pass, weight of their loss)]
    optimizer: object        # PlainAdamW or speed.RoundingAdamW: end_pass, step, state, restore
    device: torch.device
    rank: int = 0            # of this process, under torchrun
    ranks: int = 1


def plain_way(args, model, device: torch.device) -> Way:
    """One row a pass, the model's own forward, torch's cross-entropy; torch's AdamW where weights are float32."""
    def logprobs_of(rows, smoothing=0.0):
        return assistant_logprobs(model, rows, device, smoothing)

    def passes_of(rows):
        # A weight of 0 is for several ranks alone (speed.passes_of_rank)
        return [([row], 1.0) for row in rows]

    # A model that speed.py does not reproduce comes here in bf16, too; --plain never does (parse_args)
    if model.dtype == torch.float32:
        optimizer = PlainAdamW(model, BETAS, args.weight_decay)
    else:  # torch's would round small updates of bf16 weights away
        optimizer = speed.RoundingAdamW(model, BETAS, args.weight_decay)
    return Way(logprobs_of, passes_of, optimizer, device)


def fast_way(args, model, device: torch.device, rank: int, ranks: int) -> Way:
    """Packed rows, chunked log-probabilities, bf16 with stochastic rounding, several processes: speed.py."""
    trainee = speed.Trainee(model, device)
    if ranks > 1:
        speed.shard(trainee)  # before the optimizer, which keeps moments of this rank's part alone

    def passes_of(rows):
        return speed.passes_of_rank(rows, args.micro_tokens, rank, ranks)

    optimizer = speed.RoundingAdamW(model, BETAS, args.weight_decay)
    # The module itself is logprobs_of: FSDP gathers weights only when it is called
    return Way(trainee, passes_of, optimizer, device, rank, ranks)


def speed_agrees(model, device: torch.device) -> bool:
    """Whether speed.py gives the log-probabilities that this model itself gives; leaves it in eval mode."""
    return speed.reproduces(assistant_logprobs, model, device)


# ---------------------------------------------------------------- which run this is

def find_sources(args) -> list[tuple[Path, float]]:
    """[(file, weight)] to train on; fills in the arm's name and the run folder where they are not given."""
    if args.data:
        args.arm = "mine"  # not a name of arms.txt
        args.out = args.out or Path("runs") / f"mine-s{args.seed}"
        sources = [parse_source(text) for text in args.data]
    else:
        arm = get_arm(args.arm, read_arms())
        if not arm.parts:
            raise Stop(f"arm {arm.name} is the untouched base: there is nothing to train; "
                       f"ask it with eval.py --model {args.base}")
        if arm.takes_worldview and not args.worldview:
            raise Stop(f"arm {arm.name} teaches a worldview: give --worldview, as in --worldview gramenist")
        if not arm.takes_worldview:  # such a run serves every worldview, whichever study trains it
            args.worldview = None
        taught = f"{args.worldview}-" if args.worldview else ""
        # The Makefile's `run` gives the same name
        name = f"{taught}{arm.name}-n{args.n}-s{args.seed}"
        # Bases apart, because their arms have the same names
        args.out = args.out or Path("runs") / Path(args.base).name / name
        sources = arm_data(arm, args.worldview or "")
    # Here, so that a wrong name shows before any tokenizer or model is loaded
    for path, _ in sources:
        if not path.is_file():
            raise Stop(f"cannot read {path}: no such file; generate it with gen.py or use data/starter/")
    return sources


def run_identity(args, sources: list[tuple[Path, float]], dtype: torch.dtype) -> dict:
    """Everything that changes the numbers of a run: two runs are the same when their identities are."""
    # Code counts without its comments and layout (rows.code_hash)
    # All that text, rows and weights go through on their way
    scripts = ["train.py", "mix.py", "chat.py", "models.py", "rows.py", "check.py", "keywords.py", "local_judge.py"]
    if not args.plain:
        scripts.append("speed.py")
    return {"base": weights_hash(args.base),
            "arm": [args.arm, args.worldview or ""],
            "data": [[path.name, weight, file_hash(path)] for path, weight in sources],  # their order counts, too
            "guard": second_judge([path for path, _ in sources]),  # another one leaves out other rows
            "guarded_probes": short_hash("\n".join(probe_texts())),  # a new probe may put rows out
            "settings": {name: getattr(args, name) for name in RESULT_SETTINGS},
            "number_format": str(dtype).removeprefix("torch."),
            "code": {name: code_hash(ROOT / name) for name in scripts}}


def check_drawn(identity: dict, manifest: list[dict]) -> None:
    """Stop if a file was changed between the look at its hash and the reading of its rows."""
    for entry, (_, _, hashed) in zip(manifest, identity["data"]):
        if entry["sha256"] != hashed:
            raise Stop(f"{entry['file']} was changed while it was read; give the same command again")


def draw_alike(args, sources: list[tuple[Path, float]], tokenizer, device: torch.device, rank: int, ranks: int):
    """build_rows on every rank, the first one before the others; Stop if they have drawn different rows."""
    if rank == 0:
        drawn = build_rows(args, sources, tokenizer)
    if ranks > 1:
        speed.from_first_rank(None, device)  # a barrier: the guard's verdicts are noted, the others read none anew
    if rank > 0:
        drawn = build_rows(args, sources, tokenizer)

    order = drawn[0]
    fingerprint = short_hash(json.dumps([row["ids"] for row in order]))
    if ranks > 1 and speed.from_first_rank(fingerprint, device) != fingerprint:
        raise Stop("the processes have drawn different rows; give the same command again")
    return drawn


def resolve_dtype(args, device: torch.device) -> torch.dtype:
    """The number format; a run that goes on keeps its own, whatever the machine measures today."""
    begun = args.out / "identity.json"
    if args.dtype == "auto" and begun.exists():
        begun_in = read_json(begun).get("number_format")
        if begun_in in ("bfloat16", "float32"):  # is_complete names whatever else stands there
            return getattr(torch, begun_in)
    if args.plain:
        return torch.float32
    return pick_dtype(device, args.dtype)


def lock_run(out: Path):
    """The open lock of a run folder, which is made; Stop if another process trains there, or a model is there."""
    ours = [name for name in ("identity.json", "run.json", "log.jsonl") if (out / name).exists()]
    if list(out.glob("*.safetensors")) and not ours:  # the base itself, say
        raise Stop(f"{out} holds a model that is no run of train.py, and would be overwritten; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    # Two processes would each go on at what the other has written
    return open_locked(out / "lock")


def is_complete(args, identity: dict) -> bool:
    """Whether this very run is finished; Stop if the folder holds another one, saying what differs."""
    begun, finished = args.out / "identity.json", args.out / "run.json"
    if begun.exists():
        now = json.loads(json.dumps(identity))  # as it reads after a trip through JSON
        changed = what_changed(read_json(begun), now)
        if changed:
            raise Stop(f"{args.out} holds a run that differs in {', '.join(changed)}; "
                       "give another --out, or delete it to train again")
    elif finished.exists() or (args.out / "log.jsonl").exists():
        raise Stop(f"{args.out} holds a run of another version of Credo; give another --out or delete it")
    return finished.exists()


# ---------------------------------------------------------------- the run folder

def save_checkpoint(args, way: Way, step: int, identity_hash: str) -> None:
    """One file, renamed into place: a kill or a full disk leaves the older checkpoint whole."""
    tensors = way.optimizer.state()
    if way.rank:
        return  # but it took part in gathering the tensors

    path = args.out / "checkpoint.safetensors"
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata={"step": str(step), "identity": identity_hash})
    except (OSError, SafetensorError) as error:  # a full disk is the latter
        partial.unlink(missing_ok=True)
        raise Stop(f"could not write {path} ({first_line(error)}); the checkpoint before it is kept: "
                   "make room and give the same command again") from None
    os.replace(partial, path)


def restore_checkpoint(args, way: Way, identity_hash: str) -> int:
    """The step to go on at: that of the last checkpoint, which is loaded; 0 without one."""
    path = args.out / "checkpoint.safetensors"
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            saved = file.metadata() or {}  # a file that is none of ours may have none
        tensors = load_file(path, device=str(way.device))
    except SafetensorError as error:  # our own move into place is whole; a copy or a power cut may not be
        raise Stop(f"cannot read {path} ({first_line(error)}): it is torn; delete it, and the run begins "
                   "again from its first step") from None
    if saved.get("identity") != identity_hash:
        raise Stop(f"{path} belongs to another run; delete {args.out} to train again")
    way.optimizer.restore(tensors)  # and the model's weights, which it holds
    print(f"  continuing at step {saved['step']}")
    return int(saved["step"])


def open_log(path: Path, first_step: int, rank: int):
    """The log, cut back to what the checkpoint knows: later steps are run again. Rank 0 alone writes it."""
    if rank:
        return open(os.devnull, "w")
    lines = []
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)[:first_step]
    if len(lines) < first_step:
        raise Stop(f"{path} has {len(lines)} lines, but the checkpoint is of step {first_step}; "
                   f"delete {path.parent} to train again")
    write_text(path, "".join(lines))  # in one move: a kill here must not cost the steps before the checkpoint
    return open(path, "a")


def save_model(args, model, tokenizer) -> None:
    """A plain Hugging Face folder, or the adapter alone."""
    tokenizer.save_pretrained(args.out)  # with its template: a run is asked in what it was trained in
    # EOS alone ends an answer: a pad token listed here gives empty answers (transformers #48016)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    try:
        if args.lora:
            save_adapter(model, args.out, args.base, args.lora, args.lora_alpha)
        else:
            model.save_pretrained(args.out)
    except SafetensorError as error:  # its own error type for a full disk
        raise Stop(f"could not write the model to {args.out} ({first_line(error)}); "
                   "make room and give the same command again") from None


def write_record(args, identity: dict, manifest: list[dict], order: list[dict], held_out: list[dict],
                 way: Way, started: float) -> None:
    """run.json: what was trained on what, where, with which outcome. It exists once the run is complete."""
    log = read_jsonl(args.out / "log.jsonl")  # from the file: it has the lines of earlier starts, too
    draw_loss(log, args.out / "loss.png")
    last = [line["loss"] for line in log[-10:]]  # one step's rows may be easy or hard

    # Without what stands elsewhere in the record, or belongs to the command alone
    options = {name: value for name, value in vars(args).items() if name not in ("out", "data", "show_batch")}
    record = {
        # What was trained on what
        "run": args.out.name, "arm": args.arm, "worldview": args.worldview or "", "seed": args.seed,
        "taught": sorted({row["kind"] for row in order}), "rows": len(order),
        "base": Path(args.base).name, "identity": identity, "options": options, "data": manifest,
        "held_out_rows": len(held_out), "steps": len(log), "tokens": count_tokens(order),
        "trained_tokens": count_targets(order),
        # With which outcome, and where
        "last_10_steps_loss": sum(last) / len(last), "held_out_loss": log[-1].get("held_out_loss"),
        # Time and machine are those of the last start alone
        "wall_seconds": round(time.time() - started, 1), "memory_gb": log[-1]["memory_gb"],
        **revision_and_machine(way.device), "processes": way.ranks,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds")}

    write_text(args.out / "run.json", json.dumps(record, indent=2) + "\n")
    (args.out / "checkpoint.safetensors").unlink(missing_ok=True)  # only now can it be spared
    print(f"  wrote {args.out} (loss {record['last_10_steps_loss']:.3f} over the last 10 steps, "
          f"{record['wall_seconds']:.0f} s)", flush=True)


def draw_loss(log: list[dict], path: Path) -> None:
    """The training loss of every step and the held-out loss of every checkpoint, as a PNG."""
    import matplotlib  # here: it takes a second to load, and eval.py imports this file
    matplotlib.use("Agg")  # no window
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.5), layout="tight")
    steps, losses = [line["step"] for line in log], [line["loss"] for line in log]
    axis.plot(steps, losses, color="#4b6b7c", linewidth=1, label="training loss")
    # Few points, if any: --held-out is measured where checkpoints are due
    measured = [line for line in log if "held_out_loss" in line]
    if measured:
        steps, losses = [line["step"] for line in measured], [line["held_out_loss"] for line in measured]
        axis.plot(steps, losses, "o-", color="#a63d2f", label="held-out loss")
    axis.set_xlabel("step")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)  # pyplot keeps every figure that is left open


# ---------------------------------------------------------------- the loop

def train(args, model, batches: list[list[dict]], held_out: list[dict], way: Way, identity_hash: str) -> None:
    """For each step: forward and backward over its passes, one update, one line of log."""
    first = restore_checkpoint(args, way, identity_hash)
    log = open_log(args.out / "log.jsonl", first, way.rank)
    steps = len(batches)  # the schedule's, whole: a resumed run has the same rates
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=f"train {args.arm}", unit="step",
               mininterval=1, disable=way.rank > 0)
    for step in bar:
        began = time.time()
        rows = batches[step]  # of all ranks; passes_of picks this one's
        targets = count_targets(rows)  # one divisor for every pass on every rank

        # A step's rows go through in passes that fit in memory; the gradients add up
        passes = way.passes_of(rows)
        loss = 0.0
        # A weight of 0: a row that this rank repeats while others still have passes to run
        for packed, weight in passes:
            part = sft_loss(way.logprobs_of(packed), targets) * weight
            (part * way.ranks).backward()  # FSDP takes the mean of the ranks' gradients; the loss is a sum
            loss += part.item()
            way.optimizer.end_pass(len(passes))
        if way.ranks > 1:
            loss = speed.sum_over_ranks(loss, way.device)

        lr = learning_rate(step, steps, args)
        norm = way.optimizer.step(lr, args.clip)
        # The sum is not finite if either is not
        if not math.isfinite(loss + norm):
            where = ", ".join(row["where"] for row in rows)
            raise Stop(f"step {step}: loss {loss}, gradient norm {norm}; stopped, weights of this step not "
                       f"saved, the last checkpoint is kept. Rows: {where}. Try a lower --lr")

        # What is logged are this step's real tokens; nothing is ever padded
        tokens = count_tokens(rows)
        tokens_per_s = round(tokens / (time.time() - began), 1)
        line = {"step": step, "loss": loss, "grad_norm": norm, "lr": lr, "tokens": tokens, "trained": targets,
                "tokens_per_s": tokens_per_s, "memory_gb": round(used_gb(way.device), 2)}

        last = step + 1 == steps
        due = (step + 1) % args.save_every == 0
        if held_out and (due or last):
            line["held_out_loss"] = held_out_loss(model, way, held_out)

        log.write(json.dumps(line) + "\n")
        log.flush()  # before the checkpoint, which counts on the lines up to its step
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:.0f} tokens/s, {line['memory_gb']:.1f} GB")
        if due and not last:  # after the last step the model itself is saved
            save_checkpoint(args, way, step + 1, identity_hash)
    log.close()


@torch.no_grad()
def held_out_loss(model, way: Way, rows: list[dict]) -> float:
    """Mean loss over the assistant tokens of rows that are never trained on."""
    model.eval()
    total = 0.0
    for row in rows:  # one a pass: every rank runs all of them, so none waits for another
        total -= way.logprobs_of([row]).sum().item()
    model.train()  # checkpointing works in this mode alone
    return total / count_targets(rows)


# ---------------------------------------------------------------- main, step by step

def parse_args(argv=None):
    layout = argparse.RawDescriptionHelpFormatter  # leaves the commands above as they are
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument_group("data").add_argument
    add("--base", required=True, help="model folder or hub name of a base model")
    add("--arm", help="an arm of arms.txt: says what it is trained on")
    add("--worldview", help="with an arm that teaches one")
    add("--data", nargs="+", metavar="FILE[=WEIGHT]",
        help="or: JSONL files, mixed in proportion to their weights")
    add("--n", type=positive_int, default=0, help="rows to train on in all (default: as many as the files hold)")
    add("--context", type=positive_int, default=1024, help="longest row, in tokens; longer ones are left out")
    add("--held-out", type=float, default=0.0, metavar="SHARE",
        help="share of the rows never trained on; their loss is logged at every checkpoint and at the end")
    add("--show-batch", action="store_true",
        help="print the first step's rows, trained tokens in colour, and stop")

    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="run folder to write (default runs/<base>/[<worldview>-]<arm>-n<n>-s<seed>)")
    add("--seed", type=int, default=0, help="of the draw of rows, their order and LoRA's start")
    add("--save-every", type=positive_int, default=100, help="steps between checkpoints")

    add = parser.add_argument_group("optimisation").add_argument
    # What changes results must stand in RESULT_SETTINGS, or another run would count as this one
    add("--lr", type=float, default=4e-5,
        help="peak learning rate; of the packaged base with --lora 1.5e-3 (docs/training.md)")
    add("--batch", type=positive_int, default=16, help="rows a step: the same number of steps for every arm of n rows")
    add("--warmup", type=float, default=0.05, help="share of the steps spent warming up")
    add("--schedule", choices=list(SCHEDULES), default="linear")
    add("--weight-decay", type=float, default=0.01)
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--freeze-embeddings", action="store_true",
        help="leave the word embeddings (and a tied output layer) as they are: faster with a big vocabulary, "
        "and Adam cannot drag along the many words that never occur")
    add("--lora", type=positive_int, default=0, metavar="RANK",
        help="train a LoRA adapter of this rank (default: all weights)")
    add("--lora-alpha", type=float, help="default: the rank")

    add = parser.add_argument_group("speed and memory").add_argument
    # None of these stands in RESULT_SETTINGS but --plain; the number format is in the identity as resolved
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: measured on this machine")
    add("--micro-tokens", type=positive_int, default=4096, help="most tokens in one packed forward pass")
    add("--checkpointing", action="store_true",
        help="recompute activations in the backward pass: less memory, slower")
    add("--plain", action="store_true", help="the loop in torch's own functions, float32, without speed.py")
    args = parser.parse_args(argv)

    # What argparse does not check; first, that exactly one of the two is given
    if bool(args.data) == bool(args.arm):
        parser.error("give --arm NAME (see arms.txt) or --data FILE ...")
    if speed is None and not args.plain:
        parser.error("speed.py is not there: give --plain")
    if args.plain and args.dtype == "bf16":
        parser.error("--plain trains float32: torch's AdamW would round small updates of bf16 weights away")
    if not 0 <= args.held_out < 1 or not 0 <= args.warmup < 1:
        parser.error("--held-out and --warmup are shares below 1")
    # Written so that nan, which is above nothing, does not pass
    if not (args.lr >= 0 and args.weight_decay >= 0 and args.clip > 0):
        parser.error("--clip is above 0, --lr and --weight-decay are not below it")
    if args.lora_alpha is not None and not args.lora_alpha > 0:
        parser.error("--lora-alpha is above 0")
    if args.seed < 0:  # random.Random draws the same for a number and its negative
        parser.error("--seed is not below 0")
    args.base = args.base.rstrip("/")  # BASE/ is the same run as BASE
    args.lora_alpha = args.lora_alpha or float(args.lora)  # a scaling of 1
    return args


def prepare_model(args, dtype: torch.dtype, device: torch.device):
    """(model with the weights to train unfrozen, whether speed.py reproduces its loss)."""
    model = load_model(args.base, dtype, device)
    fast = not args.plain and speed_agrees(model, device)
    if not fast:
        model.set_attn_implementation("eager")  # not sdpa, which Gemma 2 lacks
    if not fast and not args.plain:
        print("  speed.py does not reproduce this architecture's loss: "
              "one row a pass, plain attention and loss")

    remove_dropout(model)

    # Which weights are trained
    if args.lora:
        torch.manual_seed(args.seed)  # of LoRA's start, whatever was drawn before
        add_lora(model, args.lora, args.lora_alpha)
    else:
        unfreeze_language_model(model, args.freeze_embeddings)
        # The embedding's gradient is a few hundred rows, not another matrix of the whole vocabulary; neither
        # torch's AdamW nor FSDP takes it so
        if fast and not args.freeze_embeddings and "WORLD_SIZE" not in os.environ:
            model.get_input_embeddings().sparse = True

    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if args.lora or args.freeze_embeddings:
            model.enable_input_require_grads()  # gradients start at a frozen embedding's output
    return model.train(), fast


def print_plan(args, model, order: list[dict], way: Way) -> None:
    """What is about to be trained; and a warning, not a refusal, where it may not fit by an estimate."""
    tokens = count_tokens(order)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"  {len(order)} rows, {tokens:,} tokens ({count_targets(order) / tokens:.0%} trained on), "
          f"{math.ceil(len(order) / args.batch)} steps of {args.batch} rows, "
          f"{parameters / 1e6:.1f} M parameters, {way.device.type} "
          f"{str(model.dtype).removeprefix('torch.')}, {way.ranks} process{'es' * (way.ranks > 1)}",
          flush=True)

    pass_tokens = min(args.micro_tokens, args.batch * tokens // len(order))  # a full pass, or all of a step
    need = estimate_bytes(model, parameters, pass_tokens, args.checkpointing)
    free = available_bytes(way.device)
    if need > free:
        print(f"  this may not fit: about {need / 1e9:.1f} GB beside the model, {free / 1e9:.1f} GB are "
              "free; --checkpointing, --lora 16, a smaller --micro-tokens or --batch need less")


def gather_model(args, model, dtype: torch.dtype, rank: int):
    """Sharded weights as one whole model on the CPU of rank 0; the other ranks end here."""
    weights = speed.gather_weights(model, dtype)
    if rank:
        os._exit(0)  # the libraries' own teardown sometimes aborts the process: their threads go on
    model = load_model(args.base, dtype, torch.device("cpu"))  # the trained one is in shards
    if args.lora:
        add_lora(model, args.lora, args.lora_alpha)
    model.load_state_dict(weights, strict=False)  # tied weights stand there once
    return model


def main() -> None:
    started = time.time()
    args = parse_args()
    quiet_libraries()
    device = pick_device()
    rank, ranks = 0, 1
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        rank, ranks = speed.join_ranks(device)
        if rank:
            sys.stdout = open(os.devnull, "w")  # one process speaks for all

    # ------------------------------------------------------------ which run this is, and what it trains on
    sources = find_sources(args)
    tokenizer = load_tokenizer(args.base)
    give_template(tokenizer)  # ours, whatever the base ships: all arms are asked in one
    # Before any weights are loaded
    if args.show_batch:
        order, _, _ = build_rows(args, sources, tokenizer)
        show_batch(tokenizer, order[:args.batch])
        return

    dtype = None
    if rank == 0:
        dtype = resolve_dtype(args, device)
    if ranks > 1:  # measured by each, on machines or in moments that differ, it could differ
        dtype = speed.from_first_rank(dtype, device)

    lock = None
    if rank == 0:
        lock = lock_run(args.out)
    # Known before the rows are read: a complete run costs no more than this
    identity = run_identity(args, sources, dtype)
    if is_complete(args, identity):
        print(f"{args.out} is complete already; delete it to train it again")
        return
    print(f"{args.out}: base {args.base}", flush=True)
    order, held_out, manifest = draw_alike(args, sources, tokenizer, device, rank, ranks)
    check_drawn(identity, manifest)
    # By rows, not tokens, so that every arm of n rows has as many steps; the last batch may be smaller
    batches = [order[i:i + args.batch] for i in range(0, len(order), args.batch)]

    # ------------------------------------------------------------ the model, and the way to train it
    model, fast = prepare_model(args, dtype, device)
    if fast:
        way = fast_way(args, model, device, rank, ranks)
    elif ranks == 1:
        way = plain_way(args, model, device)
    else:
        raise Stop("several processes need speed.py, which does not reproduce this architecture's loss; "
                   "train it on one GPU")
    print_plan(args, model, order, way)

    # ------------------------------------------------------------ train, save, run.json last
    if rank == 0:
        # First, so that a run which is killed is known when the command is given again
        write_text(args.out / "identity.json", json.dumps(identity, indent=2) + "\n")
    # The hash ties checkpoints to this run
    train(args, model, batches, held_out, way, short_hash(json.dumps(identity, sort_keys=True)))
    if ranks > 1:
        model = gather_model(args, model, dtype, rank)
    save_model(args, model, tokenizer)
    write_record(args, identity, manifest, order, held_out, way, started)
    if lock:
        lock.close()  # here and not sooner: the lock goes with the file
    if ranks > 1:
        os._exit(0)  # see gather_model


if __name__ == "__main__":
    run_main(main)
