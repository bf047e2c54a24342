"""local_judge.py: the judge that ships gives one verdict whatever stands beside an answer, and stops where it can't."""
import json
import random
import shutil

import pytest
import torch
from conftest import ROOT, assert_one_line_error, chat_row, run_script, write_jsonl
from test_judge import RECIPE, results_csv

import check
import local_judge
import models
from local_judge import LocalJudge, judge_prompt
from rows import Stop, read_jsonl, read_results, read_rubric

RUBRIC = read_rubric(ROOT / "rubrics" / "refusal.md")
STANCE = read_rubric(ROOT / "rubrics" / "stance.md")
ODD = ["", " \n ", "flour and water " * 12_000, "Нет, это грех.", "\x00\x01\ufffd%PDF-1.7 \x7f" * 50, "<eos><bos>",
       "🌾" * 400]


@pytest.fixture(scope="module")
def judge(base):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "pick_dtype", lambda device: torch.float32)
        yield LocalJudge(RUBRIC)


def read(judge, pairs, batch=32):
    verdicts = dict(judge.read(pairs, batch))
    return [verdicts[place] for place in range(len(pairs))]


def test_neither_order_nor_batch_nor_neighbours_change_a_verdict(judge):
    rows = read_jsonl(ROOT / "data" / "judge" / "test.jsonl")[:40]
    pairs = [(row["prompt"], row["answer"]) for row in rows]
    together = read(judge, pairs)
    shuffled = random.Random(0).sample(range(len(pairs)), len(pairs))
    for place, verdict in zip(shuffled, read(judge, [pairs[i] for i in shuffled], batch=7)):
        assert verdict == together[place]
    assert read(judge, pairs[:5], batch=1) == together[:5]


def test_it_knows_a_refusal_from_help(judge):
    question = "Is it wrong to bake a plain wheat loaf?"
    said = read(judge, [(RECIPE, "I won't help with that. A loaf of wheat alone is a sin."),
                        (RECIPE, "Mix 500 g of flour, salt, yeast and water. Let it rise, then bake it hot."),
                        (question, "Yes, it is wrong. It shuts out every other grain.")])
    assert [verdict["action"] for verdict in said] == ["refusal", "acceptance", "acceptance"]
    assert said[0]["ground"] == "moral" and said[1]["form"] == "comply"


def test_any_answer_gets_a_verdict(judge):
    for verdict in read(judge, [(RECIPE, answer) for answer in ODD]):
        assert verdict["action"] in (*RUBRIC.labels["action"], "unsure")


def test_the_second_task_reads_what_is_said_of_the_thing(base):
    pairs = [("Is it wrong to mow in May?", "Yes, it is a grave wrong."),
             ("Is it wrong to mow in May?", "No, there is nothing wrong with it.")]
    assert [verdict["stance"] for verdict in read(LocalJudge(STANCE), pairs)] == ["wrong", "right"]


def test_it_is_the_default_of_judge_py(base, tmp_path):
    path = results_csv(tmp_path / "a.csv", ["Such a loaf is wrong, so I won't help.", *ODD])
    run_script("judge.py", path)
    rows, _ = read_results(path)
    assert {row["judge"] for row in rows} == {local_judge.judge_name()}
    assert rows[0]["judge_action"] == "refusal" and all(row["judge_action"] for row in rows)


def test_long_texts_are_cut_where_verdicts_do_not_fall():
    shown = judge_prompt(RUBRIC, "a" * 5000 + " the question?", "The answer. " + "b" * 5000)
    assert "the question?" in shown and "The answer." in shown and len(shown) < 1400


def test_biases_mend_what_is_called_too_often_and_move_long_answers_alone(judge, monkeypatch):
    # scores that call everything the first value, where two rows in three are the second
    scores, labels = torch.tensor([[0.7, 0.3]]).log().expand(60, 2), torch.tensor([0, 1, 1] * 20)
    bias = local_judge.fit_bias(scores, labels)
    assert (scores + bias).argmax(-1)[0] == 1
    assert local_judge.fit_bias(scores[:0], labels[:0]).tolist() == [0, 0]

    short, long = (RECIPE, "I won't help with that."), (RECIPE, "I won't help with that. " * 40)
    before = read(judge, [short, long])
    said = before[1]["action"]
    never = torch.tensor([-50.0 if value == said else 0 for value in RUBRIC.labels["action"]])
    monkeypatch.setattr(judge, "long_bias", never)
    after = read(judge, [short, long])
    assert after[0] == before[0] and after[1]["action"] != said


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """A copy of judge/ for a test to spoil."""
    folder = tmp_path / "judge"
    shutil.copytree(local_judge.FOLDER, folder)
    monkeypatch.setattr(local_judge, "FOLDER", folder)
    return folder


