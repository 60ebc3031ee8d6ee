"""What items give away to one who knows nothing: the scores of simple rules, by the items alone.

Each rule gives an item 1 where it takes the right option, 0 where it takes another, and a share where it can't decide
between several.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import expit

from espalier.evaluate.items import Item

FOLDS = 5
# Strength of the pull towards zero weights; that of scikit-learn's default.
RIDGE = 1.0

Feature = Callable[[Item, int], list[str]]


def cues(items: Sequence[Item]) -> dict[str, list[float]]:
    """Each rule's score on each item. All items have options.

    majority letter  the place where the right option mostly is
    longest          the option of most characters
    overlap          the option with most words of the prompt
    options only     a classifier of the options' words, fitted to other items
    question only    a classifier of the prompt's words, which tells the place
    """
    places = Counter(item.options.index(item.gold) for item in items)
    asked = [set(words(item.prompt)) for item in items]
    return {
        "majority letter": [_score(item, [places[n] for n in range(len(item.options))]) for item in items],
        "longest": [_score(item, [len(option) for option in item.options]) for item in items],
        "overlap": [
            _score(item, [len(seen & set(words(option))) for option in item.options])
            for item, seen in zip(items, asked, strict=True)
        ],
        "options only": _classified(items, lambda item, place: words(item.options[place])),
        "question only": _classified(items, lambda item, place: [f"{place} {word}" for word in words(item.prompt)]),
    }


def words(text: str) -> list[str]:
    """In small letters; a Chinese character is a word."""
    return re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", text.lower())


def _score(item: Item, values: Sequence[float]) -> float:
    """What taking the option of the largest value is worth."""
    best = max(values)
    return (values[item.options.index(item.gold)] == best) / sum(value == best for value in values)


def _classified(items: Sequence[Item], feature: Feature) -> list[float]:
    """The option that looks right by those of the other folds: logistic regression on TF-IDF."""
    order = random.Random(0).sample(range(len(items)), len(items))
    scores = [0.0] * len(items)
    for fold in range(min(FOLDS, len(items))):
        held = sorted(order[fold::FOLDS])
        others = sorted(set(order) - set(held))
        looks = _looks_right([items[number] for number in others], [items[number] for number in held], feature)
        for number, values in zip(held, looks, strict=True):
            scores[number] = _score(items[number], values)
    return scores


def _looks_right(known: Sequence[Item], asked: Sequence[Item], feature: Feature) -> list[list[float]]:
    """How right each option of what is asked looks, by what is known."""
    rows = _options(known, feature)
    found = Counter(word for row in rows for word in set(row))
    columns = {word: number for number, word in enumerate(found)}
    rarity_F = 1 + np.log((1 + len(rows)) / (1 + np.array(list(found.values()))))
    right_N = np.array([option == item.gold for item in known for option in item.options], dtype=float)
    weights_F = _logistic(_tf_idf(rows, columns, rarity_F), right_N)
    values = iter((_tf_idf(_options(asked, feature), columns, rarity_F) @ weights_F).tolist())
    return [[next(values) for _ in item.options] for item in asked]


def _options(items: Sequence[Item], feature: Feature) -> list[list[str]]:
    return [feature(item, place) for item in items for place in range(len(item.options))]


def _tf_idf(rows: Sequence[list[str]], columns: dict[str, int], rarity_F: np.ndarray) -> sparse.csr_array:
    """[rows, features] of length 1 each; words that aren't among the columns are left out."""
    at = [(number, columns[word]) for number, row in enumerate(rows) for word in row if word in columns]
    line, column = np.array(at, dtype=int).reshape(-1, 2).T
    made = sparse.csr_array((rarity_F[column], (line, column)), shape=(len(rows), len(columns)))
    norms = np.sqrt(made.multiply(made).sum(axis=1))
    return sparse.diags_array(1 / np.where(norms > 0, norms, 1)) @ made


def _logistic(x_NF: sparse.csr_array, y_N: np.ndarray) -> np.ndarray:
    """Weights of each feature; the intercept, which is the same for all options, is fitted and left out."""

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z_N = x_NF @ w[:-1] + w[-1]
        slope_N = expit(z_N) - y_N
        value = (np.logaddexp(0, z_N) - y_N * z_N).sum() + RIDGE / 2 * w[:-1] @ w[:-1]
        return float(value), np.append(x_NF.T @ slope_N + RIDGE * w[:-1], slope_N.sum())

    return minimize(loss, np.zeros(x_NF.shape[1] + 1), jac=True, method="L-BFGS-B").x[:-1]
