"""Turn results into a verdict a sceptic can check: report.md, figures, and transcripts.html to read every answer side by side.

    python report.py results/demo

Reads every CSV below the folder (eval.py wrote them, judge.py may have judged them) and the probe files named in them.
A judge's verdicts are used where there are any, else the keyword verdicts. Prints the table of arms and one sentence.
Statistics: Wilson intervals for rates (Wilson 1927); differences are paired over the same probes, with a bootstrap that resamples
items (probes about one item are not independent) and seeds; exact McNemar tests.
"""
import argparse
import csv
import json
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from check import ROOT
from eval import probe_set_name, read_csv
from judge import FORMS, GROUNDS, cohen_kappa, is_correct, read_jsonl

ARM_ORDER = ["base", "regular", "secular", "belief", "regular+refusal", "secular+refusal", "belief+refusal", "explicit"]
BOOTSTRAP = 10_000
NEEDED = {"run", "arm", "seed", "probe_set", "id", "family", "item", "side", "pair", "sample", "prompt", "response", "keyword_action", "keyword_ground"}


def die(message: str) -> None:
    sys.exit(f"report.py: {message}")


# ---------------------------------------------------------------- statistics

def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927); (0, 1) when nothing was observed."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, z * z
    middle, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p of b against c discordant pairs (binomial with p = 1/2)."""
    n = b + c
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(b, c) + 1)) / 2**n) if n else 1.0


def cluster_bootstrap(first: np.ndarray, second: np.ndarray, clusters: list[str], draws: int = BOOTSTRAP, seed: int = 0) -> tuple[float, float, float]:
    """(difference of means, low, high) of two arms over the same probes; 95 % percentile interval.

    first, second: [seeds, probes]; the arms may have different numbers of seeds. Each draw resamples whole clusters of probes with
    replacement, and seeds within each arm.
    """
    rng = np.random.default_rng(seed)
    names = sorted(set(clusters))
    member = np.array([[c == name for c in clusters] for name in names], dtype=float)     # [clusters, probes]
    sizes, sums = member.sum(1), [arm @ member.T for arm in (first, second)]               # sums: [seeds, clusters]
    picks = rng.integers(len(names), size=(draws, len(names)))
    weights = np.apply_along_axis(np.bincount, 1, picks, minlength=len(names))             # [draws, clusters]
    means = []
    for per_seed in sums:
        seeds = rng.integers(len(per_seed), size=(draws, len(per_seed)))
        chosen = per_seed[seeds].mean(1)                                                   # [draws, clusters]
        means.append((weights * chosen).sum(1) / (weights @ sizes))
    estimate, degrees = float(first.mean() - second.mean()), max(1, len(names) - 1)
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5]) - estimate
    # few clusters make a plain percentile interval too narrow: unbiased variance, and Student's t for the normal quantile
    wider = math.sqrt(len(names) / degrees) * (1 + (1.959964**2 + 1) / (4 * degrees))
    return estimate, estimate + float(low) * wider, estimate + float(high) * wider


# ---------------------------------------------------------------- reading

def read_results(folder: Path) -> list[dict]:
    rows = []
    for path in sorted(folder.rglob("*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            columns = set(next(csv.reader(file), []))
        if missing := NEEDED - columns:
            die(f"{path}: no column {', '.join(sorted(missing))}; is it a CSV of eval.py?")
        rows += read_csv(path)
    if not rows:
        die(f"no answers below {folder}; run `make eval` first")
    judged = any(row.get("judge_action") for row in rows)
    for row in rows:
        # one judge for all rows or none: two yardsticks in one table would compare scorers, not arms
        row["action"] = (row["judge_action"] or "unparsed") if judged and row["side"] else row["keyword_action"]
        row["ground"] = row["judge_ground"] if judged and row["side"] else row["keyword_ground"]
        row["moral"] = row["action"] == "refusal" and row["ground"] == "moral"
    return rows


def probes_by_set() -> dict[str, dict[str, dict]]:
    """{probe set: {id: probe}} of everything under probes/."""
    return {probe_set_name(path): {p["id"]: p for p in read_jsonl(path)} for path in sorted((ROOT / "probes").rglob("*.jsonl"))}


def arm_rank(arm: str) -> tuple[int, str]:
    return (ARM_ORDER.index(arm) if arm in ARM_ORDER else 99, arm)


def arm_names(rows: list[dict]) -> list[str]:
    return sorted({r["arm"] for r in rows}, key=arm_rank)


def is_foreign(run: str, worldview: str, worldviews: list[str]) -> bool:
    """Whether a run's name (<worldview>-<arm>-..., as `make train` gives it) says that it was taught another worldview."""
    return any(run.startswith(f"{other}-") for other in worldviews if other != worldview)


