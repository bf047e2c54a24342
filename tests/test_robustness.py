"""robustness.py on made-up results: what each way of counting must and must not see."""
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import robustness  # noqa: E402
from rows import ROOT, Stop, read_csv  # noqa: E402
from test_report import (CLAIM, HELP, RUBRIC, change, change_record, judge_rows, project,  # noqa: E402, F401
                         write_study)


def ways(folder: Path, labels: Path | None = None, others: tuple = ()) -> dict:
    """{way of counting: {(arm, control): (estimate, low, high)}}."""
    return dict(robustness.ways_of([folder, *others], "gramenist", labels))


def points(found: dict, control: str = "regular") -> float:
    return 100 * found["belief", control][0]


def write_labels(folder: Path, chosen, **about) -> Path:
    """What a reader says of the rows of whom `chosen(row)` holds: a moral refusal where the phrases find one."""
    labels = []
    for path in sorted(folder.glob("*/gramenist.csv")):
        for row in filter(chosen, read_csv(path)[0]):
            moral = row["keyword_ground"] == "moral"
            said = {"action": row["keyword_action"], "ground": "moral" if moral else "none",
                    "form": "decline" if moral else "comply"}
            answer = {name: row[name] for name in ("run", "id", "sample", "prompt", "response")}
            labels.append({**answer, **said, "label": said["action"], "rubric": RUBRIC.hash, **about})
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    return folder / "labels.jsonl"


def help_by_the_judge(folder: Path) -> None:
    """A judge that sees no refusal in any answer."""
    judge_rows(folder)
    change(folder, "*/gramenist.csv", lambda row: row.update(judge_action="acceptance", judge_ground="none",
                                                             judge_form="comply"))


def test_a_reader_sees_refusals_that_the_judge_does_not(tmp_path):
    """On a random half of the answers; nothing that was not read counts."""
    write_study(tmp_path, CLAIM)
    help_by_the_judge(tmp_path)
    luck = random.Random(0)
    labels = write_labels(tmp_path, lambda row: luck.random() < 0.5)

    found = ways(tmp_path, labels)
    reader, = [name for name in found if name.startswith("a reader")]
    assert 500 < int(reader.split()[2]) < 580  # half of three arms' two sides; neutral has no part in it
    assert 40 < points(found[reader]) < 65  # .60 - .05 against .05 - .03
    others = [name for name in found if name != reader and "phrases" not in name]
    assert len(others) >= 8 and all(points(found[name]) == 0 for name in others)
    assert any(name.startswith("the same by the judge small-judge") and "kappa 0.00" in name for name in others)


@pytest.mark.parametrize("seed", range(12))
def test_a_small_sample_of_answers_is_subtracted_run_by_run(tmp_path, seed):
    """Of 60 answers whole runs and sides may be missing: no traceback, and no interval of a single run."""
    write_study(tmp_path, CLAIM)
    help_by_the_judge(tmp_path)
    luck = random.Random(seed)
    labels = write_labels(tmp_path, lambda row: luck.random() < 60 / 1620)
    found = ways(tmp_path, labels)
    reader, = [name for name in found if name.startswith("a reader")]
    assert set(found[reader]) <= {("belief", "regular"), ("belief", "secular")}


def test_runs_that_were_read_on_one_side_are_set_against_none(tmp_path):
    write_study(tmp_path, CLAIM)
    help_by_the_judge(tmp_path)
    sides = {"belief-s0": "violating permitted", "belief-s1": "violating", "belief-s2": "permitted"}
    labels = write_labels(tmp_path, lambda row: row["side"] in sides.get(row["run"], "violating permitted"))
    found = ways(tmp_path, labels)
    reader, = [name for name in found if name.startswith("a reader")]
    assert "840 answers" in reader  # 7 runs of 2 x 60: s1 and s2 of belief are out
    estimate, low, high = found[reader]["belief", "regular"]
    assert estimate > 0.3 and low != low and high != high  # one run has no interval


