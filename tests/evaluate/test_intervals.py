"""Intervals hold what they are said to hold as often as they say, and tests err as seldom."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.evaluate.intervals import binomial, holm, mean_of_means, paired_bootstrap, sign_test, stderr

TIMES = 1000
# Of so many intervals at 95%, fewer than this hold the truth once in some thousand tries.
LEAST = 0.93 * TIMES


@pytest.mark.parametrize("n", [20, 100, 300])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_wilson_holds_the_share(n, share):
    """Averaged over shares nearby, as the coverage at one share jumps with it."""
    draw, held = np.random.default_rng(n), 0
    for _ in range(TIMES):
        near = share + draw.uniform(-0.02, 0.02)
        held += near in binomial(float(draw.binomial(n, near)), n)
    assert held >= LEAST


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_its_own_share_and_stays_between_nothing_and_all(given):
    right, n = given
    found = binomial(right, n)
    assert 0 <= found.low <= found.value == right / n <= found.high <= 1 and found.low < found.high


@pytest.mark.parametrize("n", [60, 200])
@pytest.mark.parametrize("gain", [0.0, 0.15])
def test_paired_bootstrap_holds_the_difference(n, gain):
    """Two models that agree on most items, the second better on a share of them."""
    draw, held = np.random.default_rng(n), 0
    for seed in range(TIMES):
        first = draw.random(n) < 0.5
        other = draw.random(n)
        # Of what was wrong some is gained, of what was right some is lost: `gain` in all.
        second = np.where(first, other > 0.2, other < 0.2 + 2 * gain)
        held += gain in paired_bootstrap(first, second, seed=seed, draws=1000)
    assert held >= LEAST


def test_paired_is_surer_than_apart():
    draw = random.Random(0)
    first = [float(draw.random() < 0.5) for _ in range(300)]
    second = [score if draw.random() < 0.9 else 1.0 for score in first]
    paired = paired_bootstrap(first, second)
    apart = 1.96 * math.hypot(stderr(first), stderr(second))
    assert paired.high - paired.low < apart


def test_the_mean_over_tasks_holds_the_mean_however_many_items_each_has():
    draw, held = np.random.default_rng(0), 0
    for seed in range(TIMES):
        tasks = [draw.random(40) < 0.2, draw.random(150) < 0.6, draw.random(60) < 0.4]
        held += 0.4 in mean_of_means([task.astype(float) for task in tasks], seed=seed, draws=1000)
    assert held >= LEAST


def test_the_sign_test_errs_as_seldom_as_it_says():
    draw = np.random.default_rng(0)
    found = [sign_test(draw.integers(-1, 2, 80)) for _ in range(TIMES)]
    assert 0.01 < sum(p < 0.05 for p in found) / TIMES < 0.07
    assert sign_test([1.0] * 10) == pytest.approx(2 / 2**10) == sign_test([-0.1] * 10)
    assert sign_test([]) == sign_test([0.0] * 5) == sign_test([1.0, -1.0]) == 1.0


@given(st.lists(st.floats(0, 1), max_size=12))
def test_corrected_probabilities_are_larger_in_the_same_order_and_no_larger_than_bonferroni_s(chances):
    found = holm(chances)
    for before, after in zip(chances, found, strict=True):
        assert before <= after <= min(1.0, len(chances) * before) or after == pytest.approx(before)
    order = sorted(range(len(chances)), key=chances.__getitem__)
    assert [found[place] for place in order] == sorted(found)


def test_holm_is_wrong_about_any_of_many_tests_as_seldom_as_about_one():
    draw = np.random.default_rng(0)
    wrong = sum(min(holm(list(draw.random(20)))) < 0.05 for _ in range(2000))
    assert 60 < wrong < 140
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
