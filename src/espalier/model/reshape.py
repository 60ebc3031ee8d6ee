"""Reshape: apply a growth to a model's weights and to its optimizer's moments, one tensor at a time.

Where tensors come from is the caller's business (`read`): memory, files read one by one, or another growth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from espalier.errors import RunError
from espalier.model.build import draw
from espalier.model.growth import NEW, Growth, IndexMap, Part
from espalier.model.layout import Axes, Axis, Layout, Side

Read = Callable[[str], Tensor]
StdOf = Callable[[str, tuple[int, ...]], float]

# With weights times s and the same function, gradients are divided by s, and their squares by s squared.
MOMENT_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2}


@dataclass(frozen=True)
class Target:
    """A tensor of a grown model: the old one that it copies, and the one whose rows its copied slots take."""

    source: str
    donor: str
    silent: bool


@dataclass(frozen=True)
class Grown:
    """The weights of a grown model, each made when it is asked for. Growth b after a is `Grown(b, a.layout, a.read)`.

    before  the layout of the model before the growth
    old     gives the old weight of a name of `before`
    std_of  the initialiser's standard deviation for a name and (grown) shape; random slots depend on it and on
            (seed, name, shape) alone
    """

    growth: Growth
    before: Layout
    old: Read
    seed: int
    std_of: StdOf

    @cached_property
    def targets(self) -> dict[str, Target]:
        return targets(self.growth, self.before)

    @cached_property
    def layout(self) -> Layout:
        """The layout of the grown model."""
        return after(self.before, self.growth)

    def origin(self, name: str) -> str | None:
        """The old tensor that this one is, bit for bit; None for one that has to be made."""
        target = self.targets[name]
        moved = any(axis.roles & self.growth.maps.keys() for axis in self.before.tensors[target.source])
        changed = target.silent or moved or self.growth.factor(self.before.parts[target.source]) != 1
        return None if changed else target.source

    def read(self, name: str) -> Tensor:
        """The weight of a name of `layout`; where nothing changes, the old tensor itself."""
        growth, target = self.growth, self.targets[name]
        axes, parts = self.before.tensors[target.source], self.before.parts[target.source]
        if target.silent:
            return self.old(target.source).new_zeros(self.layout.sizes(name))
        offset = self.before.offsets.get(target.source, 0.0)
        weight, is_new = mapped(self.old(target.source), axes, growth)
        if target.donor != target.source and (copied := _copied(axes, growth)) is not None:
            weight = torch.where(copied, mapped(self.old(target.donor), axes, growth)[0], weight)
        share = _read_share(axes, growth, before_tied_head(self.before, parts))
        factor = growth.factor(parts)
        weight = _scaled(weight, share, factor, offset)
        match growth.fill(parts) if is_new.any() else "none":
            case "zero":
                weight = weight.masked_fill(is_new, 0.0)
            case "mean":
                weight = _averaged(weight.masked_fill(is_new, 0.0), axes, growth)
            case "random":
                shape = tuple(weight.shape)
                # The shape is in the key: a second growth with the same seed must not repeat the first one's draws.
                drawn = draw(f"{name}{shape}", shape, self.std_of(name, shape), self.seed)
                weight = torch.where(is_new, drawn.to(weight), weight)
        return weight


def apply(growth: Growth, layout: Layout, read: Read, *, seed: int, std_of: StdOf) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of every tensor of the grown model; `layout` and `read` are of the old one, as in `Grown`."""
    grown = Grown(growth, layout, read, seed, std_of)
    for name in grown.targets:
        yield name, grown.read(name)


