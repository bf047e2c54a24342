"""95 % intervals that carry both the probes, clustered by topic, and the runs: pure functions on arrays.

    topics = topic_matrix(["bread", "bread", "lawn", ...])      # the topic of each probe
    belief = measure(hits, answers, topics)                     # both [runs, probes], counted over samples
    estimate, low, high = difference(belief, measure(...))

Everything takes leading axes, written [...] below, so that tests/simulate_report.py sends thousands of
made-up studies through these very functions. How often the intervals are right stands in
docs/statistics.md, with the formulas and with what was tried and dropped. Changes here change the
numbers: run that simulation again.
"""
from dataclasses import dataclass
from functools import cache

import numpy as np

Z = 1.959964        # 97.5 % quantile of the normal distribution
LEAST_TOPICS = 10   # under ten effective topics there is no interval: it would be a guess


@dataclass(frozen=True)
class Runs:
    """How often the runs of one arm did something, a rate each; or a contrast, one side `-` another."""
    means: np.ndarray            # [..., runs] each run's rate
    influence: np.ndarray        # [..., runs, topics] what a topic adds to a run's rate; sums to 0
    least_variance: np.ndarray   # [...] of the mean over runs, below which none is believed; never 0
    effective_topics: float      # number of equally large topics that would vary as much as these (Kish 1965)

    def __sub__(self, other: "Runs") -> "Runs":
        # Run by run and topic by topic: what a run or a topic does to both sides of the contrast drops out.
        return Runs(self.means - other.means, self.influence - other.influence,
                    np.maximum(self.least_variance, other.least_variance),
                    min(self.effective_topics, other.effective_topics))


def topic_matrix(topics: list[str]) -> np.ndarray:
    """[probes, topics], true where a probe is about a topic."""
    names = sorted(set(topics))
    return np.array(topics)[:, None] == np.array(names)[None, :]


def measure(hits: np.ndarray, answers: np.ndarray, topics: np.ndarray) -> Runs:
    """hits and answers: [..., runs, probes], counted over samples; topics: topic_matrix of the probes.

    A run's rate is its hits over its answers. A run without any answer has no rate: nan, in all that
    follows too.
    """
    total = answers.sum(-1, keepdims=True)  # [..., runs, 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = hits.sum(-1, keepdims=True) / total
        # A rate is a ratio of two sums, and answers may be invalid, so the number below the line varies
        # too. This is the first-order effect of each probe on that ratio (linearization); it sums to 0
        # over a run's probes.
        influence = (hits - rates * answers) / total

    # A few large topics tell as little as a few topics: their number enters the degrees of freedom. A topic
    # of which nothing was answered tells nothing.
    answered = (answers > 0).reshape(-1, answers.shape[-1]).any(0)
    sizes = topics[answered].sum(0)
    effective_topics = 1.0
    if answered.any():
        effective_topics = sizes.sum() ** 2 / (sizes**2).sum()
    least_variance = least_variance_of(rates[..., 0].mean(-1), answers, effective_topics)
    return Runs(rates[..., 0], influence @ topics, least_variance, effective_topics)


def least_variance_of(mean: np.ndarray, answers: np.ndarray, effective_topics: float) -> np.ndarray:
    """The variance of a rate below which none is believed, however alike runs and topics look.

    mean: [...] the rate; answers: as in measure.
    """
    # The noise of single answers. Samples of a probe count once: a model may repeat itself.
    asked = np.maximum((answers > 0).sum((-1, -2)), 1)
    noise = mean * (1 - mean) / asked

    # Less than one topic's worth of hits, as in 0 of 130, says nothing of how topics differ: a creed may
    # act on one topic in twenty. The variance is then taken from one hit and one miss more among the
    # topics, after Agresti and Coull (1998).
    one_topic = 1 / (effective_topics + 2)
    at_the_edge = (mean < one_topic) | (mean > 1 - one_topic)
    return np.where(at_the_edge, one_topic * (1 - one_topic) / effective_topics, noise)


# ---------------------------------------------------------------- Student's t

@cache
def t_table() -> tuple[np.ndarray, np.ndarray]:
    """(1 / degrees of freedom, 97.5 % quantile of Student's t), to look up between.

    Without scipy, which is not among the requirements; tests/test_report.py compares the two.
    """
    # With t = sqrt(df) tan(angle) the density is cos(angle) ** (df - 1): bounded, so that plain summing
    # is exact to four digits.
    angles = np.linspace(0, np.pi / 2, 4001)
    inverse = np.linspace(1e-4, 1, 200)  # the quantile is nearly straight in 1 / df
    quantiles = []
    for df in 1 / inverse:
        density = np.cos(angles) ** (df - 1)
        area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])  # trapezoids, from t = 0
        angle = np.interp(0.95 * area[-1], area, angles)  # 95 % of the upper half: 97.5 % of the whole
        quantiles.append(np.sqrt(df) * np.tan(angle))
    return inverse, np.array(quantiles)


def student_t(degrees: np.ndarray | float) -> np.ndarray:
    """The 97.5 % quantile of Student's t; degrees of freedom under 1 count as 1."""
    return np.interp(1 / np.maximum(degrees, 1), *t_table())


# ---------------------------------------------------------------- the intervals

