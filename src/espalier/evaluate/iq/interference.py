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
    person, *others = draw.sample(setting.half(said.names), len(setting.half(said.names)))
    places = setting.half(said.places)
    went = draw.sample(places, draw.randint(1, min(2, total - 1)))
    relevant = [said.goes.format(name=person, place=place) for place in went]
    return _located(draw, setting, relevant, others, total, person, went[-1])


def two_supporting_facts(draw: random.Random, setting: Setting) -> Question:
    """Where a thing is that somebody took along, and perhaps put down on the way; lengths are sentences."""
    said, total = setting.phrases, setting.length(draw)
    person, *others = draw.sample(setting.half(said.names), len(setting.half(said.names)))
    thing = draw.choice(setting.half(said.things))
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
    return _located(draw, setting, relevant, others, total, thing, reached)


def _located(
    draw: random.Random,
    setting: Setting,
    relevant: Sequence[str],
    others: Sequence[str],
    total: int,
    what: str,
    place: str,
) -> Question:
    """The question where something is, after the relevant sentences and those about others; its options are the
    places that are named."""
    said, places = setting.phrases, setting.half(setting.phrases.places)
    elsewhere = [other for other in places if other != place]
    # The first goes elsewhere, so that there is always a choice.
    gone = [draw.choice(elsewhere), *draw.choices(places, k=total - len(relevant) - 1)]
    distractors = [said.goes.format(name=draw.choice(others), place=where) for where in gone]
    text = said.gap.join(_interleaved(draw, relevant, distractors))
    options = tuple(f" {other}" for other in places if other in text)
    return Question(f"{text}\n{said.where.format(what=what)}\n{said.answer}", f" {place}", options)


def _interleaved(draw: random.Random, some: Sequence[str], others: Sequence[str]) -> list[str]:
    """Both in their own order, mixed at random."""
    total = len(some) + len(others)
    chosen = set(draw.sample(range(total), len(some)))
    first, second = iter(some), iter(others)
    return [next(first if place in chosen else second) for place in range(total)]
