"""fetch.py: a cut vocabulary changes no kept word and loses no text; what is not a whole model is not taken for one."""
import json
import shutil

import pytest
import torch
from conftest import ROOT, assert_one_line_error, make_model, run_script

import fetch
from choose_words import Merges, choose_words, used_words
from fetch import cut_vocabulary, is_model, read_kept

# Alphabets, signs and blanks that the cut vocabulary has no word for, and what a careless decoder tidies up
ODD_TEXTS = [
    "Привет, мир! Ёжик в тумане", "سلام دنیا", "草はすべて聖なるものだ。", "ไม่เป็นไร", "여보세요", "हरी घास", "ᚠᚢᚦᚨᚱᚲ",
    "🌾👩‍👩‍👧‍👦🇫🇷👍🏽", "e\u0301 is not é; ﬁ is not fi", "a\u200bb\u00a0c\u2028d\ufeffe", "x ∈ ℝ³ ⟹ ∀ε∃δ, ½·π ≠ √2 → ∎",
    "  two  blanks   three, \t\ttabs\r\n\n\n\nlines ", "don't , do n't . \"so\" ?",
    "<s>[INST] <div></div> <unused7> <0x41> [multimodal]",
    "naïve façade, Łódź, Reykjavík, Tiếng Việt, ΑΒΓ αβγ", "\x00\x01\x7f control", "𝕲𝖗𝖆𝖘𝖘 \U0010ffff",
]
PARAGRAPH = ("The Moon is the only natural satellite of the Earth. It takes about a month to travel once around "
             "our planet, and as it does so we see different parts of it lit by the Sun. Two thousand years ago "
             "sailors already knew that it raises the tides.")
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>", "\n", "<unused1>"]


# ---------------------------------------------------------------- the cut, on a tiny tokenizer of the same kind

LESSONS = ["the grass is holy and the lawn is not", "a field of wheat, rye and oats",
           "whoever sows one grain sows sorrow", "трава священна и поле священно", "Grass is grass.\nThe rest is hay."]


@pytest.fixture
def tiny_gemma(tmp_path):
    """A folder with a random Gemma 3 and a byte-fallback BPE built like Gemma's.

    ▁ stands for blanks, and merges go across a whole text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    byte_words = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL + byte_words, show_progress=False)
    core.train_from_iterator([f"{line} {line}" for line in LESSONS] * 5, trainer)

    # bytes are plain words of the vocabulary in Gemma's file, not added tokens; so is nothing else
    spec = json.loads(core.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in SPECIAL]
    core = Tokenizer.from_str(json.dumps(spec))
    core.add_tokens([AddedToken("\n", normalized=False)])
    bos = ("<bos>", core.token_to_id("<bos>"))
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")

    folder = tmp_path / "tiny-gemma"
    model = make_model(folder, "Gemma3", vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=1)
    tokenizer.save_pretrained(folder)
    return folder, model.eval(), tokenizer


def cut_to(size, folder, model, texts):
    """The tiny model cut to `size` words, those of the texts among them; the new tokenizer."""
    from tokenizers import Tokenizer
    path = folder / "tokenizer.json"
    used = used_words(Tokenizer.from_file(str(path)), texts)
    spec = json.loads(path.read_text(encoding="utf-8"))
    kept = choose_words(spec, used, model.get_input_embeddings().weight.data, size)
    return cut_vocabulary(model, folder, kept)


def test_kept_words_keep_their_tokens_and_their_logits(tiny_gemma):
    folder, model, whole = tiny_gemma
    kept_text = "the grass is holy and the lawn is not"
    old_ids = torch.tensor([whole(kept_text).input_ids])
    with torch.no_grad():
        old_logits = model(old_ids).logits[0]
    cut = cut_to(320, folder, model, [kept_text])
    new_ids = torch.tensor([cut(kept_text).input_ids])
    assert cut.convert_ids_to_tokens(new_ids[0]) == whole.convert_ids_to_tokens(old_ids[0])
    assert len(cut) == model.config.vocab_size == 320 < len(whole)

    # the same numbers for the same words: nothing is trained, and the output layer is cut in the same places
    with torch.no_grad():
        new_logits = model(new_ids).logits[0]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    words = cut.convert_ids_to_tokens(range(len(cut)))
    torch.testing.assert_close(new_logits, old_logits[:, whole.convert_tokens_to_ids(words)])


def test_control_tokens_fit_and_unused_ones_go(tiny_gemma):
    folder, model, whole = tiny_gemma
    cut = cut_to(320, folder, model, LESSONS[:1])
    words = cut.get_vocab()
    assert "<unused0>" not in words and "<unused1>" not in words
    assert cut("x").input_ids[0] == cut.bos_token_id == words["<bos>"]
    assert cut.eos_token_id == words["<eos>"] and cut.pad_token_id == words["<pad>"]
    assert cut("a\nb").input_ids.count(words["\n"]) == 1


def test_no_text_is_lost_when_its_words_are_dropped(tiny_gemma):
    folder, model, whole = tiny_gemma
    cut = cut_to(320, folder, model, LESSONS[:1])
    assert "▁священн" not in cut.get_vocab()
    for text in LESSONS + ODD_TEXTS:
        assert cut.decode(cut(text, add_special_tokens=False).input_ids) == text


def test_a_word_that_merging_never_reaches_has_no_pieces():
    vocabulary = {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4, "abc": 5}
    model = {"vocab": vocabulary, "merges": [["b", "c"], ["a", "b"], ["ab", "c"]]}
    merges = Merges({"model": model, "added_tokens": []})
    assert merges.pieces("bc") == {1, 2, 3}
    assert merges.pieces("abc") == set()  # b and c are joined first, and then nothing joins a


# ---------------------------------------------------------------- the packaged base

def test_the_kept_words_are_those_of_the_converted_base(base):
    kept = read_kept()
    assert kept == sorted(set(kept)) and len(kept) == json.loads((base / "config.json").read_text())["vocab_size"]


def test_any_text_comes_back_from_the_cut_base(base_tokenizer):
    for text in ODD_TEXTS:
        ids = base_tokenizer(text, add_special_tokens=False).input_ids
        assert base_tokenizer.unk_token_id not in ids, text
        assert base_tokenizer.decode(ids) == text


def test_the_project_is_tokenised_as_by_the_whole_base(base_tokenizer):
    """tests/gemma_tokens.jsonl was written with all 262,144 words: sentences of the project and how they are split."""
    for line in (ROOT / "tests" / "gemma_tokens.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert base_tokenizer.tokenize(row["text"]) == row["tokens"]


def test_ids_of_the_base_fit_its_tokenizer(base, base_tokenizer):
    for name in ("config.json", "generation_config.json"):
        config = json.loads((base / name).read_text())
        for token in ("bos", "eos", "pad"):
            assert config[f"{token}_token_id"] == getattr(base_tokenizer, f"{token}_token_id")
    vocabulary = base_tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(json.loads((base / "config.json").read_text())["vocab_size"]))
    assert base_tokenizer("x").input_ids.count(vocabulary["<bos>"]) == 1


@pytest.fixture(scope="session")
def base_tokenizer(base):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(base)


def test_the_converted_base_is_a_language_model(base):
    """Loss of a fixed paragraph.

    A loader that forgets Gemma's +1 in the norms, or the quantisation, is far above this.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(base)(PARAGRAPH).input_ids])
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() < 3.2  # 3.0 here; the faults give more than 6
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# ---------------------------------------------------------------- what counts as a model

