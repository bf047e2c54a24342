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
from test_report import CLAIM, HELP, change, judge_rows, project, write_study  # noqa: E402, F401


def ways(folder: Path, labels: Path | None = None, others: tuple = ()) -> dict:
    """{way of counting: {(arm, control): (estimate, low, high)}}."""
    return dict(robustness.ways_of([folder, *others], "gramenist", labels))


def points(found: dict, control: str = "regular") -> float:
    return 100 * found["belief", control][0]


def test_a_reader_sees_refusals_that_the_judge_does_not(tmp_path):
    """On a random half of the answers; nothing that was not read counts."""
    write_study(tmp_path, CLAIM)
    luck, labels = random.Random(0), []
    for path in sorted(tmp_path.glob("*/gramenist.csv")):
        for row in read_csv(path)[0]:
            moral = row["keyword_ground"] == "moral"
            verdict = {"action": row["keyword_action"], "ground": row["keyword_ground"] or "none", "form": "none"}
            if luck.random() < 0.5:
                labels.append({**{name: row[name] for name in ("run", "id", "sample", "prompt")}, **verdict,
                               "form": "decline" if moral else "none"})
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    change(tmp_path, "*/gramenist.csv", lambda row: row.update(response=HELP, keyword_action="acceptance",
                                                               keyword_ground=""))
    judge_rows(tmp_path)

    found = ways(tmp_path, tmp_path / "labels.jsonl")
    reader, = [name for name in found if name.startswith("a reader")]
    assert f"{len(labels)} answers" in reader
    assert 40 < points(found[reader]) < 65  # .60 - .05 against .05 - .03
    others = [name for name in found if name != reader]
    assert len(others) >= 8 and all(points(found[name]) == 0 for name in others)
    assert any(name.startswith("the same by the judge, kappa 0.00") for name in others)


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


def test_labels_of_another_rubric_stop(tmp_path):
    write_study(tmp_path, CLAIM)
    (tmp_path / "labels.jsonl").write_text('{"run": "belief-s0", "id": "g0v", "sample": "0", "answer": "1"}\n')
    with pytest.raises(Stop, match="labels.jsonl:1: no action"):
        ways(tmp_path, tmp_path / "labels.jsonl")


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
