"""Items: questions with their answers, and how a model did on them; a JSON line each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from espalier import files
from espalier.errors import DataError

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class Item:
    """One question as a model sees it.

    task            what it belongs to
    prompt          all that the model is shown
    gold            the right answer
    options         continuations of the prompt to choose among, `gold` one of them; none where it is to be written
    max_new_tokens  of an answer that is written
    stop            where it ends
    tags            by what results are split, such as a language or a length
    """

    task: str
    prompt: str
    gold: str
    options: tuple[str, ...] = ()
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ("\n",)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.options and self.options.count(self.gold) != 1:
            raise ValueError(f"gold {self.gold!r} isn't one of the options, once")

    @cached_property
    def id(self) -> str:
        """Digest of what was asked and what is right: the same item in two runs has the same."""
        return files.digest([self.task, self.prompt, self.gold, self.options])[:16]

    @property
    def chance(self) -> float:
        """The score of an answerer that knows nothing."""
        return 1 / len(self.options) if self.options else 0.0


@dataclass(frozen=True)
class Outcome:
    """How a model did on an item.

    scores    by metric, 0 to 1
    said      what it wrote, or chose
    logprobs  of the options, in nats; none where the answer was written
    """

    task: str
    id: str
    scores: dict[str, float]
    said: str
    gold: str
    chance: float
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[float, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)


def fingerprint(items: Sequence[Item]) -> str:
    """Digest of a task: of all its items, in order."""
    return files.digest([item.id for item in items])


def write_items(path: Path, items: Iterable[Item]) -> None:
    """A JSON line an item."""
    files.write_text(path, "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items))


def read_items(path: Path) -> list[Item]:
    """The items of a JSON lines file; `DataError` with the line of one that isn't an item."""
    return [_read(Item, path, number, line) for number, line in _lines(path)]


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """A JSON line an outcome."""
    files.write_text(path, "".join(json.dumps(asdict(outcome), ensure_ascii=False) + "\n" for outcome in outcomes))


def read_outcomes(path: Path) -> list[Outcome]:
    """What `write_outcomes` wrote."""
    return [_read(Outcome, path, number, line) for number, line in _lines(path)]


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            str(path),
            found=getattr(error, "strerror", None) or "bytes that aren't UTF-8",
            expected="JSON lines",
            mend="Name another file.",
        ) from None
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _read(kind: Any, path: Path, number: int, line: str) -> Any:
    try:
        return TypeAdapter(kind).validate_json(line)
    except ValidationError as error:
        complaint = error.errors()[0]
        key = ".".join(map(str, complaint["loc"]))
        raise DataError(
            f"{path}:{number}" + (f": {key}" if key else ""),
            found=complaint["msg"].removeprefix("Value error, "),
            expected=f"an {kind.__name__.lower()} in JSON",
            mend="Mend the line.",
        ) from None
