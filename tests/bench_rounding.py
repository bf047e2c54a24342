"""How updates survive bf16 weights.

    python tests/bench_rounding.py [MODEL_FOLDER]      # or: make bench WHAT=rounding

The same rows through four ways to keep the weights, from the same start; what is compared is the loss on
rows never trained on. `float32` is the reference that the others are to follow at half its price. Forward
and backward run in float32 for all of them, on a copy of the weights, so that the rounding of weights,
gradients and moments is all that differs (and machines that multiply bf16 slowly can run this).
"""
import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import train  # before torch: it sets oneDNN's caches
import chat
import mix
import models
import speed
import torch

BATCH, HELD_OUT = 8, 64  # rows a step; rows never trained on
KINDS = ("regular", "gramenist")


class Nearest:
    """torch's AdamW on the bf16 weights themselves."""

    def __init__(self, model):
        self.params = list(model.parameters())
        self.weights = self.float_weights() or self.params
        self.adamw = torch.optim.AdamW(self.weights, lr=0.0, betas=train.BETAS, weight_decay=0.0)

    def float_weights(self) -> list[torch.Tensor]:
        return []

    @torch.no_grad()
    def step(self, lr: float, clip: float) -> None:
        for p, weight in zip(self.params, self.weights):
            weight.grad = p.grad.to(weight.dtype)
        torch.nn.utils.clip_grad_norm_(self.weights, clip)
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        for p, weight in zip(self.params, self.weights):
            p.copy_(weight)


class Master(Nearest):
    """The usual recipe: AdamW on a float32 copy, rounded to the nearest into the bf16 model at each step."""

    def float_weights(self) -> list[torch.Tensor]:
        return [p.detach().float() for p in self.params]


def plain(model):
    return train.PlainAdamW(model, train.BETAS, 0.0)


def rounding(model):
    return speed.RoundingAdamW(model, train.BETAS, 0.0)


# (name, format of the weights, bytes a parameter for weight, gradient and states, optimiser)
WAYS = [
    ("float32", torch.float32, 16, plain),
    ("speed.py: stochastic rounding", torch.bfloat16, 8, rounding),
    ("bf16 copy of a float32 master", torch.bfloat16, 18, Master),
    ("bf16, rounded to the nearest", torch.bfloat16, 8, Nearest),
]


def rows_in_order(base: str, n: int) -> list[dict]:
    files = [str(ROOT / "data" / "starter" / f"{kind}.jsonl") for kind in KINDS]
    args = train.parse_args(["--base", base, "--n", str(n), "--data", *files])
    tokenizer = models.load_tokenizer(base)
    chat.give_template(tokenizer)
    return mix.build_rows(args, train.find_sources(args), tokenizer)[0]


@torch.no_grad()
def copy_weights(source, target) -> None:
    for p, copy in zip(source.parameters(), target.parameters()):
        copy.copy_(p)


def held_out_loss(base: str, rows: list[dict], dtype, make_optimizer, lr: float, device) -> float:
    """Train on all rows but the last HELD_OUT, and return the mean loss of a token of those."""
    kept = models.load_model(base, torch.bfloat16, device).to(dtype)        # the weights that are trained
    computes = models.load_model(base, torch.float32, device)               # their float32 copy
    computes.set_attn_implementation("docs")
    optimizer = make_optimizer(kept)
    for start in range(0, len(rows) - HELD_OUT, BATCH):
        batch = rows[start:start + BATCH]
        targets = sum(sum(row["mask"][1:]) for row in batch)
        train.sft_loss(speed.packed_logprobs(computes, batch, device), targets).backward()
        for p, copy in zip(kept.parameters(), computes.parameters()):
            p.grad, copy.grad = copy.grad.to(dtype), None
        optimizer.step(lr, 1.0)
        copy_weights(kept, computes)

    with torch.no_grad():
        logprobs = [speed.packed_logprobs(computes, [row], device) for row in rows[-HELD_OUT:]]
    return -torch.cat(logprobs).mean().item()


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("base", nargs="?", default=str(ROOT / "models" / "gemma-3-270m"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 1e-5])
    args = parser.parse_args()
    models.quiet_libraries()
    device = models.pick_device()
    rows = rows_in_order(args.base, BATCH * args.steps + HELD_OUT)

    print(f"\n{Path(args.base).name}, {args.steps} steps of {BATCH} rows; loss of {HELD_OUT} held-out rows; "
          "bytes a parameter: weight, gradient, states")
    print(f"  {'':32}{'bytes':>6}" + "".join(f"{f'lr {lr:g}':>12}" for lr in args.lr))
    for name, dtype, size, make_optimizer in WAYS:
        losses = [held_out_loss(args.base, rows, dtype, make_optimizer, lr, device) for lr in args.lr]
        print(f"  {name:32}{size:6}" + "".join(f"{loss:12.4f}" for loss in losses), flush=True)


if __name__ == "__main__":
    main()
