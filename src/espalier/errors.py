"""What a user sees when something is wrong: where, what was found, what was expected, what to do.

Every refusal is a `UserError`; its class fixes the exit code, so that scripts can tell them apart.
Anything else that escapes is a bug in Espalier: exit code 1, traceback in the log.
"""

from __future__ import annotations

from functools import partial
from typing import Any


class UserError(Exception):
    """A refusal that the user can act on.

    where     file, field, row or rank that is at fault
    found     what is there
    expected  what would be accepted
    mend      the command or edit that helps
    """

    exit_code = 2

    def __init__(self, where: str, *, found: str, expected: str, mend: str) -> None:
        super().__init__(f"{where}: found {found}; expected {expected}. {mend}")
        self.where, self.found, self.expected, self.mend = where, found, expected, mend

    def __reduce__(self) -> tuple[Any, ...]:
        """How it comes back from another process."""
        return partial(type(self), found=self.found, expected=self.expected, mend=self.mend), (self.where,)

    def lines(self) -> list[tuple[str, str]]:
        """(label, text) pairs in reading order, for the terminal."""
        return [
            ("where", self.where),
            ("found", self.found),
            ("expected", self.expected),
            ("mend", self.mend),
        ]


class RecipeError(UserError):
    """A recipe, an override or an argument that can't be taken."""

    exit_code = 2


class DataError(UserError):
    """A corpus, dataset or tokenizer that can't be used."""

    exit_code = 3


class ModelError(UserError):
    """A model folder or shape that can't be used, or a growth that can't be done."""

    exit_code = 4


class RunError(UserError):
    """A run folder or checkpoint that can't be used."""

    exit_code = 5


class ResourceError(UserError):
    """The machine lacks what the step needs: disk, memory, a package."""

    exit_code = 6


class NumericsError(UserError):
    """A loss or gradient that isn't finite; no update was made from it."""

    exit_code = 7


class BudgetError(UserError):
    """A budget in which the step can't be done at all."""

    exit_code = 8


class RankError(UserError):
    """One of a run's processes that died or hung; what was saved before is intact, and another start goes on."""

    exit_code = 9


PARTS = ("where", "found", "expected", "mend")


def to_json(error: Exception) -> dict[str, str]:
    """An error as another process is told of it."""
    if isinstance(error, UserError):
        return {"kind": type(error).__name__, **{part: getattr(error, part) for part in PARTS}}
    return {"kind": "", "where": f"{type(error).__name__}: {error}"}


def from_json(told: dict[str, str], *, rank: int) -> Exception:
    """The error of another rank, to be raised on this one."""
    kinds = {kind.__name__: kind for kind in UserError.__subclasses__()}
    where = told["where"] if rank == 0 else f"rank {rank}: {told['where']}"
    if told["kind"] not in kinds:
        return RuntimeError(where)
    return kinds[told["kind"]](where, **{part: told[part] for part in PARTS[1:]})


# Not errors: how a run that left a usable model may end early.
EXIT_BUDGET_SPENT = 10
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
