"""Rule understanding: the rule is said, and is to be carried out to the letter."""

from __future__ import annotations

import random

from espalier.evaluate.iq.setting import Question, Setting, in_pairs, text_of

SHOWN_TERMS = 3


def counting(draw: random.Random, setting: Setting) -> Question:
    """Go on counting from the third number to the last one; lengths are the numbers to be written."""
    step, terms = draw.randint(1, 9), SHOWN_TERMS + setting.length(draw)
    start = setting.number(draw, 10, 10_000)
    numbers = [str(start + step * place) for place in range(terms)]
    rule = setting.phrases.count.format(start=start, end=numbers[-1], step=step)
    shown, rest = (", ".join(part) for part in (numbers[:SHOWN_TERMS], numbers[SHOWN_TERMS:]))
    return Question(f"{rule}\n{shown},", f" {rest}")


def replace_lowercase(draw: random.Random, setting: Setting) -> Question:
    """Small letters become capitals; capitals and digits stay. Lengths are words of random letters."""
    letters = setting.letters + setting.letters.upper() + "0123456789"

    def text() -> str:
        return " ".join(text_of(draw, letters, draw.randint(3, 6)) for _ in range(setting.length(draw)))

    *shown, last = [text() for _ in range(setting.shots + 1)]
    examples = [(given, given.upper()) for given in shown]
    return Question(in_pairs(examples, last, setting.phrases.raise_letters), f" {last.upper()}")


def replace_word(draw: random.Random, setting: Setting) -> Question:
    """One word becomes another wherever it is; lengths are words."""
    words = setting.half(setting.phrases.words)
    old, new, *others = draw.sample(words, len(words))

    def pair() -> tuple[str, str]:
        text = draw.choices(others, k=setting.length(draw))
        for place in draw.sample(range(len(text)), draw.randint(1, (len(text) + 2) // 3)):
            text[place] = old
        return " ".join(text), " ".join(new if word == old else word for word in text)

    *shown, (last, gold) = [pair() for _ in range(setting.shots + 1)]
    return Question(in_pairs(shown, last, setting.phrases.replace_word.format(old=old, new=new)), f" {gold}")
