"""Multiple-choice questions: read from JSON lines, and shown to a model with letters or without its options.

A template holds {question}, {context} and {options}; a line with {context} is left out where there is none. The
options become a line each: a letter, a full stop, a space, the text.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from espalier.errors import DataError
from espalier.evaluate.items import Item, read_rows

LETTERS = string.ascii_uppercase[:24]
LETTERED = "Context: {context}\nQuestion: {question}\nOptions:\n{options}Answer:"
CLOZE = "Context: {context}\nQuestion: {question}\nAnswer:"

Style = Literal["letters", "cloze"]
Span = tuple[int, int]


@dataclass(frozen=True)
class Question:
    """A question with its options.

    answer   the place of the right option, from 0, or its text
    context  what the question is about, if it isn't told in the question itself
    tags     by what results are split
    """

    question: str
    options: tuple[str, ...]
    answer: int | str
    context: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 2 <= len(self.options) <= len(LETTERS):
            raise ValueError(f"{len(self.options)} options, not 2 to {len(LETTERS)}")
        if not all(option.strip() for option in self.options):
            raise ValueError("an option without text")
        if len({option.strip() for option in self.options}) < len(self.options):
            raise ValueError("an option twice")
        if self.answer not in (self.options if isinstance(self.answer, str) else range(len(self.options))):
            raise ValueError(f"the answer {self.answer!r} is none of the options")

    @property
    def gold(self) -> int:
        """The place of the right option."""
        return self.options.index(self.answer) if isinstance(self.answer, str) else self.answer

    def with_options(self, extra: Sequence[str]) -> Question:
        """With options that are wrong at the end, such as "None of the above"."""
        return replace(self, options=(*self.options, *extra))

    def shuffled(self, draw: random.Random, *, fixed: int = 0) -> Question:
        """With its options in another order, the last `fixed` ones where they are."""
        moving = range(len(self.options) - fixed)
        order = list(moving)
        while order == list(moving):
            draw.shuffle(order)
        places = (*order, *range(len(moving), len(self.options)))
        return replace(self, options=tuple(self.options[place] for place in places), answer=places.index(self.gold))


@dataclass(frozen=True)
class Prompt:
    """A question as text, and where each option is in it: [start, end) of its line and of its own text."""

    text: str
    lines: tuple[Span, ...]
    texts: tuple[Span, ...]


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSON lines file; `DataError` with the line of one that isn't a question."""
    questions = read_rows(Question, path)
    if not questions:
        raise DataError(str(path), found="no questions", expected="a question a line", mend="Name another file.")
    return questions


def render(question: Question, template: str) -> Prompt:
    """The prompt of a question, which ends where the model is to answer."""
    before, options, after = template.partition("{options}")
    text, lines, texts = _filled(before, question), [], []
    for letter, option in zip(LETTERS, question.options, strict=False):
        if not options:
            break
        line = f"{letter}. {option.strip()}\n"
        lines.append((len(text), len(text) + len(line)))
        texts.append((len(text) + len("A. "), len(text) + len(line) - 1))
        text += line
    return Prompt(text + _filled(after, question), tuple(lines), tuple(texts))


def as_item(question: Question, task: str, style: Style, template: str) -> Item:
    """What any engine can be asked: for the option's letter, or for its text where the template shows no options."""
    shown = LETTERS[: len(question.options)] if style == "letters" else question.options
    options = tuple(f" {option.strip()}" for option in shown)
    prompt = render(question, template).text
    return Item(task, prompt, options[question.gold], options, tags=question.tags)


def _filled(template: str, question: Question) -> str:
    kept = [line for line in template.splitlines(keepends=True) if question.context or "{context}" not in line]
    parts = {"{question}": question.question, "{context}": question.context}
    # Part by part, so that braces in a question are only braces.
    filled = ""
    for line in kept:
        while found := [mark for mark in parts if mark in line]:
            mark = min(found, key=line.index)
            before, _, line = line.partition(mark)
            filled += before + parts[mark]
        filled += line
    return filled
