"""Schedule: which sizes a model should have on its way, and when it should grow, by a law of the loss.

A law says how many tokens training a model of N parameters takes to come to a loss. A growth keeps what was learned:
a grown model stands at the loss of the one before, so it has only the rest of its own way to go, less a share that it
learns again. Then the cheapest way to a loss is a path through (size, loss), along which one trains on or grows; the
cheapest paths to all of them are found in one sweep from high losses to low. Where a larger size gains more per unit of
money than the present one, the path grows: the schedule is an outcome, not a choice.

Costs are in any one unit (dollars, seconds, FLOPs, shares of a budget), the same throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

# Losses between the first and the last that are told apart. The cost at the end is off by about 1 / LOSSES.
LOSSES = 2000


class Law(Protocol):
    """A law of the loss, `budget/scaling.py`'s `Terms`: of numbers, or of arrays of them."""

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Nats a token of a model of so many parameters that was trained on so many tokens."""
        ...

    def tokens_for(self, loss: Any, parameters: Any) -> Any:
        """Tokens at which the loss is reached; infinite for one below what the size can reach."""
        ...


@dataclass(frozen=True)
class Size:
    """A size that the model may have.

    parameters      as the law counts them
    cost_per_token  of training
    ready           cost of beginning to train it, whatever comes before: compiling, a first evaluation
    after           cost of what follows if it is the final size, such as serving it
    """

    parameters: float
    cost_per_token: float
    ready: float = 0.0
    after: float = 0.0


# By the sizes before and after: the share of its way so far that a grown model learns again.
# 0 keeps all, 1 begins anew, infinity forbids the growth.
Relearned = Callable[[int, int], float]


@dataclass(frozen=True)
class Stage:
    """Training at one size for so many tokens, to a loss (or one for each value of the law); with its cost."""

    size: int
    tokens: float
    loss: Any
    cost: float


@dataclass(frozen=True)
class Schedule:
    """Stages in order; their costs, and what follows the last, add up to the budget."""

    stages: tuple[Stage, ...]

    @property
    def loss(self) -> Any:
        return self.stages[-1].loss

    @property
    def tokens(self) -> float:
        return sum(stage.tokens for stage in self.stages)


def from_scratch(law: Law, sizes: Sequence[Size], size: int, budget: float) -> Schedule | None:
    """All of the budget on one size; None if it doesn't pay for getting ready and what follows."""
    return spend(law, sizes, [(size, 0.0)], budget, lambda before, after: math.inf)


def trajectory(law: Law, sizes: Sequence[Size], stages: Sequence[tuple[int, float]], relearned: Relearned) -> Schedule:
    """What stages of (size, tokens) come to, by the law."""
    done: list[Stage] = []
    for size, tokens in stages:
        standing = 0.0
        if done:
            whole = law.tokens_for(done[-1].loss, sizes[size].parameters)
            standing = whole * (1 - min(relearned(done[-1].size, size), 1.0))
        loss = law.loss(sizes[size].parameters, standing + tokens)
        done.append(Stage(size, tokens, loss, sizes[size].ready + tokens * sizes[size].cost_per_token))
    return Schedule(tuple(done))


def cheapest(
    law: Law, sizes: Sequence[Size], budget: float, relearned: Relearned, last: float = 0.0
) -> Schedule | None:
    """The schedule with the lowest loss that the budget pays for; None if it pays for no size's first step.

    sizes  in the order in which a model may grow: from one to any later one for which `relearned` is finite
    last   the share of the budget that the last of several stages takes at least
    """
    alone = [schedule for size in range(len(sizes)) if (schedule := from_scratch(law, sizes, size, budget))]
    if not alone:
        return None
    best = min(alone, key=lambda schedule: schedule.loss)
    paths = _sweep(law, sizes, budget, relearned, _first_loss(law, sizes, budget), _lowest_loss(law, sizes, budget))
    # The sweep is on a grid; its stages are worked out exactly, and the last takes what is left of the budget.
    in_time = [_grown_by(sizes, path, (1 - last) * budget) for path in paths]
    grown = [spend(law, sizes, path, budget, relearned) for path in in_time if path]
    return min([best, *(schedule for schedule in grown if schedule)], key=lambda schedule: schedule.loss)


def spend(
    law: Law, sizes: Sequence[Size], stages: Sequence[tuple[int, float]], budget: float, relearned: Relearned
) -> Schedule | None:
    """Stages of (size, tokens), the last one lengthened or shortened so that the budget is spent; None if it can't."""
    before = sum(sizes[size].ready + tokens * sizes[size].cost_per_token for size, tokens in stages[:-1])
    last = sizes[stages[-1][0]]
    tokens = (budget - before - last.ready - last.after) / last.cost_per_token
    if tokens <= 0:
        return None
    return trajectory(law, sizes, [*stages[:-1], (stages[-1][0], tokens)], relearned)


