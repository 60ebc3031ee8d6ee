"""Refusals: each says where, what was found, what was expected and what to do (FAULTS P5)."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import espalier
from espalier import errors
from faults.sheet import Row
from faults.small import Setting

SOURCE = Path(espalier.__file__).parent
KINDS = {"UserError", *(kind.__name__ for kind in errors.UserError.__subclasses__())}
KEYS = ("found", "expected", "mend")


def refusals(setting: Setting) -> list[Row]:
    """All that the source can raise, and all that the other parts have seen."""
    made, wrong = 0, []
    for path in sorted(SOURCE.rglob("*.py")):
        for call in _made(path):
            made += 1
            if lacking := _lacking(call):
                wrong.append(f"{path.relative_to(SOURCE)}:{call.lineno} lacks {', '.join(lacking)}")
    seen = [json.loads(line) for path in setting.place.parent.glob("*/refusals.jsonl") for line in path.open()]
    empty = [error for error in seen if not all(error[key].strip() for key in ("where", *KEYS))]
    return [
        Row(
            "G10",
            f"refusals in the source: {made}",
            f"{made - len(wrong)} whole",
            "all",
            not wrong,
            "; ".join(wrong),
            trials=made,
            of=made,
        ),
        Row(
            "G10",
            f"refusals that the other parts met: {len(seen)}",
            f"{len(seen) - len(empty)} with four lines",
            "all",
            not empty,
            "; ".join(sorted({str(error)[:200] for error in empty})[:3])
            if seen
            else "the other parts weren't carried out",
            trials=len(seen),
            of=len(seen),
        ),
    ]


def _made(path: Path) -> Iterator[ast.Call]:
    """The calls that make a refusal, by the name of its class."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in KINDS:
                yield node


def _lacking(call: ast.Call) -> list[str]:
    """What a refusal doesn't say: a missing or empty part, or a mend that isn't a sentence."""
    given = {word.arg: word.value for word in call.keywords}
    if None in given:  # handed on from another refusal
        return []
    lacking = [key for key in KEYS if key not in given or _text(given[key]) == ""]
    if not call.args and "where" not in given:
        lacking.append("where")
    mend = _text(given.get("mend"))
    if mend and not mend.rstrip().endswith((".", "...", "`")):
        lacking.append("a mend that ends as a sentence")
    return lacking


def _text(node: ast.expr | None) -> str | None:
    """The text of a literal; None for anything that is made at run time."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
