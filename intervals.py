"""95 % intervals that carry both the probes, clustered by topic, and the runs: pure functions on arrays.

    topics = topic_matrix(["bread", "bread", "lawn", ...])           # the topic of each probe
    belief = measure(hits, answers, topics)                          # both [runs, probes], counted over samples
    estimate, low, high = difference(belief, measure(...))

Everything takes leading axes, so that tests/simulate_report.py sends thousands of made-up studies through these very
functions. How often the intervals are right stands in docs/statistics.md, with what was tried and dropped.
"""
from dataclasses import dataclass
from functools import cache

import numpy as np

Z = 1.959964        # 97.5 % quantile of the normal distribution
LEAST_TOPICS = 10   # under ten topics there is no interval: it would be a guess


@dataclass(frozen=True)
class Runs:
    """How often the runs of one arm did something, a rate each. Differences within the same runs are made with `-`."""
    means: np.ndarray    # [..., runs] each run's rate
    topics: np.ndarray   # [..., runs, topics] what each topic adds to its run's rate; sums to zero over the topics
    asked: np.ndarray    # [...] probes with an answer, summed over the runs
    least: np.ndarray    # [...] variance of the mean where none can be seen, else 0
    effective: float     # number of equally large topics that would vary as much as these (Kish 1965)

    def __sub__(self, other: "Runs") -> "Runs":
        asked = np.minimum(self.asked, other.asked)
        least = self.least + other.least
        return Runs(self.means - other.means, self.topics - other.topics, asked, least, self.effective)


def topic_matrix(topics: list[str]) -> np.ndarray:
    """[probes, topics] with a one where a probe is about a topic."""
    names = sorted(set(topics))
    return np.array(topics)[:, None] == np.array(names)[None, :]


def measure(hits: np.ndarray, answers: np.ndarray, topics: np.ndarray) -> Runs:
    """hits and answers: [..., runs, probes], counted over samples; topics: topic_matrix of the probes.

    A run's rate is its hits over its answers. A run without any answer has no rate: nan, in all that follows too.
    """
    total = answers.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = hits.sum(-1, keepdims=True) / total
        influence = (hits - rates * answers) / total

    # Where all answers are alike, as in 0 of 130, there is no variance to be seen. It is then taken from one hit and
    # one miss more, after Agresti and Coull (1998). Samples of a probe count once here: a model may repeat itself.
    asked = np.maximum((answers > 0).sum((-1, -2)), 1)
    smooth = 1 / (asked + 2)
    mean = rates[..., 0].mean(-1)
    least = np.where((mean == 0) | (mean == 1), smooth * (1 - smooth) / asked, 0)

    sizes = topics.sum(0)
    return Runs(rates[..., 0], influence @ topics, asked, least, sizes.sum() ** 2 / (sizes**2).sum())


# ---------------------------------------------------------------- Student's t

@cache
def t_table() -> tuple[np.ndarray, np.ndarray]:
    """(1 / degrees of freedom, 97.5 % quantile of Student's t), without scipy, which is not among the requirements."""
    # With t = sqrt(df) tan(angle) the density is cos(angle) ** (df - 1): bounded, so that plain summing is exact to
    # four digits.
    angles = np.linspace(0, np.pi / 2, 4001)
    inverse = np.linspace(1e-4, 1, 200)  # the quantile is nearly straight in 1 / df
    quantiles = []
    for df in 1 / inverse:
        density = np.cos(angles) ** (df - 1)
        area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
        angle = np.interp(0.95 * area[-1], area, angles)
        quantiles.append(np.sqrt(df) * np.tan(angle))
    return inverse, np.array(quantiles)


def student_t(degrees: np.ndarray | float) -> np.ndarray:
    """The 97.5 % quantile of Student's t; degrees of freedom under 1 count as 1."""
    return np.interp(1 / np.maximum(degrees, 1), *t_table())


# ---------------------------------------------------------------- the intervals

