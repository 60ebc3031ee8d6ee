"""Pattern mining: pairs of random strings, and not a word about the rule that makes one of the other.

Lengths are those of the inputs, in letters.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from espalier.evaluate.iq.setting import Question, Setting, in_pairs, text_of


def head_and_tail(draw: random.Random, setting: Setting) -> Question:
    """A fixed beginning and a fixed end around the input."""
    head, tail = (text_of(draw, setting.letters, draw.randint(3, 5)) for _ in range(2))

    def is_plain(body: str) -> bool:
        """The input is at one place of the output only, so a single example shows what was put around it."""
        whole = head + body + tail
        return whole.find(body) == whole.rfind(body)

    return _mined(draw, setting, lambda body: head + body + tail, is_plain)


def full_repeating(draw: random.Random, setting: Setting) -> Question:
    """The input twice."""
    return _mined(draw, setting, lambda body: body * 2)


def head_slicing(draw: random.Random, setting: Setting) -> Question:
    """The first few letters of the input, always as many."""
    kept = draw.randint(1, min(4, setting.lengths[0] - 1))
    return _mined(draw, setting, lambda body: body[:kept])


def _mined(
    draw: random.Random,
    setting: Setting,
    rule: Callable[[str], str],
    is_plain: Callable[[str], bool] = lambda body: True,
) -> Question:
    bodies: list[str] = []
    while len(bodies) <= setting.shots:
        body = text_of(draw, setting.letters, setting.length(draw))
        if is_plain(body):
            bodies.append(body)
    *shown, last = bodies
    return Question(in_pairs([(body, rule(body)) for body in shown], last), f" {rule(last)}")
