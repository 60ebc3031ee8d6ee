"""Anti-interference: what matters is among much that doesn't."""

from __future__ import annotations

import random
from collections.abc import Sequence

from espalier.evaluate.iq.setting import Question, Setting


def multiple_key_retrieval(draw: random.Random, setting: Setting) -> Question:
    """Two to four numbered keys in long filler, one of which is asked for; lengths are sentences of filler."""
    said = setting.phrases
    values = {number: setting.number(draw, 10_000, 100_000) for number in range(1, draw.randint(2, 4) + 1)}
    keys = [said.key.format(number=number, value=value) for number, value in values.items()]
    draw.shuffle(keys)
    filler = draw.choices(setting.half(said.filler), k=setting.length(draw))
    asked = draw.choice(list(values))
    text = said.gap.join(_interleaved(draw, keys, filler))
    return Question(f"{said.keys}\n{text}\n{said.which_key.format(number=asked)}\n{said.answer}", f" {values[asked]}")


def single_supporting_fact(draw: random.Random, setting: Setting) -> Question:
    """Where a person is who went somewhere, as many others did; lengths are sentences."""
    said, total = setting.phrases, setting.length(draw)
    person, *others = _shuffled(draw, setting.half(said.names))
    went = draw.sample(setting.half(said.places), draw.randint(1, min(2, total - 1)))
    relevant = [said.goes.format(name=person, place=place) for place in went]
    besides = _journeys(draw, setting, others, total - len(relevant), went[-1])
    return _located(draw, setting, relevant, besides, person, went[-1])


def two_supporting_facts(draw: random.Random, setting: Setting) -> Question:
    """Where a thing is that somebody took along, and perhaps put down on the way; lengths are sentences.

    Others take other things.
    """
    said, total = setting.phrases, setting.length(draw)
    person, *others = _shuffled(draw, setting.half(said.names))
    thing, *things = _shuffled(draw, setting.half(said.things))
    taken, reached, left_for = draw.sample(setting.half(said.places), 3)
    relevant = [
        said.goes.format(name=person, place=taken),
        said.takes.format(name=person, thing=thing),
        said.goes.format(name=person, place=reached),
    ]
    if total >= 6 and draw.random() < 0.5:
        relevant += [
            said.drops.format(name=person, thing=thing),
            said.goes.format(name=person, place=left_for),
        ]
    besides = _journeys(draw, setting, others, total - len(relevant), reached)
    for place, other in zip(range(1, len(besides), 3), things, strict=False):
        besides[place] = said.takes.format(name=draw.choice(others), thing=other)
    return _located(draw, setting, relevant, besides, thing, reached)


def _journeys(draw: random.Random, setting: Setting, names: Sequence[str], count: int, place: str) -> list[str]:
    """Sentences about people who go somewhere, the first of them elsewhere than to `place`: so there is a choice."""
    places = setting.half(setting.phrases.places)
    reached = [draw.choice([other for other in places if other != place]), *draw.choices(places, k=count - 1)]
    return [setting.phrases.goes.format(name=draw.choice(names), place=where) for where in reached]


def _located(
    draw: random.Random, setting: Setting, relevant: Sequence[str], besides: Sequence[str], what: str, place: str
) -> Question:
    """Where something is, after what matters and what doesn't; the options are the places that are named."""
    said = setting.phrases
    text = said.gap.join(_interleaved(draw, relevant, besides))
    options = tuple(f" {other}" for other in setting.half(said.places) if other in text)
    return Question(f"{text}\n{said.where.format(what=what)}\n{said.answer}", f" {place}", options)


def _shuffled(draw: random.Random, values: Sequence[str]) -> list[str]:
    return draw.sample(values, len(values))


def _interleaved(draw: random.Random, some: Sequence[str], others: Sequence[str]) -> list[str]:
    """Both in their own order, mixed at random."""
    total = len(some) + len(others)
    chosen = set(draw.sample(range(total), len(some)))
    first, second = iter(some), iter(others)
    return [next(first if place in chosen else second) for place in range(total)]
