"""Models into memory: a folder or a hub name, a LoRA adapter around it, and the number format that this machine is fast in.

    from models import load_model, pick_device, pick_dtype
    device = pick_device()
    model = load_model("models/gemma-3-270m", pick_dtype(device), device)

train.py, eval.py and judge.py load their models here. Weights are read from safetensors alone (a pickle can run code), and no code that
comes with a model is ever run. What cannot be loaded raises rows.Stop.
"""
import json
import math
import os
import platform
import resource
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rows import Stop, write_text

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---------------------------------------------------------------- models and tokenizers

def load_tokenizer(name: str):
    """The tokenizer of a model folder or hub name."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise Stop(f"no tokenizer at {name!r} ({first_line(error)}); give a model folder or a hub name; "
                   "`make models` makes models/gemma-3-270m") from None
    if tokenizer.eos_token is None:
        raise Stop(f"the tokenizer of {name!r} has no end-of-text token, so an answer could never end; "
                   "set eos_token in its tokenizer_config.json")
    return tokenizer


def load_model(name: str, dtype: torch.dtype, device: torch.device, attention: str | None = None):
    """The causal language model at `name`, safetensors only (a pickle can run code); attention None is the model's own."""
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        raise Stop(f"{name} is not a model folder (no config.json); `make models` makes models/gemma-3-270m")
    how = {} if attention is None else {"attn_implementation": attention}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **how)
    except (OSError, ValueError) as error:
        raise Stop(f"cannot load {name!r}: {first_line(error)} (safetensors weights are needed; pickles are refused)") from None
    except (RuntimeError, MemoryError, SafetensorError) as error:
        raise Stop(f"cannot load {name!r}: {first_line(error)}") from None
    return model.to(device)


# ---------------------------------------------------------------- LoRA

class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x with W frozen, A [r, in] random, B [out, r] zero (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, **like)
        self.lora_B = nn.Linear(rank, base.out_features, **like)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base(x) + self.scaling * self.lora_B(self.lora_A(x))


def add_lora(model, rank: int, alpha: float) -> None:
    """Freeze the model and put a trainable LoRALinear around every attention and MLP projection."""
    model.requires_grad_(False)
    for module in list(model.get_decoder().modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name in LORA_TARGETS:
                setattr(module, name, LoRALinear(child, rank, alpha))
    if not any(p.requires_grad for p in model.parameters()):
        raise Stop(f"--lora: this architecture has no layer named {', '.join(LORA_TARGETS)}; add its names to LORA_TARGETS")


def save_adapter(model, out: Path, base: str, rank: int, alpha: float) -> None:
    """Write the adapter as a PEFT folder, the form that peft, vLLM and eval.py load."""
    tensors = {f"base_model.model.{name}": p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha,
              "lora_dropout": 0.0, "bias": "none", "target_modules": list(LORA_TARGETS), "inference_mode": True}
    write_text(out / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def load_adapter(folder: Path, model) -> None:
    """Put a PEFT LoRA adapter around its layers. It stays apart: bf16 weights would round most of a small adapter away."""
    config = json.loads((folder / "adapter_config.json").read_text())
    unlike = [name for name in ("use_rslora", "use_dora", "modules_to_save", "alpha_pattern", "rank_pattern", "fan_in_fan_out",
                                "trainable_token_indices", "layer_replication") if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unlike:
        raise Stop(f"{folder}: an adapter with {', '.join(unlike) or config.get('peft_type')} is not the plain LoRA that this reads; "
                   "merge it into its base with peft (merge_and_unload) and give the merged folder")
    tensors = load_file(folder / "adapter_model.safetensors", device=str(model.device))
    pairs = [key for key in tensors if key.endswith("lora_A.weight")]
    if 2 * len(pairs) != len(tensors):
        raise Stop(f"{folder}: the adapter holds tensors that are not LoRA pairs; merge it into its base with peft first")
    for key in pairs:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        layer = LoRALinear(model.get_submodule(name), config["r"], config["lora_alpha"])
        layer.lora_A.weight.data = tensors[key].to(model.dtype)
        layer.lora_B.weight.data = tensors[key.replace("lora_A", "lora_B")].to(model.dtype)
        model.set_submodule(name, layer)


# ---------------------------------------------------------------- the machine

def pick_device() -> torch.device:
    """CUDA where there is one (the rank's own under torchrun), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def measure_gflops(dtype: torch.dtype, device: torch.device) -> float:
    """Best of seven matrix products of a transformer's size, in GFLOP/s."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(7):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        if best > 0.5:  # bf16 without hardware for it: one product says enough
            break
    return 2 * size**3 / best / 1e9


def pick_dtype(device: torch.device, wanted: str = "auto") -> torch.dtype:
    """The number format for "bf16", "fp32" or "auto": bf16 where this machine multiplies it faster than float32.

    A CPU's name is not enough: bf16 is 3-8x faster with AMX and on Zen 5, but 10-80x slower with AVX2 alone (pytorch#146508).
    """
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = measure_gflops(torch.bfloat16, device) > measure_gflops(torch.float32, device)
    return torch.bfloat16 if fast else torch.float32


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def used_gb(device: torch.device) -> float:
    """Most memory this process has held so far: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if Path("/proc/meminfo").exists():
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def quiet_libraries() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
