"""Symbolic mapping: classes are named by random symbols, and examples show which is which."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from espalier.evaluate.iq.alphabets import SYMBOLS
from espalier.evaluate.iq.setting import Question, Setting, text_of

SYMBOL_LENGTH = 8


def topic(draw: random.Random, setting: Setting) -> Question:
    """Whether two people like things of one kind."""
    said = setting.phrases

    def texts(label: str) -> tuple[str, ...]:
        kind, other = draw.sample(setting.half(said.topics), 2)
        liked = draw.sample(kind, 2) if label == "same" else (draw.choice(kind), draw.choice(other))
        names = draw.sample(setting.half(said.names), 2)
        return tuple(said.likes.format(name=name, what=what) for name, what in zip(names, liked, strict=True))

    return _mapped(draw, setting, said.meanings["topic"], texts)


def entailment(draw: random.Random, setting: Setting) -> Question:
    """Whether who is older follows from two comparisons, or is against them."""
    said = setting.phrases

    def texts(label: str) -> tuple[str, ...]:
        oldest, middle, youngest = draw.sample(setting.half(said.names), 3)
        given = [said.older.format(name=a, other=b) for a, b in ((oldest, middle), (middle, youngest))]
        draw.shuffle(given)
        older, younger = (oldest, youngest) if label == "follows" else (youngest, oldest)
        return said.gap.join(given), said.older.format(name=older, other=younger)

    return _mapped(draw, setting, said.meanings["entailment"], texts)


def sentiment(draw: random.Random, setting: Setting) -> Question:
    """Whether somebody praises or blames."""
    said = setting.phrases

    def texts(label: str) -> tuple[str, ...]:
        words = setting.half(said.praise if label == "praise" else said.blame)
        return (said.says.format(name=draw.choice(setting.half(said.names)), what=draw.choice(words)),)

    return _mapped(draw, setting, said.meanings["sentiment"], texts)


def in_symbols(
    draw: random.Random,
    setting: Setting,
    meanings: Mapping[str, str],
    shown: Sequence[tuple[tuple[str, ...], str]],
    last: tuple[tuple[str, ...], str],
) -> Question:
    """The class of the last texts is asked for, after those of the shown ones in a new order.

    meanings  of the classes, by their names, which nobody is shown
    """
    said = setting.phrases
    classes = draw.sample(list(meanings), len(meanings))
    symbols = dict(zip(classes, _symbols(draw, setting, len(classes)), strict=True))
    named = [symbols[each] + f" ({meanings[each]})" * (setting.instruction == "guided") for each in classes]

    def block(texts: tuple[str, ...]) -> str:
        lines = [said.text.format(number=number, text=text) for number, text in enumerate(texts, start=1)]
        return "\n".join([*lines, said.answer])

    examples = [f"{block(texts)} {symbols[label]}" for texts, label in draw.sample(shown, len(shown))]
    prompt = "\n\n".join([said.symbols.format(symbols=", ".join(named)), *examples, block(last[0])])
    return Question(prompt, f" {symbols[last[1]]}", tuple(f" {symbols[each]}" for each in classes), last[1])


def _mapped(
    draw: random.Random, setting: Setting, meanings: Mapping[str, str], texts: Callable[[str], tuple[str, ...]]
) -> Question:
    """As many examples of each class as there are shots, no two of all texts the same."""
    asked = draw.choice(list(meanings))
    found: dict[tuple[str, ...], str] = {}
    for label, count in (*((label, setting.shots) for label in meanings), (asked, 1)):
        wanted = len(found) + count
        while len(found) < wanted:
            found[texts(label)] = label
    *shown, last = found.items()
    return in_symbols(draw, setting, meanings, shown, last)


def _symbols(draw: random.Random, setting: Setting, count: int) -> list[str]:
    """Different symbols of one length."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[f"<{text_of(draw, ''.join(setting.half(SYMBOLS)), SYMBOL_LENGTH)}>"] = None
    return list(found)
