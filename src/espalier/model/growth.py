"""Growth: one index map per role, with shares and rules for new slots. What a growth operator builds.

A growth is a plain value: it can be planned, printed and checked without torch. `reshape` applies it to tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Self

import numpy as np

# What the slots of an axis are; "fixed" ones follow no size that growth changes.
Role = Literal[
    "vocab",
    "positions",
    "hidden",
    "ffn",
    "expert_ffn",
    "shared_ffn",
    "experts",
    "heads",
    "kv_heads",
    "head_dim",
    "fixed",
]

# What a tensor does in the model; `Layout.parts` tells which hold for it.
Part = Literal[
    "embeds", "writes_residual", "reads_residual", "scales_residual", "final_norm", "feeds_norm", "routes", "bias"
]

# What a new slot holds: zero, the mean over the old slots that the tensor writes, or a draw of the initialiser's
# standard deviation. Where a tensor reads new slots, zero and mean mean zero.
Fill = Literal["zero", "mean", "random"]

NEW = -1


class Shape(Protocol):
    """What operators have to know of a model: a ModelSpec, or the ConfigShape that axes finds for any other model.

    norm             "rms", or "layer" for norms that subtract the mean
    normed_heads     whether norms over queries and keys take "each" head alone, "all" together, or there are "none"
    embedding_scale  what the model multiplies embeddings by because of its width
    """

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def initializer_range(self) -> float: ...
    @property
    def logits_scaling(self) -> float: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def norm(self) -> Literal["rms", "layer"]: ...
    @property
    def normed_heads(self) -> Literal["none", "each", "all"]: ...
    @property
    def embedding_scale(self) -> float: ...

    def changed(self, **sizes: Any) -> Self:
        """This shape with some fields replaced, checked again."""

    def fields(self) -> dict[str, Any]:
        """All that tells it from other shapes, by name."""

    def to_config(self) -> dict[str, Any]:
        """Its values under the names of the Hugging Face config."""


def differing(one: Shape, other: Shape) -> list[str]:
    """The fields in which two shapes differ."""
    ours, theirs = one.fields(), other.fields()
    return [key for key in ours if ours[key] != theirs[key]]


@dataclass(frozen=True, eq=False)
class IndexMap:
    """Where each slot of a grown axis comes from.

    source  (n',) int64: the slot of the old axis, or NEW
    share   (n',) float64: the factor on what is read through the slot (on the "in" side). Over the copies of a slot
            shares sum to 1, so that the sum that is read stays what it was
    """

    source: np.ndarray
    share: np.ndarray

    @classmethod
    def pad(cls, before: int, after: int) -> IndexMap:
        """Keep all slots, then new ones."""
        return cls.take([*range(before), *[NEW] * (after - before)])

    @classmethod
    def take(cls, source: list[int]) -> IndexMap:
        """Each slot whole, from where `source` says."""
        return cls(np.array(source, dtype=np.int64), np.ones(len(source)))

    @classmethod
    def copies(cls, source: list[int], noise: float = 0.0, seed: int = 0) -> IndexMap:
        """Slots copied as `source` says; copies of one slot share it equally, or by weights of 1 +- `noise`."""
        slots = np.array(source, dtype=np.int64)
        weights = 1 + noise * np.random.default_rng(seed).uniform(-1, 1, len(slots))
        return cls(slots, weights / np.bincount(slots, weights)[slots])

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

    @property
    def is_copy(self) -> np.ndarray:
        """(n',) bool: whether an earlier slot has the same source."""
        first = np.zeros(len(self.source), dtype=bool)
        first[np.unique(self.source, return_index=True)[1]] = True
        return ~first & (self.source != NEW)


@dataclass(frozen=True)
class LayerMap:
    """Where each layer comes from, and which are additions to the layers that were there.

    source  for each target layer the number of the old layer that it copies
    new     target layers that weren't there before
    donor   for each target layer the old layer whose rows its copied slots take (AKI); as `source` if not stated
    """

    source: tuple[int, ...]
    new: frozenset[int] = frozenset()
    donor: tuple[int, ...] = ()

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
    learned  whether its maps are only where the training of maps begins
    masked   parts whose new slots a mask raises from nothing to what `unmasked` has there
    """

    operator: str
    before: Shape
    after: Shape
    exact: bool
    layers: LayerMap
    maps: Mapping[Role, IndexMap] = field(default_factory=dict)
    fills: Mapping[Part, Fill] = field(default_factory=dict)
    factors: Mapping[Part, float] = field(default_factory=dict)
    silent: frozenset[Part] = frozenset()
    masked: frozenset[Part] = frozenset()
    learned: bool = False

    def unmasked(self) -> Growth:
        """The growth without its masks: new slots have their initial values, norms see all channels."""
        if not self.masked:
            return self
        fills = {part: fill for part, fill in self.fills.items() if part not in self.masked}
        factors: dict[Part, float] = {
            part: factor for part, factor in self.factors.items() if part != "scales_residual"
        }
        return replace(self, exact=False, fills=fills, factors=factors, silent=self.silent - self.masked)

    def fill(self, parts: frozenset[Part]) -> Fill:
        """What new slots of a tensor with these parts hold."""
        return next((fill for part, fill in self.fills.items() if part in parts), "random")

    def factor(self, parts: frozenset[Part]) -> float:
        """What old slots of a tensor with these parts are multiplied by."""
        return math.prod(factor for part, factor in self.factors.items() if part in parts)

    def identity(self) -> list[Any]:
        """All that the grown weights depend on, as JSON: what it says of itself, and every map, fill and factor."""
        maps = {role: [map_.source.tolist(), map_.share.tolist()] for role, map_ in self.maps.items()}
        layers = [self.layers.source, sorted(self.layers.new), self.layers.donor]
        return [
            self.record(),
            maps,
            layers,
            dict(self.fills),
            dict(self.factors),
            sorted(self.silent),
            sorted(self.masked),
        ]

    def record(self) -> dict[str, Any]:
        """What was done, as JSON, for made.json."""
        before, after = self.before.fields(), self.after.fields()
        return {
            "operator": self.operator,
            "exact": self.exact,
            "changed": {key: [before[key], after[key]] for key in differing(self.before, self.after)},
            "layers": list(self.layers.source),
        }