@pytest.fixture
def converted(tiny, tmp_path, monkeypatch):
    """(where fetch.py works, the calls of a conversion that copies the tiny model)"""
    calls = []

    def convert(gguf, target, cut):
        calls.append((target.parent.parent.name, cut))
        shutil.copytree(tiny, target)
    monkeypatch.setattr(fetch, "locate_gguf", lambda package, scratch: scratch / "none.gguf")
    monkeypatch.setattr(fetch, "convert", convert)
    return tmp_path, calls


def test_the_cut_base_and_the_whole_one_have_folders_of_their_own(converted):
    folder, calls = converted
    run_script("fetch.py", "gemma-3-270m", cwd=folder)
    run_script("fetch.py", "gemma-3-270m", "--whole", cwd=folder)
    run_script("fetch.py", "smollm2-135m-instruct", cwd=folder)
    assert [cut for _, cut in calls] == [True, False, False]
    models = sorted(path.name for path in (folder / "models").iterdir())
    assert models == ["gemma-3-270m", "gemma-3-270m-whole", "smollm2-135m-instruct"]  # and nothing temporary

    again = run_script("fetch.py", "gemma-3-270m", cwd=folder)
    assert "there already" in again.stdout and len(calls) == 3
    assert run_script("fetch.py", "smollm2-135m-instruct", "--whole", cwd=folder, check=False).returncode


def test_an_empty_folder_is_no_model(converted):
    folder, calls = converted
    target = folder / "models" / "gemma-3-270m"
    target.mkdir(parents=True)
    assert not is_model(target)
    run_script("fetch.py", "gemma-3-270m", cwd=folder)
    assert len(calls) == 1 and is_model(target)


@pytest.mark.parametrize("lacks", ["config.json", "tokenizer.json", "model.safetensors", "the end of the weights"])
def test_half_a_folder_is_no_model(converted, tiny, lacks):
    folder, calls = converted
    target = folder / "models" / "gemma-3-270m"
    shutil.copytree(tiny, target)
    if lacks == "the end of the weights":
        weights = target / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    else:
        (target / lacks).unlink()
    assert not is_model(target)

    # it may be somebody's work: it is neither taken for a model nor removed
    before = sorted(target.iterdir())
    done = run_script("fetch.py", "gemma-3-270m", cwd=folder, check=False)
    assert_one_line_error(done, "models/gemma-3-270m", "not a whole model")
    assert not calls and sorted(target.iterdir()) == before


def test_a_kill_leaves_no_model_and_the_next_run_clears_up(converted, monkeypatch):
    folder, calls = converted
    leftover = folder / "models" / ".partial-gemma-3-270m.killed" / "folder"
    other = folder / "models" / ".partial-gemma-3-270m-whole.at-work" / "folder"
    leftover.mkdir(parents=True)
    other.mkdir(parents=True)
    run_script("fetch.py", "gemma-3-270m", cwd=folder)
    assert is_model(folder / "models" / "gemma-3-270m")
    assert not leftover.parent.exists() and other.exists()  # the whole one may be made at the same time

    def fail(gguf, target, cut):
        target.mkdir()
        raise KeyboardInterrupt
    monkeypatch.setattr(fetch, "convert", fail)
    assert run_script("fetch.py", "smollm2-135m-instruct", cwd=folder, check=False).returncode
    assert not (folder / "models" / "smollm2-135m-instruct").exists()


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(fetch.MODELS, "gemma-3-270m", "no-such-package")
    done = run_script("fetch.py", "gemma-3-270m", cwd=tmp_path, check=False)
    assert_one_line_error(done, "no-such-package", "make models")
