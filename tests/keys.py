"""Keys of a recipe class, and of each another value that can be stated: for trials that change one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

from espalier import recipe
from espalier.errors import RecipeError
from espalier.recipe import Recipe

# Every key that isn't a choice takes one of these.
VALUES = (3, 0.5, 512, "other", ["other"], True, "1kB", "3%")


def leaves(kind: type[Recipe], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a recipe class with its annotation; of a list of recipes the first one's."""
    for name, field in kind.model_fields.items():
        inner = recipe._models_in(field.annotation)
        if inner:
            many = "tuple" in str(field.annotation)
            yield from leaves(inner[0], f"{prefix}{name}.{'0.' if many else ''}")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", field.annotation


def another(was: Recipe, key: str, annotation: Any) -> str:
    """An override by which this key of a recipe, and no other, comes to another value."""
    text = recipe.dump(was)
    for value in (*_choices(annotation), *VALUES):
        override = f"{key}={json.dumps(value)}"
        try:
            now = recipe.parse(type(was), text, [override], where=key)
        except RecipeError:
            continue
        if len(recipe.changes(was.model_dump(mode="json"), now.model_dump(mode="json"))) == 1:
            return override
    raise AssertionError(f"no other value for {key}")


def _choices(annotation: Any) -> list[Any]:
    """The values that a key has to choose from, where it has."""
    return [
        choice
        for inner in get_args(annotation)
        for choice in (_choices(inner) if get_args(inner) else [inner] if isinstance(inner, str) else [])
    ]
