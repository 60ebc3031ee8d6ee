"""The sub-tasks, with the paper's sizes, and the items of each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from espalier.evaluate.iq import interference, patterns, rules, symbols
from espalier.evaluate.iq.alphabets import LETTERS, Split
from espalier.evaluate.iq.phrases import PHRASES
from espalier.evaluate.iq.setting import Instruction, Question, Setting
from espalier.evaluate.items import Item

# More tokens than bytes no answer has; a few more let a model end it in its own way.
SPARE_TOKENS = 8
# Of a task that has no lengths.
UNMEASURED = (0, 0)
MAPPING, RULES, PATTERNS, INTERFERENCE = GROUPS = (
    "symbolic mapping",
    "rule understanding",
    "pattern mining",
    "anti-interference",
)


@dataclass(frozen=True)
class Task:
    """A sub-task.

    n          items, if nothing else is asked for
    shots      examples before the question (of each class, in symbolic mapping); 0 where it has none
    lengths    least and most, if nothing else is asked for; what is counted stands at the generator
    shortest   for which there is an item at all
    languages  in which it can be said
    """

    name: str
    group: str
    generate: Callable[[random.Random, Setting], Question]
    n: int
    shots: int
    lengths: tuple[int, int]
    shortest: int
    languages: tuple[str, ...]

    def items(
        self,
        n: int,
        languages: Sequence[str] = ("en",),
        *,
        split: Split = "test",
        shots: int | None = None,
        lengths: tuple[int, int] | None = None,
        instruction: Instruction = "induction",
        seed: int = 0,
    ) -> Iterator[Item]:
        """The first n items, the languages in turn; an item depends on its own number only, not on the others."""
        first = Setting(
            language=languages[0],
            split=split,
            shots=shots or self.shots,
            lengths=lengths or self.lengths,
            instruction=instruction,
        )
        for number in range(n):
            round, place = divmod(number, len(languages))
            setting = replace(first, language=languages[place])
            draw = random.Random(f"{seed} {self.name} {split} {setting.language} {round}")
            yield as_item(self.name, self.generate(draw, setting), setting.language)


def as_item(task: str, question: Question, language: str) -> Item:
    """A question with what an answer may take, and with what results are split by."""
    label = {"label": question.label} if question.label else {}
    return Item(
        task=task,
        prompt=question.prompt,
        gold=question.gold,
        options=question.options,
        max_new_tokens=len(question.gold.encode()) + SPARE_TOKENS,
        tags={"language": language} | label,
    )


SPOKEN = tuple(PHRASES)
CASED = tuple(language for language in SPOKEN if PHRASES[language].raise_letters)
WRITTEN = tuple(LETTERS)

TASKS = {
    task.name: task
    for task in (
        Task("topic", MAPPING, symbols.topic, 300, 3, UNMEASURED, 0, SPOKEN),
        Task("entailment", MAPPING, symbols.entailment, 300, 3, UNMEASURED, 0, SPOKEN),
        Task("sentiment", MAPPING, symbols.sentiment, 300, 3, UNMEASURED, 0, SPOKEN),
        Task("counting", RULES, rules.counting, 148, 0, (3, 12), 1, SPOKEN),
        Task("replace_lowercase", RULES, rules.replace_lowercase, 300, 4, (2, 5), 1, CASED),
        Task("replace_word", RULES, rules.replace_word, 300, 4, (5, 12), 1, SPOKEN),
        Task("head_and_tail", PATTERNS, patterns.head_and_tail, 100, 5, (2, 6), 1, WRITTEN),
        Task("full_repeating", PATTERNS, patterns.full_repeating, 100, 5, (3, 8), 1, WRITTEN),
        Task("head_slicing", PATTERNS, patterns.head_slicing, 100, 5, (5, 8), 2, WRITTEN),
        Task("multiple_key_retrieval", INTERFERENCE, interference.multiple_key_retrieval, 300, 0, (10, 30), 0, SPOKEN),
        Task("single_supporting_fact", INTERFERENCE, interference.single_supporting_fact, 300, 0, (6, 20), 2, SPOKEN),
        Task("two_supporting_facts", INTERFERENCE, interference.two_supporting_facts, 300, 0, (6, 20), 4, SPOKEN),
    )
}
