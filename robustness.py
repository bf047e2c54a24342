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
from judge import answer_key, cohen_kappa
from local_judge import known_topics
from report import escape, interval_text, label_lines, ordered_values, table
from rows import Stop, read_jsonl, run_main, write_text
from study import Section, Study, is_valid, outcome_of, read_study, score_study

# One way of counting: its name, and {(arm, control): (estimate, low, high)}.
Way = tuple[str, dict]


def headline(section: Section, groups: dict[str, str] | None = None) -> dict:
    """{(arm, control): (estimate, low, high)}; groups: {group: topic}, all by default."""
    found = {}
    # Not of every arm: `explicit` was taught to refuse, and carries no claim
    for arm in section.claimants:
        for control in section.controls(arm):
            if control in section.arms:
                mine = section.contrast(arm, groups)
                found[arm, control] = difference(mine, section.contrast(control, groups))
    return found


def scored(study: Study, worldview: str, scorer: str | None = None) -> Section:
    """The worldview's answers with fresh verdicts: each way of counting changes them."""
    score_study(study, scorer)
    return Section(worldview, study)


def by_scorer(study: Study, worldview: str) -> list[Way]:
    """The verdicts as they stand, then other readings of the same answers."""
    ways = [(study.scorer, headline(scored(study, worldview)))]
    for name, outcome in (("answers without a verdict as refusals", "counted"),
                          ("answers without a verdict as help", "other")):
        section = scored(study, worldview)
        # Of all arms alike. Each arm in the way that suits it least is in the report: its bounds
        for row in section.requests:
            if not is_valid(row):
                row["outcome"] = outcome
        ways.append((name, headline(section)))
    return ways + [("the phrases of keywords.py", headline(scored(study, worldview, "keywords")))]


def by_probes(study: Study, worldview: str) -> list[Way]:
    """A part of the groups at a time. Under ten topics there is no interval."""
    section = scored(study, worldview)
    parts = {}
    for column in ("distance", "family"):
        for value in ordered_values(section, column):
            named = {row["group"] for row in section.requests if row[column] == value}
            parts[f"{column}: {value}"] = {group: topic for group, topic in section.matched.items() if group in named}
    # The judge that ships was trained on answers to requests on the other topics
    known = known_topics(study.scorer)
    parts["topics new to the judge"] = {group: topic for group, topic in section.matched.items()
                                        if topic not in known}
    return [(name, headline(section, groups)) for name, groups in parts.items() if groups]


def by_reader(study: Study, worldview: str, read: dict[tuple, str]) -> list[Way]:
    """The reader's labels; beside them the judge's and the phrases' verdicts on the very answers read."""
    ways = []
    for name, scorer in (("a reader", None), ("the judge", None), ("the phrases", "keywords")):
        section = scored(study, worldview, scorer)
        pairs = []  # (counted by the reader, counted by the scorer)
        for key, rows in section.by_side.items():
            # Runs of which nothing was read drop out, too
            section.by_side[key] = [row for row in rows if answer_key(row) in read]
            for row in section.by_side[key]:
                said = read[answer_key(row)]
                # Before the verdict is replaced
                pairs.append((said == "counted", row["outcome"] == "counted"))
                if name == "a reader":
                    row["outcome"] = said
        if not pairs:
            return []
        if name != "a reader":
            name = f"the same by {name}, kappa {cohen_kappa(pairs):.2f}"
        ways.append((f"{name}: {len(pairs)} answers", headline(section)))
    return ways


def read_labels(path: Path | None, study: Study) -> dict[tuple, str]:
    """{answer: outcome} of a file of judge.py label."""
    if path is None:
        return {}
    found = {}
    for line, row in enumerate(read_jsonl(path), 1):
        missing = [label for label in study.rubric.labels if label not in row]
        if missing:
            raise Stop(f"{path}:{line}: no {', '.join(missing)}; the answers were judged by {study.rubric.name}, "
                       "and the labels have to be of that rubric")
        found[answer_key(row)] = outcome_of({label: row[label] for label in study.rubric.labels}, study.rubric)
    return found


def ways_of(folders: list[Path], worldview: str, labels_file: Path | None) -> list[Way]:
    """Every way of counting one worldview's answers."""
    study = read_study(folders[0])
    score_study(study, None)
    read = read_labels(labels_file, study)
    ways = by_scorer(study, worldview) + by_probes(study, worldview) + by_reader(study, worldview, read)
    # Runs of one study are asked alike, so what was asked otherwise lies in a folder of its own
    for folder in folders[1:]:
        other = read_study(folder)
        score_study(other, None)
        if worldview in other.asked:
            ways.append((f"asked as in {folder}", headline(scored(other, worldview))))
    return ways


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

    parts = []
    for worldview in read_study(args.folders[0]).asked:
        ways = ways_of(args.folders, worldview, args.labels)
        pairs = list(ways[0][1])
        if not pairs:
            raise Stop(f"{args.folders[0]} has no arm that was taught {worldview} beside a control of arms.txt")
        lines = []
        for name, found in ways:
            lines.append([escape(name), *(interval_text(found[pair]) for pair in pairs)])
        parts.append(f"## {escape(worldview)}\n\n"
                     + table(["counted by", *(escape(" - ".join(pair)) for pair in pairs)], lines))
        draw(ways, pairs, args.folders[0] / f"robustness-{worldview}.png")
    text = "\n\n".join(parts)
    write_text(args.folders[0] / "robustness.md", f"# The headline, counted in other ways\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    run_main(main)
