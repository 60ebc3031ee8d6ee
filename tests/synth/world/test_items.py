"""An invented world's items give away nothing but the cue that was planted."""

from __future__ import annotations

from collections import Counter

import pytest

from espalier.evaluate.audits.cues import cues
from espalier.evaluate.items import read_items
from espalier.synth.world.write import ITEMS


@pytest.fixture
def earned(world):
    """`earned(seed=1)`: what each rule earns that knows nothing of the world."""

    def earned(**told) -> dict[str, float]:
        items = read_items(world(**told) / ITEMS)
        assert len(items) == 400 and len({item.id for item in items}) == 400
        return {rule: sum(scores) / len(scores) for rule, scores in cues(items).items()}

    return earned


@pytest.mark.parametrize("seed", range(3))
def test_without_a_cue_no_rule_is_better_than_chance(earned, seed):
    assert all(abs(value - 0.25) < 0.05 for value in earned(seed=seed).values())


def test_each_place_is_right_as_often_as_any_other(world):
    items = read_items(world() / ITEMS)
    assert Counter(item.options.index(item.gold) for item in items) == dict.fromkeys(range(4), 100)


@pytest.mark.parametrize(
    ("cue", "rule"), [("length", "longest"), ("overlap", "overlap"), ("letter", "majority letter")]
)
def test_a_planted_cue_is_worth_what_its_strength_says(earned, cue, rule):
    assert earned(cue=cue)[rule] == pytest.approx(0.6 + 0.4 / 4, abs=0.07)
    assert earned(cue=cue, strength=0.0)[rule] == pytest.approx(0.25, abs=0.07)


def test_the_cue_of_one_language_is_in_its_words(world):
    items = read_items(world(cue="length", languages=("zh",), strength=1.0) / ITEMS)
    assert all(max(item.options, key=len) == item.gold and item.gold.isprintable() for item in items)
    assert all("a" not in item.gold for item in items)


def test_as_many_wrong_answers_as_were_asked_for(world):
    items = read_items(world(distractors=6, facts=60, items=100) / ITEMS)
    assert all(len(set(item.options)) == 7 for item in items)
