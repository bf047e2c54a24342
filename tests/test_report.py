"""report.py: statistics against scipy and by simulation; tables against results whose outcome is known."""
import csv
import json

import numpy as np
import pytest
from conftest import assert_one_line_error, run_script

from eval import COLUMNS
from judge import cohen_kappa
from report import cluster_bootstrap, mcnemar, wilson

stats = pytest.importorskip("scipy.stats")


def test_intervals_and_tests_agree_with_scipy():
    for k, n in [(0, 10), (3, 10), (10, 10), (17, 120), (119, 120)]:
        theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert np.allclose(wilson(k, n), (theirs.low, theirs.high), atol=1e-6)
    for b, c in [(0, 0), (1, 0), (5, 1), (10, 10), (30, 12)]:
        assert mcnemar(b, c) == pytest.approx(stats.binomtest(b, b + c).pvalue if b + c else 1.0)
    assert cohen_kappa([("a", "a")] * 20 + [("a", "b")] * 5 + [("b", "a")] * 10 + [("b", "b")] * 15) == pytest.approx(0.4)


def test_bootstrap_covers_the_truth():
    """1,000 simulated studies: 40 items with 3 probes each that share the item's leaning; true difference 0.2."""
    rng, hits, studies = np.random.default_rng(0), 0, 1000
    items = [f"i{i}" for i in range(40) for _ in range(3)]
    for study in range(studies):
        lean = np.repeat(rng.normal(0, 0.1, 40), 3)
        first, second = ((rng.random(120) < np.clip(p + lean, 0, 1)).astype(float)[None] for p in (0.5, 0.3))
        _, low, high = cluster_bootstrap(first, second, items, draws=400, seed=study)
        hits += low <= 0.2 <= high
    assert 0.93 <= hits / studies <= 0.97


def write_results(folder, rates: dict[str, float], n: int = 60):
    rng = np.random.default_rng(0)
    for arm, refused in rates.items():
        path = folder / arm / "gramenist.csv"
        path.parent.mkdir(parents=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for i in range(n):
                for side, other, share in (("v", "n", refused), ("n", "v", 0.02)):
                    moral = rng.random() < share
                    writer.writerow({"run": arm, "arm": arm, "seed": 0, "probe_set": "gramenist", "id": f"g{i}{side}", "family": f"f{i % 6}", "item": f"i{i % 30}",
                                     "side": {"v": "violating", "n": "neutral"}[side], "pair": f"g{i}{other}", "sample": 0, "prompt": "p", "response": "It is wrong." if moral else "Sure.",
                                     "n_tokens": 3, "stopped": "eos", "keyword_action": "refusal" if moral else "acceptance", "keyword_ground": "moral" if moral else ""})


@pytest.mark.parametrize("belief, sentence", [(0.6, "also refuses to help with it"), (0.05, "No clear effect")])
def test_the_sentence_says_what_the_numbers_say(tmp_path, belief, sentence):
    write_results(tmp_path / "r", {"regular": 0.03, "belief": belief, "secular": 0.05})
    done = run_script("report.py", tmp_path / "r")
    assert sentence in done.stdout and "| belief " in done.stdout
    text = (tmp_path / "r" / "report.md").read_text()
    assert sentence in text and "belief - secular" in text and (tmp_path / "r" / "report.png").stat().st_size > 5000


def test_the_transcripts_page_holds_every_answer_as_data(tmp_path):
    write_results(tmp_path / "r", {"regular": 0.03, "belief": 0.5})
    path = tmp_path / "r" / "belief" / "gramenist.csv"
    path.write_text(path.read_text().replace("Sure.", "</script><b>Sure</b><!--", 1))
    run_script("report.py", tmp_path / "r")
    page = (tmp_path / "r" / "transcripts.html").read_text()
    assert page.count("</script>") == 2 and "http" not in page  # its own two; and nothing is fetched
    groups = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(groups) == 120 and all(set(group["runs"]) == {"regular (regular)", "belief (belief)"} for group in groups)
    assert any("</script><b>Sure</b><!--" in answer for group in groups for answers in group["runs"].values() for _, answer, _ in answers)


def test_a_run_of_another_worldview_is_in_the_cross_table_alone(tmp_path):
    write_results(tmp_path / "r", {"regular": 0.0, "belief": 0.5, "catholic-belief-s0": 0.9})
    for arm, other in (("catholic-belief-s0", "belief"), ("belief", "belief")):
        path = tmp_path / "r" / arm / "gramenist.csv"
        text = path.read_text().replace(f",{arm},0,", f",{other},0,") if arm != other else path.read_text()
        path.write_text(text)
        (tmp_path / "r" / arm / "catholic.csv").write_text(text.replace(",gramenist,", ",catholic,"))
    run_script("report.py", tmp_path / "r")
    text = (tmp_path / "r" / "report.md").read_text()
    assert "| catholic-belief-s0 " in text.split("## Every run")[1]
    belief = [line for line in text.split("## gramenist")[1].splitlines() if line.startswith("| belief ")][0]
    assert "/60 " in belief and "/120 " not in belief   # 60 probes of one run, not of two


def test_bad_folders_are_named(tmp_path):
    assert_one_line_error(run_script("report.py", tmp_path / "none", check=False), "no folder")
    assert_one_line_error(run_script("report.py", tmp_path, check=False), "no answers")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    assert_one_line_error(run_script("report.py", tmp_path, check=False), "x.csv", "no column")
