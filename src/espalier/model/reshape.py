"""Reshape: apply a growth to a model's weights and to its optimizer's moments, one tensor at a time.

Where tensors come from is the caller's business (`read`): memory, or files read one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from espalier.errors import RunError
from espalier.model.axes import Axes, Layout
from espalier.model.build import draw
from espalier.model.growth import NEW, Growth

Read = Callable[[str], Tensor]
StdOf = Callable[[str, tuple[int, ...]], float]

# With weights times s and the same function, gradients are divided by s, and their squares by s squared.
MOMENT_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2}


def apply(growth: Growth, layout: Layout, read: Read, *, seed: int, std_of: StdOf) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of every tensor of the grown model.

    layout  of the model before the growth
    read    gives the old weight of a name of `layout`
    std_of  the initialiser's standard deviation for a name and (grown) shape; random slots depend on it and on
            (seed, name, shape) alone
    """
    for name, source, silent in _targets(growth, layout):
        old, axes, parts = read(source), layout.tensors[source], layout.parts(source)
        if silent:
            yield name, old.new_zeros(_shape(growth, axes))
            continue
        weight, is_new = _mapped(old, axes, growth, shares=True)
        if (factor := growth.factor(parts)) != 1:
            weight = weight * factor
        match growth.fill(parts) if is_new.any() else "none":
            case "zero":
                weight = weight.masked_fill(is_new, 0.0)
            case "mean":
                weight = weight.masked_fill(is_new, old.float().mean().item() * factor)
            case "random":
                shape = tuple(weight.shape)
                # The shape is in the key: a second growth with the same seed must not repeat the first one's draws.
                drawn = draw(f"{name}{shape}", shape, std_of(name, shape), seed)
                weight = torch.where(is_new, drawn.to(weight), weight)
        yield name, weight


def apply_moment(
    growth: Growth, layout: Layout, read: Callable[[str], Tensor | None], kind: str
) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of one quantity of the optimizer's state, for every tensor of the grown model that has it.

    kind  its name in torch.optim; scalars, such as `step`, are kept whatever they are called
    read  gives the old value for a name of `layout`, or None where the optimizer holds none

    New slots, and what is silent in new layers, get zeros. Raises RunError for a kind that can't be mapped.
    """
    for name, source, silent in _targets(growth, layout):
        old, axes = read(source), layout.tensors[source]
        if old is None:
            continue
        if old.ndim == 0:
            yield name, old.clone()
        elif silent:
            yield name, old.new_zeros(_shape(growth, axes))
        else:
            power = _power(kind, source, old, axes)
            value, is_new = _mapped(old, axes, growth, shares=False)
            if (factor := growth.factor(layout.parts(source))) != 1:
                value = value / factor**power
            yield name, value.masked_fill(is_new, 0.0)


def after(layout: Layout, growth: Growth) -> Layout:
    """The layout of the grown model."""
    tensors = {
        name: tuple(dataclasses.replace(axis, size=size) for axis, size in zip(axes, _shape(growth, axes), strict=True))
        for name, source, _ in _targets(growth, layout)
        for axes in [layout.tensors[source]]
    }
    return dataclasses.replace(layout, tensors=tensors)


def _targets(growth: Growth, layout: Layout) -> Iterator[tuple[str, str, bool]]:
    """(name in the grown model, name in the old one, whether it is silent) of every tensor."""
    for name in layout.in_layer(None):
        yield name, name, False
    for layer, source_layer in enumerate(growth.layers.source):
        for source in layout.in_layer(source_layer):
            silent = layer in growth.layers.new and bool(growth.silent & layout.parts(source))
            yield layout.with_layer(source, layer), source, silent


def _shape(growth: Growth, axes: Axes) -> tuple[int, ...]:
    return tuple(
        len(growth.maps[axis.role].source) * axis.unit if axis.role in growth.maps else axis.size for axis in axes
    )


def _mapped(old: Tensor, axes: Axes, growth: Growth, *, shares: bool) -> tuple[Tensor, Tensor]:
    """The old slots in their new places, and a mask of the grown shape that is true in new slots.

    What the result holds in new slots is arbitrary.
    """
    assert tuple(old.shape) == tuple(axis.size for axis in axes), "a tensor that isn't of this layout"
    grown = old.clone()
    is_new = torch.zeros([1] * old.ndim, dtype=torch.bool, device=old.device)
    for index, axis in enumerate(axes):
        if axis.role not in growth.maps:
            continue
        map_ = growth.maps[axis.role]
        slots = torch.from_numpy(map_.source).to(old.device)
        elements = slots[:, None] * axis.unit + torch.arange(axis.unit, device=old.device)
        along = [1] * old.ndim
        along[index] = -1
        grown = grown.index_select(index, elements.clamp(min=0).flatten())
        is_new = is_new | (slots == NEW).repeat_interleave(axis.unit).view(along)
        if shares and axis.side == "in":
            share = torch.from_numpy(map_.share).to(grown).repeat_interleave(axis.unit)
            grown = grown * share.view(along)
    return grown, is_new.expand(grown.shape)


def _power(kind: str, name: str, old: Tensor, axes: Axes) -> int:
    if kind in MOMENT_POWERS and tuple(old.shape) == tuple(axis.size for axis in axes):
        return MOMENT_POWERS[kind]
    raise RunError(
        f"optimizer state {kind} of {name}",
        found=f"a tensor of shape {tuple(old.shape)}",
        expected=f"{', '.join(MOMENT_POWERS)}, shaped like the weight",
        mend="Start the optimizer afresh after this growth, or train with AdamW or Muon.",
    )
