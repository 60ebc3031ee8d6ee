"""Changes: how the recipe that a run is taken up with differs from the one that it was begun with, and what follows.

Every key has a class (`recipe.Resume`), stated where its field is declared; a change that isn't safe or planned for is
refused until it is taken back, or accepted by its name where it may be.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from espalier import recipe
from espalier.errors import RunError
from espalier.recipe import Recipe, Resume

HEADS = ("field", "saved", "now", "class")
WIDEST = 40
ACCEPT = "--accept-changes"


@dataclass(frozen=True)
class Change:
    """A key as `recipe.changes` writes it, its value in the run folder, the one stated now, and its class."""

    key: str
    saved: Any
    now: Any
    resume: Resume


def between(saved: dict[str, Any], now: Recipe) -> list[Change]:
    """What differs between the recipe that a run folder has and the one stated now."""
    differing = recipe.changes(saved, now.model_dump(mode="json"))
    return [Change(key, old, new, recipe.resume_class(type(now), key)) for key, old, new in differing]


def table(changes: Sequence[Change]) -> str:
    """The changes in columns: field, saved, now, class."""
    rows = [HEADS, *((change.key, _shown(change.saved), _shown(change.now), change.resume) for change in changes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def require_allowed(changes: Sequence[Change], accept: Collection[str], *, where: str, finished: bool) -> None:
    """Refuse changes that would make another run, or that have to be accepted and aren't; safe ones alone of a run that
    is finished.
    """
    refused = [change for change in changes if change.resume == "refused" or (finished and change.resume != "safe")]
    waiting = [change.key for change in changes if change.resume == "flag" and change.key not in accept]
    if not refused and not waiting:
        return
    raise RunError(
        where,
        found=f"other values than the {'finished run has' if finished else 'run was begun with'}\n{table(changes)}",
        expected="the saved ones" + ("" if finished else " where the class is refused, and consent where it is flag"),
        mend=_take_back(refused) if refused else f"Add {ACCEPT} {','.join(waiting)} to compute the rest of the run so.",
    )


def carried_out(lines: Sequence[dict[str, Any]], saved: dict[str, Any]) -> list[dict[str, Any]]:
    """The recorded changes with which work has gone on, then one for each other key that was changed since.

    That is from what was last computed with to what the recipe in the folder has; none where these are the same, since
    it was taken back, or a kill kept it from being made.
    """
    first = _waiting(lines)
    waiting = [{**line, "now": _at(saved, key)} for key, line in first.items()]
    return [line for line in lines if "step" in line] + [line for line in waiting if line["saved"] != line["now"]]


def since_computed(changes: Sequence[Change], lines: Sequence[dict[str, Any]]) -> list[Change]:
    """The changes against what was last computed with, where nothing was with the recipe that the folder has."""
    first = _waiting(lines)
    found = [replace(one, saved=first[one.key]["saved"]) if one.key in first else one for one in changes]
    return [one for one in found if one.saved != one.now]


def _waiting(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By key, the first recorded change with which no work has gone on yet."""
    return {line["key"]: line for line in reversed(lines) if "step" not in line}


def _take_back(refused: Sequence[Change]) -> str:
    settings = [f"{change.key}={json.dumps(change.saved)}" for change in refused]
    stated = all(isinstance(change.saved, bool | int | float | str) for change in refused)
    back = " ".join(settings) if stated else "the saved values of " + ", ".join(change.key for change in refused)
    return f"Go on with {back}, or begin another run: choose another name=..., or delete the folder."


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    half = WIDEST // 2
    return text if len(text) <= WIDEST else f"{text[: half - 3]}...{text[-half:]}"


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        steps = {str(number): value for number, value in enumerate(values)} if isinstance(values, list) else values
        values = steps.get(part) if isinstance(steps, dict) else None
    return values
