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
    import numpy as np

    difference = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    random = np.random.default_rng(seed)
    means = [float(random.choice(difference, len(difference)).mean()) for _ in range(draws)]
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return Interval(float(difference.mean()), float(low), float(high))
