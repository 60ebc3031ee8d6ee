"""Operators: growth operators by name, and the growths that lead from one shape to the next. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from espalier.grow.depth import identity, stack
from espalier.grow.width import zero_pad
from espalier.model.growth import Growth
from espalier.spec import ModelSpec

Operator = Callable[[ModelSpec, ModelSpec], Growth]
DepthOperator = Literal["stack", "identity"]
WidthOperator = Literal["zero_pad"]

DEPTH: dict[str, Operator] = {"stack": stack, "identity": identity}
WIDTH: dict[str, Operator] = {"zero_pad": zero_pad}
OPERATORS = DEPTH | WIDTH


def plan_growth(
    before: ModelSpec, after: ModelSpec, *, depth: DepthOperator = "stack", width: WidthOperator = "zero_pad"
) -> list[Growth]:
    """The growths from `before` to `after`, to be applied in order: width first, then depth; none if they agree.

    The last one's `after` is the shape that comes out. It has the rms_norm_eps that the operators worked out, in
    the place of the one stated. Raises ModelError if a size shrinks or another field changes.
    """
    growths: list[Growth] = []
    wide = after.changed(num_hidden_layers=before.num_hidden_layers, rms_norm_eps=before.rms_norm_eps)
    if wide != before:
        growths.append(WIDTH[width](before, wide))
        wide = growths[-1].after
    if after.num_hidden_layers != before.num_hidden_layers:
        growths.append(DEPTH[depth](wide, wide.changed(num_hidden_layers=after.num_hidden_layers)))
    return growths
