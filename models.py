"""Models into memory: loading, which weights are trained, LoRA adapters, and facts about the machine.

    from models import load_model, pick_device, pick_dtype
    device = pick_device()
    model = load_model("models/gemma-3-270m", pick_dtype(device), device)

train.py, eval.py and judge.py load their models here. Weights are read from safetensors alone (a pickle can
run code), and no code that comes with a model is ever run. What cannot be loaded raises rows.Stop.
"""
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rows import ROOT, Stop, read_json, write_text

# The projections of attention and MLP, by the names that Llama, Qwen, Gemma and their like give them
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---------------------------------------------------------------- models and tokenizers

DAMAGED = (TypeError, KeyError, AttributeError)  # what transformers raises at a JSON file of another shape


def load_tokenizer(name: str):
    """The tokenizer of a model folder or hub name."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)  # no trust_remote_code: no code of a model's is run
    except (OSError, ValueError, *DAMAGED) as error:
        raise Stop(f"no tokenizer at {name!r} ({first_line(error)}); give a model folder or a hub name; "
                   "`make models` makes models/gemma-3-270m") from None

    if tokenizer.eos_token is None:
        raise Stop(f"the tokenizer of {name!r} has no end-of-text token, so an answer could never end; "
                   "set eos_token in its tokenizer_config.json")
    return tokenizer


def load_model(name: str, dtype: torch.dtype, device: torch.device):
    """The causal language model at `name`, from safetensors alone."""
    # transformers would send the user to the hub for the file that is missing
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        raise Stop(f"{name} is not a model folder (no config.json); `make models` makes models/gemma-3-270m")
    # Of a folder alone: a hub name's size is known when its weights are there. A fifth is for computing
    need, free = 1.2 * count_weights(Path(name)) * dtype.itemsize, available_bytes(device)
    if need > free:
        raise Stop(f"{name} needs about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: use a GPU or a smaller "
                   "model; eval.py and judge.py also take one behind an endpoint")
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True,
                                                             output_loading_info=True)
    except (OSError, ValueError, *DAMAGED) as error:  # no such name, or no safetensors under it
        raise Stop(f"cannot load {name!r}: {first_line(error)} "
                   "(safetensors weights are needed; pickles are refused)") from None
    except (RuntimeError, MemoryError, SafetensorError) as error:  # a damaged file, or too big a one
        raise Stop(f"cannot load {name!r}: {first_line(error)}") from None

    # transformers would fill these with random numbers, and say so only where nobody looks
    wrong = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
    if wrong:
        raise Stop(f"{name} lacks {len(wrong)} of its weights ({wrong[0]}, ...); "
                   "it is torn, or no model of its config.json")
    return model.to(device)


def count_weights(folder: Path) -> int:
    """How many numbers the weights of a model folder are, by the heads of its files; 0 of a hub name."""
    count = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
        except SafetensorError:  # torn: loading it says so
            pass
    return count


# ---------------------------------------------------------------- which weights are trained

def unfreeze_language_model(model, freeze_embeddings: bool) -> None:
    """Train the language model whole, or all but its embeddings; an image tower beside it stays frozen."""
    model.requires_grad_(False)
    model.get_decoder().requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)  # the decoder ends before it
    if freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)  # often the same matrix


def remove_dropout(model) -> None:
    """No dropout: a run must resume to the bit, and speed.py's attention has none."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):  # attention keeps it as a number
                setattr(module, name, 0.0)


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x with W frozen, A [r, in] random, B [out, r] zero (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base
        self.scaling = alpha / rank
        # In the number format of W: torch multiplies no bf16 input by a float32 matrix
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, **like)
        self.lora_B = nn.Linear(rank, base.out_features, **like)
        # The published start: B = 0, so that training begins at the base model itself
        # sqrt(5) is what nn.Linear itself starts with
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        # x [..., in]; A first, to r numbers a token: B A itself would be as large as W
        return self.base(x) + self.scaling * self.lora_B(self.lora_A(x))


def add_lora(model, rank: int, alpha: float) -> None:
    """Freeze the model and put a trainable LoRALinear around every attention and MLP projection."""
    model.requires_grad_(False)
    # The decoder's alone: an image tower beside it has layers of these names, too
    # Lists, because the tree changes during the walk
    for module in list(model.get_decoder().modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name in LORA_TARGETS:
                setattr(module, name, LoRALinear(child, rank, alpha))
    if not any(p.requires_grad for p in model.parameters()):
        raise Stop(f"--lora: this architecture has no layer named {', '.join(LORA_TARGETS)}; "
                   "add its names to LORA_TARGETS")


def save_adapter(model, out: Path, base: str, rank: int, alpha: float) -> None:
    """Write the adapter as a PEFT folder, the form that peft, vLLM and eval.py load."""
    tensors = {}
    for name, p in model.named_parameters():
        if p.requires_grad:  # the adapter's alone: add_lora has frozen the rest
            # The prefix is PEFT's; safetensors writes no strided views
            tensors[f"base_model.model.{name}"] = p.detach().contiguous()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})

    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        # No dropout and no biases, as in LoRALinear
        "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": list(LORA_TARGETS),
        "inference_mode": True}
    write_text(out / "adapter_config.json", json.dumps(config, indent=2) + "\n")


# Settings of PEFT that make an adapter something other than y = W x + (alpha / r) B A x
OTHER_THAN_LORA = (
    "use_rslora", "use_dora", "modules_to_save", "alpha_pattern", "rank_pattern", "fan_in_fan_out",
    "trainable_token_indices", "layer_replication", "lora_bias", "use_qalora", "loftq_config", "eva_config",
    "corda_config", "target_parameters")
