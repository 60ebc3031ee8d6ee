"""Layout: what each axis of each tensor of a model stands for, and what each tensor does. `axes` finds it out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from espalier.model.growth import Part, Role, Shape

Side = Literal["out", "in", "along"]


@dataclass(frozen=True)
class Block:
    """`count` slots of a role, each a run of `unit` elements: a head of 64 channels, a neuron of 1."""

    role: Role
    count: int
    unit: int = 1

    @property
    def size(self) -> int:
        return self.count * self.unit


@dataclass(frozen=True)
class Axis:
    """One axis: its blocks one after the other; a fused projection has several, as in [q | k | v] or [gate | up].

    side  "out": the module writes along it; "in": it reads along it; "along": it scales or shifts each element
    """

    blocks: tuple[Block, ...]
    side: Side

    @classmethod
    def of(cls, role: Role, count: int, unit: int, side: Side) -> Axis:
        """An axis of one block."""
        return cls((Block(role, count, unit),), side)

    @property
    def size(self) -> int:
        return sum(block.size for block in self.blocks)

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset(block.role for block in self.blocks)


Axes = tuple[Axis, ...]


def writes_residual(axes: Axes) -> bool:
    """Whether the tensor's output goes to the residual stream: embedding, o_proj, down_proj and their biases."""
    return any("hidden" in axis.roles and axis.side == "out" for axis in axes)


def reads_residual(axes: Axes) -> bool:
    """Whether the tensor multiplies what a norm made of the residual stream: q, k, v, gate, up, untied read-out."""
    return any("hidden" in axis.roles and axis.side == "in" for axis in axes)


@dataclass(frozen=True)
class Layout:
    """The axes and the parts of every tensor; a tied tensor is there once.

    stem     what comes before the layer number in a name, as in "model.layers."
    tied     other names in the state dict for a tensor of `tensors`
    offsets  what a norm adds to its weight before it multiplies by it, where that isn't 0 (Gemma adds 1)
    """

    shape: Shape
    tensors: Mapping[str, Axes]
    parts: Mapping[str, frozenset[Part]]
    stem: str
    tied: Mapping[str, str] = field(default_factory=dict)
    offsets: Mapping[str, float] = field(default_factory=dict)

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a tensor belongs to; None outside the layers."""
        return int(name.removeprefix(self.stem).split(".")[0]) if name.startswith(self.stem) else None

    def with_layer(self, name: str, layer: int) -> str:
        """The name of the same tensor in another layer; the name itself outside the layers."""
        if self.layer_of(name) is None:
            return name
        return f"{self.stem}{layer}.{name.removeprefix(self.stem).partition('.')[2]}"

    def in_layer(self, layer: int | None) -> list[str]:
        """The names of one layer's tensors; of those outside the layers for None."""
        return [name for name in self.tensors if self.layer_of(name) == layer]

    @property
    def elements(self) -> int:
        """Of all tensors together: the parameters of the model."""
        return sum(math.prod(self.sizes(name)) for name in self.tensors)

    def sizes(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(axis.size for axis in self.tensors[name])

    def grown(self, shape: Shape, sources: Mapping[str, str], counts: Mapping[Role, int]) -> Layout:
        """The layout of a larger model: {name: the old tensor that it is like}, and new counts of some roles."""
        return dataclasses.replace(
            self,
            shape=shape,
            tensors={name: _resized(self.tensors[source], counts) for name, source in sources.items()},
            parts={name: self.parts[source] for name, source in sources.items()},
            offsets={name: self.offsets[source] for name, source in sources.items() if source in self.offsets},
        )


def _resized(axes: Axes, counts: Mapping[Role, int]) -> Axes:
    return tuple(
        dataclasses.replace(
            axis,
            blocks=tuple(dataclasses.replace(b, count=counts.get(b.role, b.count)) for b in axis.blocks),
        )
        for axis in axes
    )
