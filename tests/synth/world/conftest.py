"""A world as its command writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from espalier.run import Run
from espalier.synth.world.recipe import WorldRecipe
from espalier.synth.world.write import write_world


@pytest.fixture
def world(tmp_path) -> Callable[..., Path]:
    """`world(seed=1)` writes a world and gives its folder."""

    def world(**told: Any) -> Path:
        folder = tmp_path / f"world-{len(list(tmp_path.glob('world-*')))}"
        recipe = WorldRecipe(**told)
        with Run.start(folder, recipe, tell=lambda text: None) as run:
            return write_world(recipe, run)

    return world


@pytest.fixture
def rows() -> Callable[[Path], list[dict]]:
    """The rows of a file of JSON lines."""
    return lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