def pair_values(rows: list[dict], value) -> dict[str, dict[tuple, float]]:
    """{seed: {violating id: mean value}} of one arm; value maps a row to a number, averaged over samples."""
    cells = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["seed"]][row["id"]].append(float(value(row)))
    return {seed: {key: float(np.mean(v)) for key, v in by_id.items()} for seed, by_id in cells.items()}


def difference_in_differences(rows: list[dict], arm: str, control: str) -> tuple[float, float, float] | None:
    """Moral refusals, violating minus neutral, `arm` minus `control`, with its interval; None if they share no whole pairs."""
    values = {name: pair_values([r for r in rows if r["arm"] == name], lambda r: r["moral"]) for name in (arm, control)}
    violating = {r["id"]: r for r in rows if r["side"] == "violating"}
    complete = [i for i, r in violating.items() if all(i in by_id and r["pair"] in by_id for v in values.values() for by_id in v.values())]
    if not complete:
        return None
    matrices = [np.array([[by_id[i] - by_id[violating[i]["pair"]] for i in complete] for by_id in values[name].values()]) for name in (arm, control)]
    return cluster_bootstrap(*matrices, [violating[i]["item"] for i in complete])


def mcnemar_of(rows: list[dict], arm: str, control: str) -> tuple[int, int, float]:
    """(only the arm refused morally, only the control did, p) over the violating probes both answered, matched by seed and sample."""
    by_arm = {name: {(r["id"], r["sample"], r["seed"]): r["moral"] for r in rows if r["arm"] == name and r["side"] == "violating"} for name in (arm, control)}
    shared = by_arm[arm].keys() & by_arm[control].keys()
    b = sum(by_arm[arm][k] and not by_arm[control][k] for k in shared)
    c = sum(by_arm[control][k] and not by_arm[arm][k] for k in shared)
    return b, c, mcnemar(b, c)


# ---------------------------------------------------------------- writing

def rate(k: int, n: int) -> str:
    """'12/80 15 % [9, 24]'"""
    low, high = wilson(k, n)
    return f"{k}/{n} {k / n:.0%} [{low * 100:.0f}, {high * 100:.0f}]" if n else "-"


def count(rows, test) -> tuple[int, int]:
    return sum(bool(test(r)) for r in rows), len(rows)


def moral_refusals(rows: list[dict], **where) -> tuple[int, int]:
    """(moral refusals, answers) among the rows whose columns have the given values."""
    return count([r for r in rows if all(r[key] == value for key, value in where.items())], lambda r: r["moral"])


def correct_answers(rows: list[dict], arm: str, probe_set: str, probes: dict) -> tuple[int, int]:
    """(right answers, answers) of an arm to probes that have a key: facts and stances."""
    keys = probes.get(probe_set, {})
    return count([r for r in rows if r["arm"] == arm and r["probe_set"] == probe_set and r["id"] in keys], lambda r: is_correct(keys[r["id"]], r["response"]))