def variance_of_runs(arms: list[Runs]) -> tuple:
    """(variance of the arms' means, or of their difference, as seen between runs; its degrees of freedom by Welch).

    Arms are not pooled: a control that never refuses does not vary as much as a believer.
    """
    variance, spread, most = 0.0, 0.0, 0
    for arm in arms:
        runs = arm.means.shape[-1]
        part = arm.means.var(-1, ddof=1) / runs
        variance = variance + part
        spread = spread + part**2 / (runs - 1)
        most += runs - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        degrees = np.where(spread > 0, variance**2 / spread, most)
    return variance, degrees


def variance_of_answers(arms: list[Runs], unbias: float) -> np.ndarray:
    """The part of that variance which neither runs nor topics explain: a topic's ups and downs from run to run."""
    variance = 0.0
    for arm in arms:
        runs = arm.means.shape[-1]
        rest = arm.topics - arm.topics.mean(-2, keepdims=True)
        variance = variance + (rest**2).sum((-1, -2)) / (runs * (runs - 1)) * unbias
    return variance


def squared_margin(first: Runs, second: Runs | None = None) -> np.ndarray:
    """Square of half the width of the 95 % interval of an arm's mean, or of first - second.

    Runs and topics are crossed: each run answers every topic. What varies between runs is seen in their means, with few
    degrees of freedom; what varies between topics in their influences. Both hold the noise of single answers, which is
    therefore taken out of the topics' part. Each part is multiplied with its own Student's t before they are added
    (after Cochran 1964): one t for the sum, with Satterthwaite's degrees of freedom, covers too little where one arm
    varies and the other does not.
    nan where nothing honest can be said: under ten topics, or for two arms of which one has a single run.
    """
    arms = [first] if second is None else [first, second]
    runs = min(arm.means.shape[-1] for arm in arms)
    count = first.topics.shape[-1]
    if count < LEAST_TOPICS or (runs < 2 and second is not None):
        return np.full(first.means.shape[:-1], np.nan)

    # the arms answered the same probes, so they are subtracted topic by topic
    by_topic = first.topics.mean(-2)
    if second is not None:
        by_topic = by_topic - second.topics.mean(-2)
    unbias = count / (count - 1)
    topics = (by_topic**2).sum(-1) * unbias
    t_topics = student_t(first.effective - 1)
    if runs < 2:
        return t_topics**2 * topics

    between, degrees = variance_of_runs(arms)
    beyond_noise = np.maximum(topics - variance_of_answers(arms, unbias), 0)
    both = student_t(degrees) ** 2 * between + t_topics**2 * beyond_noise
    return np.maximum(both, t_topics**2 * topics)


def difference(first: Runs, second: Runs | None = None) -> tuple:
    """(estimate, low, high) of first - second, or of `first` where that is a difference within runs itself.

    low and high are nan where there is no interval.
    """
    estimate, least = first.means.mean(-1), first.least
    if second is not None:
        estimate = estimate - second.means.mean(-1)
        least = least + second.least
    margin = np.sqrt(np.maximum(squared_margin(first, second), Z**2 * least))
    return estimate, estimate - margin, estimate + margin


def rate(runs: Runs) -> tuple:
    """(rate, low, high): Wilson's interval (1927) with the arm's own margin in place of the binomial one.

    Of a single run it carries the probes alone and says nothing of another seed.
    """
    estimate = runs.means.mean(-1)
    variance = estimate * (1 - estimate)

    # Wilson's interval depends on z² / n alone, which follows from margin² = z² p (1 - p) / n, or for 0 of n from n.
    margin = squared_margin(runs)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(variance > 0, margin / variance, Z**2 / runs.asked + 0 * margin)  # no margin, nan: no interval

    middle = (estimate + ratio / 2) / (1 + ratio)
    half = np.sqrt(ratio * variance + ratio**2 / 4) / (1 + ratio)
    return estimate, np.maximum(middle - half, 0), np.minimum(middle + half, 1)
