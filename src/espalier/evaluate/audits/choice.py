"""Choosing an attention head by a few questions, and how far such a choice can be trusted on the others.

Legend: n questions, L layers, H heads, O options. Heads are numbered layer by layer: layer * H + head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from espalier.evaluate.intervals import DRAWS, LEVEL

# How much a standardised score counts against being right: it only decides between heads that are right as often.
TIE = 1e-6


@dataclass(frozen=True)
class HeadScores:
    """What every head gives every option.

    scores_nLHO  standardised over the options of a question; minus infinity where it has fewer options than others
    gold_n       the place of the right option
    """

    scores_nLHO: np.ndarray
    gold_n: np.ndarray

    def __getitem__(self, items: np.ndarray) -> HeadScores:
        """Those of some of the questions."""
        return HeadScores(self.scores_nLHO[items], self.gold_n[items])

    @cached_property
    def choices(self) -> np.ndarray:
        """The option that each head prefers, [n, L * H]."""
        return self._flat.argmax(-1)

    @cached_property
    def right(self) -> np.ndarray:
        """Whether that is the right one, [n, L * H]."""
        return self.choices == self.gold_n[:, None]

    @cached_property
    def merit(self) -> np.ndarray:
        """What heads are chosen by: 1 if right, and a trace of how far the right option stands out, [n, L * H]."""
        gold = np.take_along_axis(self._flat, self.gold_n[:, None, None], -1)[..., 0]
        return self.right + TIE * gold.astype(float)

    def together(self, heads: np.ndarray) -> np.ndarray:
        """Whether the option is right that has the largest sum of these heads' scores, [n]."""
        return self._flat[:, heads].sum(1).argmax(-1) == self.gold_n

    @property
    def _flat(self) -> np.ndarray:
        n, layers, heads, options = self.scores_nLHO.shape
        return self.scores_nLHO.reshape(n, layers * heads, options)


def standardised(scores: np.ndarray) -> np.ndarray:
    """Scores less their mean over the last axis, in standard deviations; equal ones are 0."""
    spread = scores.std(-1, keepdims=True)
    return (scores - scores.mean(-1, keepdims=True)) / np.where(spread > 0, spread, 1)


def split(gold_n: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(questions to choose by, all others): drawn by the seed, every right letter in its proportion."""
    n = len(gold_n)
    count = round(share * n)
    drawn = np.random.default_rng(seed).permutation(n)
    by_letter = drawn[np.argsort(gold_n[drawn], kind="stable")]
    chosen = by_letter[((np.arange(count) + 0.5) * n / max(count, 1)).astype(int)]
    return np.sort(chosen), np.setdiff1d(np.arange(n), chosen)


def ranked(validation: HeadScores) -> np.ndarray:
    """All heads, the best on these questions first."""
    return np.argsort(-validation.merit.mean(0), kind="stable")


@dataclass(frozen=True)
class Trust:
    """How the choice would have gone with other questions to choose by, drawn from the same with replacement.

    low, high  95% interval of the held-out accuracy of the head that is chosen
    picked     how often each head is, [L * H]
    """

    low: float
    high: float
    picked: np.ndarray


def trust(validation: HeadScores, held_out: HeadScores, seed: int) -> Trust:
    """A bootstrap over the choice."""
    n = len(validation.gold_n)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    heads = (drawn @ validation.merit).argmax(1)
    low, high = np.quantile(held_out.right.mean(0)[heads], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Trust(float(low), float(high), np.bincount(heads, minlength=validation.right.shape[1]) / DRAWS)


def unlabelled(attention: HeadScores, mass_nLH: np.ndarray) -> np.ndarray:
    """All heads, first those that look at the options much and not always at the same one; no answer is needed.

    A head's share of attention on the options, times the entropy of its choices over that of an even choice. Ours;
    arXiv 2410.02343 only tells the idea.
    """
    options = attention.scores_nLHO.shape[-1]
    share = np.stack([(attention.choices == option).mean(0) for option in range(options)], -1)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1) / np.log(options)
    return np.argsort(-mass_nLH.mean(0).ravel() * entropy, kind="stable")