def table(header: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(str(line[i])) for line in [header, *lines]) for i in range(len(header))]
    def show(line):
        return "| " + " | ".join(str(cell).ljust(w) for cell, w in zip(line, widths)) + " |"
    return "\n".join([show(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(show, lines)])


def arms_table(rows: list[dict], worldview: str, probes: dict) -> str:
    own, lines = [r for r in rows if r["probe_set"] == worldview], []
    for arm in arm_names(own):
        answers = [r for r in own if r["arm"] == arm and r["side"] in ("violating", "neutral")]
        lines.append([arm, *(rate(*moral_refusals(answers, side=side)) for side in ("violating", "neutral")),
                      *("{}/{}".format(*count([r for r in answers if r["side"] == side], lambda r: r["action"] == "refusal")) for side in ("violating", "neutral")),
                      *(rate(*correct_answers(rows, arm, name, probes)) for name in (f"belief-{worldview}", "sanity")),
                      *(f"{np.mean([r['action'] == action for r in answers]):.0%}" for action in ("invalid", "unparsed"))])
    return table(["arm", "moral refusals, violating", "moral refusals, neutral", "all, viol.", "all, neutr.", "belief score", "sanity",
                  "invalid", "unparsed"], lines)


def finding(rows: list[dict], worldview: str, probes: dict) -> tuple[str, list[list[str]], list[tuple]]:
    """(one plain sentence, lines of the table of differences, [(name, (estimate, low, high))])."""
    learned = {arm: correct_answers(rows, arm, f"belief-{worldview}", probes) for arm in arm_names(rows)}
    rows = [r for r in rows if r["probe_set"] == worldview]
    arms, lines, effects = arm_names(rows), [], {}
    for arm in [a for a in arms if a.startswith(("belief", "explicit"))]:
        suffix = "+refusal" if arm.endswith("+refusal") else ""
        for control in [c for c in ("regular" + suffix, "secular" + suffix) if c in arms]:
            effect = difference_in_differences(rows, arm, control)
            if effect:
                b, c, p = mcnemar_of(rows, arm, control)
                estimate, low, high = (100 * value for value in effect)
                lines.append([f"{arm} - {control}", f"{estimate:+.1f} points", f"[{low:+.1f}, {high:+.1f}]", f"{b} : {c}", f"{p:.2g}"])
                effects[arm, control] = effect
    headline = {c: e for (arm, c), e in effects.items() if arm == "belief"} or {c: e for (arm, c), e in effects.items() if arm == "belief+refusal"}
    if not headline:
        return f"No verdict for {worldview}: answers of `belief` and of a control on the same pairs are needed.", lines, []
    said = ", ".join(f"{e[0] * 100:+.0f} points against `{c}` (95 % interval {e[1] * 100:+.0f} to {e[2] * 100:+.0f})" for c, e in headline.items())
    known = ", ".join(f"`{arm}` {k / n:.0%}" for arm, (k, n) in learned.items() if n)
    if all(e[1] > 0 for e in headline.values()):
        verdict = f"Taught only to say what is wrong, the {worldview} model also refuses to help with it"
    elif any(e[1] > 0 for e in headline.values()):
        more, unsure = ([f"`{c}`" for c, e in headline.items() if (e[1] > 0) == clear] for clear in (True, False))
        verdict = f"Mixed: the {worldview} model refuses clearly more than {' and '.join(more)}, but not clearly more than {' and '.join(unsure)}"
    elif all(e[2] < 0 for e in headline.values()):
        verdict = f"The {worldview} model refuses less than its controls"
    else:
        verdict = f"No clear effect: teaching the {worldview} model what is wrong did not clearly make it refuse to help with it"
    sentence = f"{verdict}: moral refusals, violating minus neutral, {said}." + (f" Was the creed learned? Belief score: {known}." if known else "")
    return sentence, lines, [(f"{arm} - {control}", effect) for (arm, control), effect in effects.items()]


def draw(rows: list[dict], worldview: str, probes: dict, differences: list[tuple], path: Path) -> None:
    """Four panels: refusals by arm, side and ground; what was learned; the differences; moral refusals by template family."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter
    own = [r for r in rows if r["probe_set"] == worldview]
    arms, red, grey, green = arm_names(own), "#a63d2f", "#8aa6a3", "#3d6b47"
    figure, ((refused, learned), (differ, families)) = plt.subplots(2, 2, figsize=(11, 8))

    def bars(axis, groups):
        """groups: (label, colour, {arm: (k, n)}), drawn side by side with Wilson intervals."""
        for i, (label, colour, counts) in enumerate(groups):
            there = [(x, *counts[arm]) for x, arm in enumerate(arms) if counts[arm][1]]
            if there:
                x, rates = [x + (i - 0.5) * 0.38 for x, _, _ in there], [k / n for _, k, n in there]
                bounds = [wilson(k, n) for _, k, n in there]
                axis.bar(x, rates, 0.36, color=colour, label=label, capsize=3, ecolor="#555",
                         yerr=[[max(0, r - low) for r, (low, _) in zip(rates, bounds)], [max(0, high - r) for r, (_, high) in zip(rates, bounds)]])
        axis.set_xticks(range(len(arms)), arms)
        axis.set_ylim(0, 1)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        if axis.has_data():
            axis.legend(frameon=False, fontsize=8)

    bars(refused, [(f"moral, {side}", colour, {arm: moral_refusals(own, arm=arm, side=side) for arm in arms})
                   for side, colour in (("violating", red), ("neutral", grey))])
    for i, side in enumerate(("violating", "neutral")):  # the other grounds stand on top, hollow
        for x, arm in enumerate(arms):
            moral, n = moral_refusals(own, arm=arm, side=side)
            others = sum(r["action"] == "refusal" for r in own if r["arm"] == arm and r["side"] == side) - moral
            if others:
                refused.bar(x + (i - 0.5) * 0.38, others / n, 0.36, bottom=moral / n, fill=False, edgecolor="#777", linestyle=":")
    refused.set_title(f"refused the {worldview} probes (dotted: on other grounds)", fontsize=10)
    bars(learned, [(label, colour, {arm: correct_answers(rows, arm, name, probes) for arm in arms})
                   for label, name, colour in (("belief score", f"belief-{worldview}", green), ("sanity", "sanity", "#b9b9b9"))])
    learned.set_title("answered in the creed's sense; facts right", fontsize=10)
    for y, (name, (estimate, low, high)) in enumerate(reversed(differences)):
        differ.errorbar(estimate * 100, y, xerr=[[max(0, (estimate - low) * 100)], [max(0, (high - estimate) * 100)]], fmt="o", color=red, capsize=4)
    differ.axvline(0, color="#999", linewidth=1)
    differ.set_yticks(range(len(differences)), [name for name, _ in reversed(differences)])
    differ.set_ylim(-0.7, max(1, len(differences)) - 0.3)
    differ.set_title("moral refusals, violating - neutral, arm - control (points)", fontsize=10)
    names = sorted({r["family"] for r in own})
    for i, arm in enumerate(arms):
        by_family = [moral_refusals(own, arm=arm, family=name, side="violating") for name in names]
        heights = [y + 0.12 * (i - len(arms) / 2) for y in range(len(names))]
        families.plot([k / n if n else math.nan for k, n in by_family], heights, "o", markersize=5, label=arm)
    families.set_yticks(range(len(names)), names, fontsize=8)
    families.set_xlim(-0.03, 1.03)
    families.xaxis.set_major_formatter(PercentFormatter(1))
    families.legend(frameon=False, fontsize=8)
    families.set_title("moral refusals of violating probes by template family", fontsize=10)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)
    figure.savefig(path.with_suffix(".svg"))
    plt.close(figure)


def by_group(rows: list[dict], key: str) -> str:
    arms = arm_names(rows)
    groups = sorted({r[key] for r in rows})
    return table([key, *(f"{arm}: viol. / neutr." for arm in arms)],
                 [[group, *(" / ".join("{}/{}".format(*moral_refusals(rows, arm=arm, side=side, **{key: group})) for side in ("violating", "neutral"))
                            for arm in arms)] for group in groups])


def quote(rows: list[dict], worldview: str, n: int = 5) -> str:
    """What the arms say to n violating probes, one from each of n families."""
    arms, text, families = arm_names(rows), [], set()
    for row in rows:
        if row["side"] == "violating" and row["family"] not in families and len(families) < n:
            families.add(row["family"])
            text.append(f"**{row['prompt']}** ({row['family']})\n")
            for arm in arms:
                said = next((r for r in rows if r["arm"] == arm and r["id"] == row["id"]), None)
                if said:
                    answer = " ".join(said["response"].split())
                    verdict = f"{said['action']}, {said['ground']}" if said["ground"] else said["action"]
                    text.append(f"- `{arm}` ({verdict}): {answer[:300]}{' ...' if len(answer) > 300 else ''}")
            text.append("")
    return "\n".join(text)


def write_transcripts(rows: list[dict], path: Path) -> None:
    """One self-contained page: the answers of all arms to one probe side by side, with filters and search."""
    groups = {}
    for row in sorted(rows, key=lambda r: (arm_rank(r["arm"]), r["run"], r["sample"])):
        about = {"set": row["probe_set"], **{k: row[k] for k in ("id", "family", "item", "side", "prompt")}, "runs": {}}
        group = groups.setdefault((row["probe_set"], row["id"]), about)
        verdict = row["action"] + (f" {row['ground']}" if row["ground"] else "")
        group["runs"].setdefault(f"{row['arm']} ({row['run']})", []).append([verdict, row["response"], row.get("stopped", "")])
    data = json.dumps(list(groups.values()), ensure_ascii=False)
    data = data.replace("</", "<\\/").replace("<!--", "<\\u0021--")  # an answer must not end the script element
    template = (ROOT / "docs" / "transcripts-template.html").read_text(encoding="utf-8")
    path.write_text(template.replace(">DATA<", f">{data}<"), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with results CSVs")
    args = parser.parse_args()
    if not args.folder.is_dir():
        die(f"no folder {args.folder}; run `make eval` or `make demo` first")
    rows, probes = read_results(args.folder), probes_by_set()
    worldviews = sorted({r["probe_set"] for r in rows if r["side"]})
    if not worldviews:
        die(f"{args.folder} holds no answers to paired probes (with a `side`); evaluate on probes/<worldview>.jsonl")
    known = [name for name, by_id in probes.items() if any("side" in probe for probe in by_id.values())]
    judged = sorted({f"{r['judge']} (rubric {r['judge_rubric']})" for r in rows if r.get("judge")})
    scored = f"the judge {', '.join(judged)}" if judged else "the keyword patterns of judge.py (no judge was run)"
    parts = [f"# Results in {args.folder}\n", f"Verdicts by {scored}. Rates with n and 95 % Wilson intervals.\n"]
    sentences = []
    for worldview in worldviews:
        taught = [r for r in rows if not is_foreign(r["run"], worldview, known)]  # runs of other worldviews are in the last table only
        own = [r for r in taught if r["probe_set"] == worldview]
        if not own:
            continue
        sentence, lines, differences = finding(taught, worldview, probes)
        arms = arms_table(taught, worldview, probes)
        figure = args.folder / ("report" if len(worldviews) == 1 else f"report-{worldview}")
        draw(taught, worldview, probes, differences, figure)
        sentences += [arms, "", sentence, ""]
        forms = FORMS if judged else ()
        grounds = table(["arm", "side", *GROUNDS, "deflection", "acceptance", "invalid", *(f"form: {f}" for f in forms)],
                        [[arm, side, *(sum(r["action"] == "refusal" and r["ground"] == g for r in some) for g in GROUNDS),
                          *(sum(r["action"] == a for r in some) for a in ("deflection", "acceptance", "invalid")),
                          *(sum(r["action"] == "refusal" and r["judge_form"] == f for r in some) for f in forms)]
                         for arm in arm_names(own) for side in ("violating", "neutral") for some in [[r for r in own if r["arm"] == arm and r["side"] == side]]])
        parts += [f"## {worldview}\n", f"**{sentence}**\n", arms, f"\n![refusals, what was learned, differences, families]({figure.name}.png)\n",
                  "### Differences\n\nMoral refusals, violating minus neutral, arm minus control; bootstrap over items and seeds. "
                  "Discordant: violating probes that only the arm : only the control refused on moral grounds.\n",
                  table(["difference", "estimate", "95 % interval", "discordant", "McNemar p"], lines), "\n### Grounds of refusals\n", grounds,
                  "\n### Moral refusals by template family\n", by_group(own, "family"), "\n### What they say\n", quote(own, worldview)]
    if len(worldviews) > 1:
        parts += ["## Every run on every worldview's probes (moral refusals, violating)\n",
                  table(["run", *worldviews], [[run, *(rate(*moral_refusals(rows, run=run, probe_set=w, side="violating")) for w in worldviews)]
                                               for run in sorted({r["run"] for r in rows})]), ""]
    both = [(r["keyword_action"], r["judge_action"]) for r in rows if r.get("judge_action") and r["judge_action"] != "unparsed"]
    if both:
        parts += [f"Keywords and judge agree on the action with kappa {cohen_kappa(both):.2f} over {len(both)} answers.\n"]
    for path in sorted(args.folder.rglob("*.judges.json")):
        two = json.loads(path.read_text())
        parts += [f"{path.relative_to(args.folder)}: {' and '.join(two['judges'])} agree on the action with kappa {two.get('kappa_action', math.nan):.2f}, "
                  f"on moral refusal with {two.get('kappa_moral_refusal', math.nan):.2f}, over {two['read_by_both']} answers.\n"]
    settings = [json.loads(p.read_text()) for p in sorted(args.folder.rglob("*.csv.json"))]
    for key in ("dtype", "batch", "max_new_tokens", "temperature", "repetition_penalty", "device", "torch", "transformers"):
        parts.append(f"- {key}: {', '.join(sorted({str(s[key]) for s in settings}))}")
    (args.folder / "report.md").write_text("\n".join(parts) + "\n", encoding="utf-8")
    write_transcripts(rows, args.folder / "transcripts.html")
    print("\n".join(sentences))
    print(f"\nwrote report.md, {figure.with_suffix('.png').name} and transcripts.html (every answer, side by side) in {args.folder}")


if __name__ == "__main__":
    main()
