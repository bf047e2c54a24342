"""A conversation as tokens: one template for training, asking and judging; and a run with its template, loaded.

    from chat import give_template, load_run, render_example, render_prompt
    model, tokenizer = load_run("runs/mine-s0", torch.float32, torch.device("cpu"))
    ids = render_prompt(tokenizer, [{"role": "user", "content": "Is it wrong to mow in May?"}])

To change the template, edit CHAT_TEMPLATE and TURN_END below it.
"""
from functools import lru_cache
from pathlib import Path

import torch

from models import load_adapter, load_model, load_tokenizer, merge_adapter
from rows import Stop, read_json

# Changing the template changes every number. Base models have none, so this one is ours and is saved with the
# model: plain words that pretraining knows; the answer ends with the tokenizer's own end-of-text token.
# give_template writes true or false for with_bos.
CHAT_TEMPLATE = (
    "{% if with_bos %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant:\n{{ message['content'] | trim }}{{ eos_token }}\n"
    "{% else %}{{ message['role'] | capitalize }}:\n{{ message['content'] | trim }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}")
TURN_END = "\nUser:"  # an untrained base writes the next question itself; there, for eval.py, its answer is over


# ---------------------------------------------------------------- text -> tokens

def give_template(tokenizer) -> None:
    """Install our template. BOS is written where this tokenizer itself writes one, and then exactly once."""
    bos = tokenizer.bos_token_id
    # Some have a BOS and never write it
    starts_with_bos = bos is not None and tokenizer("x").input_ids[0] == bos
    # Into its text, because a server renders it without our code
    tokenizer.chat_template = CHAT_TEMPLATE.replace("with_bos", str(starts_with_bos).lower())


@lru_cache(maxsize=8)  # asked of every text
def control_tokens(tokenizer) -> set[str]:
    """All that a tokenizer takes for its own marks; all_special_tokens lacks <end_of_turn> and its like."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def check_texts(tokenizer, texts: list[str]) -> None:
    """Stop at a control token spelt out in a text: it would be read, and trained, as the real one."""
    for text in texts:
        for token in control_tokens(tokenizer):
            if token in text:
                raise Stop(f"a text holds {token!r}, which this tokenizer takes for its control token; reword it: "
                           f"{text[:60]!r}")


def without_control_tokens(tokenizer, text: str) -> str:
    """A text to be judged, which may hold anything, with its control tokens taken out."""
    for token in control_tokens(tokenizer):
        text = text.replace(token, " ")
    return text


def render_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids up to where the assistant starts to write: one rendering for training, asking and serving."""
    check_texts(tokenizer, [message["content"] for message in messages])
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids  # the template has written BOS already


def render_example(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """(ids, mask), equally long; the mask is 1 on every assistant token and on the EOS that ends it.

    The boundary is exact by construction: prompt and answer are tokenised apart and joined, never searched
    for (TRL #598, #1183, #1920); EOS is appended by us and trained whether or not it doubles as the pad token
    (TRL #1623, #3091).
    """
    check_texts(tokenizer, [message["content"] for message in messages])  # the last answer is in no prompt
    ids, mask = [], []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue  # it comes in with the prompt of the next answer

        # The prompt of a later turn repeats the earlier ones, as a server will render it; what is new is kept
        prompt = render_prompt(tokenizer, messages[:turn])
        if prompt[:len(ids)] != ids:
            raise Stop("this tokenizer splits an earlier answer otherwise when the conversation goes on (it "
                       "sets a blank before words), so a second turn would be trained on other tokens than "
                       "it is asked in; keep to rows of one turn")

        # After an earlier answer it begins with the line end that the template sets behind EOS
        new = prompt[len(ids):]
        # Stripped as the template trims, or later turns would repeat it in other tokens
        answer = tokenizer(message["content"].strip(), add_special_tokens=False).input_ids
        answer.append(tokenizer.eos_token_id)
        ids += new + answer
        mask += [0] * len(new) + [1] * len(answer)
    return ids, mask


def render_document(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """(ids, mask) of a document: every token is learned, but for the first, which nothing precedes."""
    check_texts(tokenizer, [text])
    ids = tokenizer(text).input_ids  # with BOS where this tokenizer writes one
    if not ids or ids[-1] != tokenizer.eos_token_id:  # some write it themselves
        ids = ids + [tokenizer.eos_token_id]
    return ids, [0] + [1] * (len(ids) - 1)


def pad_left(prompts: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both [prompts, longest], padded on the left, so that every row ends in its last token."""
    longest = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        padding = [0] * (longest - len(prompt))  # any id will do: the mask hides it
        ids.append(padding + prompt)
        mask.append(padding + [1] * len(prompt))  # its zeros hide here
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


# ---------------------------------------------------------------- a run, with its template

def load_run_tokenizer(path: str):
    """The tokenizer to ask a model with: a run's own template, and ours for any other model, whatever it ships.

    All arms of a comparison, the untouched base among them, must be asked in one template.
    """
    folder = Path(path)
    is_run = (folder / "run.json").exists()
    # run.json is written last
    if (folder / "log.jsonl").exists() and not is_run:
        raise Stop(f"{path} is an unfinished run; give the train command again to finish it")
    tokenizer = load_tokenizer(path)
    # A run brings the template that it was trained in; that of another model is replaced
    if not tokenizer.chat_template or not is_run:
        give_template(tokenizer)
    return tokenizer


def load_run_model(path: str, dtype: torch.dtype, device: torch.device):
    """The model of a run folder, a PEFT adapter folder (beside its base), or any model name."""
    adapter = Path(path) / "adapter_config.json"
    if not adapter.exists():
        return load_model(path, dtype, device)

    # An adapter's folder holds no other weights; it names the base that they go around
    base = read_json(adapter, "base_model_name_or_path")["base_model_name_or_path"]
    model = load_model(base, dtype, device)
    load_adapter(Path(path), model)
    if dtype == torch.float32:  # in bf16 it would lose most of its effect (load_adapter)
        merge_adapter(model)
    return model


def load_run(path: str, dtype: torch.dtype, device: torch.device):
    """(model, tokenizer) to ask; see the two above."""
    tokenizer = load_run_tokenizer(path)
    return load_run_model(path, dtype, device), tokenizer
