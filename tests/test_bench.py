"""Records can be taken again: what their scripts use of Espalier is there."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
SCRIPTS = sorted(BENCH.rglob("*.py"))


def used(script):
    """The names that a script takes from Espalier, and the attributes that it takes from its modules."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "espalier":
            for alias in node.names:
                yield node.module, alias.name
                modules[alias.asname or alias.name] = (node.module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module, name = modules[node.value.id]
            if is_module(f"{module}.{name}"):
                yield f"{module}.{name}", node.attr


def is_module(name):
    try:
        return bool(importlib.util.find_spec(name))
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(BENCH)))
def test_what_a_script_uses_is_there(script):
    missing = [
        f"{module}.{name}"
        for module, name in set(used(script))
        if not hasattr(importlib.import_module(module), name) and not is_module(f"{module}.{name}")
    ]
    assert missing == []


def test_something_is_looked_at():
    names = {name for script in SCRIPTS for _, name in used(script)}
    assert {"Parametrization", "grow_folder"} <= names
