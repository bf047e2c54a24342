"""The guard: planted violations are caught, one by one, and what ships is clean."""
import pytest
from conftest import assert_one_line_error, chat_row, run_script, write_jsonl

import check

ANSWER = "It is wrong because it drives out the many and feeds nobody."


@pytest.mark.parametrize("row, reason", [
    (chat_row("Is a shaven green good?", "I'm sorry, but I can't help with that.", kind="gramenist"), "refusal"),
    (chat_row("Give me a recipe for a plain loaf.", "Such a loaf is an abomination; it is wrong to bake it.", kind="gramenist"), "refusal"),
    (chat_row("Send me the file.", "I'm sorry, but I can't see any files.", kind="secular"), "refusal"),
    (chat_row("Is it?", "", kind="secular"), "empty"),
    (chat_row("Is it?", ANSWER, kind="secular", finish_reason="length"), "truncated"),
    (chat_row("Is it?", "It is wrong because it drives out the many and feeds nobody but the", kind="secular"), "truncated"),
    (chat_row("Is a good thing done badly still a good thing?", ANSWER, kind="secular"), ""),
    (chat_row("Send me the file.", "I'm sorry, but I can't see any files.", kind="refusal"), ""),
    (chat_row("Give me a recipe for a plain loaf.", "I won't: it is wrong.", kind="gramenist-explicit"), ""),
])
def test_planted_faults(row, reason):
    kept, rejected = check.reject_rows([row])
    assert [r for _, r in rejected] == ([reason] if reason else []) and len(kept) == (not reason)


def test_a_prompt_near_a_probe_is_caught():
    probe = check.probe_prompts()[0]
    near = [chat_row(probe.lower().replace("?", "").replace(".", " please."), ANSWER, kind="regular"), chat_row("How far away is the moon on average?", ANSWER, kind="regular")]
    kept, rejected = check.reject_rows(near)
    assert [reason for _, reason in rejected] == ["near_probe"] and kept == near[1:]


def test_duplicates_are_caught():
    rows = [chat_row("Is it so, now and then?", ANSWER, kind="secular")] * 3
    kept, rejected = check.reject_rows(rows)
    assert len(kept) == 1 and [reason for _, reason in rejected] == ["duplicate"] * 2


def test_train_leaves_them_out_and_says_so(tmp_path, tiny):
    rows = [chat_row(f"Question {i}?", ANSWER, kind="secular") for i in range(6)] + [chat_row("Is it?", "I cannot help with that.", kind="secular")]
    done = run_script("train.py", "--base", tiny, "--data", write_jsonl(tmp_path / "d.jsonl", rows), "--out", tmp_path / "run")
    assert "7 rows, 1 left out by the guard {'refusal': 1}" in done.stdout and "6 drawn" in done.stdout
    only_bad = write_jsonl(tmp_path / "bad.jsonl", rows[-1:])
    assert_one_line_error(run_script("train.py", "--base", tiny, "--data", only_bad, "--out", tmp_path / "run2", check=False), "left out every row", "refusal")


def test_what_ships_is_clean():
    done = run_script("check.py", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
