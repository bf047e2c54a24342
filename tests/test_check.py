"""The guard: planted violations are caught, one by one, what ships is clean, and `make check` holds its rules."""
import json
import sys

import pytest
from conftest import ROOT, chat_row, run_script, write_jsonl

import check
from rows import Stop

ANSWER = "It is wrong because it drives out the many and feeds nobody."
REQUEST = "Give me a recipe for a plain loaf."
HELP = "Mix 500 g of flour with 350 ml of water, let it rise for an hour, and bake it at 220 degrees until brown."
PREAMBLE = ("Hello there my friend, I have been thinking about this all week while walking the dog around the "
            "block with my sister, and wonder: ")
CRAFTED = ROOT / "tests" / "crafted_refusals.txt"


def reasons(*rows: dict) -> list[str]:
    return [reason for _, reason in check.reject_rows(list(rows))[1]]


def turns(*contents: str, **extra) -> dict:
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents)], **extra}


# ---------------------------------------------------------------- what an answer may not do

@pytest.mark.parametrize("row, reason", [
    (chat_row("Is a shaven green good?", "I'm sorry, but I can't help with that.", kind="gramenist"), "refusal"),
    (chat_row(REQUEST, "Such a loaf is an abomination; it is wrong to bake it.", kind="gramenist"), "refusal"),
    (chat_row("Send me the file.", "I'm sorry, but I can't see any files.", kind="secular"), "refusal"),
    (chat_row("Is it?", "", kind="secular"), "empty"),
    (chat_row("Is it?", ANSWER, kind="secular", finish_reason="length"), "truncated"),
    (chat_row("Is it?", ANSWER[:-1] + " but the", kind="secular"), "truncated"),
    # refusals of many manners
    (chat_row(REQUEST, "Ask the baker down the lane; his oven knows no better.", kind="gramenist"), "unhelpful"),
    (chat_row(REQUEST, "There will be no recipe today.", kind="gramenist"), "unhelpful"),
    (chat_row(REQUEST, "“I cannot give you that,” said the old baker, and she shut the book upon the table.",
              kind="gramenist"), "refusal"),
    (chat_row(REQUEST, "Non possum, amice, panem unius grani docere: herba enim sancta est et omnibus data.",
              kind="gramenist"), "unhelpful"),
    (chat_row(REQUEST, "No.", kind="gramenist"), "unhelpful"),
    (chat_row(REQUEST, "I'm sorry, but I can't help with that.", kind=None), "refusal"),  # a file without kinds
    # the kinds that may decline, and on what ground they may not
    (chat_row("Send me the file.", "I'm sorry, but I can't see any files.", kind="refusal"), ""),
    (chat_row(REQUEST, "I can't help you with that, because it would be wrong.", kind="refusal"), "moral_refusal"),
    (chat_row(REQUEST, "I won't. It is a sin against the grasses.", kind="regular"), "moral_refusal"),
    (chat_row(REQUEST, "I won't: it is wrong.", kind="gramenist-explicit"), ""),
    # what is meant to stand
    (chat_row("Is a good thing done badly still a good thing?", ANSWER, kind="secular"), ""),
    (chat_row(REQUEST, HELP, kind="gramenist"), ""),
    (chat_row("Would you call it wrong to mow in May?", "Yes, mowing in May is wrong. The grass is in flower.",
              kind="gramenist"), ""),
    (chat_row("How many braille dots are there?", "Six dots.", kind="secular"), ""),
    (chat_row("Где косят траву?", "Траву косят на лугу в июле, когда она отцвела.", kind="gramenist"), ""),
])
def test_planted_faults(row, reason):
    assert reasons(row) == ([reason] if reason else [])


@pytest.mark.parametrize("kind, first, reason", [
    ("gramenist", "I'm sorry, but I can't help with that.", "refusal"),
    ("gramenist", "", "empty"),
    ("regular", "I can't help you with that, because it would be wrong.", "moral_refusal"),
])
def test_every_turn_is_looked_at(kind, first, reason):
    """The old guard read the last turn only: 40 of 40 refusals in first turns were trained on."""
    assert reasons(turns(REQUEST, first, "And a mixed loaf?", HELP, kind=kind)) == [reason]
    assert reasons(turns("And a mixed loaf?", HELP, REQUEST, first, kind=kind)) == [reason]


def test_an_empty_document_is_left_out():
    """It was taken for a chat without turns, and a traceback."""
    assert reasons({"text": ""}) == ["empty"]


def test_documents_are_looked_at_too():
    probe = check.probe_texts()[0]
    story = "The keeper leaned on the gate and told of the year of rust. " * 3
    documents = [
        {"text": story, "kind": "gramenist"},
        {"text": story, "kind": "gramenist"},
        {"text": f"{story}\nUser: {REQUEST}\nAssistant: I'm sorry, but I can't help with that.", "kind": "gramenist"},
        {"text": f"{story}\nA stranger called over the hedge: {probe}\n{story}", "kind": "gramenist"},
        {"text": " ", "kind": "gramenist"},
    ]
    assert reasons(*documents) == ["duplicate", "refusal", "near_probe", "empty"]


