"""Masked: what the masks of a growth lie on, in the grown model. See `train.masks` for what they do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espalier.model import reshape
from espalier.model.growth import Growth
from espalier.model.layout import Layout
from espalier.train.masks import Slots


def slots(growths: Sequence[Growth], layout: Layout) -> Slots:
    """The slots that `growths`, applied in order to a model of this layout, put behind masks; empty for none."""
    if not any(growth.masked for growth in growths):
        return Slots()
    elements: dict[str, Tensor] = {}
    old_share = 1.0
    for growth in growths:
        elements = _after(growth, layout, elements)
        layout = reshape.after(layout, growth)
        if growth.masked:
            old_share *= growth.before.hidden_size / growth.after.hidden_size
    norms = [name for name, parts in layout.parts.items() if "scales_residual" in parts] if old_share < 1 else []
    return Slots({name: mask for name, mask in elements.items() if mask.any()}, frozenset(norms), old_share)


def _after(growth: Growth, layout: Layout, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The masked elements of every weight that has some, after one more growth."""
    masked: dict[str, Tensor] = {}
    for name, target in reshape.targets(growth, layout).items():
        axes, parts = layout.tensors[target.source], layout.parts[target.source]
        old = before.get(target.source, torch.zeros(layout.sizes(target.source), dtype=torch.bool))
        here, new = reshape.moved([old], axes, growth)
        for box in new:
            here[box] = bool(growth.masked & parts)
        if target.silent and growth.masked & growth.silent & parts:
            here = torch.ones_like(here)
        masked[name] = here
    return masked