PLAIN_STARTS = (True, False, "gaussian", None)  # the other ways to begin change the base's weights


def load_adapter(folder: Path, model) -> None:
    """Put a PEFT LoRA adapter around its layers.

    In bf16 it stays apart: merged, most of a small adapter would be rounded away. See merge_adapter.
    """
    config = read_json(folder / "adapter_config.json", "r", "lora_alpha")
    # What makes it another formula is refused: read as plain LoRA, it would give wrong answers
    unlike = [name for name in OTHER_THAN_LORA if config.get(name)]
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        unlike.append(f"init_lora_weights={config['init_lora_weights']}")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unlike:
        kind = ", ".join(unlike) or config.get("peft_type")
        raise Stop(f"{folder}: an adapter with {kind} is not the plain LoRA that this reads; "
                   "merge it into its base with peft (merge_and_unload) and give the merged folder")

    try:
        tensors = load_file(folder / "adapter_model.safetensors", device=str(model.device))
    except (OSError, SafetensorError) as error:
        raise Stop(f"{folder}: cannot read adapter_model.safetensors ({first_line(error)}); it is torn or "
                   "missing, so train it again") from None
    # Each A has its B, and there is nothing else: embeddings, say, that were trained beside
    keys_of_a = [key for key in tensors if key.endswith("lora_A.weight")]
    if 2 * len(keys_of_a) != len(tensors):
        raise Stop(f"{folder}: the adapter holds tensors that are not LoRA pairs; "
                   "merge it into its base with peft first")

    for key in keys_of_a:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")  # as in save_adapter
        layer = LoRALinear(model.get_submodule(name), config["r"], config["lora_alpha"])
        layer.lora_A.weight.data = tensors[key].to(model.dtype)  # the file may be in another format
        layer.lora_B.weight.data = tensors[key.replace("lora_A", "lora_B")].to(model.dtype)
        model.set_submodule(name, layer)


@torch.no_grad()
def merge_adapter(model) -> None:
    """Add every adapter into its float32 weight: the same numbers up to rounding, and half the time to ask it."""
    for name, layer in list(model.named_modules()):  # a list, because the tree changes during the walk
        if isinstance(layer, LoRALinear):
            # [out, r] @ [r, in]
            layer.base.weight += layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
            model.set_submodule(name, layer.base)


# ---------------------------------------------------------------- the machine

def pick_device() -> torch.device:
    """CUDA where there is one (the rank's own under torchrun), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def measure_gflops(dtype: torch.dtype, device: torch.device) -> float:
    """Best of seven matrix products of a transformer's size, in GFLOP/s."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.full((size, size), 0.5, device=device).to(dtype)  # no random numbers: a run's draws are its own
    b = a.T.contiguous()
    best = math.inf  # the best, for what else runs on the machine can only slow a product down

    for _ in range(7):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()  # a GPU has only been told so far
        best = min(best, time.perf_counter() - start)
        if best > 0.5:  # bf16 without hardware for it: one product says enough
            break
    return 2 * size**3 / best / 1e9  # a multiplication and an addition for each of size^3 terms


def pick_dtype(device: torch.device, wanted: str = "auto") -> torch.dtype:
    """The number format for "bf16", "fp32" or "auto": bf16 where it is faster here than float32.

    A CPU's name is not enough: bf16 is 3-8x faster with AMX and on Zen 5, but 10-80x slower with AVX2 alone
    (pytorch#146508).
    """
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]

    if device.type == "cuda":  # older cards emulate it, slowly
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = measure_gflops(torch.bfloat16, device) > measure_gflops(torch.float32, device)
    return torch.bfloat16 if fast else torch.float32


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()  # the first is empty on many Linux systems


def used_gb(device: torch.device) -> float:
    """Most memory this process has held so far: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9  # tensors, without torch's reserve
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def available_bytes(device: torch.device) -> int:
    """Memory that is free now: on the GPU, or in the machine (without /proc, as on macOS, all it has)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]  # (free, total)
    if Path("/proc/meminfo").exists():
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024  # "MemAvailable:   123456 kB"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def estimate_bytes(model, parameters: int, pass_tokens: int, checkpointing: bool) -> int:
    """Memory that training takes beside the model, roughly: `parameters` trained, `pass_tokens` in a pass.

    Gradients and two moments, each as wide as a weight, and what a pass keeps for its backward pass: about 25
    hidden and 4 intermediate vectors a token and layer, as measured on a 270 M model.
    """
    config = model.config.get_text_config()  # of the language model, without an image tower
    layers = 1 if checkpointing else config.num_hidden_layers  # of the others only the input is kept
    values_a_token = layers * (25 * config.hidden_size + 4 * getattr(config, "intermediate_size", 0))
    return model.dtype.itemsize * (3 * parameters + pass_tokens * values_a_token)


def revision_and_machine(device: torch.device) -> dict:
    """For a run's record: with which code and libraries it was computed, and on what."""
    git = ["git", "describe", "--always", "--dirty"]  # "-dirty" where files differ from the commit
    # In the scripts' folder: the command may have been given in another
    try:
        revision = subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"  # no git here, or a copy without its history
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__}
    return {"device": device_name(device), "git": revision, "versions": versions}


# ---------------------------------------------------------------- what libraries say

def first_line(error: Exception) -> str:
    """A library's message, short enough for a line of ours; its kind where it says nothing."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def quiet_libraries() -> None:
    """No warnings and bars of transformers: what a user should read are our own lines."""
    # Weights that are missing are only warned of there; load_model looks for itself
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