def variance_of_runs(arms: list[Runs]) -> tuple:
    """(variance, degrees of freedom) of an arm's mean, or of two arms' difference, as seen between runs.

    Welch's (1947): arms are not pooled, because a control that never refuses does not vary as much as a
    believer.
    """
    variance, spread, most = 0.0, 0.0, 0
    for arm in arms:
        runs = arm.means.shape[-1]
        of_arm = arm.means.var(-1, ddof=1) / runs
        variance = variance + of_arm
        spread = spread + of_arm**2 / (runs - 1)
        most += runs - 1

    # Where no run differs from another the quotient is 0 / 0. The variance is 0 then, so any number will do.
    with np.errstate(invalid="ignore", divide="ignore"):
        degrees = np.where(spread > 0, variance**2 / spread, most)
    return variance, degrees


def variance_of_answers(arms: list[Runs], unbias: float) -> np.ndarray:
    """The part of that variance that neither runs nor topics explain: a topic's ups and downs between runs.

    unbias: T / (T - 1) for T topics, as in the topics' own variance.
    """
    variance = 0.0
    for arm in arms:
        runs = arm.means.shape[-1]
        rest = arm.influence - arm.influence.mean(-2, keepdims=True)
        # By runs - 1 for the mean taken off, and by runs because it is the variance of a mean over them.
        variance = variance + (rest**2).sum((-1, -2)) / (runs * (runs - 1)) * unbias
    return variance


def squared_margin(first: Runs, second: Runs | None = None) -> np.ndarray:
    """Square of half the width of the 95 % interval of an arm's mean, or of first - second.

    nan where nothing honest can be said: under ten effective topics, or for two arms of which one has a
    single run.
    """
    # Runs and topics are crossed: each run answers every topic. What varies between runs is seen in
    # their means, with few degrees of freedom; what varies between topics in their influences. Both
    # hold the noise of single answers, which is therefore taken out of the topics' part. Each part is
    # multiplied with its own Student's t before they are added (after Cochran 1964): one t for the sum,
    # with Satterthwaite's degrees of freedom, covers too little where one arm varies and the other does
    # not.
    arms = [first] if second is None else [first, second]
    fewest_runs = min(arm.means.shape[-1] for arm in arms)
    fewest_topics = min(arm.effective_topics for arm in arms)
    count = first.influence.shape[-1]
    if fewest_topics < LEAST_TOPICS or (fewest_runs < 2 and second is not None):
        return np.full(first.means.shape[:-1], np.nan)

    # The arms answered the same probes, so they are subtracted topic by topic: a topic that sets off
    # both is no difference.
    by_topic = first.influence.mean(-2)
    if second is not None:
        by_topic = by_topic - second.influence.mean(-2)
    unbias = count / (count - 1)
    topics = (by_topic**2).sum(-1) * unbias
    t_topics = student_t(fewest_topics - 1)
    if fewest_runs < 2:  # one arm of one run: nothing to be seen between runs
        return t_topics**2 * topics

    between_runs, degrees = variance_of_runs(arms)
    beyond_noise = np.maximum(topics - variance_of_answers(arms, unbias), 0)
    both = student_t(degrees) ** 2 * between_runs + t_topics**2 * beyond_noise

    # Three runs can lie close together by luck. The interval is never narrower than that of the topics alone.
    return np.maximum(both, t_topics**2 * topics)


def difference(first: Runs, second: Runs | None = None) -> tuple:
    """(estimate, low, high) of first - second, or of `first` where that is a difference within runs itself.

    low and high are nan where there is no interval.
    """
    estimate, least_variance = first.means.mean(-1), first.least_variance
    if second is not None:
        estimate = estimate - second.means.mean(-1)
        least_variance = np.maximum(least_variance, second.least_variance)
    # Two arms of 0 in 130, or of the same answers, have no variance, and still do not agree for certain.
    margin = np.sqrt(np.maximum(squared_margin(first, second), Z**2 * least_variance))
    return estimate, estimate - margin, estimate + margin


def rate(runs: Runs) -> tuple:
    """(rate, low, high): Wilson's interval (1927) with the arm's own margin in place of the binomial one.

    Of a single run it carries the probes alone and says nothing of another seed.
    """
    estimate = runs.means.mean(-1)
    binomial = estimate * (1 - estimate)  # variance of one answer
    one_topic = 1 / (runs.effective_topics + 2)
    least_binomial = np.maximum(binomial, one_topic * (1 - one_topic))  # as in least_variance_of

    # Wilson's interval depends on z² / n alone, and margin² = z² p (1 - p) / n gives it: n is then the
    # number of independent answers that would be as uncertain as these.
    margin = squared_margin(runs)
    with np.errstate(invalid="ignore", divide="ignore"):
        seen = np.where(binomial > 0, margin / binomial, 0)
    ratio = np.maximum(seen, Z**2 * runs.least_variance / least_binomial)
    ratio = np.where(np.isnan(margin), np.nan, ratio)  # no margin, no interval

    middle = (estimate + ratio / 2) / (1 + ratio)
    half = np.sqrt(ratio * binomial + ratio**2 / 4) / (1 + ratio)
    return estimate, np.maximum(middle - half, 0), np.minimum(middle + half, 1)  # rounding may step over
