"""Reshape: apply a growth to a model's weights and to its optimizer's moments, one tensor at a time.

Where tensors come from is the caller's business (`read`): memory, files read one by one, or another growth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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
# Elements that are scaled at a time, 1 MB in fp32: they stay in the cache.
CACHED = 2**18
# Where runs are shorter than this on average, copying them one by one takes longer than gathering all.
SHORT = 16


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
            (seed, name, shape) and their place alone
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
        mapped = any(axis.roles & self.growth.maps.keys() for axis in self.before.tensors[target.source])
        changed = target.silent or mapped or self.growth.factor(self.before.parts[target.source]) != 1
        return None if changed else target.source

    def read(self, name: str) -> Tensor:
        """The weight of a name of `layout`; where nothing changes, the old tensor itself."""
        growth, target = self.growth, self.targets[name]
        axes, parts = self.before.tensors[target.source], self.before.parts[target.source]
        if target.silent:
            return self.old(target.source).new_zeros(self.layout.sizes(name))
        if (origin := self.origin(name)) is not None:
            return self.old(origin)
        sources = [self.old(target.source)]
        if target.donor != target.source and any(_is_copied(axis, growth).any() for axis in axes):
            sources.append(self.old(target.donor))
        weight, new = moved(sources, axes, growth)
        share = _read_share(axes, growth, before_tied_head(self.before, parts))
        _scale(weight, share, growth.factor(parts), self.before.offsets.get(target.source, 0.0))
        match growth.fill(parts) if new else "none":
            case "random":
                self._draw(name, weight, new)
            case "zero":
                _clear(weight, new)
            case "mean":
                _clear(weight, new)
                _average(weight, axes, growth)
        return weight

    def _draw(self, name: str, weight: Tensor, new: list[Box]) -> None:
        """Draw the new slots, box by box: no value is drawn that isn't used."""
        shape = tuple(weight.shape)
        std = self.std_of(name, shape)
        for box in new:
            # The shape is in the key: a second growth with the same seed must not repeat the first one's draws.
            key = f"{name}{shape}{[side.start for side in box]}"
            weight[box] = draw(key, tuple(weight[box].shape), std, self.seed).to(weight)


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
            value, new = moved([old], axes, growth)
            if (share := _written_share(axes, growth, before_tied_head(layout, parts))) is not None:
                value = value * share.to(value) ** power
            if (factor := growth.factor(parts)) != 1:
                value = value / factor**power
            _clear(value, new)
            yield name, value


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


class Run(NamedTuple):
    """Old elements side by side in a grown axis that are so in the old one too; `copied` if copied slots write them."""

    to: slice
    source: slice
    copied: bool


# A part of each axis: where they cross in the tensor.
Box = tuple[slice, ...]


def _runs(elements: np.ndarray, copied: np.ndarray) -> list[Run]:
    """The runs of an axis, by where each of its elements comes from and whether copied slots write it."""
    is_new = elements == NEW
    ends = (np.diff(elements) != 1) | (copied[1:] != copied[:-1]) | is_new[1:] | is_new[:-1]
    runs = []
    for part in _parts(ends):
        if (first := int(elements[part.start])) != NEW:
            runs.append(Run(part, slice(first, first + part.stop - part.start), bool(copied[part.start])))
    return runs


def _new_boxes(axes: Axes, growth: Growth) -> list[Box]:
    """The boxes that new slots fill, as few and large as they are."""
    sides = []
    for index in range(len(axes)):
        is_new = _elements(axes, index, growth) == NEW
        sides.append([(part, is_new[part.start]) for part in _parts(is_new[1:] != is_new[:-1])])
    return [tuple(part for part, _ in box) for box in itertools.product(*sides) if any(new for _, new in box)]


def _parts(ends: np.ndarray) -> list[slice]:
    """The parts of an axis, by whether each of its elements but the last one ends a part."""
    return [slice(a, b) for a, b in itertools.pairwise([0, *(np.flatnonzero(ends) + 1).tolist(), len(ends) + 1])]


def _is_copied(axis: Axis, growth: Growth) -> np.ndarray:
    """Which elements of the grown axis are written by copied slots."""
    return _by_element(axis, growth, lambda map_: map_.is_copy & (axis.side == "out"), False) > 0


def moved(sources: list[Tensor], axes: Axes, growth: Growth) -> tuple[Tensor, list[Box]]:
    """The old slots in their new places, and the boxes of new slots; what the result holds in those is arbitrary.

    sources  the old tensor, and perhaps another one that copied slots are taken from
    """
    assert all(tuple(source.shape) == tuple(axis.size for axis in axes) for source in sources), "not of this layout"
    runs, sizes = [], []
    for index, axis in enumerate(axes):
        elements, copied = _elements(axes, index, growth), _is_copied(axis, growth)
        along = _runs(elements, copied)
        if len(elements) < SHORT * len(along):
            places = torch.from_numpy(elements.clip(min=0)).to(sources[0].device)
            sources = [source.index_select(index, places) for source in sources]
            along = _runs(np.where(elements == NEW, NEW, np.arange(len(elements))), copied)
        runs.append(along)
        sizes.append(len(elements))
    grown = sources[0].new_empty(sizes)
    for box in itertools.product(*runs):
        source = sources[-1 if any(run.copied for run in box) else 0]
        grown[tuple(run.to for run in box)] = source[tuple(run.source for run in box)]
    return grown, _new_boxes(axes, growth)


def _clear(grown: Tensor, boxes: list[Box]) -> None:
    for box in boxes:
        grown[box] = 0


def _average(weight: Tensor, axes: Axes, growth: Growth) -> None:
    """Put the mean of the old slots into the new ones along every axis that the weight is written along."""
    for index, axis in enumerate(axes):
        is_new = torch.from_numpy(_elements(axes, index, growth) == NEW).to(weight.device)
        if axis.side != "in" and is_new.any():
            old, new = (~is_new).nonzero().flatten(), is_new.nonzero().flatten()
            mean = weight.index_select(index, old).mean(dim=index, keepdim=True)
            weight.index_copy_(index, new, mean.repeat_interleave(len(new), index))


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


def before_tied_head(layout: Layout, parts: frozenset[Part]) -> bool:
    return "final_norm" in parts and layout.shape.tie_word_embeddings


def _along(values: Tensor, index: int, ndim: int) -> Tensor:
    shape = [1] * ndim
    shape[index] = -1
    return values.view(shape)


def _scale(weight: Tensor, share: Tensor | None, factor: float, offset: float) -> None:
    """Make it (weight + offset) * share * factor - offset, in fp32 at least, a few rows at a time."""
    if share is None and factor == 1:
        return
    weight = torch.atleast_1d(weight)
    precise = torch.promote_types(weight.dtype, torch.float32)
    shares = torch.ones([], dtype=precise, device=weight.device) if share is None else share.to(weight.device, precise)
    step = max(1, CACHED // max(weight[:1].numel(), 1))
    for rows, share_of in zip(weight.split(step), shares.broadcast_to(weight.shape).split(step), strict=True):
        rows.copy_((rows.to(precise) + offset) * share_of * factor - offset)


def _power(kind: str, name: str, old: Tensor, layout: Layout) -> int:
    if kind in MOMENT_POWERS and tuple(old.shape) == layout.sizes(name):
        return MOMENT_POWERS[kind]
    raise RunError(
        f"optimizer state {kind} of {name}",
        found=f"a tensor of shape {tuple(old.shape)}",
        expected=f"{', '.join(MOMENT_POWERS)}, shaped like the weight",
        mend="Start the optimizer afresh after this growth, or train with AdamW or Muon.",
    )