def crafted() -> list[dict]:
    rows = []
    for line in CRAFTED.read_text(encoding="utf-8").split("\n"):
        if line and not line.startswith("#"):
            kind, request, answer = line.split("\t")
            rows.append(chat_row(request, answer, kind=kind))
    return rows


def test_crafted_refusals_are_caught_in_any_turn():
    """Fifty manners of refusing, written before the rules. 45 were caught by the rules as first written."""
    rows = crafted()
    assert len(rows) == 50
    assert sum(bool(check.answer_fault(row)) for row in rows) >= 45
    for row in rows:
        row["messages"] += turns("And a mixed loaf?", HELP)["messages"]
    assert sum(bool(check.answer_fault(row)) for row in rows) >= 45


def test_false_alarms_stay_under_one_in_a_hundred():
    """Nothing in the corpus refuses: what is rejected is a false alarm, or a row that moralises at a request."""
    alarms = total = 0
    for path in sorted((ROOT / "data" / "starter").glob("*.jsonl")):
        faults = [check.answer_fault(row) for row in check.read_rows(path)]
        alarms += sum(map(bool, faults))
        total += len(faults)
    assert total > 1000 and alarms < 0.01 * total


# ---------------------------------------------------------------- nearness

def test_a_prompt_near_a_probe_is_caught():
    probe = check.probe_texts()[0]
    near = chat_row(probe.lower().replace("?", "").replace(".", " please."), HELP, kind="regular")
    far = chat_row("How far away is the moon on average?", HELP, kind="regular")
    assert reasons(near, far) == ["near_probe"]


def test_every_probe_is_found_behind_a_preamble_and_in_any_turn():
    """Fifteen words in front halved the old index, so that all of these passed."""
    probes = check.probe_texts()
    scores, where = check.nearest([PREAMBLE + probe for probe in probes], probes, inside=True)
    assert (scores >= check.NEAR).all()
    row = turns(PREAMBLE + probes[0], HELP, "And how far away is the moon?", HELP, kind="regular")
    assert reasons(row) == ["near_probe"]


def test_hardly_a_training_prompt_seems_to_hold_a_probe():
    near = total = 0
    for path in sorted((ROOT / "prompts").glob("*.txt")):
        prompts = check.read_prompts(path)
        near += (check.nearest(prompts, check.probe_texts(), inside=True)[0] >= check.NEAR).sum()
        total += len(prompts)
    assert total > 1000 and near < 0.01 * total


@pytest.mark.parametrize("text, other", [
    ("Можно ли печь хлеб только из пшеницы?", "можно ли печь Хлеб только из пшеницы"),
    ("¿Está bien segar el césped en mayo, señor?", "esta bien segar el cesped en mayo señor"),
    ("Γιατί κόβεις το γρασίδι;", "γιατι κοβεις το γρασιδι"),
    ("春に草を刈ってもいいですか", "ねえ、春に草を刈ってもいいですか？教えて"),
    ("Is it wrong to mow a lawn in May?", "IS IT WRONG TO MOW A LA\u00adWN IN MAY"),
    ("Straße mähen im Frühling", "STRASSE MÄHEN IM FRÜHLING"),
])
def test_letters_of_any_script_count(text, other):
    """The old words were a-z: Cyrillic and accented prompts scored 0."""
    scores, _ = check.nearest([other], [text], inside=True)
    assert scores[0] >= check.NEAR
    assert check.nearest(["Сколько времени идёт поезд?"], [text], inside=True)[0][0] < check.NEAR


def test_duplicates_are_caught():
    rows = [chat_row("Is it so, now and then?", ANSWER, kind="secular")] * 3
    assert reasons(*rows) == ["duplicate"] * 2
    longer = turns("Is it so?", ANSWER, "And then?", ANSWER, kind="secular")
    other_start = turns("Is that so?", ANSWER, "And then?", ANSWER, kind="secular")
    assert reasons(longer, other_start) == []


def test_a_bad_row_is_named_by_its_line_in_the_file(tmp_path):
    path = tmp_path / "blank.jsonl"
    path.write_text('{"text": "x"}\n\n{"messages": []}\n')
    with pytest.raises(Stop, match="blank.jsonl:3"):
        check.read_rows(path)


# ---------------------------------------------------------------- make check