def _grown_by(
    sizes: Sequence[Size], stages: Sequence[tuple[int, float]], latest: float
) -> list[tuple[int, float]] | None:
    """The stages with those before the last shortened, all by as much, until they cost `latest`; None if they can't."""
    ready = sum(sizes[size].ready for size, _ in stages[:-1])
    training = sum(tokens * sizes[size].cost_per_token for size, tokens in stages[:-1])
    if ready + training <= latest:
        return list(stages)
    if ready >= latest:
        return None
    return [(size, tokens * (latest - ready) / training) for size, tokens in stages[:-1]] + [stages[-1]]


def _first_loss(law: Law, sizes: Sequence[Size], budget: float) -> float:
    """The loss at which paths begin: that of the cheapest size after a thousandth of the budget."""
    return min(law.loss(size.parameters, budget / 1000 / size.cost_per_token) for size in sizes)


def _lowest_loss(law: Law, sizes: Sequence[Size], budget: float) -> float:
    """Where the sweep ends: the lowest loss that any size comes to on 20 times the budget, far below any path's."""
    return min(law.loss(size.parameters, 20 * budget / size.cost_per_token) for size in sizes)


def _sweep(
    law: Law, sizes: Sequence[Size], budget: float, relearned: Relearned, first: float, last: float
) -> list[list[tuple[int, float]]]:
    """The cheapest path to the lowest loss within the budget at each size, as stages of (size, tokens)."""
    losses = np.linspace(first, last, LOSSES)
    tokens = np.array([law.tokens_for(losses, size.parameters) for size in sizes])
    price = np.array([size.cost_per_token for size in sizes])
    ready = np.array([size.ready for size in sizes])
    again = np.array([[relearned(i, k) if i < k else math.inf for k in range(len(sizes))] for i in range(len(sizes))])
    cost = ready + price * tokens[:, 0]
    came_from = np.full((LOSSES, len(sizes)), -1)  # the size grown from at this loss; -1: trained on
    costs = np.empty((LOSSES, len(sizes)))
    for row in range(LOSSES):
        if row:
            with np.errstate(invalid="ignore"):
                step = tokens[:, row] - tokens[:, row - 1]
            cost = cost + price * np.where(np.isfinite(step), step, math.inf)
        for size in range(1, len(sizes)):  # in order, so that a growth may follow a growth
            with np.errstate(invalid="ignore"):
                grown = cost[:size] + ready[size] + again[:size, size] * price[size] * tokens[size, row]
            grown = np.where(np.isnan(grown), math.inf, grown)
            nearest = int(np.argmin(grown))
            if grown[nearest] < cost[size]:
                cost[size], came_from[row, size] = grown[nearest], nearest
        costs[row] = cost
    return [
        _back(number, costs[:, number] + size.after, came_from, tokens, again, budget)
        for number, size in enumerate(sizes)
    ]


def _back(
    size: int, costs: np.ndarray, came_from: np.ndarray, tokens: np.ndarray, again: np.ndarray, budget: float
) -> list[tuple[int, float]]:
    """The path to the lowest loss within the budget at a size, backwards from there."""
    affordable = np.flatnonzero(costs <= budget)
    row = int(affordable[-1]) if len(affordable) else 0
    turns = [(size, row)]  # a size, and the row at which its stage ends
    starts: list[int] = []
    while row >= 0:
        before = came_from[row, size]
        if before < 0:
            row -= 1
            continue
        starts.append(row)
        size = int(before)
        turns.append((size, row))
    turns.reverse()
    starts.reverse()
    path = [(turns[0][0], float(tokens[turns[0][0], turns[0][1]]))]
    for ((before, _), (now, end)), start in zip(pairwise(turns), starts, strict=True):
        standing = tokens[now, start] * (1 - min(again[before, now], 1.0))
        path.append((now, float(tokens[now, end] - standing)))
    return path


def shares(schedule: Schedule) -> list[float]:
    """Each stage's part of the whole cost."""
    whole = sum(stage.cost for stage in schedule.stages)
    return [stage.cost / whole for stage in schedule.stages]


def growth_points(schedule: Schedule) -> list[float]:
    """Tokens at which the model grows."""
    done = np.cumsum([stage.tokens for stage in schedule.stages])
    return [float(tokens) for tokens in done[:-1]]
