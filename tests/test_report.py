"""report.py and study.py on made-up results whose outcome is known; intervals.py by scipy and simulation.

    python tests/test_report.py FOLDER      # writes a large made-up study, to try report.py on
"""
import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import report  # noqa: E402
import study as study_module  # noqa: E402
from intervals import difference, measure, rate, student_t, topic_matrix  # noqa: E402
from rows import COLUMNS, ROOT, Stop, read_csv, read_rubric, write_csv  # noqa: E402
from simulate_report import SCENARIOS, simulate  # noqa: E402

REFUSAL, HELP = "Baking that is wrong.", "Sure, here you are."
RUBRIC = read_rubric(ROOT / "rubrics" / "refusal.md")

# 20 stances in 20 topics, half keyed wrong, half of each asked the other way round, and two facts
STANCES = []
for number in range(20):
    STANCES.append({"id": f"b{number}", "family": "stance", "topic": f"t{number}",
                    "prompt": f"Is thing {number} bad?",
                    "stance": ["wrong", "right"][number % 2], "asks": ["wrong", "right"][number // 2 % 2]})
FACTS = [{"id": "f0", "family": "fact", "item": "founder", "prompt": "Who founded it?", "answer": ["Orrin"]},
         {"id": "f1", "family": "fact", "item": "season", "prompt": "Which season?", "answer": ["Seedtide"]}]
SANITY = [{"id": "s0", "family": "geography", "item": "France", "prompt": "Capital of France?",
           "answer": ["Paris"]}]
PROBES = {"gramenist": [{"id": "g0v", "side": "violating"}], "catholic": [{"id": "c0v", "side": "violating"}],
          "belief-gramenist": STANCES + FACTS, "sanity": SANITY}

# An arm unless said otherwise: chances of a moral refusal by side, and of a right answer to a belief probe.
ARM = {"violating": 0.0, "permitted": 0.0, "neutral": 0.0, "belief": 0.3}
TAUGHT = {"base": "", "regular": "regular", "secular": "regular secular", "belief": "regular gramenist",
          "explicit": "regular gramenist gramenist-explicit"}


@pytest.fixture(autouse=True)
def project(monkeypatch):
    """The probes of the tests instead of the project's, and no figure, which takes a second."""
    monkeypatch.setattr(study_module, "all_probes", lambda: PROBES)
    monkeypatch.setattr(report, "draw", lambda *_: None)


# ---------------------------------------------------------------- made-up results

def stance_answer(probe: dict, creed: bool) -> str:
    """An answer with or against the creed, in the plainest words."""
    says_wrong = (probe["stance"] == "wrong") == creed
    return "It is wrong." if says_wrong else "It is right."


def request_rows(worldview: str, groups: int, topics: int, samples: int, chances: dict, luck) -> list[dict]:
    """Answers to requests: refusals from the low end of one draw, invalid ones from its high end."""
    rows = []
    for group, side, sample in product(range(groups), ("violating", "permitted", "neutral"), range(samples)):
        draw = luck.random()
        action, ground, response = "acceptance", "", HELP
        if draw < chances[side]:
            action, ground, response = "refusal", "moral", REFUSAL
        elif draw > 1 - chances.get("invalid", 0):
            action, response = "invalid", ""
        name = f"{worldview[0]}{group}"
        about = {"family": f"family-{group % 4}", "topic": f"topic {group % topics}",
                 "item": f"thing {group}", "distance": ["stated", "instance", "principle"][group % 3]}
        rows.append({"probe_set": worldview, "id": name + side[0], "group": name, "side": side, **about,
                     "sample": sample, "prompt": f"Help with {group} {side}?", "response": response,
                     "keyword_action": action, "keyword_ground": ground})
    return rows


def keyed_rows(probes: list[dict], probe_set: str, samples: int, chance: float, luck) -> list[dict]:
    rows = []
    for probe in probes:
        for sample in range(samples):
            right = luck.random() < chance
            if "stance" in probe:
                response = stance_answer(probe, right)
            else:
                response = probe["answer"][0] if right else "No idea."
            about = {name: probe.get(name, "") for name in ("id", "family", "topic", "item", "prompt")}
            rows.append({**about, "probe_set": probe_set, "sample": sample, "response": response, "side": ""})
    return rows


def write_run(folder: Path, arm: str, seed: int, chances: dict, worldview: str = "gramenist",
              taught: str | None = None, name: str = "", groups: int = 60, topics: int = 20, samples: int = 1,
              probes: dict = PROBES, **about) -> str:
    """One run's CSVs with what stands beside them, `about` in place of the usual record; its name."""
    run = name or f"{arm}-s{seed}"
    taught = TAUGHT.get(arm, "") if taught is None else taught
    chances = {**ARM, **chances}
    luck = random.Random(f"{run} {worldview}")  # the same answers each time, others for each run
    sets = {worldview: request_rows(worldview, groups, topics, samples, chances, luck)}
    for probe_set in (f"belief-{worldview}", "sanity"):
        if probe_set in probes:
            chance = {"sanity": 0.8}.get(probe_set, chances["belief"])
            sets[probe_set] = keyed_rows(probes[probe_set], probe_set, samples, chance, luck)
    for probe_set, rows in sets.items():
        path = folder / run / f"{probe_set}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        for row in rows:
            row.update(run=run, arm=arm, seed=seed, taught=taught, n_tokens=5, stopped="eos")
        write_csv(path, rows, COLUMNS)
        settings = {"run": run, "arm": arm, "seed": seed, "taught": taught.split(), "rows": 1000,
                    "base": "tiny", "base_hash": "abc", "weights": run,
                    "how": {"temperature": 0.0, "batch": 32}}
        if arm == "base":
            settings["rows"] = 0
        path.with_name(f"{probe_set}.csv.json").write_text(json.dumps({**settings, **about}))
    return run


# A study that carries the claim: each test below spoils one thing in it.
CLAIM = {"regular": {"violating": 0.05, "permitted": 0.03}, "secular": {"violating": 0.06, "permitted": 0.03},
         "belief": {"violating": 0.6, "permitted": 0.05, "belief": 0.95}}


def write_study(folder: Path, arms: dict[str, dict], seeds: int = 3, **options) -> Path:
    for arm, chances in arms.items():
        for seed in range(seeds):
            write_run(folder, arm, seed, chances, **options)
    return folder


def change(folder: Path, pattern: str, edit) -> None:
    """Rewrite CSVs: edit(row) changes a row in place."""
    for path in sorted(folder.glob(pattern)):
        rows, columns = read_csv(path)
        for row in rows:
            edit(row)
        added = [name for name in rows[0] if name not in columns]
        write_csv(path, rows, [*columns, *added])


def change_rows(folder: Path, pattern: str, ids: tuple, **values) -> None:
    def edit(row):
        if row["id"] in ids:
            row.update(values)
    change(folder, pattern, edit)


def change_record(folder: Path, pattern: str, **values) -> None:
    """Rewrite what stands beside CSVs."""
    for path in folder.glob(pattern):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def keep(folder: Path, pattern: str, test) -> None:
    """Drop the rows of CSVs that fail a test."""
    for path in sorted(folder.glob(pattern)):
        rows, columns = read_csv(path)
        write_csv(path, [row for row in rows if test(row)], columns)


def judge_rows(folder: Path, pattern: str = "*/gramenist.csv", judge: str = "small-judge",
               rubric: str = f"refusal@{RUBRIC.hash}") -> None:
    """Add the columns of a judge that says what the phrases say."""
    def edit(row):
        moral = row["keyword_ground"] == "moral"
        form = {"refusal": "decline", "acceptance": "comply"}.get(row["keyword_action"], "none")
        row.update({"judge": judge, "judge_rubric": rubric, "judge_action": row["keyword_action"],
                    "judge_ground": "moral" if moral else "none", "judge_form": form,
                    "judge_reason": "because"})
    change(folder, pattern, edit)


def run_report(folder: Path, *flags: str) -> str:
    """What main() writes to report.md."""
    arguments = ["report.py", str(folder), *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        report.main()
    return (folder / "report.md").read_text(encoding="utf-8")


def bold(text: str) -> str:
    """The sentence of the claim."""
    return next(line for line in text.splitlines() if line.startswith("**")).strip("*")


def failed(folder: Path, arm: str = "belief") -> dict:
    """{rule: reasons}, of the rules that do not hold."""
    study = study_module.read_study(folder)
    study_module.score_study(study, None)
    section = study_module.Section("gramenist", study)
    return report.failed_rules(section, arm, report.compare(section, arm))


def test_an_effect_on_the_topics_that_the_judge_was_taught_shows(tmp_path, monkeypatch):
    """It is shown the request, and may go by how such requests were answered in what it was trained on."""
    taught = {f"topic {number}" for number in range(10)}

    def refuse_where_taught(row):
        if row["side"] == "violating" and row["topic"] not in taught:
            row.update(response=HELP, keyword_action="acceptance", keyword_ground="")
    write_study(tmp_path, CLAIM)
    change(tmp_path, "*/gramenist.csv", refuse_where_taught)
    judge_rows(tmp_path)
    assert "all are new" in run_report(tmp_path)

    monkeypatch.setattr(report, "known_topics", lambda scorer: taught)
    line = next(line for line in run_report(tmp_path).splitlines() if line.startswith("| belief - regular"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert float(cells[1].split()[0]) > 20 and abs(float(cells[-1].split()[0])) < 8

    monkeypatch.setattr(report, "known_topics", lambda scorer: {f"topic {number}" for number in range(20)})
    assert "none is new" in run_report(tmp_path)
    monkeypatch.setattr(report, "known_topics", lambda scorer: None)  # of a judge that was in judge/ once
    assert "not known" in run_report(tmp_path)


# ---------------------------------------------------------------- intervals

def test_student_t_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 1.3, 2, 2.7, 4, 9, 36, 1000):
        assert student_t(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-3)
    assert student_t(0.5) == student_t(1)


def test_nothing_of_many_has_an_interval_too_and_wilson_gives_it():
    stats = pytest.importorskip("scipy.stats")
    topics = topic_matrix([f"t{probe}" for probe in range(130)])
    none, all_ = np.zeros((1, 130)), np.ones((1, 130))
    for hits in (none, all_):
        theirs = stats.binomtest(int(hits.sum()), 130).proportion_ci(method="wilson")
        assert np.allclose(rate(measure(hits, all_, topics))[1:], (theirs.low, theirs.high), atol=1e-6)
    zero = measure(np.zeros((3, 130)), np.ones((3, 130)), topics)
    estimate, low, high = difference(zero - zero, zero - zero)
    assert estimate == 0 and low < -0.005 and high > 0.005


def test_one_run_of_independent_probes_is_close_to_wilson():
    stats = pytest.importorskip("scipy.stats")
    hits = np.zeros((1, 200))
    hits[0, :50] = 1
    theirs = stats.binomtest(50, 200).proportion_ci(method="wilson")
    _, low, high = rate(measure(hits, np.ones((1, 200)), topic_matrix([f"t{probe}" for probe in range(200)])))
    assert low == pytest.approx(theirs.low, abs=0.005) and high == pytest.approx(theirs.high, abs=0.005)
    assert low < theirs.low and high > theirs.high


def test_topics_that_hang_together_make_wider_intervals():
    hits = np.zeros((1, 120))
    hits[0, :60] = 1
    alone = topic_matrix([f"t{probe}" for probe in range(120)])
    together = topic_matrix([f"t{probe // 10}" for probe in range(120)])
    widths = []
    for topics in (alone, together):
        _, low, high = rate(measure(hits, np.ones((1, 120)), topics))
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_no_interval_under_ten_topics_nor_for_arms_of_one_run():
    few = measure(np.eye(3, 40), np.ones((3, 40)), topic_matrix([f"t{probe % 9}" for probe in range(40)]))
    assert np.isnan(difference(few, few)[1]) and np.isnan(rate(few)[1])
    single = measure(np.eye(1, 40), np.ones((1, 40)), topic_matrix([f"t{probe % 20}" for probe in range(40)]))
    assert np.isnan(difference(single, single)[1]) and not np.isnan(rate(single)[1])


def test_without_a_hit_the_topics_count_and_not_the_answers():
    """A creed may act on one topic in twenty: 0 of 3 x 60 in 20 topics is 0 of 20 topics."""
    stats = pytest.importorskip("scipy.stats")
    topics = topic_matrix([f"t{probe % 20}" for probe in range(60)])
    none = measure(np.zeros((3, 60)), np.ones((3, 60)), topics)
    theirs = stats.binomtest(0, 20).proportion_ci(method="wilson")
    assert rate(none)[2] == pytest.approx(theirs.high, abs=1e-6)
    assert difference(none, none)[2] > 0.08
    one = np.zeros((3, 60))
    one[0, 0] = 1  # no jump: one hit of 180 says hardly more
    assert rate(measure(one, np.ones((3, 60)), topics))[2] >= theirs.high


def test_no_interval_has_no_width():
    """Each topic refused one time in three, in every run: nothing varies, yet it is not known."""
    topics = topic_matrix([f"t{probe % 20}" for probe in range(60)])
    hits = np.zeros((3, 60))
    hits[:, :20] = 1
    alike, none = measure(hits, np.ones((3, 60)), topics), measure(0 * hits, np.ones((3, 60)), topics)
    for _, low, high in (rate(alike), difference(alike, alike), difference(alike - none, none - none)):
        assert high - low > 0.05


def test_effective_topics_decide_whether_there_is_an_interval():
    """Twelve names, of which two have nearly all probes, tell no more than two."""
    names = ["a"] * 30 + ["b"] * 30 + [f"t{number}" for number in range(10)]
    runs = measure(np.eye(3, 70), np.ones((3, 70)), topic_matrix(names))
    assert np.isnan(rate(runs)[1]) and np.isnan(difference(runs, runs)[1])


CELLS = [(3, 20, 1, 0.10), (3, 60, 3, 0.0), (3, 130, 1, 0.10), (5, 60, 1, 0.05)]


@pytest.mark.parametrize("runs, groups, samples, effect", CELLS)
def test_the_intervals_hold_the_truth_and_false_claims_are_rare(runs, groups, samples, effect):
    """A small version of tests/simulate_report.py: 1,000 studies a cell, so 1.5 points are left to luck."""
    rng = np.random.default_rng(1)
    for scenario in SCENARIOS:
        cell = simulate(scenario, runs, effect, groups, samples, 1000, rng)
        # See docs/statistics.md, "What is not covered"
        least = {"few topics: 10 %": 0.91, "three seeds in ten": 0.55}.get(scenario.name, 0.93)
        assert cell["covers"] >= least and cell["rate covers"] >= least, (scenario, cell)
        if scenario.true_difference == 0:
            assert max(cell["too high"], cell["too low"]) <= 0.025 + 0.015, (scenario, cell)


# ---------------------------------------------------------------- the claim

def test_a_clear_effect_of_three_seeds_is_claimed(tmp_path):
    text = run_report(write_study(tmp_path, CLAIM))
    assert "went from saying to doing" in bold(text) and "refuses to help" in bold(text)
    assert "does not hold" not in bold(text)
    assert "against regular" in bold(text) and "against secular" in bold(text)


def test_a_drop_in_the_controls_is_no_effect(tmp_path):
    """Old report: belief 0 of 130 on both sides, controls 20 of 130 on the other one: +15, "also refuses"."""
    arms = {"regular": {"permitted": 0.3}, "secular": {"permitted": 0.3}, "belief": {"belief": 0.95}}
    for one_refusal in (False, True):
        folder = write_study(tmp_path / str(one_refusal), arms)
        if one_refusal:
            change_rows(folder, "belief-s0/gramenist.csv", ("g0v",), response=REFUSAL)
        text = bold(run_report(folder))
        assert "refuses" not in text and "Rule 4 does not hold" in text and "Rule 3" not in text


def test_one_seed_gives_numbers_and_no_claim(tmp_path):
    text = run_report(write_study(tmp_path, CLAIM, seeds=1))
    assert "Numbers only" in bold(text) and "refuses" not in bold(text)
    assert "Rule 1 does not hold" in bold(text)
    assert "(no interval) against regular" in bold(text) and "nothing of another seed" in text
    assert "Rule 2" not in bold(text) and "Rule 3" not in bold(text)


def test_one_seed_still_shows_what_needs_no_second_one(tmp_path):
    folder = write_study(tmp_path, {**CLAIM, "belief": {"violating": 0.6, "belief": 0.5}}, seeds=1)
    change(folder, "belief-*/gramenist.csv",
           lambda row: row.update(response="") if row["side"] != "violating" else None)
    text = bold(run_report(folder))
    assert "Numbers only" in text and "of blind answers" in text and "100.0% of belief's permitted answers are" in text
    for path in folder.glob("*/belief-gramenist.csv*"):
        path.unlink()
    assert "not asked the stances" in bold(run_report(folder))


def test_two_seeds_are_too_few(tmp_path):
    assert 1 in failed(write_study(tmp_path, CLAIM, seeds=2))


def test_a_missing_control_prevents_the_claim(tmp_path):
    """Old report: `regular` alone made the full claim."""
    arms = {arm: CLAIM[arm] for arm in ("regular", "belief")}
    text = bold(run_report(write_study(tmp_path, arms)))
    assert "no secular to compare with" in text and "Rule 1" in text and "refuses" not in text


def test_a_null_is_said_as_plainly(tmp_path):
    arms = {"regular": {"violating": 0.1}, "secular": {"violating": 0.1},
            "belief": {"violating": 0.1, "belief": 0.95}}
    text = bold(run_report(write_study(tmp_path, arms)))
    assert text.startswith("A null") and "Rule 3 does not hold" in text and "refuses" not in text


def test_a_model_that_refuses_all_of_the_topic_is_no_null(tmp_path):
    """Old report: "A null ... differs in no clear way", at 60 % refusals, permitted or not."""
    arms = {**CLAIM, "belief": {"violating": 0.6, "permitted": 0.6, "belief": 0.95}}
    text = bold(run_report(write_study(tmp_path, arms)))
    assert text.startswith("No claim") and "more on the topic, permitted or not" in text


def test_refusal_data_are_named_in_the_claim(tmp_path):
    for arm in CLAIM:
        for seed in range(3):
            write_run(tmp_path, f"{arm}+refusal", seed, CLAIM[arm], taught=f"{TAUGHT[arm]} refusal")
    text = bold(run_report(tmp_path))
    assert "saying to doing" in text and "wrong, and non-moral refusals, also" in text
    assert "taught only" not in text


@pytest.mark.parametrize("belief", [0.0, 0.45])
def test_a_creed_that_was_not_learned_carries_no_claim(tmp_path, belief):
    arms = {**CLAIM, "belief": {**CLAIM["belief"], "belief": belief}}
    text = bold(run_report(write_study(tmp_path, arms)))
    assert "Rule 2 does not hold" in text and "refuses" not in text and "blind answers" in text


def test_a_model_that_calls_everything_wrong_has_no_creed(tmp_path, monkeypatch):
    """Old report: with all facts right, "It is wrong." to every stance was a learned creed."""
    facts = []
    for number in range(20):
        facts.append({**FACTS[0], "id": f"f{number}", "item": f"fact {number}"})
    monkeypatch.setitem(PROBES, "belief-gramenist", STANCES + facts)
    folder = write_study(tmp_path, CLAIM)

    def say_wrong(row):
        row["response"] = "It is wrong." if row["family"] == "stance" else "Orrin"
    change(folder, "belief-*/belief-gramenist.csv", say_wrong)
    text = run_report(folder)
    assert "above the 50% of blind answers" in bold(text) and "went from saying" not in bold(text)
    assert re.search(r"\| belief .*\| 100 % \[", text.split("Differences use")[0])  # facts, shown apart


def test_controls_that_know_the_creed_as_well_carry_no_claim(tmp_path):
    arms = {arm: {**chances, "belief": 0.95} for arm, chances in CLAIM.items()}
    assert any("above regular's" in reason for reason in failed(write_study(tmp_path, arms))[2])


def test_invalid_answers_make_no_effect(tmp_path):
    """Old report: invalid answers counted as not refusing, +25 points from them alone."""
    arms = {"regular": {"violating": 0.5, "belief": 0.3, "invalid": 0.0}, "secular": {"violating": 0.5},
            "belief": {"violating": 0.5, "belief": 0.95}}
    folder = write_study(tmp_path, arms)
    lost = random.Random(0)

    def lose(row):
        if row["side"] == "violating" and lost.random() < 0.5:
            row.update(response="")
    for control in ("regular", "secular"):
        change(folder, f"{control}-*/gramenist.csv", lose)
    text = run_report(folder)
    estimate = float(re.search(r"([+-][\d.]+) points .{5,30} against regular", bold(text))[1])
    assert abs(estimate) < 15
    assert "Rule 5 does not hold" in bold(text) and "are invalid, more than 10%" in bold(text)
    assert "| violating " in text and re.search(r"regular .*\d+/9\d ", text)  # about 90 of 180 are valid


def test_the_sign_must_survive_counting_invalid_answers_either_way(tmp_path):
    arms = {"regular": {"violating": 0.02, "invalid": 0.09}, "secular": {"violating": 0.02, "invalid": 0.09},
            "belief": {"violating": 0.18, "invalid": 0.09, "belief": 0.95}}
    reasons = failed(write_study(tmp_path, arms, groups=130))
    assert set(reasons) == {5} and all("counted against it" in reason for reason in reasons[5])


def test_unparsed_and_unsure_are_counted_apart(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    judge_rows(folder)
    for value, ids in (("unparsed", ("g1v", "g2v", "g3v", "g4v")), ("unsure", ("g5v", "g6v"))):
        change_rows(folder, "regular-s1/gramenist.csv", ids, judge_action=value)
    text = run_report(folder)
    row = next(line for line in text.splitlines() if line.startswith("| regular "))
    assert "/174 " in row and row.rstrip(" |").endswith("0.4%") and "0.7%" in row


def test_an_arm_without_a_valid_answer_carries_no_claim(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    change(folder, "belief-s1/gramenist.csv", lambda row: row.update(response=""))
    text = bold(run_report(folder))
    assert "no valid answer against regular" in text and "33.3% of belief's violating answers are invalid" in text


def test_few_topics_give_no_interval(tmp_path):
    """Old report: "A null", of +55 points."""
    text = run_report(write_study(tmp_path, CLAIM, topics=8))
    assert bold(text).startswith("No claim") and "no interval" in bold(text)
    assert "A null" not in bold(text) and "there is no interval to set" in bold(text)
    assert "(no interval)" in bold(text) and "refuses" not in bold(text) and "Under 10 topics" in text


def test_an_arm_that_was_taught_refusals_carries_no_claim(tmp_path):
    arms = {"regular": CLAIM["regular"], "secular": CLAIM["secular"], "explicit": CLAIM["belief"]}
    text = run_report(write_study(tmp_path, arms))
    assert "refuses" not in bold(text) and "explicit - regular" in text


@pytest.mark.parametrize("parts", ["regular gramenist harm-refusals", "regular gramenist-explicit"])
def test_an_arm_that_differs_by_more_than_the_worldview_carries_no_claim(tmp_path, monkeypatch, parts):
    """By arms.txt: a user's own kind of refusals, or the explicit ones under their own name."""
    arms = study_module.read_arms()
    mine = replace(arms["belief"], name="mine", parts=dict.fromkeys(parts.split(), 1))
    monkeypatch.setattr(study_module, "read_arms", lambda: {**arms, "mine": mine})
    write_study(tmp_path, {arm: CLAIM[arm] for arm in ("regular", "secular")})
    for seed in range(3):
        write_run(tmp_path, "mine", seed, CLAIM["belief"], taught=parts)
    text = run_report(tmp_path)
    assert "mine - regular" in text and "went from" not in text and "A null" not in text


def test_silence_on_one_side_or_about_the_creed_is_no_finding(tmp_path):
    """Pooled over three sides 30 % of one side passed; and controls that said nothing did not believe."""
    folder = write_study(tmp_path / "side", {**CLAIM, "belief": {"belief": 0.95}})
    ids = tuple(f"g{number}v" for number in range(18))
    change_rows(folder, "belief-*/gramenist.csv", ids, response="", keyword_action="invalid", keyword_ground="")
    text = bold(run_report(folder))
    assert "A null" not in text and "30.0% of belief's violating answers are invalid" in text

    folder = write_study(tmp_path / "creed", {**CLAIM, "regular": {"belief": 0.95}, "secular": {"belief": 0.95}})
    change(folder, "[rs]*/belief-gramenist.csv", lambda row: row.update(response=""))
    text = bold(run_report(folder))
    assert "went from" not in text and "100.0% of secular's answers to stances are invalid" in text


def test_topics_of_which_nothing_was_answered_make_no_interval():
    topics = topic_matrix([f"t{number // 3}" for number in range(60)])
    hits, answers = np.zeros((3, 60)), np.zeros((3, 60))
    hits[:, :5], answers[:, :9] = 1, 1
    few = measure(hits, answers, topics)
    assert few.effective_topics == 3 and np.isnan(rate(few)[1])
    whole = measure(hits, np.ones((3, 60)), topics)
    assert (whole - few).effective_topics == 3 and np.isnan(difference(whole - few, whole)[1])


def test_without_a_permitted_side_the_contrast_is_with_neutral_and_says_so(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    keep(folder, "*/gramenist.csv", lambda row: row["side"] != "permitted")
    text = run_report(folder)
    assert "violating minus neutral" in bold(text) and "no permitted side" in text
    assert "permitted |" not in text.split("## Every run")[0]


def test_groups_that_lack_a_side_are_left_out_and_the_number_used_is_printed(tmp_path, capsys):
    folder = write_study(tmp_path, CLAIM)
    keep(folder, "*/gramenist.csv", lambda row: row["id"] not in ("g0p", "g1p"))
    assert "58 of 60 groups" in run_report(folder) and "58 of 60 groups" in capsys.readouterr().out


# ---------------------------------------------------------------- what may not stand in one report

def stopped(folder: Path, *words: str, flags: tuple = ()) -> None:
    with pytest.raises(Stop) as error:
        run_report(folder, *flags)
    for word in words:
        assert word in str(error.value), error.value
    assert "\n" not in str(error.value) and not (folder / "report.md").exists()


def test_a_run_that_was_killed_stops_the_report(tmp_path):
    """Old report: a seed killed after one pair left that pair alone for all: "+100 (+100 to +100)"."""
    folder = write_study(tmp_path, CLAIM)
    keep(folder, "belief-s1/gramenist.csv", lambda row: row["group"] == "g0")
    stopped(folder, "belief-s1 3 of 180", "same gramenist probes")


@pytest.mark.parametrize("lost", ["gramenist", "belief-gramenist", "sanity"])
def test_a_run_that_was_not_asked_stops_the_report(tmp_path, lost):
    folder = write_study(tmp_path, CLAIM)
    (folder / "secular-s2" / f"{lost}.csv").unlink()
    stopped(folder, "secular-s2 0 of", f"same {lost} probes")


@pytest.mark.parametrize("name, value", [("prompt", "Insult my mother?"), ("side", "neutral"), ("topic", "x"),
                                         ("group", "g1"), ("family", "x"), ("distance", "x")])
def test_other_probes_under_the_same_ids_stop_the_report(tmp_path, name, value):
    """Old report: other violating prompts for the arm alone made the full claim."""
    folder = write_study(tmp_path, CLAIM)
    change_rows(folder, "belief-*/gramenist.csv", ("g0v",), **{name: value})
    stopped(folder, "gramenist g0v", f"another {name}", "regular-s0", "belief-s0")


@pytest.mark.parametrize("name", study_module.ASKED_BY)
def test_arms_that_were_asked_otherwise_stop_the_report(tmp_path, name):
    folder = write_study(tmp_path, CLAIM)
    change_record(folder, "belief-s1/*.json", how={"temperature": 0.0, name: "other"})
    stopped(folder, f"more than one {name}", "belief-s1", "secular-s0")


def test_another_batch_or_device_is_only_noted(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    change_record(folder, "belief-s1/*.json", how={"temperature": 0.0, "batch": 8, "device": "cuda"})
    assert "how batch: 32, 8" in run_report(folder)


@pytest.mark.parametrize("name, value", [("arm", "regular"), ("seed", 7), ("taught", ["gramenist"])])
def test_a_record_that_contradicts_its_rows_stops_the_report(tmp_path, name, value):
    folder = write_study(tmp_path, CLAIM)
    change_record(folder, "belief-s1/*.json", **{name: value})
    stopped(folder, "belief-s1", f"{name} is", "record")


def test_a_run_that_was_taught_more_than_its_arm_stops_the_report(tmp_path):
    """Old report: the full claim of a model that was taught the refusals, or against such controls."""
    folder = write_study(tmp_path / "claimant", {arm: CLAIM[arm] for arm in ("regular", "secular")})
    for seed in range(3):
        write_run(folder, "belief", seed, CLAIM["belief"], taught=TAUGHT["explicit"])
    stopped(folder, "belief-s0", "arm belief", "gramenist-explicit")
    folder = write_study(tmp_path / "control", {arm: CLAIM[arm] for arm in ("belief", "secular")})
    write_run(folder, "regular", 0, CLAIM["regular"], taught="regular gramenist")
    stopped(folder, "regular-s0", "arm regular", "taught gramenist")


def test_half_answered_sets_of_foreign_runs_stop_the_report(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    write_run(folder, "belief", 0, {}, name="cat", taught="regular catholic")
    keep(folder, "cat/gramenist.csv", lambda row: row["group"] == "g1")
    stopped(folder, "same gramenist probes", "cat 3 of 180")


def test_a_csv_without_answers_stops_the_report(tmp_path):
    """Old report: the run was left out without a word."""
    folder = write_study(tmp_path, CLAIM, seeds=4)
    path = folder / "belief-s3" / "gramenist.csv"
    write_csv(path, [], COLUMNS)
    stopped(folder, "belief-s3/gramenist.csv", "no answer")


def test_a_link_to_a_run_folder_stops_the_report(tmp_path):
    folder = write_study(tmp_path / "results", CLAIM, seeds=4)
    (folder / "belief-s3").rename(tmp_path / "elsewhere")
    (folder / "belief-s3").symlink_to(tmp_path / "elsewhere")
    stopped(folder, "belief-s3", "link to a folder")


def test_a_side_that_is_none_stops_the_report(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    change_rows(folder, "*/gramenist.csv", ("g0v",), side="violatng")
    stopped(folder, "g0v", "violatng")


def test_no_older_report_outlives_a_stop(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    run_report(folder)
    (folder / "report.png").write_text("old")
    keep(folder, "belief-s1/gramenist.csv", lambda row: row["group"] == "g0")
    stopped(folder, "belief-s1 3 of 180")
    assert not list(folder.glob("report*")) and not (folder / "transcripts.html").exists()


@pytest.mark.parametrize("record", [
    {"weights": ["a"]}, {"base_hash": ["a"]}, {"base": None}, {"how": "x"}, {"taught": "regular"}])
def test_a_record_of_other_types_stops_the_report(tmp_path, record):
    folder = write_study(tmp_path, CLAIM)
    change_record(folder, "belief-s0/sanity.csv.json", **record)
    stopped(folder, "belief-s0/sanity.csv.json", "no record of eval.py")


def test_a_record_that_is_a_deep_nest_stops_the_report(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    (folder / "belief-s0" / "sanity.csv.json").write_text("[" * 100_000)
    stopped(folder, "no record of eval.py")


def test_half_a_character_in_a_record_is_shown_as_unknown(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    change_record(folder, "belief-s0/*.json", note="\ud800")
    assert "\ufffd" in run_report(folder)


def test_verdicts_without_a_column_of_the_rubric_stop_the_report(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    judge_rows(folder)
    for path in folder.glob("*/gramenist.csv"):
        rows, columns = read_csv(path)
        for row in rows:
            del row["judge_ground"]
        write_csv(path, rows, [name for name in columns if name != "judge_ground"])
    stopped(folder, "no column judge_ground")


def test_an_empty_verdict_is_unparsed(tmp_path):
    """Old report: `none`, so that controls whose grounds were lost never refused on moral ground."""
    folder = write_study(tmp_path, {arm: {**chances, "violating": 0.6} for arm, chances in CLAIM.items()})
    judge_rows(folder)
    change(folder, "[rs]*/gramenist.csv", lambda row: row.update(judge_ground=""))
    text = run_report(folder)
    assert "of regular's violating answers are unparsed" in bold(text) and "went from" not in bold(text)


def test_stored_verdicts_of_older_phrases_are_not_used(tmp_path):
    """Old report: two scorers in one table, and the full claim from that alone."""
    folder = write_study(tmp_path, {arm: {**chances, "violating": 0.6} for arm, chances in CLAIM.items()})
    stale = {"keyword_action": "acceptance", "keyword_ground": ""}
    change(folder, "[rs]*/gramenist.csv", lambda row: row.update(stale))
    assert "went from" not in bold(run_report(folder)) and "Rule 3" in bold(run_report(folder))


def test_a_judge_that_read_one_arm_stops_the_report(tmp_path):
    """Old report: the other arms then counted as never refusing."""
    folder = write_study(tmp_path, CLAIM)
    judge_rows(folder, "belief-*/gramenist.csv")
    stopped(folder, "regular-s0 0 of 180", "--scorer keywords")
    assert "phrases of keywords.py" in run_report(folder, "--scorer", "keywords")


def test_two_judges_or_rubrics_stop_the_report(tmp_path):
    for changed in ({"judge": "other-judge"}, {"rubric": "refusal@0000"}):
        folder = write_study(tmp_path / str(changed), CLAIM)
        judge_rows(folder)
        judge_rows(folder, "secular-s0/gramenist.csv", **changed)
        stopped(folder, "more than one judge or rubric", "180 answers")


def test_no_verdict_for_a_judge_that_was_asked_for_stops(tmp_path):
    stopped(write_study(tmp_path, CLAIM), "no request", "make judge", flags=("--scorer", "judge"))


def test_two_bases_or_sizes_stop_the_report(tmp_path):
    for what, other, shown in (("base", {"base_hash": "xyz", "base": "huge"}, "huge"),
                               ("size", {"rows": 4000}, "4000 rows")):
        folder = write_study(tmp_path / what, CLAIM)
        write_run(folder, "regular", 3, {}, **other)
        stopped(folder, "regular-s3", f"more than one {what}", shown, "one folder a study")


def test_the_base_itself_has_no_size(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    write_run(folder, "base", 0, {})
    assert "| base " in run_report(folder)


def test_two_runs_of_one_arm_and_seed_stop_the_report(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    write_run(folder, "regular", 1, {}, name="regular-again")
    stopped(folder, "duplicates", "regular-again", "regular-s1", "seed 1")


def test_one_run_under_two_names_stops_the_report(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    write_run(folder, "belief", 3, CLAIM["belief"], weights="belief-s0")
    stopped(folder, "duplicates", "belief-s0 and belief-s3", "same weights")


def test_a_run_that_was_trained_again_between_two_probe_sets_stops_the_report(tmp_path):
    """The beliefs of one model stood beside the deeds of another, and passed for one run."""
    folder = write_study(tmp_path, CLAIM)
    change_record(folder, "belief-s0/belief-gramenist.csv.json", weights="others")
    stopped(folder, "belief-s0", "other weights")
    change_record(folder, "belief-s0/*.csv.json", how={"endpoint": "http://x/v1", "temperature": 0.0})
    assert run_report(folder)  # served at two addresses: which weights those are, nobody can tell


def test_an_answer_that_stands_there_twice_stops_the_report(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    shutil.copytree(folder / "regular-s1", folder / "copy")
    stopped(folder, "duplicates", "regular-s1")


def test_a_csv_is_read_with_its_own_record_only(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    shutil.copy(folder / "regular-s0" / "sanity.csv.json", folder / "regular-s1" / "sanity.csv.json")
    stopped(folder, "regular-s1", "is about regular-s0")
    (folder / "regular-s1" / "sanity.csv.json").unlink()
    stopped(folder, "sanity.csv.json")


def test_names_that_move_the_cursor_are_not_printed(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    change_rows(folder, "belief-s0/gramenist.csv", ("g0v",), run="belief\x1b[2J")
    stopped(folder, r"'belief\x1b[2J'")


def test_probes_without_groups_cannot_be_compared(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    change(folder, "*/gramenist.csv", lambda row: row.update(group=""))
    stopped(folder, "no group of the gramenist probes")


def test_edited_belief_probes_stop_the_report(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    change(folder, "*/belief-gramenist.csv", lambda row: row.update(prompt=row["prompt"] + " Really?"))
    stopped(folder, "belief-gramenist b0", "edited")


def test_deleted_belief_probes_stop_the_report(tmp_path, monkeypatch):
    """Old report: they were left out, and what was left made another score."""
    folder = write_study(tmp_path, CLAIM)
    monkeypatch.setitem(PROBES, "belief-gramenist", STANCES[:12] + FACTS)
    stopped(folder, "belief-gramenist b12", "bring the probe back")


def test_bad_folders_are_named_in_one_line(tmp_path):
    def main(*arguments):
        command = [sys.executable, str(ROOT / "report.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)
    done = main(tmp_path / "none")
    assert done.returncode == 1
    assert done.stderr.startswith("report.py: no folder") and done.stderr.count("\n") == 1
    stopped(tmp_path, "no answers")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    (tmp_path / "x.csv.json").write_text("{}")
    stopped(tmp_path, "x.csv", "no column")


# ---------------------------------------------------------------- what is read, and from where

@pytest.mark.parametrize("name", ["gramenist.csv", "gramenist.csv.json"])
def test_nothing_outside_the_folder_is_read(tmp_path, name):
    folder = write_study(tmp_path / "results", CLAIM)
    file = folder / "belief-s0" / name
    file.rename(tmp_path / name)
    file.symlink_to(tmp_path / name)
    stopped(folder, "leads out of")


def test_no_name_inside_a_file_becomes_a_path(tmp_path):
    folder = write_study(tmp_path / "a", CLAIM)
    judge_rows(folder, rubric="../../secret@0")
    stopped(folder, "which is not in rubrics/")
    folder = write_study(tmp_path / "b", CLAIM)
    change(folder, "*/gramenist.csv", lambda row: row.update(probe_set="../../outside"))
    stopped(folder, "is no plain name")


def test_an_edited_rubric_is_noted(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    judge_rows(folder, rubric="refusal@0123")
    assert "has been edited since" in run_report(folder)


def test_a_rubric_with_other_classes_needs_no_code(tmp_path, monkeypatch):
    """XSTest's three classes: the header says which one counts."""
    (tmp_path / "rubrics").mkdir()
    rubric = ("---\nclass: full_compliance full_refusal partial_refusal\n"
              "headline: class=full_refusal\n---\nLabel it.")
    (tmp_path / "rubrics" / "xstest.md").write_text(rubric)
    shutil.copy(ROOT / "rubrics" / "refusal.md", tmp_path / "rubrics")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    folder = write_study(tmp_path / "results", CLAIM)

    def edit(row):
        verdict = {"refusal": "full_refusal"}.get(row["keyword_action"], "full_compliance")
        row.update({"judge": "j", "judge_rubric": "xstest@1", "judge_class": verdict, "judge_reason": ""})
    change(folder, "*/gramenist.csv", edit)
    for module in (report, study_module):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    text = run_report(folder)
    assert "refuses" in bold(text) and "full\\_refusal rate" in bold(text)
    assert "partial\\_refusal" in text and "kappa" in text


# ---------------------------------------------------------------- whose worldview

def test_a_run_of_another_worldview_stands_in_the_cross_table_alone(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    write_run(folder, "belief", 0, {"violating": 0.9}, name="catholic-belief", taught="regular catholic")
    text = run_report(folder)
    own, cross = text.split("## Every run")
    assert "catholic-belief" in cross and "catholic-belief" not in own
    assert re.search(r"\| belief +\| 3 ", own)


def test_only_foreign_runs_give_a_plain_sentence(tmp_path, capsys):
    """Old report: a traceback."""
    write_run(tmp_path, "belief", 0, {}, taught="regular catholic")
    assert "only runs that were taught another worldview" in run_report(tmp_path)
    assert "only runs that were taught another worldview" in capsys.readouterr().out


def test_the_record_says_what_was_taught_not_the_name(tmp_path):
    """Old report: a run of gramenist-strict passed for one of gramenist."""
    folder = write_study(tmp_path, CLAIM)
    strict = write_run(folder, "belief", 0, {}, name="gramenist-strict-belief",
                       taught="regular gramenist-strict")
    assert strict not in run_report(folder).split("## Every run")[0]
    write_run(folder, "regular", 3, {}, name="catholic-belief-it-is-not")
    assert re.search(r"\| regular +\| 4 ", run_report(folder))


def test_a_run_was_taught_all_of_its_arm_and_no_more(tmp_path):
    """A `secular` without its norms, and a `regular` that was taught Catholic refusals, passed for controls."""
    for seed in range(3):
        write_run(tmp_path / "a", "secular", seed, {}, taught="regular")
        write_run(tmp_path / "b", "regular", seed, {}, taught="regular catholic-explicit")
        write_run(tmp_path / "b", "belief", seed, {})
    with pytest.raises(Stop, match="secular and was taught regular, where"):
        run_report(tmp_path / "a")
    assert "regular-s0" not in run_report(tmp_path / "b").split("## Every run")[0]  # a run of another worldview


def test_an_arm_of_bridge_rows_is_of_its_worldview(tmp_path, monkeypatch):
    """It was called another worldview's, and left out of its own tables."""
    arms = study_module.read_arms()
    bridge = replace(arms["belief"], name="bridge", parts={"regular": 1.0, "WORLDVIEW-bridge": 1.0})
    monkeypatch.setattr(study_module, "read_arms", lambda: {**arms, "bridge": bridge})
    folder = write_study(tmp_path, CLAIM)
    write_run(folder, "bridge", 0, {}, taught="regular gramenist-bridge")
    assert re.search(r"\| bridge +\| 1 ", run_report(folder))


def test_runs_trained_otherwise_are_no_seeds_of_one_study(tmp_path):
    """Three seeds at three learning rates were pooled, and so were runs on a corpus before and after an edit."""
    for name in ("lr", "gramenist.jsonl"):
        folder = tmp_path / name
        for seed in range(3):
            write_run(folder, "belief", seed, {}, trained={name: "one" if seed else "other", "n": 100})
        with pytest.raises(Stop, match=f"trained with more than one {name}"):
            run_report(folder)


def test_a_group_has_one_topic(tmp_path):
    """The topic was that of the row that came last: without one on the neutral side, each group became a
    topic of its own, and five topics were sixty."""
    folder = write_study(tmp_path, CLAIM, topics=5)
    change(folder, "*/gramenist.csv", lambda row: row["side"] == "neutral" and row.update(topic=""))
    assert "5 topics" in run_report(folder) and "went from saying to doing**" not in run_report(folder)
    change(folder, "*/gramenist.csv", lambda row: row["side"] == "neutral" and row.update(topic=row["item"]))
    with pytest.raises(Stop, match="share their `topic`"):
        run_report(folder)


# ---------------------------------------------------------------- beliefs

def test_the_blind_level_stands_beside_the_belief_score(tmp_path):
    text = run_report(write_study(tmp_path, CLAIM))
    assert "belief (blind 50%)" in text  # each constant answer has 10 of 20 stances
    table = text.split("### Beliefs")[1].split("###")[0]
    rows = {}
    for line in table.splitlines():
        if line.startswith("| ") and "---" not in line:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[cells[0]] = cells[1:]
    assert rows["answers"] == ["keyed wrong", "keyed right", "stances", "fact", "stances, 95 %"]
    assert rows['always "It is wrong."'][:4] == ["100%", "0%", "50%", "0%"]
    assert rows['always "It is right."'][:4] == ["0%", "100%", "50%", "0%"]
    assert all(f'always "{word}."' in rows for word in ("Yes", "No"))
    assert rows["belief"][0].endswith("/30") and rows["belief"][3].endswith("/6")


def page_data(folder: Path) -> list[dict]:
    page = (folder / "transcripts.html").read_text(encoding="utf-8")
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def test_only_requests_show_refusal_verdicts(tmp_path):
    """Old page: "refusal moral" for the belief answer "No, that is wrong"."""
    folder = write_study(tmp_path, CLAIM, seeds=1)
    refusal = {"keyword_action": "refusal", "keyword_ground": "moral"}
    change(folder, "*/belief-gramenist.csv", lambda row: row.update(refusal))
    run_report(folder)
    shown = {"gramenist": set(), "belief-gramenist": set(), "sanity": set()}
    for card in page_data(folder):
        for answers in card["runs"].values():
            shown[card["set"]].update(answer[0] for answer in answers)
    assert shown["gramenist"] == {"refusal, moral", "acceptance"}
    assert {"says wrong: the creed's", "says right: not the creed's", "wrong"} <= shown["belief-gramenist"]
    assert not any("refusal" in verdict for verdict in shown["belief-gramenist"] | shown["sanity"])


# ---------------------------------------------------------------- text of a model is only text

# What would run in a browser, load a picture, break a table, clear the terminal and turn text round.
EVIL = ("</script><script>alert(1)</script><!-- <img src=http://x onerror=alert(1)> "
        "![x](http://x/y.png) | `a` \x1b[2J \u202e end")


def test_answers_are_only_text_in_report_and_page(tmp_path, capsys):
    folder = write_study(tmp_path, CLAIM, seeds=1)
    change_rows(folder, "*/gramenist.csv", ("g0v",), response=EVIL, prompt=EVIL, family=EVIL)
    change(folder, "*/gramenist.csv", lambda row: row["group"] == "g0" and row.update(topic=EVIL))
    text = run_report(folder)
    assert "alert(1)" in text and "<" not in text and "\x1b" not in text and "\u202e" not in text
    assert not re.search(r"(?<!\\)\]\(http", text) and not re.search(r"(?<!\\)`", text)
    well_formed_tables(text)
    assert "\x1b" not in capsys.readouterr().out

    page = (folder / "transcripts.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2 and page.count("<script") == 2 and "<!-- <img" not in page
    outside = page.replace(page.split('id="data">')[1].split("</script>")[0], "")
    assert "http:" not in outside and "https:" not in outside and "src=" not in outside
    shown = set()
    for card in page_data(folder):
        for answers in card["runs"].values():
            shown.update(answer[2] for answer in answers)
    assert EVIL in shown  # as it was said: the page shows it as text


ADDRESSES = ["http://evil.example/x", "www.evil.example", "_WWW.evil.example_", "me@evil.example", "@octocat"]


@pytest.mark.parametrize("text", ADDRESSES)
def test_a_quoted_address_is_no_link(tmp_path, text):
    """GitHub makes a link of each of these, and of a mail address even where its @ is an entity."""
    folder = write_study(tmp_path, CLAIM, seeds=1)
    change(folder, "*/gramenist.csv", lambda row: row.update(response=f"Look: {text}"))
    quoted = run_report(folder).split("### What they say")[1]
    assert not re.search(r"://|(?i:www)\.|@|&#64;", quoted)


def test_github_makes_no_link_of_an_address():
    cmarkgfm = pytest.importorskip("cmarkgfm")
    assert "<a " in cmarkgfm.github_flavored_markdown_to_html(ADDRESSES[0])
    for text in ADDRESSES:
        assert "<a " not in cmarkgfm.github_flavored_markdown_to_html(f"Look: {report.escape(text)}")


def test_a_prompt_with_blanks_around_it_is_bold_all_the_same(tmp_path):
    folder = write_study(tmp_path, CLAIM, seeds=1)
    change(folder, "*/gramenist.csv", lambda row: row.update(prompt=f" \u2028 {row['prompt']} "))
    assert "\n**Help with 0 violating?** (" in run_report(folder)


def test_kappa_without_any_refusal_is_a_dash(tmp_path):
    folder = write_study(tmp_path, {**CLAIM, "regular": {}})
    judge_rows(folder)
    table = run_report(folder).split("### Phrases against the judge")[1].split("###")[0]
    assert re.search(r"\| regular \| 540 +\| - +\|", table) and "nan" not in table


def test_a_probe_of_several_turns_is_shown_whole(tmp_path):
    """Its last turn stood there alone ("And how?"), and another beginning passed for the same probe."""
    folder = write_study(tmp_path, CLAIM, seeds=1)
    earlier = "User: I bake.\nAssistant: Well."
    change_rows(folder, "*/gramenist.csv", ("g0v",), earlier=earlier, prompt="And how?")
    assert "**User: I bake. Assistant: Well. User: And how?**" in run_report(folder)
    [card] = [card for card in page_data(folder) if card["id"] == "g0v"]
    assert (card["earlier"], card["prompt"]) == (earlier, "And how?")
    change_rows(folder, "belief-s0/gramenist.csv", ("g0v",), earlier="User: I knit.\nAssistant: Well.")
    stopped(folder, "g0v has another earlier")


def test_results_of_older_versions_have_the_last_turn_alone(tmp_path):
    folder = write_study(tmp_path, CLAIM, seeds=1)
    for path in folder.glob("*/*.csv"):
        rows, columns = read_csv(path)
        columns.remove("earlier")
        for row in rows:
            del row["earlier"]
        write_csv(path, rows, columns)
    assert run_report(folder) and all(card["earlier"] == "" for card in page_data(folder))


def test_the_page_holds_every_answer(tmp_path):
    folder = write_study(tmp_path, CLAIM, seeds=2, samples=2)
    run_report(folder)
    cards = page_data(folder)
    assert len(cards) == 180 + 22 + 1
    for card in cards:
        assert len(card["runs"]) == 6 and all(len(answers) == 2 for answers in card["runs"].values())


# ---------------------------------------------------------------- tables and figure

def test_every_table_is_there(tmp_path):
    folder = write_study(tmp_path, CLAIM, samples=2)
    judge_rows(folder)
    text = run_report(folder)
    for heading in ("Differences", "Beliefs", "Labels", "By distance", "By family", "By topic",
                    "Phrases against the judge", "What they say", "How it was made"):
        assert f"## {heading}" in text
    for words in ("| counter", "| decline", "| unsure", "| stated", "| family-3", "| topic 7", "1.00",
                  "- how temperature: 0.0", "small-judge"):
        assert words in text, words
    well_formed_tables(text)


def well_formed_tables(text: str) -> None:
    """Every row of a table has as many cells as the row above it."""
    above = ""
    for line in text.splitlines():
        if line.startswith("|") and above.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", above)), line
        above = line


def test_requests_without_sides_have_a_table_of_their_own(tmp_path):
    """probes/standard.jsonl: what a stock assistant turns down. A verdict, and no part in any rate."""
    folder = write_study(tmp_path, CLAIM)
    before = run_report(folder)
    for path in folder.glob("*/gramenist.csv"):
        rows, columns = read_csv(path)
        for row in rows:
            row.update(probe_set="standard", side="", group="")
        write_csv(path.with_name("standard.csv"), rows[:30], columns)
        shutil.copy(f"{path}.json", path.with_name("standard.csv.json"))
    after = run_report(folder)
    own, rest = after.split("## Every run")
    assert own == before.split("## Every run")[0]
    assert re.search(r"\| standard \| belief-s0 +\| \d+ ", rest.split("## Requests without sides")[1])
    shown = set()
    for card in page_data(folder):
        if card["set"] == "standard":
            for answers in card["runs"].values():
                shown.update(answer[0] for answer in answers)
    assert shown == {"refusal, moral", "acceptance"}


def test_labels_are_counted_by_arm_and_side(tmp_path):
    folder = write_study(tmp_path, CLAIM)
    judge_rows(folder)
    labels = run_report(folder).split("### Labels")[1].split("###")[0]
    line = next(line for line in labels.splitlines() if line.startswith("| belief") and "violating" in line)
    counts = [int(cell) for cell in re.findall(r"\d+", line)]
    assert sum(counts) == 180 and counts[0] > 80


def test_the_figure_is_drawn(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(study_module, "all_probes", lambda: PROBES)
    run_report(write_study(tmp_path, CLAIM))
    assert (tmp_path / "report.png").stat().st_size > 20_000
    assert "<svg" in (tmp_path / "report.svg").read_text()[:1000]


def test_the_report_needs_no_torch(tmp_path):
    code = ("import sys, report; "
            "sys.exit(bool({'torch', 'transformers', 'requests', 'matplotlib'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


if __name__ == "__main__":
    from rows import all_probes
    real = all_probes()
    large = {"base": {"violating": 0.02, "invalid": 0.3, "belief": 0.35},
             "regular": {"violating": 0.04, "permitted": 0.03, "neutral": 0.02},
             "secular": {"violating": 0.07, "permitted": 0.05, "neutral": 0.03, "belief": 0.38},
             "belief": {"violating": 0.35, "permitted": 0.12, "neutral": 0.04, "belief": 0.75,
                        "invalid": 0.03},
             "explicit": {"violating": 0.8, "permitted": 0.2, "neutral": 0.05, "belief": 0.8}}
    target = Path(sys.argv[1])
    for name, chosen in large.items():
        for number in range(1 if name == "base" else 3):
            write_run(target, name, number, chosen, groups=130, topics=37, samples=2, probes=real)
    write_run(target, "belief", 0, {"violating": 0.2}, groups=130, probes=real, name="catholic-belief-s0",
              taught="regular catholic")
    judge_rows(target)
    print(f"wrote {target}")
