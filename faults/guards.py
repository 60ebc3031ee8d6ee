"""Guard removal: take one guard away, run the tests that mirror its file, and see whether one turns red (FAULTS G12).

    python -m faults.guards [FILE ...]

Too slow for the suite; what was found stands in guards.json, with its date, and the sheet shows it.
A guard is an `if` that ends in a refusal, or a call that requires, verifies or flushes.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.refusals import KINDS, SOURCE
from faults.sheet import Row, today
from faults.small import Setting

ROOT = Path(__file__).parent.parent
FOUND = Path(__file__).with_name("guards.json")
GUARDED = (
    *("ledger.py", "folder.py", "files.py", "run.py"),
    *("train/checkpoint.py", "train/loop.py", "data/pack.py", "data/tokenizer.py", "data/prepare.py"),
)
CALLS = ("require_", "verify", "_sync", "fsync", "cut_torn_line")
SHARE = 0.95


def removed(setting: Setting) -> list[Row]:
    """What the last removal of guards found."""
    found: dict[str, Any] = json.loads(FOUND.read_text())
    guards = {name: red for file in found["files"].values() for name, red in file.items()}
    red, share = sum(guards.values()), sum(guards.values()) / len(guards)
    missing = [name for name in GUARDED if name not in found["files"]]
    unnoticed = [name for name, noticed in guards.items() if not noticed]
    why = [f"no test noticed: {', '.join(unnoticed)}"] * bool(unnoticed)
    why += [f"not tried yet: {', '.join(missing)}"] * bool(missing)
    tried = f"guards removed one at a time: {len(guards)} in {', '.join(found['files'])} ({found['date']})"
    figure = f"{red} of {len(guards)} turn a test red ({share:.0%})"
    of = len(guards)
    return [Row("G12", tried, figure, ">= 95%", share >= SHARE and not missing, "; ".join(why), trials=of, of=of)]


def main(names: list[str]) -> None:
    """Try the guards of some files and add what was found."""
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {"files": {}}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(shutil.copytree(SOURCE, Path(folder) / "espalier"))
        for name in names:
            found["files"][name] = {}
            for guard, text in without_guards(SOURCE / name):
                (source / name).write_text(text)
                found["files"][name][f"{name}:{guard}"] = noticed = _red(name, Path(folder))
                print(f"{name}:{guard}: {'red' if noticed else 'NOT NOTICED'}", flush=True)
            shutil.copy(SOURCE / name, source / name)
            FOUND.write_text(json.dumps({**found, "date": today()}, indent=2) + "\n")


def without_guards(path: Path) -> Iterator[tuple[str, str]]:
    """(where and what the guard is, the file's text without it) for every guard of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for number, node in enumerate(ast.walk(tree)):
        if not _is_guard(node):
            continue
        changed = copy.deepcopy(tree)
        guard = next(other for place, other in enumerate(ast.walk(changed)) if place == number)
        if isinstance(guard, ast.If):
            guard.test = ast.Constant(False)
        elif isinstance(guard, ast.Expr):
            guard.value = ast.Constant(None)
        yield f"{node.lineno}", ast.unparse(changed)  # type: ignore[attr-defined]


def _is_guard(node: ast.AST) -> bool:
    if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
        raised = node.body[-1].exc
        return isinstance(raised, ast.Call) and (_name(raised) in KINDS or _name(raised).startswith("_"))
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _name(node.value).startswith(CALLS)


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _red(name: str, source: Path) -> bool:
    """Whether the mirror tests of a file fail with the sources in `source`."""
    path = Path(name)
    test = ROOT / "tests" / path.parent / f"test_{path.name}"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(test)]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300, check=False)
    return done.returncode != 0


if __name__ == "__main__":
    main(sys.argv[1:] or list(GUARDED))
