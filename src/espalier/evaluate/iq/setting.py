"""What a generator is told, and what it gives back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from espalier.evaluate.iq.alphabets import LETTERS, Split, half
from espalier.evaluate.iq.phrases import PHRASES, Phrases

Instruction = Literal["induction", "guided"]
T = TypeVar("T")


class Question(NamedTuple):
    """All that a model is shown, the right answer, and what there is to choose among, if that is so.

    label  the class of the answer, where answers have classes
    """

    prompt: str
    gold: str
    options: tuple[str, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Setting:
    """What may vary between the items of a task.

    language     whose letters and sentences
    split        which half of them
    shots        examples before the question; of each class where there are classes
    lengths      least and most; what is counted is the task's own
    instruction  "guided" says what the classes mean, "induction" leaves that to the examples
    """

    language: str
    split: Split
    shots: int
    lengths: tuple[int, int]
    instruction: Instruction = "induction"

    @property
    def letters(self) -> str:
        return "".join(self.half(LETTERS[self.language]))

    @property
    def phrases(self) -> Phrases:
        return PHRASES[self.language]

    def half(self, values: Sequence[T]) -> Sequence[T]:
        return half(values, self.split)

    def length(self, draw: random.Random) -> int:
        return draw.randint(*self.lengths)

    def number(self, draw: random.Random, least: int, most: int) -> int:
        """Even for training, odd for testing; least and most are even."""
        return draw.randrange(least, most, 2) + (self.split == "test")


def text_of(draw: random.Random, letters: str, length: int) -> str:
    """A string of random letters."""
    return "".join(draw.choices(letters, k=length))


def in_pairs(examples: Sequence[tuple[str, str]], last: str, instruction: str = "") -> str:
    """A prompt of inputs and outputs, whose last output is to be written."""
    shown = [f"Input: {given}\nOutput: {made}" for given, made in examples]
    return "\n\n".join([instruction, *shown, f"Input: {last}\nOutput:"]).lstrip()
