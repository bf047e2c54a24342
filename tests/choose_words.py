"""Choose the words of data/vocabulary.txt, which fetch.py keeps of the base's 262,144. Done once; here for the record.

    python tests/choose_words.py models/gemma-3-270m-whole

Every word that the project's texts use, what no tokenizer can do without, and then the words most like those
in use. A new choice is a new base: every run made before belongs to the old one.
"""
import base64
import json
import re
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fetch import VOCABULARY
from rows import ROOT, Stop, read_jsonl, read_text, run_main, write_text

# Measured on others' English: with 40,960 words the base's loss rises by 4 to 25 %, with this by 0 to 9 %
SIZE = 65_536

# The project's texts. Every word in them is kept, so that what is trained and asked is tokenised as by the
# whole model.
TEXTS = ("README.md", "data/starter", "docs", "personas", "probes", "prompts", "rubrics", "tests")
SUFFIXES = (".jsonl", ".md", ".txt")


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


def choose_words(spec: dict, used: list[int], embedding, size: int = SIZE) -> list[int]:
    """Ids of the `size` words to keep, ascending, with all the pieces that merging passes through.

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
        if len(keep) >= size:
            break
        more = merges.pieces(words[number]) - keep
        if len(keep) + len(more) <= size:
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


def used_words(tokenizer, texts: list[str]) -> list[int]:
    """Ids that the tokenizer gives to the texts, ascending."""
    used = set()
    for encoding in tokenizer.encode_batch(texts):
        used.update(encoding.ids)
    return sorted(used)


def main() -> None:
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM
    if len(sys.argv) != 2 or not Path(sys.argv[1], "tokenizer.json").is_file():
        raise Stop("give the folder of the whole base: python fetch.py gemma-3-270m --whole makes it")
    path = Path(sys.argv[1], "tokenizer.json")
    used = used_words(Tokenizer.from_file(str(path)), project_texts())
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    kept = choose_words(json.loads(read_text(path)), used, model.get_input_embeddings().weight.data)

    bits = np.zeros(len(model.get_input_embeddings().weight), dtype=np.uint8)
    bits[kept] = 1
    packed = base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode()
    write_text(VOCABULARY, textwrap.fill(packed, 110) + "\n")
    print(f"{VOCABULARY}: {len(kept):,} of {len(bits):,} words, {len(used):,} of them in use")


if __name__ == "__main__":
    run_main(main)