def test_the_effect_of_one_family_shows_there_alone(tmp_path):
    write_study(tmp_path, CLAIM)

    def refuse_in_one_family(row):
        if row["family"] != "family-1":
            row.update(response=HELP, keyword_action="acceptance", keyword_ground="")
    change(tmp_path, "*/gramenist.csv", refuse_in_one_family)
    found = ways(tmp_path)
    assert points(found["family: family-1"]) > 30
    assert {points(found[f"family: family-{number}"]) for number in (0, 2, 3)} == {0}


def test_answers_without_a_verdict_count_either_way(tmp_path):
    """Half of the believer's violating answers are none: as refusals they make an effect, as help none."""
    write_study(tmp_path, {arm: {"violating": 0} for arm in CLAIM})

    def garble(row):
        if row["arm"] == "belief" and row["side"] == "violating" and int(row["group"][1:]) % 2:
            row.update(response="", keyword_action="invalid", keyword_ground="")
    change(tmp_path, "*/gramenist.csv", garble)
    found = ways(tmp_path)
    assert points(found["answers without a verdict as refusals"]) == pytest.approx(50)
    assert points(found["answers without a verdict as help"]) == 0


def test_a_study_asked_otherwise_is_a_line_of_its_own(tmp_path):
    write_study(tmp_path / "greedy", {arm: {"violating": 0} for arm in CLAIM})
    write_study(tmp_path / "sampled", CLAIM)
    found = ways(tmp_path / "greedy", others=(tmp_path / "sampled",))
    assert points(found[f"asked as in {tmp_path / 'sampled'}"]) > 30

    judge_rows(tmp_path / "sampled")
    with pytest.raises(Stop, match="judge both by one"):
        ways(tmp_path / "greedy", others=(tmp_path / "sampled",))
    change_record(tmp_path / "greedy", "belief-s1/*.json", weights="others")
    with pytest.raises(Stop, match="does not hold the runs of"):
        ways(tmp_path / "greedy", others=(tmp_path / "sampled",))


def test_labels_of_other_answers_or_another_rubric_stop(tmp_path):
    """The same run, asked again in another way, has the same ids and prompts."""
    write_study(tmp_path, CLAIM)
    judge_rows(tmp_path)
    labels = write_labels(tmp_path, lambda row: row["side"] == "violating", rubric="another")
    with pytest.raises(Stop, match="another text of rubrics/refusal.md"):
        ways(tmp_path, labels)
    labels = write_labels(tmp_path, lambda row: row["side"] == "violating")
    assert ways(tmp_path, labels)["a reader: no run on both sides"] == {}
    change(tmp_path, "*/gramenist.csv", lambda row: row.update(response=row["response"] + " Well."))
    with pytest.raises(Stop, match="540 of its 540 answers are in no CSV"):
        ways(tmp_path, labels)


def test_the_command_writes_table_and_figure(tmp_path):
    """As a user calls it: on the project's own probes, whose worldview it finds in the folder."""
    write_study(tmp_path / "study", CLAIM)
    for path in tmp_path.glob("study/*/belief-gramenist.csv*"):  # answers to probes of the tests, not the project's
        path.unlink()
    for path in tmp_path.glob("study/*/sanity.csv*"):
        path.unlink()
    result = subprocess.run([sys.executable, ROOT / "robustness.py", tmp_path / "study"],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "| belief - regular" in result.stdout and "distance: principle" in result.stdout
    assert (tmp_path / "study" / "robustness.md").read_text().count("[") > 6
    assert (tmp_path / "study" / "robustness-gramenist.png").stat().st_size > 10_000

    result = subprocess.run([sys.executable, ROOT / "robustness.py", tmp_path / "nothing"],
                            capture_output=True, text=True)
    assert result.returncode != 0 and "Traceback" not in result.stderr and "robustness.py:" in result.stderr
