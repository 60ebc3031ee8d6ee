"""Items: questions with their answers, and how a model did on them; a JSON line each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from espalier import files
from espalier.errors import DataError
from espalier.infer.engine import Answer, Generate, Request, Score

SAMPLES = "samples.jsonl"
Scoring = Literal["options", "written"]
T = TypeVar("T")


class Askable(Protocol):
    """What can be asked: an item of ours, a document of somebody else's task.

    task  what it belongs to
    id    the same in two runs that ask the same
    """

    @property
    def task(self) -> str: ...
    @property
    def id(self) -> str: ...

    def requests(self, scoring: Scoring) -> list[Request]:
        """What a model is asked for it."""
        ...

    def judge(self, answers: Sequence[Answer]) -> Outcome:
        """How the answers to its requests do."""
        ...


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

    def requests(self, scoring: Scoring) -> list[Request]:
        """What a model is asked: how probable each option is, or to write."""
        if self.options and scoring == "options":
            return [Score(self.prompt, option) for option in self.options]
        return [Generate(self.prompt, self.max_new_tokens, self.stop)]

    def judge(self, answers: Sequence[Answer]) -> Outcome:
        """How the answers to these requests do: `option_scores` or `written_scores`."""
        if all(answer.finish == "scored" for answer in answers):
            logprobs = tuple(answer.logprob for answer in answers)
            said, scores = self.options[best(logprobs)], option_scores(self.options, self.gold, logprobs)
        else:
            [answer] = answers
            said, logprobs = answer.text, ()
            scores = written_scores(self.gold, said)
        return Outcome(
            task=self.task,
            id=self.id,
            scores=scores,
            said=said,
            gold=self.gold,
            chance=self.chance if logprobs else 0.0,
            prompt_tokens=answers[0].prompt_tokens,
            completion_tokens=sum(answer.completion_tokens for answer in answers),
            logprobs=logprobs,
            tags=self.tags,
        )


@dataclass(frozen=True)
class Outcome:
    """How a model did on an item.

    scores    by metric; 0 to 1, but for losses and what lm-eval may have
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


def option_scores(options: Sequence[str], gold: str, logprobs: Sequence[float]) -> dict[str, float]:
    """How the probabilities of options do.

    acc       the most probable option is right
    acc_norm  the one of the highest probability a character is
    """
    lengths = [len(option.strip()) or 1 for option in options]
    fair = [value / length for value, length in zip(logprobs, lengths, strict=True)]
    right = options.index(gold)
    return {"acc": float(best(logprobs) == right), "acc_norm": float(best(fair) == right)}


def written_scores(gold: str, said: str) -> dict[str, float]:
    """exact_match: the first line that was written is right, whitespace around it aside."""
    return {"exact_match": float(said.strip().split("\n", 1)[0].strip() == gold.strip())}


def best(values: Sequence[float]) -> int:
    """The place of the largest; of equals the first."""
    return max(range(len(values)), key=lambda place: values[place])


def fingerprint(items: Sequence[Askable]) -> str:
    """Digest of a task: of all its items, in order."""
    return files.digest([item.id for item in items])


def write_items(path: Path, items: Iterable[Item]) -> None:
    """A JSON line an item."""
    files.write_text(path, "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items))


def read_items(path: Path) -> list[Item]:
    """The items of a JSON lines file; `DataError` with the line of one that isn't an item."""
    return read_rows(Item, path)


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """A JSON line an outcome."""
    files.write_text(path, "".join(json.dumps(asdict(outcome), ensure_ascii=False) + "\n" for outcome in outcomes))


def read_outcomes(path: Path) -> list[Outcome]:
    """What `write_outcomes` wrote."""
    return read_rows(Outcome, path)


def read_rows(kind: type[T], path: Path) -> list[T]:
    """The dataclasses in a JSON lines file; `DataError` with the line of one that isn't."""
    adapter = TypeAdapter(kind)
    return [_read(adapter, kind, path, number, line) for number, line in read_lines(path)]


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, line) of a file's lines that aren't empty; `DataError` when it can't be read."""
    text = files.read_text(path, expected="JSON lines", mend="Name another file.")
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _read(adapter: TypeAdapter[T], kind: type[T], path: Path, number: int, line: str) -> T:
    try:
        return adapter.validate_json(line)
    except ValidationError as error:
        complaint = error.errors()[0]
        key = ".".join(map(str, complaint["loc"]))
        raise DataError(
            f"{path}:{number}" + (f": {key}" if key else ""),
            found=complaint["msg"].removeprefix("Value error, "),
            expected=f"the fields of {kind.__name__}, in JSON",
            mend="Mend the line.",
        ) from None
