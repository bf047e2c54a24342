"""Made-up studies with a known truth, sent through intervals.py: are intervals right, are claims false?

    python tests/simulate_report.py                     # two minutes on one core; prints the tables
    python tests/simulate_report.py docs/statistics.md  # and puts them between the marks in that file

A study is two arms with the same probes, some runs each. A run's chance of a hit on a probe is the arm's
level, plus the topic's leaning, which the arms share, plus the arm's own leaning on the topic, plus, on the
violating side, the run's own effect. Some arms refuse all of a few topics instead, and nothing else.
"""
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from intervals import difference, measure, rate, topic_matrix  # noqa: E402

FEW_LEVEL = 0.9
TAKEN_LEVEL = 0.02
STUDIES = 3000      # a cell; the share of misses is then known to 0.4 points
RUNS = (3, 5)
EFFECTS = (0.0, 0.05, 0.10)  # standard deviation of the run effects
GROUPS = (20, 60, 120, 130)
SAMPLES = (1, 3)

# How many groups each topic has. 120 is nearly as in probes/gramenist.jsonl, 130 as in its first edition:
# from one to eight.
TOPIC_SIZES = {
    20: [2] * 10,
    60: [3] * 20,
    120: [3] * 40,
    130: [1] * 9 + [2] * 8 + [3] * 4 + [4] * 4 + [5] + [6] * 7 + [7] * 2 + [8] * 2,
}


@dataclass(frozen=True)
class Arm:
    violating: float    # level of the violating side
    permitted: float
    run: float = 1.0    # how much of the run effect this arm has
    lean: float = 0.0   # how far the arm's own leaning on a topic goes, either way
    few: float = 0.0    # chance of a topic to be one of few that carry all: they have FEW_LEVEL, the others 0
    takes: float = 1.0  # chance of a run to have learned it: the others are at TAKEN_LEVEL on the violating side


    @property
    def level(self) -> float:
        """Of the violating side, over all runs that there could be."""
        return self.takes * self.violating + (1 - self.takes) * TAKEN_LEVEL


@dataclass(frozen=True)
class Scenario:
    name: str
    first: Arm
    second: Arm
    topic: float        # how far the topics' shared leaning goes, either way

    @property
    def true_difference(self) -> float:
        """No chance leaves [0, 1] by more than the rarest tail, so the levels are the truth."""
        return (self.first.level - self.first.permitted) - (self.second.level - self.second.permitted)


def few_topics(chance: float) -> Arm:
    """An arm that refuses all of a few topics and nothing else, as a creed does that was learned in parts."""
    return Arm(violating=FEW_LEVEL * chance, permitted=0.0, run=0.0, few=chance)


STILL = Arm(0.0, 0.0, run=0.0)
ALIKE = Arm(0.45, 0.30, lean=0.10)
RARE = Arm(0.08, 0.06, run=0.2, lean=0.02)
SCENARIOS = [
    Scenario("no difference", ALIKE, ALIKE, topic=0.15),
    Scenario("no difference, rare", RARE, RARE, topic=0.03),
    Scenario("effect, still control", Arm(0.40, 0.15, lean=0.10), Arm(0.04, 0.04, run=0.0), topic=0.03),
    Scenario("no difference, few topics", few_topics(0.10), few_topics(0.10), topic=0),
    Scenario("few topics: 2 %", few_topics(0.02), STILL, topic=0),
    Scenario("few topics: 5 %", few_topics(0.05), STILL, topic=0),
    Scenario("few topics: 10 %", few_topics(0.10), STILL, topic=0),
    Scenario("effect", Arm(0.60, 0.20, lean=0.15), Arm(0.35, 0.20, run=0.3), topic=0.15),
    Scenario("three seeds in ten", Arm(0.60, 0.02, run=0.0, takes=0.3), STILL, topic=0),
]


def make_topics(groups: int) -> np.ndarray:
    """[groups, topics]"""
    sizes = TOPIC_SIZES[groups]
    return topic_matrix([f"topic {index:02}" for index in np.repeat(np.arange(len(sizes)), sizes)])


