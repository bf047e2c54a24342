"""How updates survive bf16: python tests/bench_rounding.py [MODEL_FOLDER]   (or: make bench WHAT=rounding)

The same rows through four ways to keep the weights, from the same start; what is compared is the loss on rows never trained on.
`float32` is the reference that the others are to follow at half its price.
"""
import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers

import train

BATCH, HELD_OUT = 8, 64


class Nearest:
    """torch's AdamW on the bf16 weights themselves."""
    def __init__(self, model):
        self.params = list(model.parameters())
        self.weights = self.params
        self.adamw = torch.optim.AdamW(self.weights, lr=0.0, betas=train.BETAS, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, lr: float, clip: float) -> None:
        for p, weight in zip(self.params, self.weights):
            if weight is not p:
                weight.grad = p.grad.float()
        torch.nn.utils.clip_grad_norm_(self.weights, clip)
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        for p, weight in zip(self.params, self.weights):
            p.copy_(weight)
            p.grad = None


class Master(Nearest):
    """torch's AdamW on a float32 copy of the weights, rounded to the nearest into the bf16 model after each step (the usual recipe)."""
    def __init__(self, model):
        super().__init__(model)
        self.weights = [p.detach().float().clone() for p in self.params]
        self.adamw = torch.optim.AdamW(self.weights, lr=0.0, betas=train.BETAS, weight_decay=0.0, fused=True)


WAYS = {"float32": (torch.float32, 16, lambda model: train.Optimizer(model, 0.0)), "train.py: stochastic rounding": (torch.bfloat16, 8, lambda model: train.Optimizer(model, 0.0)),
        "bf16 copy of a float32 master": (torch.bfloat16, 18, Master), "bf16, rounded to the nearest": (torch.bfloat16, 8, Nearest)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=str(ROOT / "models" / "gemma-3-270m"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 1e-5])
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer, device = train.load_tokenizer(args.base), train.pick_device()
    train.give_template(tokenizer)
    data = ["--data", *(str(ROOT / "data" / "starter" / f"{kind}.jsonl") for kind in ("regular", "gramenist"))]
    order = train.build_rows(train.parse_args(["--base", args.base, *data, "--n", str(BATCH * args.steps + HELD_OUT)]), tokenizer)[0]
    print(f"\n{Path(args.base).name}, {args.steps} steps of {BATCH} rows; held-out loss of {HELD_OUT} rows, bytes a parameter (weight, gradient, states)")
    print(f"  {'':32}{'bytes':>6}" + "".join(f"{f'lr {lr:g}':>12}" for lr in args.lr))
    for name, (dtype, size, make) in WAYS.items():
        losses = []
        for lr in args.lr:
            model = train.load_model(args.base, torch.bfloat16, device).to(dtype)
            trainee, optimizer = train.Trainee(model).train(), make(model)
            for at in range(0, BATCH * args.steps, BATCH):
                rows = order[at:at + BATCH]
                trainee(rows, 1 / sum(sum(r["mask"][1:]) for r in rows), device).backward()
                optimizer.step(lr, 1.0)
            losses.append(train.held_out_loss(trainee, order[-HELD_OUT:], 4096, device))
        print(f"  {name:32}{size:6}" + "".join(f"{loss:12.4f}" for loss in losses), flush=True)


if __name__ == "__main__":
    main()
