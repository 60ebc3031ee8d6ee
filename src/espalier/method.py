"""Methods: typed functions with one recipe each, found by one lazy line.

A verb's package lists its methods as `METHODS = {"stack": "depth:stack"}` (module below the package, function), and
may name one of them as its `DEFAULT`.
What `espalier methods` prints comes from the function's own decorator and docstring, read from the source:
listing eighty methods imports none of them.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from espalier.errors import RecipeError
from espalier.recipe import Recipe

VERBS = ("budget", "data", "grow", "synth", "evaluate")

Status = Literal["preview", "proven"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Card:
    """What a method says of itself."""

    verb: str
    name: str
    module: str
    function: str
    summary: str = ""
    paper: str = ""
    needs: str = ""
    costs: str = ""
    status: str = "preview"

    @property
    def full_name(self) -> str:
        return f"{self.verb}.{self.name}"

    def load(self) -> Callable[..., Any]:
        """Import the method's function."""
        return getattr(importlib.import_module(self.module), self.function)

    def recipe(self) -> type[Recipe]:
        """The class of the method's recipe: the type of its first parameter."""
        hints = typing.get_type_hints(self.load())
        return next(iter(hints.values()))


def method(*, paper: str = "", needs: str = "", costs: str = "", status: Status = "preview") -> Callable[[F], F]:
    """Mark a function `(recipe, run) -> result` as a method.

    paper   identifier of the source, "" for a house method
    needs   what must be there beforehand
    costs   what it takes, in words
    status  "proven" once a record in bench/ shows its published effect
    """

    def mark(function: F) -> F:
        function.method = {"paper": paper, "needs": needs, "costs": costs, "status": status}  # type: ignore[attr-defined]
        return function

    return mark


def cards() -> Iterator[Card]:
    """Every method's card, verb by verb; imports only the verbs' light packages."""
    for verb in VERBS:
        package = importlib.import_module(f"espalier.{verb}")
        for name, line in getattr(package, "METHODS", {}).items():
            yield _card(verb, name, line)


def find(full_name: str) -> Card:
    """The card of `verb.name`; an unknown one is refused with the nearest."""
    known = {card.full_name: card for card in cards()}
    if full_name in known:
        return known[full_name]
    near = difflib.get_close_matches(full_name, known, n=1, cutoff=0.4)
    raise RecipeError(
        "method",
        found=repr(full_name),
        expected="a name that `espalier methods` lists",
        mend=f"Did you mean {near[0]!r}?" if near else "Run `espalier methods`.",
    )


def default(verb: str) -> str | None:
    """The method that is meant where a verb is followed by settings at once; most verbs have none."""
    return getattr(importlib.import_module(f"espalier.{verb}"), "DEFAULT", None)


def _card(verb: str, name: str, line: str) -> Card:
    module, _, function = line.partition(":")
    # A method that leans on floors above its verb's states its module in full.
    module = module if module.startswith("espalier.") else f"espalier.{verb}.{module}"
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin, f"{verb}.{name} is registered at {line}, which isn't there"
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            summary = (ast.get_docstring(node) or "").split("\n", 1)[0]
            return Card(verb, name, module, function, summary, **_decorated(node))
    raise AssertionError(f"{module} has no function {function}")


def _decorated(node: ast.FunctionDef) -> dict[str, str]:
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "method":
            return {word.arg: ast.literal_eval(word.value) for word in decorator.keywords if word.arg}
    raise AssertionError(f"{node.name} is registered as a method but not marked with @method")
