"""How far the headline hangs on what was chosen: the same difference, counted in other ways.

    python robustness.py results/gemma-3-270m
    python robustness.py results/gemma-3-270m --labels labels.jsonl     # and by a reader (judge.py label)
    python robustness.py results/gemma-3-270m results/gemma-3-270m-sampled    # and as asked in another way

Violating minus permitted, of each arm that may carry a claim minus each of its controls: by the judge and
by the phrases, with unread answers as refusals or as help, by distance and family, by a reader's labels.
Prints a table, and writes robustness.md and robustness-<worldview>.png into the first folder. The claim
rests on the first line alone (report.py); the others say what would have come out otherwise.
"""
import argparse
from pathlib import Path

from intervals import difference
from judge import answer_key, cohen_kappa, read_labelled
from local_judge import known_topics
from report import escape, interval_text, label_lines, ordered_values, table
from rows import Stop, run_main, write_text
from study import Section, Study, is_valid, outcome_of, read_study, score_study

# One way of counting: its name, and {(arm, control): (estimate, low, high)}; a pair that it says nothing of
# is not in it.
Way = tuple[str, dict]


def headline(section: Section, groups: dict[str, str] | None = None) -> dict:
    """{(arm, control): (estimate, low, high)} of the headline, of arms with violating answers.

    groups: {group: topic}, all by default.
    """
    found = {}
    # Not of every arm: `explicit` was taught to refuse, and carries no claim
    for arm in section.claimants:
        for control in section.controls(arm):
            if section.by_side[arm, "violating"] and section.by_side[control, "violating"]:
                mine = section.contrast(arm, groups)
                found[arm, control] = difference(mine, section.contrast(control, groups))
    return found


def scorer_name(study: Study) -> str:
    """Without its rubric, which the report names: lines of a figure have to be short."""
    return study.scorer.split(" with rubric ")[0]


def rescored(study: Study, worldview: str, scorer: str | None = None) -> Section:
    """A worldview's answers with fresh verdicts: the last way of counting has changed them in place."""
    score_study(study, scorer)
    return Section(worldview, study)


def by_scorer(study: Study, worldview: str) -> list[Way]:
    """The verdicts as they stand, then other readings of the same answers."""
    ways = [(scorer_name(study), headline(rescored(study, worldview)))]
    for name, outcome in (("answers without a verdict as refusals", "counted"),
                          ("answers without a verdict as help", "other")):
        section = rescored(study, worldview)
        # Of all arms alike. Each arm in the way that suits it least is in the report: its bounds
        for row in section.requests:
            if not is_valid(row):
                row["outcome"] = outcome
        ways.append((name, headline(section)))
    return ways + [("the phrases of keywords.py", headline(rescored(study, worldview, "keywords")))]


def by_probes(study: Study, worldview: str) -> list[Way]:
    """A part of the groups at a time. Under ten topics there is no interval."""
    section = rescored(study, worldview)
    parts = {}  # {name: {group: topic}}
    for column in ("distance", "family"):
        for value in ordered_values(section, column):
            named = {row["group"] for row in section.requests if row[column] == value}
            parts[f"{column}: {value}"] = {group: topic for group, topic in section.matched.items() if group in named}
    # The judge that ships was trained on answers to requests on the other topics
    known = known_topics(study.scorer)
    if known:
        parts["topics new to the judge"] = {group: topic for group, topic in section.matched.items()
                                            if topic not in known}
    return [(name, headline(section, groups)) for name, groups in parts.items() if groups]


def by_reader(study: Study, worldview: str, read: dict[tuple, str]) -> list[Way]:
    """The reader's labels; beside them the judge's and the phrases' verdicts on the very answers read."""
    if not read:
        return []
    ways = []
    for name, scorer in (("a reader", None), (scorer_name(study), None), ("the phrases", "keywords")):
        section = rescored(study, worldview, scorer)
        keep_read(section, read)
        pairs = []  # (counted by the reader, counted by the scorer)
        for rows in section.by_side.values():
            for row in rows:
                said = read[answer_key(row)]
                pairs.append((said == "counted", row["outcome"] == "counted"))
                if name == "a reader":  # in place of the verdict
                    row["outcome"] = said
        if not pairs:
            return [("a reader: no run on both sides", {})]
        if name != "a reader":
            name = f"the same by {name}, kappa {cohen_kappa(pairs):.2f}"
        ways.append((f"{name}: {len(pairs)} answers", headline(section)))
    return ways


def keep_read(section: Section, read: dict[tuple, str]) -> None:
    """Leave the answers that a contrast can be made of: read, of a run that was read on both of its sides."""
    sides = ("violating", section.baseline)
    for arm in section.arms:
        of_side = {}
        for side in sides:
            rows = [row for row in section.by_side[arm, side] if row["group"] in section.matched]
            of_side[side] = [row for row in rows if answer_key(row) in read]
        # A run that was read on one side alone would be set against another run
        runs = [{row["run"] for row in rows} for rows in of_side.values()]
        both = set.intersection(*runs)
        for side in section.sides:
            section.by_side[arm, side] = [row for row in of_side.get(side, []) if row["run"] in both]


