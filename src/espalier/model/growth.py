"""Growth: one index map per role, with shares and rules for new slots. What a growth operator builds.

A growth is a plain value: it can be planned, printed and checked without torch. `reshape` applies it to tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from espalier.spec import ModelSpec

Role = Literal["vocab", "hidden", "ffn", "heads", "kv_heads", "head_dim"]

# What a tensor does in the model; `Layout.parts` tells which hold for it.
Part = Literal["writes_residual", "reads_residual", "scales_residual", "final_norm", "feeds_head_norm", "bias"]

# What a new slot holds: zero, the mean of the old slots, or a draw of the initialiser's standard deviation.
Fill = Literal["zero", "mean", "random"]

NEW = -1


@dataclass(frozen=True, eq=False)
class IndexMap:
    """Where each slot of a grown axis comes from.

    source  (n',) int64: the slot of the old axis, or NEW
    share   (n',) float64: the factor on what is read through the slot (on the "in" side)
    """

    source: np.ndarray
    share: np.ndarray

    @classmethod
    def pad(cls, before: int, after: int) -> IndexMap:
        """Keep all slots, then new ones."""
        return cls.take([*range(before), *[NEW] * (after - before)])

    @classmethod
    def grouped(cls, before: tuple[int, int], after: tuple[int, int]) -> IndexMap:
        """Query heads, (key-value heads, query heads of each): slot (j, r) takes (j, r) where that existed.

        Query heads of one key-value head lie side by side, so new ones go in between the old.
        """
        (old_groups, old_each), (groups, each) = before, after
        return cls.take(
            [
                group * old_each + head if group < old_groups and head < old_each else NEW
                for group in range(groups)
                for head in range(each)
            ]
        )

    @classmethod
    def take(cls, source: list[int]) -> IndexMap:
        """Each slot whole, from where `source` says."""
        return cls(np.array(source, dtype=np.int64), np.ones(len(source)))


@dataclass(frozen=True)
class LayerMap:
    """Where each layer comes from, and which are additions to the layers that were there.

    source  for each target layer the number of the old layer that it copies
    new     target layers that weren't there before
    """

    source: tuple[int, ...]
    new: frozenset[int] = frozenset()

    @classmethod
    def same(cls, layers: int) -> LayerMap:
        return cls(tuple(range(layers)))


@dataclass(frozen=True, eq=False)
class Growth:
    """How one model becomes another.

    after    the shape that comes out, with what the operator had to correct for (rms_norm_eps)
    exact    whether the function stays the same, up to rounding
    maps     by role; an axis whose role isn't here stays as it is
    fills    by part: what new slots hold, the first part that holds for a tensor decides; otherwise random
    factors  by part: what old slots are multiplied by, parts of one tensor together
    silent   parts that are zero throughout a new layer, so that it adds nothing to the residual stream
    """

    operator: str
    before: ModelSpec
    after: ModelSpec
    exact: bool
    layers: LayerMap
    maps: Mapping[Role, IndexMap] = field(default_factory=dict)
    fills: Mapping[Part, Fill] = field(default_factory=dict)
    factors: Mapping[Part, float] = field(default_factory=dict)
    silent: frozenset[Part] = frozenset()

    def fill(self, parts: frozenset[Part]) -> Fill:
        """What new slots of a tensor with these parts hold."""
        return next((fill for part, fill in self.fills.items() if part in parts), "random")

    def factor(self, parts: frozenset[Part]) -> float:
        """What old slots of a tensor with these parts are multiplied by."""
        return math.prod(factor for part, factor in self.factors.items() if part in parts)

    def record(self) -> dict[str, Any]:
        """What was done, as JSON, for made.json."""
        before, after = self.before.model_dump(), self.after.model_dump()
        return {
            "operator": self.operator,
            "exact": self.exact,
            "changed": {key: [before[key], after[key]] for key in before if before[key] != after[key]},
            "layers": list(self.layers.source),
        }
