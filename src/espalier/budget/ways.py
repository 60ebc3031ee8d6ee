"""Ways: sizes that are trained to the same loss and then serve, and which of them costs the least.

A smaller model that is trained for longer comes to the same loss and answers every query for less: the more queries it
will have to answer, the smaller it should be (Sardana et al., "Beyond Chinchilla-Optimal", arXiv 2401.00448).

A budget for both is the same question: the lowest loss that it buys is the one to which it pays for the cheapest way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from espalier.budget import flops, schedule
from espalier.budget.schedule import Law, Size
from espalier.budget.serving import Served
from espalier.ledger import Cost
from espalier.spec import ModelSpec

Resource = Literal["usd", "kwh", "kgco2e", "flops"]


@dataclass(frozen=True)
class Candidate:
    """A size that the model may have: what a token of training costs, and what serving it takes."""

    spec: ModelSpec
    token: Cost
    served: Served

    @property
    def parameters(self) -> int:
        return flops.parameters(self.spec)

    @property
    def shape(self) -> str:
        return f"{self.spec.num_hidden_layers} layers × {self.spec.hidden_size}"

    def loss_on(self, law: Law, budget: float, resource: Resource) -> float | None:
        """The loss that a budget for training and serving buys; None if serving leaves nothing of it."""
        size = Size(self.parameters, getattr(self.token, resource), after=getattr(self.served.cost, resource))
        found = schedule.from_scratch(law, [size], 0, budget)
        return float(found.loss) if found else None


@dataclass(frozen=True)
class Way:
    """A size that is trained on so many tokens and then serves."""

    candidate: Candidate
    tokens: float

    @property
    def training(self) -> Cost:
        return self.candidate.token * self.tokens

    @property
    def serving(self) -> Cost:
        return self.candidate.served.cost

    @property
    def cost(self) -> Cost:
        return self.training + self.serving


@dataclass(frozen=True)
class Ways:
    """The ways to a loss, the smallest size first, compared by what they take of a resource."""

    loss: float
    resource: Resource
    all: tuple[Way, ...]

    def of(self, cost: Cost) -> float:
        """The resource in a cost."""
        return getattr(cost, self.resource)

    @property
    def chosen(self) -> Way:
        """The cheapest, serving and all."""
        return min(self.all, key=lambda way: self.of(way.cost))

    @property
    def alone(self) -> Way:
        """The one that would be chosen without serving; never a smaller one, since serving costs more by size."""
        return min(self.all, key=lambda way: self.of(way.training))

    @property
    def saved(self) -> float:
        """What the choice saves against the one without serving."""
        return self.of(self.alone.cost) - self.of(self.chosen.cost)

    @property
    def rival(self) -> Way | None:
        """The smaller size that competes with `alone`: the chosen one, or else the next; None without any."""
        smaller = self.all[: self.all.index(self.alone)]
        return self.chosen if self.chosen in smaller else smaller[-1] if smaller else None

    def break_even(self, days: float) -> float | None:
        """Queries a day, for so many days, from which on `rival` costs less than `alone`, by the device-seconds used.

        None where no traffic makes it cheaper: there is no rival, or queries cost nothing.
        """
        if self.rival is None:
            return None
        more = self.of(self.rival.training) - self.of(self.alone.training)
        less = self.of(self.alone.candidate.served.query) - self.of(self.rival.candidate.served.query)
        return more / less / days if less > 0 else None


def ways_to(law: Law, candidates: Sequence[Candidate], loss: float) -> tuple[Way, ...]:
    """The candidates that can come to a loss, each with the tokens that it takes."""
    ways = [Way(candidate, float(law.tokens_for(loss, candidate.parameters))) for candidate in candidates]
    return tuple(way for way in ways if way.tokens < math.inf)


def lowest_loss(law: Law, candidates: Sequence[Candidate], budget: float, resource: Resource) -> float | None:
    """The lowest loss that a budget for training and serving buys; None if it pays for no candidate's serving."""
    losses = [candidate.loss_on(law, budget, resource) for candidate in candidates]
    return min((loss for loss in losses if loss is not None), default=None)
