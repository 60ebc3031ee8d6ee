"""Depth: builders of growths that add layers. Width is never touched here.

All other sizes must agree; a growth in width and depth is two growths, one after the other.
"""

from __future__ import annotations

from typing import Literal

from espalier.errors import ModelError
from espalier.model.growth import Growth, LayerMap
from espalier.spec import ModelSpec

Place = Literal["after", "top"]


def stack(before: ModelSpec, after: ModelSpec) -> Growth:
    """Repeat the whole block of layers: target layer i copies layer i mod k (G_stack, arXiv 2405.15319).

    Where the target isn't a multiple of k, the remainder copies the top layers again. Not function-preserving: the
    last layer of one block feeds the first of the next.
    """
    old, new = _layers(before, after)
    rounds, rest = divmod(new, old)
    source = (*range(old), *(layer for _ in range(rounds - 1) for layer in range(old)), *range(old - rest, old))
    return Growth("stack", before, after, exact=False, layers=LayerMap(source, frozenset(range(old, new))))


def identity(before: ModelSpec, after: ModelSpec, place: Place = "after") -> Growth:
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
        added = frozenset(layer for layer in range(1, new) if source[layer] == source[layer - 1])
    layers = LayerMap(source, added)
    return Growth("identity", before, after, exact=True, layers=layers, silent=frozenset({"writes_residual"}))


def _layers(before: ModelSpec, after: ModelSpec) -> tuple[int, int]:
    old, new = before.num_hidden_layers, after.num_hidden_layers
    if new < old:
        raise ModelError(
            "num_hidden_layers",
            found=f"{new} after {old}: a stage that shrinks",
            expected=f"at least {old} layers",
            mend="Order the stages from small to large.",
        )
    if after.changed(num_hidden_layers=old) != before:
        differing = [key for key in ModelSpec.model_fields if getattr(before, key) != getattr(after, key)]
        raise ModelError(
            ", ".join(key for key in differing if key != "num_hidden_layers"),
            found="a change together with the depth",
            expected="a depth operator to change num_hidden_layers alone",
            mend="Change the width in a growth of its own, before this one.",
        )
    return old, new
