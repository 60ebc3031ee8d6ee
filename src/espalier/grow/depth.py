"""Depth: builders of growths that add layers. Width is never touched here.

All other sizes must agree; a growth in width and depth is two growths, one after the other.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from espalier.errors import ModelError
from espalier.model.growth import Growth, LayerMap, Shape, differing

Place = Literal["after", "top"]
Block = Literal["all", "top", "middle"]


def stack(before: Shape, after: Shape, block: Block = "all") -> Growth:
    """Repeat a block of layers: target layer i copies layer i mod k (G_stack, arXiv 2405.15319).

    block  "all" repeats the whole stack, and what is left over copies the top layers again; "top" repeats the upper
           half, "middle" the half in the middle (partial stacking)

    Not function-preserving: the last layer of one block feeds the first of the next.
    """
    old, new = _layers(before, after)
    begin, end = {"all": (0, old), "top": (old // 2, old), "middle": (old // 4, old - old // 4)}[block]
    rounds, rest = divmod(new - old, end - begin)
    source = (*range(end), *[*range(begin, end)] * rounds, *range(end - rest, end), *range(end, old))
    name = "stack" if block == "all" else f"stack_{block}"
    return _copies(name, before, after, source, range(end, end + new - old))


def gradual(before: Shape, after: Shape) -> Growth:
    """Copy the top layers once more: gradual stacking adds a few at each of many growths (after StackBERT,
    arXiv 2011.13635, and MSLT). At most twice the layers. Not function-preserving.
    """
    old, new = _layers(before, after)
    if new > 2 * old:
        raise ModelError(
            "num_hidden_layers",
            found=f"{new} after {old}",
            expected=f"at most {2 * old}: gradual stacking copies the top layers once",
            mend="Grow in several steps, or use stack.",
        )
    return _copies("gradual", before, after, (*range(old), *range(2 * old - new, old)), range(old, new))


def overlap(before: Shape, after: Shape) -> Growth:
    """Two copies of the stack that leave layers out where they meet: the lower one its last, the upper one its first
    (depth up-scaling, SOLAR, arXiv 2312.15166). Not function-preserving.
    """
    old, new = _layers(before, after)
    if new > 2 * old or new % 2:
        raise ModelError(
            "num_hidden_layers",
            found=f"{new} after {old}",
            expected=f"an even number, at most {2 * old}: two copies of the stack that overlap",
            mend="Choose such a number, or use stack.",
        )
    half = new // 2
    return _copies("overlap", before, after, (*range(half), *range(old - half, old)), range(half, new))


def interpolate(before: Shape, after: Shape) -> Growth:
    """Repeat each layer in place: target layer i copies layer floor(i k / k'), as in 1 1 2 2 3 3 (AquilaMoE,
    arXiv 2408.06567). Neighbours do similar work, so the loss jumps less than with `stack`.
    """
    old, new = _layers(before, after)
    source = tuple(layer * old // new for layer in range(new))
    return _copies("interpolate", before, after, source, _repeats(source))


def identity(before: Shape, after: Shape, place: Place = "after") -> Growth:
    """Add layers that pass the residual stream on unchanged: copies whose writers to it are zero (LLaMA-Pro,
    arXiv 2401.02415). Function-preserving.

    place  "after": new layers are spread evenly, each above the layer that it copies;
           "top": they are stacked on top, copying layer i mod k
    """
    old, new = _layers(before, after)
    if place == "top":
        source = tuple(layer % old for layer in range(new))
        added = frozenset(range(old, new))
    else:
        source = tuple(layer * old // new for layer in range(new))
        added = _repeats(source)
    layers, name = LayerMap(source, added), "identity" if place == "after" else "identity_top"
    return Growth(name, before, after, exact=True, layers=layers, silent=frozenset({"writes_residual"}))


def masked(before: Shape, after: Shape) -> Growth:
    """Stack copies behind masks, which are raised from 0 to 1 over the first updates (masked structural growth, MSG,
    arXiv 2305.02869). Function-preserving.

    At 0 new layers pass the residual stream on as in `identity`, at 1 they are those of `stack`.
    """
    stacked = identity(before, after, "top")
    return dataclasses.replace(stacked, operator="masked", masked=frozenset({"writes_residual"}))


def learned(before: Shape, after: Shape) -> Growth:
    """Mix layers by weights that are trained, beginning with the copies of `stack` (LiGO, arXiv 2303.00980). See
    `grow.learned`. Not function-preserving.
    """
    return dataclasses.replace(stack(before, after), operator="learned", learned=True)


def _repeats(source: tuple[int, ...]) -> frozenset[int]:
    """The layers whose lower neighbour copies the same one."""
    return frozenset(layer for layer in range(1, len(source)) if source[layer] == source[layer - 1])


def _copies(name: str, before: Shape, after: Shape, source: tuple[int, ...], new: frozenset[int] | range) -> Growth:
    assert len(source) == after.num_hidden_layers
    return Growth(name, before, after, exact=False, layers=LayerMap(source, frozenset(new)))


def _layers(before: Shape, after: Shape) -> tuple[int, int]:
    old, new = before.num_hidden_layers, after.num_hidden_layers
    if new < old:
        raise ModelError(
            "num_hidden_layers",
            found=f"{new} after {old}: a stage that shrinks",
            expected=f"at least {old} layers",
            mend="Order the stages from small to large.",
        )
    if others := [key for key in differing(before, after) if key != "num_hidden_layers"]:
        raise ModelError(
            ", ".join(others),
            found="a change together with the depth",
            expected="a depth operator to change num_hidden_layers alone",
            mend="Change the width in a growth of its own, before this one.",
        )
    return old, new
