"""Operators: growth operators by name, and the growths that lead from one shape to the next. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from espalier.errors import ModelError
from espalier.grow import depth, width
from espalier.model.growth import Growth, Shape

Operator = Callable[[Shape, Shape], Growth]
# Those that are nothing but maps, and can be applied to a folder; the others need training to be what they are.
DepthMap = Literal[
    "stack", "stack_top", "stack_middle", "gradual", "overlap", "interpolate", "identity", "identity_top"
]
WidthMap = Literal["zero_pad", "fpi", "fpi_shares", "aki"]
DepthOperator = Literal[DepthMap, "masked", "learned"]
WidthOperator = Literal[WidthMap, "masked", "learned"]

DEPTH: dict[str, Operator] = {
    "stack": depth.stack,
    "stack_top": partial(depth.stack, block="top"),
    "stack_middle": partial(depth.stack, block="middle"),
    "gradual": depth.gradual,
    "overlap": depth.overlap,
    "interpolate": depth.interpolate,
    "identity": depth.identity,
    "identity_top": partial(depth.identity, place="top"),
    "masked": depth.masked,
    "learned": depth.learned,
}
WIDTH: dict[str, Operator] = {
    "zero_pad": width.zero_pad,
    "fpi": width.fpi,
    "fpi_shares": width.fpi_shares,
    "aki": width.aki,
    "masked": width.masked,
    "learned": width.learned,
}


def plan_growth(
    before: Shape, after: Shape, *, depth: DepthOperator = "stack", width: WidthOperator = "zero_pad"
) -> list[Growth]:
    """The growths from `before` to `after`, to be applied in order: width first, then depth; none if they agree.

    The last one's `after` is the shape that comes out. It has the rms_norm_eps that the operators worked out, in
    the place of the one stated. Raises ModelError if a size shrinks or another field changes.
    """
    growths: list[Growth] = []
    wide: Shape = after.changed(num_hidden_layers=before.num_hidden_layers, rms_norm_eps=before.rms_norm_eps)
    if wide.fields() != before.fields():
        growths.append(WIDTH[width](before, wide))
        wide = growths[-1].after
    if after.num_hidden_layers != before.num_hidden_layers:
        growths.append(DEPTH[depth](wide, wide.changed(num_hidden_layers=after.num_hidden_layers)))
    return growths


def learns(growths: Sequence[Growth]) -> bool:
    """Whether the maps of these growths are to be trained; refuses those of which only some are."""
    learned = [growth.operator for growth in growths if growth.learned]
    if learned and len(learned) < len(growths):
        others = ", ".join(growth.operator for growth in growths if not growth.learned)
        raise ModelError(
            "width, depth",
            found=f"learned together with {others}",
            expected="both learned: their maps are trained together",
            mend="State width: learned and depth: learned, or grow in two stages.",
        )
    return bool(learned)


def recorded(before: Shape, records: Sequence[dict[str, Any]]) -> list[Growth]:
    """The growths of which made.json has the records, from the shape before them.

    None if one has no operator here, or began from another shape.
    """
    growths: list[Growth] = []
    for record in records:
        builders = DEPTH if "num_hidden_layers" in record.get("changed", {}) else WIDTH
        build = builders.get(record["operator"])
        began = {key: old for key, (old, _) in record.get("changed", {}).items()}
        if build is None or any(before.fields()[key] != old for key, old in began.items()):
            return []
        after = before.changed(**{key: new for key, (_, new) in record["changed"].items()})
        growths.append(build(before, after))
        before = growths[-1].after
    return growths