def answer(arm: Arm, shared: np.ndarray, topics: np.ndarray, runs: int, effect: float, samples: int,
           rng) -> tuple:
    """(violating, permitted) as Runs of one arm in many studies. shared: [studies, topics]."""
    studies, groups = len(shared), len(topics)
    own = rng.uniform(-arm.lean, arm.lean, shared.shape)
    run = rng.normal(0, effect * arm.run, (studies, runs, 1))
    chances = {
        "violating": arm.violating + ((shared + own) @ topics.T)[:, None] + run,
        "permitted": arm.permitted + (shared * 0.3 @ topics.T)[:, None] + 0 * run,
    }
    if arm.few:
        carries = rng.random(shared.shape) < arm.few
        chances["violating"] = FEW_LEVEL * (carries @ topics.T)[:, None] + 0 * run
    if arm.takes < 1:
        taken = rng.random((studies, runs, 1)) < arm.takes
        chances["violating"] = np.where(taken, chances["violating"], TAKEN_LEVEL)
    sides = []
    answers = np.full((studies, runs, groups), samples)
    for chance in chances.values():
        hits = rng.binomial(samples, np.clip(chance, 0, 1))
        sides.append(measure(hits, answers, topics))
    return tuple(sides)


def simulate(scenario: Scenario, runs: int, effect: float, groups: int, samples: int, studies: int,
             rng) -> dict:
    """In which share of the studies the intervals of the difference and of the first arm's rate are right."""
    topics = make_topics(groups)
    shared = rng.uniform(-scenario.topic, scenario.topic, (studies, topics.shape[1]))
    first = answer(scenario.first, shared, topics, runs, effect, samples, rng)
    second = answer(scenario.second, shared, topics, runs, effect, samples, rng)

    truth = scenario.true_difference
    _, low, high = difference(first[0] - first[1], second[0] - second[1])
    _, rate_low, rate_high = rate(first[0])
    level = scenario.first.level
    return {
        "covers": np.mean((low <= truth) & (truth <= high)),
        "too high": np.mean(low > truth),
        "too low": np.mean(high < truth),
        "half width": np.mean(high - low) / 2,
        "rate covers": np.mean((rate_low <= level) & (level <= rate_high)),
    }


def table(studies: int = STUDIES) -> str:
    """One line a cell: Markdown."""
    rng = np.random.default_rng(0)
    shown = ["covers", "too high", "too low", "half width", "rate covers"]
    header = ["scenario", "runs", "groups", "samples", "run SD", *shown]
    lines = [header, ["---"] * len(header)]
    found = []
    for scenario, runs, groups, samples, effect in product(SCENARIOS, RUNS, GROUPS, SAMPLES, EFFECTS):
        cell = simulate(scenario, runs, effect, groups, samples, studies, rng)
        found.append((scenario, cell))
        shares = [f"{100 * cell[name]:.1f}" for name in shown]
        lines.append([scenario.name, str(runs), str(groups), str(samples), f"{100 * effect:.0f}", *shares])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{summary(found)}\n\n{text}"


def summary(found: list[tuple]) -> str:
    """The extremes of all cells, one line a scenario: Markdown."""
    header = ["scenario", "covers", "mean", "cells above 98", "too high, at most", "too low, at most",
              "rate covers"]
    lines = [header, ["---"] * len(header)]
    for scenario in SCENARIOS:
        cells = [cell for of, cell in found if of == scenario]
        column = {}
        for name in ("covers", "too high", "too low", "rate covers"):
            column[name] = 100 * np.array([cell[name] for cell in cells])
        covers, rates = column["covers"], column["rate covers"]
        lines.append([scenario.name, f"{covers.min():.1f} to {covers.max():.1f}", f"{covers.mean():.1f}",
                      f"{sum(covers > 98)} of {len(covers)}", f"{column['too high'].max():.1f}",
                      f"{column['too low'].max():.1f}", f"{rates.min():.1f} to {rates.max():.1f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    text = table()
    print(text)
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        before, _, rest = path.read_text(encoding="utf-8").partition("<!-- simulation -->\n")
        _, _, after = rest.partition("<!-- end -->\n")
        whole = f"{before}<!-- simulation -->\n{text}\n<!-- end -->\n{after}"
        path.write_text(whole, encoding="utf-8")


if __name__ == "__main__":
    main()