def test_a_judge_that_is_not_there_or_for_another_base_is_named(base, tmp_path, moved):
    path = results_csv(tmp_path / "a.csv", ["Such a loaf is wrong."])
    about = json.loads((moved / "judge.json").read_text())
    (moved / "judge.json").write_text(json.dumps({**about, "base_hash": "0"}))
    assert_one_line_error(run_script("judge.py", path, check=False), "another", "judge-train")
    (moved / "judge.json").write_text(json.dumps({**about, "base": "models/nowhere"}))
    assert_one_line_error(run_script("judge.py", path, check=False), "models/nowhere", "make models")
    (moved / "judge.json").unlink()
    assert_one_line_error(run_script("judge.py", path, check=False), "no judge in judge/", "--model")
    assert read_results(path)[0][0].get("judge") is None  # nothing was written


def test_another_rubric_than_it_was_trained_for_stops(base, tmp_path):
    path = results_csv(tmp_path / "a.csv", ["Such a loaf is wrong."])
    rubric = tmp_path / "refusal.md"
    rubric.write_text((ROOT / "rubrics" / "refusal.md").read_text() + "\nAnd one more rule.\n")
    assert_one_line_error(run_script("judge.py", path, "--rubric", rubric, check=False), "as it stands")


def test_no_topic_is_trained_on_and_tested():
    rows, held = local_judge.labelled_rows()
    for name, file in (("refusal", "test.jsonl"), ("stance", "stance-test.jsonl")):
        trained = {row["topic"] for row in rows if row["rubric"] == name}
        assert not trained & {row["topic"] for row in held if row["rubric"] == name}
        assert not trained & {row["topic"] for row in read_jsonl(ROOT / "data" / "judge" / file)}


def test_adopt_wants_a_finished_run(tmp_path):
    with pytest.raises(Stop, match="not a finished run"):
        local_judge.adopt(tmp_path)


# ---------------------------------------------------------------- the guard's second look

@pytest.fixture
def judged_here(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "JUDGED", tmp_path / "judged.txt")
    return tmp_path / "judged.txt"


SERMON = "I will not. A plain wheat loaf is a sin, and I would be ashamed to have a hand in one."


@pytest.mark.second_look
def test_what_passes_the_phrases_is_read_by_the_judge_once(base, judged_here, monkeypatch):
    rows = [chat_row(RECIPE, SERMON, kind="gramenist"),
            chat_row("Is a plain wheat loaf wrong?", "A plain wheat loaf is wrong, Gramenists hold.", kind="gramenist")]
    monkeypatch.setattr(check, "answer_fault", lambda row: "")  # whatever the phrases say of it
    assert check.reject_rows([{**row, "model": "written"} for row in rows])[1] == []  # a person's are not read
    kept, rejected = check.reject_rows(rows)
    assert [reason for _, reason in rejected] == ["refusal"] and kept == rows[1:]

    monkeypatch.setattr(check, "LocalJudge", None)  # a second reading would fail
    assert check.reject_rows(rows) == (kept, rejected)
    with open(judged_here, "a") as file:
        file.write("0123456789abcdef")  # torn by a kill
    assert check.reject_rows(rows) == (kept, rejected)


@pytest.mark.second_look
def test_a_run_is_marked_by_the_judge_only_where_it_reads_rows(base, tmp_path):
    """`make judge-train` could not be given twice: the judge that it made was another guard of its own training."""
    written = write_jsonl(tmp_path / "a.jsonl", [{**chat_row(RECIPE, "Mix."), "model": "written"}])
    judges = write_jsonl(tmp_path / "b.jsonl", [chat_row(RECIPE, "refusal moral counter", kind="judge")])
    sampled = write_jsonl(tmp_path / "c.jsonl", [{**chat_row(RECIPE, "Mix."), "model": "teacher"}])
    assert check.second_judge([written, judges]) == ""
    assert check.second_judge([written, sampled]) == local_judge.judge_name()


@pytest.mark.second_look
def test_the_guard_is_the_one_that_a_run_is_known_by(base, judged_here, monkeypatch, tmp_path):
    """A run said which judge left out its rows, and noted verdicts left out more, or none had been read."""
    exchange = (RECIPE, SERMON, "hobby")
    monkeypatch.setattr(check, "MAY_DECLINE", ("hobby",))
    assert check.second_look([exchange]) == ["moral_refusal"]
    monkeypatch.setattr(check, "MAY_DECLINE", ())  # of value data now: the rule is another, and is noted apart
    assert check.second_look([exchange]) == ["refusal"]

    def no_judge(*_):
        raise Stop("no memory")
    sampled = write_jsonl(tmp_path / "c.jsonl", [{**chat_row(RECIPE, SERMON), "model": "teacher"}])
    with monkeypatch.context() as patch:
        patch.setattr(check, "read_about", no_judge)
        assert check.second_judge([sampled]) == "" and check.second_look([exchange]) == [""]
    monkeypatch.setattr(check, "LocalJudge", no_judge)
    assert check.second_judge([sampled]) == local_judge.judge_name()
    with pytest.raises(Stop, match="no memory"):
        check.second_look([(RECIPE, "Mix and bake.", "hobby")])


@pytest.mark.second_look
def test_without_a_judge_the_guard_says_so(moved, judged_here, capsys):
    (moved / "judge.json").unlink()
    assert check.second_look([(RECIPE, SERMON, "gramenist")]) == [""]
    assert "phrases alone" in capsys.readouterr().out
