"""Masks: weights of new slots that are raised from nothing to what is trained, over the first updates after a growth.

Masked structural growth (MSG, arXiv 2305.02869; FLM-101B, arXiv 2309.03852) multiplies what new slots put out by a
mask, 0 at the growth and 1 at the end of a ramp. Multiplying the weights that write those slots is the same, so the
model is a plain one at every step, and what is saved or evaluated on the way is exact. The optimizer trains the
unmasked weights: they are put in for its step, and gradients have the mask's factor.

A norm takes the mean square over d' channels of which new ones count `level`; it is multiplied by the square root of
the share of channels that count, so that its output stays what it was.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from espalier.train.parallel import local, part


@dataclass(frozen=True)
class Slots:
    """What a mask multiplies, by name of the weight.

    elements   bool, broadcastable to the weight: those that are multiplied by the level
    norms      weights of norms over the residual stream
    old_share  the share of the stream's channels that were there before
    """

    elements: Mapping[str, Tensor] = field(default_factory=dict)
    norms: frozenset[str] = frozenset()
    old_share: float = 1.0

    @property
    def names(self) -> list[str]:
        return [*self.elements, *sorted(self.norms)]

    def factor(self, name: str, level: float) -> Tensor:
        """What the unmasked weight is multiplied by, broadcastable to it."""
        if name in self.norms:
            return torch.tensor(math.sqrt(self.old_share + level * (1 - self.old_share)))
        return torch.where(self.elements[name], level, 1.0)


class Masks:
    """The masks of one model: `weights` hold masked values, except inside `lifted`.

    unmasked  for every name in `slots`, what is trained
    """

    def __init__(self, weights: Mapping[str, Tensor], slots: Slots, unmasked: Mapping[str, Tensor]) -> None:
        self.slots = slots
        self.unmasked = {name: _copied(unmasked[name].detach(), weights[name]) for name in slots.names}
        self._weights = {name: weights[name] for name in slots.names}
        self._factors: dict[str, Tensor] = {}

    def set_level(self, level: float) -> None:
        """Show the weights at this level, 0 to 1; at 1 they are the unmasked ones, bit for bit."""
        for name in self.unmasked:
            weight = self._weights[name]
            factor = self.slots.factor(name, level).to(local(weight))
            self._factors[name] = local(part(factor.expand(weight.shape), weight))
        self._show()

    def scale_gradients(self) -> None:
        """Turn the gradients of the masked weights into those of the unmasked."""
        for name in self.unmasked:
            if (gradient := self._weights[name].grad) is not None:
                local(gradient).mul_(self._factors[name])

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """With the unmasked weights in the model's place, to be changed."""
        with torch.no_grad():
            for name, unmasked in self.unmasked.items():
                local(self._weights[name]).copy_(local(unmasked))
            yield
            for name, unmasked in self.unmasked.items():
                local(unmasked).copy_(local(self._weights[name]))
        self._show()

    @torch.no_grad()
    def _show(self) -> None:
        for name, unmasked in self.unmasked.items():
            local(self._weights[name]).copy_(local(unmasked) * self._factors[name])


def _copied(value: Tensor, weight: Tensor) -> Tensor:
    """A copy of a value, shared and placed as a weight is."""
    return part(value, weight).to(local(weight).device, copy=True)
