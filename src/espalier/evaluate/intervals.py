"""How sure a score is: intervals of a share, of a mean, and of the difference between two models on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def stderr(scores: Sequence[float]) -> float | None:
    """Of the mean; None of fewer than two. That of shares is sqrt(p (1 - p) / (n - 1)), as lm-eval has it."""
    n = len(scores)
    if n < 2:
        return None
    mean = sum(scores) / n
    return math.sqrt(sum((score - mean) ** 2 for score in scores) / (n - 1) / n)


def binomial(right: float, n: int, level: float = LEVEL) -> Interval:
    """Wilson's interval of a share: `right` of `n`; honest at 0 and at 1 too, where the standard error is 0."""
    from scipy.stats import norm

    z = float(norm.ppf((1 + level) / 2))
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding may leave an end on the wrong side of the share itself.
    return Interval(share, min(max(0.0, middle - half), share), max(min(1.0, middle + half), share))


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0, draws: int = DRAWS, level: float = LEVEL
) -> Interval:
    """Second minus first, of scores on the same items in the same order: items are drawn anew, pairs stay pairs."""
    differences = [float(after) - float(before) for before, after in zip(first, second, strict=True)]
    return mean_of_means([differences], seed=seed, draws=draws, level=level)


def mean_of_means(
    tasks: Sequence[Sequence[float]], *, seed: int = 0, draws: int = DRAWS, level: float = LEVEL
) -> Interval:
    """The mean over tasks of each one's mean, every task counting alike; items are drawn anew within their task."""
    import numpy as np

    random = np.random.default_rng(seed)
    value, around = 0.0, np.zeros(draws)
    for scores in tasks:
        n = len(scores)
        # Only how often each score is drawn matters, and most tasks know two or three.
        known, counts = np.unique(np.asarray(scores, dtype=float), return_counts=True)
        mean = float(known @ counts) / n
        drawn = random.multinomial(n, counts / n, size=draws) @ known / n
        value += mean / len(tasks)
        # Means that are drawn from a sample vary by (n - 1) / n of what the sample's own does.
        around += (drawn - mean) * math.sqrt(n / max(n - 1, 1)) / len(tasks)
    low, high = np.quantile(around, ((1 - level) / 2, (1 + level) / 2))
    return Interval(value, value + float(low), value + float(high))


def sign_test(differences: Sequence[float]) -> float:
    """The exact two-sided probability of so lopsided a count of signs if neither side were better.

    Of scores that are 0 or 1 it is McNemar's test. Ties say nothing; with nothing else it is 1.
    """
    from scipy.stats import binomtest

    better, worse = (sum(sign * each > 0 for each in differences) for sign in (1, -1))
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def holm(chances: Sequence[float]) -> list[float]:
    """Holm's correction of several tests' probabilities: any below 0.05 may be believed at once (Holm, 1979)."""
    order = sorted(range(len(chances)), key=lambda place: chances[place])
    corrected, most = [0.0] * len(chances), 0.0
    for rank, place in enumerate(order):
        most = max(most, min((len(chances) - rank) * chances[place], 1.0))
        corrected[place] = most
    return corrected
