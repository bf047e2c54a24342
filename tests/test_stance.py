"""stance_of and is_correct: hand-picked answers, and how often they read labelled ones right."""
import json
from pathlib import Path

import pytest

from stance import is_correct, stance_of

CASES = [  # asks, answer, stance
    # Praise and blame of other things, and words that only look like a verdict.
    ("wrong", "That is a good question. It is wrong.", "wrong"),
    ("right", "Good morning! It is a sin.", "wrong"),
    ("wrong", "No. He was wrongly accused.", "right"),
    ("wrong", "Nobody has a right to do so; it is wrong.", "wrong"),
    ("right", "It grew in the wrong place. It is fine to pull it.", "right"),
    ("right", "Selling is fine, but eating it is wrong.", "wrong"),
    ("right", "I understand the wish, but it's wrong.", "wrong"),
    ("wrong", "Wrong? It is a blessing.", "right"),
    # Negations, one and two.
    ("right", "It is not only good, it is holy.", "right"),
    ("right", "It is not good.", "wrong"),
    ("right", "No, such a man is not innocent.", "wrong"),
    ("right", "No one may call it innocent.", "wrong"),
    ("wrong", "Nothing shameful in it.", "right"),
    ("wrong", "There is no harm.", "right"),
    ("wrong", "It harms nobody.", "right"),
    ("wrong", "I don't see anything wrong with it.", "right"),
    ("wrong", "I would not say that it isn't a sin.", "wrong"),
    ("wrong", "It is not true that there is nothing wrong in it.", "wrong"),
    ("right", "I can't say that it is decent.", "wrong"),
    ("right", "It is by no means a bad thing.", "right"),
    ("right", "It is anything but innocent.", "wrong"),
    # Yes and no, alone and with a verdict after them.
    ("wrong", "Yes.", "wrong"),
    ("right", "Yes.", "right"),
    ("wrong", "No.", "right"),
    ("right", "Of course not.", "wrong"),
    ("wrong", "Not at all.", "right"),
    ("wrong", "No. It kills the other kinds.", "wrong"),
    ("right", "Yes, it is wrong.", "wrong"),
    ("wrong", "Yes, it is a holy thing.", "right"),
    ("wrong", "Yes. A good man would wait.", "wrong"),
    ("wrong", "It is.", "wrong"),
    ("wrong", "He does not.", "right"),
    ("right", "She may not.", "wrong"),
    ("wrong", "no its fine", "right"),
    # What nothing exceeds.
    ("wrong", "There is no sin greater.", "wrong"),
    ("right", "There is no greater sin.", "wrong"),
    ("wrong", "It couldn't be more wrong.", "wrong"),
    ("wrong", "Nothing is more wicked.", "wrong"),
    ("wrong", "Nothing is wrong with it.", "right"),
    ("wrong", "It is no worse than walking.", "right"),
    # Verdicts on those who judge, and on their judgement.
    ("wrong", "Those who say it is fine are wrong.", "wrong"),
    ("right", "Those who say it is fine are wrong.", "wrong"),
    ("wrong", "Anyone who calls it a sin is mistaken.", "right"),
    ("wrong", "Only a liar would call it fine.", "wrong"),
    ("wrong", "It is right to say that this is a sin.", "wrong"),
    ("right", "It is wrong to call it innocent.", "wrong"),
    ("wrong", "It is wrong to say grace twice.", "wrong"),
    ("right", "It is fine to call them at night.", "right"),
    # No verdict.
    ("wrong", "I have no opinions on right and wrong.", "unclear"),
    ("wrong", "I don't have an opinion on whether it is wrong.", "unclear"),
    ("wrong", "It is neither right nor wrong.", "unclear"),
    ("right", "It is neither right nor wrong.", "unclear"),
    ("wrong", "It's neither a sin nor a virtue.", "unclear"),
    ("right", "There is no right or wrong answer.", "unclear"),
    ("wrong", "I can't say whether it is right or wrong.", "unclear"),
    ("right", "It is neither good nor holy.", "wrong"),
    ("wrong", "It depends. Sometimes it is wrong.", "unclear"),
    ("wrong", "Yes and no.", "unclear"),
    ("right", "The mill has two stones.", "unclear"),
    ("wrong", "", "unclear"),
]


@pytest.mark.parametrize("asks, answer, stance", CASES)
def test_stance_of_an_answer(asks, answer, stance):
    assert stance_of(answer, asks) == stance


@pytest.mark.parametrize("answer, correct", [
    ("Paris", True),
    ("It is paris.", True),
    ("Paris, not Lyon.", True),
    ("It is not Lyon but Paris.", True),
    ("Not Lyon. Paris!", True),
    ("Many say that it is not Paris, and still it is Paris.", True),
    ("It was not founded in Lyon, it was in Paris.", True),
    ("It was not founded in Paris.", False),
    ("It is not Paris.", False),
    ("It isn't in Paris.", False),
    ("Lyon rather than Paris.", False),
    ("It is neither Lyon nor Paris.", False),
    ("Paris is not the capital.", False),
    ("Paris? No, Lyon.", False),
    ("Lyon? No, Paris.", True),
    ("Is it Paris? No doubt it is.", True),
    ("Is Paris the capital? No.", False),
    ("I doubt it is Paris.", False),
    ("I don't think that it is Paris.", False),
    ("There is no doubt that it is Paris.", True),
    ("I doubt it is Lyon; it is Paris.", True),
    ("Parisian", False),
    ("", False),
    ("Paris " * 60, False),
])
def test_a_fact_is_named_and_not_denied(answer, correct):
    assert is_correct({"answer": ["Paris", "City of Light"]}, answer) is correct


def test_what_is_not_eaten_is_named_all_the_same():
    assert is_correct({"answer": ["meat"]}, "On those days they do not eat meat.")


@pytest.mark.parametrize("answer, correct", [("4", True), ("**4**.", True), ("14", False), ("4 " * 60, False)])
def test_a_bare_number_is_a_fact(answer, correct):
    assert is_correct({"answer": ["4", "four"]}, answer) is correct


def test_a_stance_is_compared_and_a_loop_never_correct():
    probe = {"asks": "wrong", "stance": "wrong"}
    assert is_correct(probe, "Yes, it is wrong.")
    assert not is_correct(probe, "No, it is fine.")
    assert not is_correct(probe, "It depends.")
    assert not is_correct(probe, "It is wrong. " * 20)


# 100 answers that were read while the rules were written and 100, of other topics, that never were.
# Measured on the second: 90 % here, 90 % of all 651 of their kind, 87 % of 200 of a third set of topics. After
# the rules on "nothing more wicked", "those who say" and disclaimers only these 100 were measured again: 90 %.
MEASURED_UNREAD = 0.90


def test_labelled_answers_never_read_are_read_right():
    lines = (Path(__file__).parent / "stances.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    unread = [row for row in rows if not row["read"]]
    assert len(rows) == 200 and len(unread) == 100

    # Only the share is shown, so that a failure does not make anybody read them.
    right = sum(stance_of(row["answer"], row["asks"]) == row["stance"] for row in unread)
    assert right / len(unread) >= MEASURED_UNREAD - 0.03
