"""A head is chosen by some questions and judged by others; luck on the first doesn't help with the second."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.evaluate.audits import choice
from espalier.evaluate.audits.choice import HeadScores

LAYERS, HEADS, OPTIONS = 3, 4, 4


def scores(n: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random scores [n, L, H, O], and right options."""
    random = np.random.default_rng(seed)
    return random.standard_normal((n, LAYERS, HEADS, OPTIONS)), random.integers(0, OPTIONS, n)


def planted(raw: np.ndarray, gold: np.ndarray, layer: int, head: int, items: np.ndarray) -> None:
    """Make a head right on these items."""
    raw[items, layer, head, :] = 0
    raw[items, layer, head, gold[items]] = 1


@given(st.lists(st.integers(0, 3), min_size=1, max_size=200), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_parts_the_questions_and_keeps_the_letters_in_proportion(letters, share, seed):
    gold = np.array(letters)
    chosen, others = choice.split(gold, share, seed)
    assert sorted([*chosen, *others]) == list(range(len(gold)))
    assert len(chosen) == round(share * len(gold))
    for letter in range(4):
        assert abs((gold[chosen] == letter).sum() - len(chosen) * (gold == letter).mean()) <= 1 + 1e-9
    again, _ = choice.split(gold, share, seed)
    assert again.tolist() == chosen.tolist()


def test_another_seed_is_another_split():
    gold = np.zeros(100, dtype=int)
    assert choice.split(gold, 0.1, 0)[0].tolist() != choice.split(gold, 0.1, 1)[0].tolist()


def test_the_head_that_is_right_is_chosen_and_is_right_on_the_others():
    raw, gold = scores()
    planted(raw, gold, 2, 1, np.arange(200))
    found = HeadScores(choice.standardised(raw), gold)
    chosen, others = choice.split(gold, 0.1, 0)
    best = choice.ranked(found[chosen])[0]
    assert best == 2 * HEADS + 1
    assert found[others].right[:, best].mean() == 1.0
    trust = choice.trust(found[chosen], found[others], 0)
    assert trust.low == trust.high == 1.0 and trust.picked[best] == 1.0


def test_a_head_that_is_right_only_where_it_is_chosen_scores_nothing_on_the_others():
    raw, gold = scores()
    chosen, others = choice.split(gold, 0.1, 0)
    planted(raw, gold, 1, 2, chosen)
    planted(raw, (gold + 1) % OPTIONS, 1, 2, others)
    found = HeadScores(choice.standardised(raw), gold)
    best = choice.ranked(found[chosen])[0]
    assert best == HEADS + 2
    assert found[others].right[:, best].mean() == 0.0
    assert choice.trust(found[chosen], found[others], 0).high == 0.0


def test_among_heads_that_are_right_as_often_the_surest_is_chosen():
    raw, gold = scores(40)
    items = np.arange(40)
    planted(raw, gold, 0, 0, items)
    planted(raw, gold, 2, 3, items)
    raw[items, 0, 0, (gold + 1) % OPTIONS] = 0.9  # nearly as much for a wrong one
    found = HeadScores(choice.standardised(raw), gold)
    assert choice.ranked(found)[:2].tolist() == [2 * HEADS + 3, 0]


def test_luck_in_the_choice_is_no_luck_on_the_others():
    """Of twelve heads that guess, the one that guessed best on twenty questions goes on guessing."""
    chose, judged = [], []
    for seed in range(20):
        raw, gold = scores(400, seed)
        found = HeadScores(choice.standardised(raw), gold)
        chosen, others = choice.split(gold, 0.05, seed)
        best = choice.ranked(found[chosen])[0]
        chose.append(found[chosen].right[:, best].mean())
        judged.append(found[others].right[:, best].mean())
        trust = choice.trust(found[chosen], found[others], seed)
        assert 0.15 < trust.low < trust.high < 0.35 and trust.picked.max() < 1
    assert np.mean(chose) > 0.35
    assert abs(np.mean(judged) - 0.25) < 0.02


def test_heads_together_weigh_their_scores_whatever_their_scale():
    raw, gold = scores(100)
    planted(raw, gold, 0, 0, np.arange(100))
    raw[:, 1, 1] *= 1e6  # a guess that shouts
    found = HeadScores(choice.standardised(raw), gold)
    together = found.together(np.array([0, HEADS + 1])).mean()
    assert together > 0.6
    assert found.together(np.array([0])).mean() == 1.0


@pytest.mark.parametrize("mass", [0.9, 0.4])
def test_without_answers_the_head_that_looks_at_options_and_varies_comes_first(mass):
    raw, gold = scores()
    planted(raw, gold, 2, 1, np.arange(200))
    raw[:, 0, 0] = [1, 0, 0, 0]  # always the first option, with all its weight
    masses = np.full((200, LAYERS, HEADS), 0.1)
    masses[:, 0, 0], masses[:, 2, 1] = 1.0, mass
    order = choice.unlabelled(HeadScores(choice.standardised(raw), gold), masses)
    assert order[0] == 2 * HEADS + 1 and order[-1] == 0
    blind = choice.unlabelled(HeadScores(choice.standardised(raw), gold * 0), masses)
    assert blind.tolist() == order.tolist(), "answers don't matter"


def test_an_option_that_a_question_has_not_got_is_never_chosen():
    raw, gold = scores(50)
    padded = np.concatenate([choice.standardised(raw), np.full((50, LAYERS, HEADS, 2), -np.inf)], -1)
    plain, wide = (HeadScores(each, gold) for each in (choice.standardised(raw), padded))
    assert (plain.choices == wide.choices).all() and (plain.merit == wide.merit).all()
    assert (plain.together(np.arange(5)) == wide.together(np.arange(5))).all()
