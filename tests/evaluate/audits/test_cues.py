"""Rules that know nothing are no better than chance where there is no cue, and find the cue where there is one."""

from __future__ import annotations

import random

import pytest

from espalier.evaluate.audits.cues import cues, words
from espalier.evaluate.items import Item

NAMES = [a + b for a in ("ba", "du", "ki", "mo") for b in ("lar", "nes", "tip")]


def items(n: int, cue: str = "none", strength: float = 0.6) -> list[Item]:
    """Items whose answers tell nothing but, in some share of them, by the cue."""
    draw = random.Random(0)
    made = []
    for number in range(n):
        options = draw.sample(NAMES, 4)
        right = draw.randrange(4)
        marked = right if draw.random() < strength else draw.randrange(4)
        if cue == "length":
            options[marked] += " in almost every case"
        if cue == "overlap":
            options[marked] += " thing"
        if cue == "letter":
            options[0], options[marked] = options[marked], options[0]
            right = {0: marked, marked: 0}.get(right, right)
        made.append(Item("made up", f"What is the thing {number}?", options[right], tuple(options)))
    return made


def earned(found: list[Item]) -> dict[str, float]:
    return {rule: sum(scores) / len(scores) for rule, scores in cues(found).items()}


def test_without_a_cue_no_rule_is_better_than_chance():
    assert all(abs(value - 0.25) < 0.05 for value in earned(items(600)).values())


@pytest.mark.parametrize(
    ("cue", "finders"),
    [
        ("length", {"longest", "options only"}),
        ("overlap", {"overlap", "longest", "options only"}),
        ("letter", {"majority letter", "question only"}),
    ],
)
def test_a_planted_cue_is_found_by_the_rules_that_look_for_it_alone(cue, finders):
    found = earned(items(400, cue))
    assert {rule for rule, value in found.items() if value > 0.55} == finders
    assert all(value < 0.35 for rule, value in found.items() if rule not in finders)


def test_options_that_look_alike_share_what_one_of_them_is_worth():
    item = Item("made up", "Which?", "ab", ("ab", "cd", "efg", "hij"))
    assert cues([item])["longest"] == [0.0]
    assert cues([Item("made up", "Which?", "ab", ("ab", "cd", "e"))])["longest"] == [0.5]


def test_a_classifier_is_never_fitted_to_the_item_that_it_answers():
    # Each answer is right once and wrong nowhere: what is learnt from the others says nothing about it.
    alone = [Item("made up", "Which?", f"right{n}", (f"right{n}", f"wrong{n}")) for n in range(20)]
    assert cues(alone)["options only"] == [0.5] * 20


def test_a_chinese_character_is_a_word():
    assert words("The 器官 of Ba-lar") == ["the", "器", "官", "of", "ba", "lar"]