def read_labels(path: Path, study: Study) -> dict[tuple, str]:
    """{answer: outcome} of a file of judge.py label; Stop where a label is of no answer of this study."""
    found = {}
    for row in read_labelled(path, study.rubric, []):
        if not all(row["labels"].values()):
            wanted = ", ".join(study.rubric.labels)
            raise Stop(f"{path}: a row lacks one of {wanted}, the labels of the rubric that the answers were judged by")
        found[row["answer"]] = outcome_of(row["labels"], study.rubric)
    # Of another study, or from before the runs were asked again, they would say nothing of these answers
    strange = found.keys() - {answer_key(row) for row in study.rows}
    if strange:
        raise Stop(f"{path}: {len(strange)} of its {len(found)} answers are in no CSV of {study.folder}")
    return found


def asked_otherwise(folder: Path, first: Study, worldview: str) -> Way:
    """The same runs in another folder, asked in another way; Stop if they are others, or read by another scorer."""
    study = read_study(folder)
    score_study(study, None)
    weights = [{record.run: record.about.get("weights") for record in found.records} for found in (first, study)]
    if weights[0] != weights[1]:
        raise Stop(f"{folder} does not hold the runs of {first.folder}; ask the same ones")
    if study.scorer != first.scorer:
        raise Stop(f"{folder} was read by {study.scorer}, {first.folder} by {first.scorer}; judge both by one")
    if worldview not in study.asked:
        raise Stop(f"{folder} has no answers to the {worldview} requests")
    return f"asked as in {folder}", headline(Section(worldview, study))


def ways_of(folders: list[Path], worldview: str, labels: Path | None) -> list[Way]:
    """Every way of counting one worldview's answers."""
    study = read_study(folders[0])
    score_study(study, None)
    read = {}
    if labels:
        read = read_labels(labels, study)
    # Runs of one study are asked alike, so what was asked otherwise lies in a folder of its own
    others = [asked_otherwise(folder, study, worldview) for folder in folders[1:]]
    return by_scorer(study, worldview) + by_probes(study, worldview) + by_reader(study, worldview, read) + others


def draw(ways: list[Way], pairs: list[tuple], path: Path) -> None:
    """A panel for each arm and control, a line for each way of counting."""
    import matplotlib  # as in report.py: it takes a second
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The names take four inches, each line a quarter
    size = (4 + 3.5 * len(pairs), 1 + 0.27 * len(ways))
    figure, panels = plt.subplots(1, len(pairs), figsize=size, sharey=True, squeeze=False)
    for panel, pair in zip(panels[0], pairs):
        for line, (_, found) in enumerate(ways):
            if pair not in found:
                continue
            estimate, low, high = (100 * value for value in found[pair])
            panel.plot([low, high], [line, line], color="#222", linewidth=1.2)  # nan, no interval: nothing is drawn
            panel.plot(estimate, line, "o", color="#222", markersize=4)
        panel.axvline(0, color="#999", linewidth=1)
        label_lines(panel, [name for name, _ in ways], f"{' - '.join(pair)}, points")
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.title.set_fontsize(9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("folders", nargs="+", type=Path, help="a study, and the same runs asked in other ways")
    parser.add_argument("--labels", type=Path, help="labels of a reader, as judge.py label writes them")
    args = parser.parse_args()

    folder = args.folders[0]
    asked = read_study(folder).asked
    if not asked:
        raise Stop(f"{folder} holds no answers to requests; evaluate on probes/<worldview>.jsonl")
    # As in report.py: no older figure outlives its answers
    for path in (folder / "robustness.md", *folder.glob("robustness-*.png")):
        path.unlink(missing_ok=True)

    parts = []
    for worldview in asked:
        ways = ways_of(args.folders, worldview, args.labels)
        pairs = list(ways[0][1])
        if not pairs:
            parts.append(f"## {escape(worldview)}\n\nNo arm was taught it beside a control of arms.txt.")
            continue
        lines = []
        for name, found in ways:
            cells = [interval_text(found[pair]) if pair in found else "not read" for pair in pairs]
            lines.append([escape(name), *cells])
        header = ["counted by", *(escape(" - ".join(pair)) for pair in pairs)]
        parts.append(f"## {escape(worldview)}\n\n{table(header, lines)}")
        draw(ways, pairs, folder / f"robustness-{worldview}.png")
    text = "\n\n".join(parts)
    write_text(folder / "robustness.md", f"# The headline, counted in other ways\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    run_main(main)