def apply_moment(
    growth: Growth, layout: Layout, read: Callable[[str], Tensor | None], kind: str
) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of one quantity of the optimizer's state, for every tensor of the grown model that has it.

    kind  its name in torch.optim; scalars, such as `step`, are kept whatever they are called
    read  gives the old value for a name of `layout`, or None where the optimizer holds none

    A copied slot has its share of the gradient that the slot had (channels with unequal shares nearly so, since norms
    divide theirs equally). New slots, and what is silent in new layers, get
    zeros. Raises RunError for a kind that can't be mapped.
    """
    grown = after(layout, growth)
    for name, target in targets(growth, layout).items():
        old, axes = read(target.source), layout.tensors[target.source]
        if old is None:
            continue
        if old.ndim == 0:
            yield name, old.clone()
        elif target.silent:
            yield name, old.new_zeros(grown.sizes(name))
        else:
            parts = layout.parts[target.source]
            power = _power(kind, target.source, old, layout)
            value, is_new = mapped(old, axes, growth)
            if (share := _written_share(axes, growth, before_tied_head(layout, parts))) is not None:
                value = value * share.to(value) ** power
            if (factor := growth.factor(parts)) != 1:
                value = value / factor**power
            yield name, value.masked_fill(is_new, 0.0)


def after(layout: Layout, growth: Growth) -> Layout:
    """The layout of the grown model."""
    sources = {name: target.source for name, target in targets(growth, layout).items()}
    return layout.grown(growth.after, sources, {role: len(map_.source) for role, map_ in growth.maps.items()})


def targets(growth: Growth, layout: Layout) -> dict[str, Target]:
    """Every tensor of the grown model, by name."""
    targets = {name: Target(name, name, silent=False) for name in layout.in_layer(None)}
    layers = growth.layers
    donors = layers.donor or layers.source
    by_layer = {layer: layout.in_layer(layer) for layer in set(layers.source)}
    for layer, source_layer in enumerate(layers.source):
        for source in by_layer[source_layer]:
            silent = layer in layers.new and bool(growth.silent & layout.parts[source])
            donor = layout.with_layer(source, donors[layer])
            targets[layout.with_layer(source, layer)] = Target(source, donor, silent)
    return targets


def mapped(old: Tensor, axes: Axes, growth: Growth) -> tuple[Tensor, Tensor]:
    """The old slots in their new places, and a mask that broadcasts to the grown shape and is true in new slots.

    What the result holds in new slots is arbitrary.
    """
    assert tuple(old.shape) == tuple(axis.size for axis in axes), "a tensor that isn't of this layout"
    grown = old
    is_new = torch.zeros([1] * old.ndim, dtype=torch.bool, device=old.device)
    for index, axis in enumerate(axes):
        if axis.roles.isdisjoint(growth.maps):
            continue
        elements = torch.from_numpy(_elements(axes, index, growth)).to(old.device)
        grown = grown.index_select(index, elements.clamp(min=0))
        is_new = is_new | _along(elements == NEW, index, old.ndim)
    return grown, is_new


def _averaged(weight: Tensor, axes: Axes, growth: Growth) -> Tensor:
    """The weight with the mean of the old slots in the new ones of every axis that it is written along."""
    for index, axis in enumerate(axes):
        if axis.side != "in" and not axis.roles.isdisjoint(growth.maps):
            is_old = torch.from_numpy(_elements(axes, index, growth) != NEW)
            mean = weight.index_select(index, is_old.nonzero().flatten()).mean(dim=index, keepdim=True)
            weight = torch.where(_along(is_old, index, weight.ndim), weight, mean)
    return weight


def _elements(axes: Axes, index: int, growth: Growth) -> np.ndarray:
    """Where each element of a grown axis comes from, or NEW."""
    found, offset = [], 0
    for block in axes[index].blocks:
        map_ = growth.maps.get(block.role)
        slots = np.arange(block.count) if map_ is None else map_.source
        elements = offset + slots[:, None] * block.unit + np.arange(block.unit)
        found.append(np.where(slots[:, None] == NEW, NEW, elements).ravel())
        offset += block.size
    return np.concatenate(found)


def _by_element(axis: Axis, growth: Growth, value: Callable[[IndexMap], np.ndarray], otherwise: float) -> np.ndarray:
    """A value of each slot, repeated for the slot's elements."""
    return np.concatenate(
        [
            np.repeat(value(growth.maps[b.role]), b.unit) if b.role in growth.maps else np.full(b.size, otherwise)
            for b in axis.blocks
        ]
    )


def _share(axes: Axes, growth: Growth, sides: set[Side]) -> Tensor | None:
    """The product of the slots' shares along the axes of these sides; None where all are 1."""
    total = None
    for index, axis in enumerate(axes):
        if axis.side in sides and not axis.roles.isdisjoint(growth.maps):
            shares = torch.from_numpy(_by_element(axis, growth, lambda map_: map_.share, 1.0))
            if (shares != 1).any():
                shares = _along(shares, index, len(axes))
                total = shares if total is None else total * shares
    return total


def _read_share(axes: Axes, growth: Growth, before_tied_head: bool) -> Tensor | None:
    """What the copies of a slot that is read are multiplied by.

    A tied read-out can't be: it is the embedding. The norm before it has the shares in its place.
    """
    return _share(axes, growth, {"along"} if before_tied_head else {"in"})


def _written_share(axes: Axes, growth: Growth, before_tied_head: bool) -> Tensor | None:
    """What a copied element has of the gradient of the one that it copies, since its readers have their shares."""
    return None if before_tied_head else _share(axes, growth, {"out", "along"})


def _copied(axes: Axes, growth: Growth) -> Tensor | None:
    """Which elements of the grown tensor are written by copied slots; None if none are."""
    copied = None
    for index, axis in enumerate(axes):
        if axis.side == "out" and not axis.roles.isdisjoint(growth.maps):
            here = _along(
                torch.from_numpy(_by_element(axis, growth, lambda map_: map_.is_copy, False) > 0), index, len(axes)
            )
            copied = here if copied is None else copied | here
    return copied


def before_tied_head(layout: Layout, parts: frozenset[Part]) -> bool:
    return "final_norm" in parts and layout.shape.tie_word_embeddings


def _along(values: Tensor, index: int, ndim: int) -> Tensor:
    shape = [1] * ndim
    shape[index] = -1
    return values.view(shape)


def _scaled(weight: Tensor, share: Tensor | None, factor: float, offset: float) -> Tensor:
    """(weight + offset) * share * factor - offset, in fp32 at least."""
    if share is None and factor == 1:
        return weight
    scaled = weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset
    if share is not None:
        scaled = scaled * share.to(scaled)
    return (scaled * factor - offset).to(weight.dtype)


def _power(kind: str, name: str, old: Tensor, layout: Layout) -> int:
    if kind in MOMENT_POWERS and tuple(old.shape) == layout.sizes(name):
        return MOMENT_POWERS[kind]
    raise RunError(
        f"optimizer state {kind} of {name}",
        found=f"a tensor of shape {tuple(old.shape)}",
        expected=f"{', '.join(MOMENT_POWERS)}, shaped like the weight",
        mend="Start the optimizer afresh after this growth, or train with AdamW or Muon.",
    )