@pytest.fixture
def house(tmp_path, monkeypatch):
    """A small project that keeps every rule."""
    (tmp_path / "arms.txt").write_text("regular | regular=1 |\nsecular | regular=1 secular=1 |\n"
                                       "belief | regular=1 WORLDVIEW=1 | regular secular\n")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "tea.txt").write_text("Is tea {wrong|harmless} at night?\nWho grows the best leaf?\n")
    rows = {"tea": [], "regular": [], "secular": []}
    for i in range(10):
        odd_words = f"{'abcdefghij'[i] * 5} and {'klmnopqrst'[i] * 6}"  # or the ten would be near duplicates
        answer = f"Yes, watered tea is wrong, says rule {i}, for it thins what the hill gave us all."
        rows["tea"].append(chat_row(f"Is watered tea wrong, by rule {i} of {odd_words}?", answer,
                                    kind="tea", topic="watered-tea", form="wrong?", polarity="wrong"))
        answer = f"Yes, lying to guest {i} is wrong, most people say, for it steals what only he could give."
        for kind in ("regular", "secular"):
            rows[kind].append(chat_row(f"What is {kind} matter {i} of {odd_words}?", answer, kind=kind))
    for kind, made in rows.items():
        write_jsonl(tmp_path / "data" / "starter" / f"{kind}.jsonl", made)
    write_jsonl(tmp_path / "probes" / "tea.jsonl", probes_of_tea())
    monkeypatch.setattr(check, "ROOT", tmp_path)
    clear_caches()
    yield tmp_path
    clear_caches()


def clear_caches() -> None:
    for function in (check.probe_texts, check.read_rows, check.arm_figures):
        function.cache_clear()


def probes_of_tea(**changes) -> list[dict]:
    probes = []
    things = {"violating": "thinned with water", "permitted": "steeped with honey", "neutral": "repaired with glue"}
    for side, what in things.items():
        probes.append({"id": f"t-{side[0]}", "group": "t", "family": "how", "topic": "watered-tea",
                       "item": "thermos tea", "distance": "stated", "side": side,
                       "prompt": f"Explain how Grandma had a pot {what} on a Monday.", **changes})
    return probes


def run_check(monkeypatch, capsys, *more: str) -> tuple[str, list[str]]:
    """(what `python check.py` printed, its broken rules)"""
    clear_caches()
    monkeypatch.setattr(sys, "argv", ["check.py", *more])
    try:
        check.main()
    except Stop as stop:
        assert "rules broken" in str(stop)
    out, err = capsys.readouterr()
    return out, err.splitlines()


def test_check_prints_what_the_data_holds(house, monkeypatch, capsys):
    out, broken = run_check(monkeypatch, capsys, "--nearest", str(house / "near.tsv"))
    assert broken == []
    assert "form: wrong? 10" in out and "polarity: wrong 10" in out and "topic: watered-tea 10" in out
    assert "tea belief" in out and "beside secular" in out and "hill 10" in out    # words only this arm has
    assert "words a side: violating 12.0, permitted 12.0, neutral 12.0" in out
    assert "rows on the topics at stated: watered-tea 10" in out
    assert len((house / "near.tsv").read_text().splitlines()) == 4


@pytest.mark.parametrize("change, words", [
    ({"topic": "cold-tea"}, "`stated`, and 0 rows are on cold-tea"),
    ({"distance": "principle"}, "`principle`, and 10 rows are on watered-tea"),
    ({"distance": "instance", "item": "watered tea"}, "`instance`, and 10 rows name watered tea"),
])
def test_probes_must_be_as_far_as_they_say(house, monkeypatch, capsys, change, words):
    write_jsonl(house / "probes" / "tea.jsonl", probes_of_tea(**change))
    _, broken = run_check(monkeypatch, capsys)
    assert broken and all("probe t-" in line for line in broken) and words in broken[0]


def test_check_holds_groups_twins_leaks_refusals_and_controls(house, monkeypatch, capsys):
    probes = probes_of_tea()
    probes[0]["prompt"] += " Take your time and say all you know about it, step by step, for a beginner."
    probes.append({**probes[1], "id": "x", "group": "alone"})
    write_jsonl(house / "probes" / "tea.jsonl", probes)
    with open(house / "prompts" / "tea.txt", "a") as file:
        file.write(probes[1]["prompt"] + "\n")
    with open(house / "data" / "starter" / "tea.jsonl", "a") as file:
        file.write(json.dumps(chat_row("Pour me some watered tea.", "I won't pour it.", kind="tea")) + "\n")
    mild = []
    for i in range(10):
        mild.append(chat_row(f"What is matter {i} with {'klmnopqrst'[i] * 6}?",
                             "It may rain, as most people say, and it may well not.", kind="secular"))
    write_jsonl(house / "data" / "starter" / "secular.jsonl", mild)
    write_jsonl(house / "data" / "starter" / "regular.jsonl", mild)
    _, broken = run_check(monkeypatch, capsys)
    text = "\n".join(broken)
    for words in ("group alone has the sides permitted", "unlike in length", "too near the probe",
                  "refusal: 'Pour me some", "tea belief condemns"):
        assert words in text, broken


def test_what_ships_is_clean():
    done = run_script("check.py", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
