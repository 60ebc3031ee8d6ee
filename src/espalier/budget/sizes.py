"""Sizes: the shapes to choose from when nobody states one. A width is so many heads, and the depth follows from it."""

from __future__ import annotations

# Widths to choose from, in heads.
HEADS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512)
# Published decoders have 32 to 128 channels a layer, the small ones fewer.
LEAST_ASPECT, MOST_ASPECT = 32, 128


def depth_of(hidden: int) -> int:
    """Layers of a model of this width."""
    return max(round(hidden / min(max(hidden / LEAST_ASPECT, LEAST_ASPECT), MOST_ASPECT)), 2)
