"""The timing formula gives the paper's own figures, and knows where it means nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import RecipeError
from espalier.grow.when import WhenRecipe, grow_when, stack_timing
from espalier.run import Run


@pytest.mark.parametrize(
    ("parameters", "tokens", "expected"),
    [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9)],
)
def test_the_papers_own_figures_come_out(parameters, tokens, expected):
    timing = stack_timing(parameters, tokens)
    assert timing.tokens == pytest.approx(expected, rel=1e-3)
    assert timing.basis == "extrapolated"


def test_a_size_within_the_fit_says_so():
    assert stack_timing(1.1e9, 1e12).basis == "fitted"


@given(parameters=st.floats(1e3, 1e13), tokens=st.floats(1e3, 1e14))
def test_it_never_asks_for_more_than_a_tenth(parameters, tokens):
    timing = stack_timing(parameters, tokens)
    assert 0 < timing.share(tokens) <= 0.1 + 1e-12
    assert timing.basis == "share" or parameters >= 1e8


def test_toy_sizes_get_a_share_and_are_told_so(tmp_path):
    told: list[str] = []
    with Run.start(
        tmp_path / "run", recipe := WhenRecipe(parameters=1e6, tokens=2e7, layers=8), tell=told.append
    ) as run:
        assert grow_when(recipe, run) == "duration: 10.0%"
    assert "Train 2 layers for 2M tokens (10.0% of all)" in told[0] and "means nothing here" in told[0]


def test_more_copies_than_layers_are_refused(tmp_path):
    recipe = WhenRecipe(parameters=1e9, tokens=1e12, layers=3)
    with Run.start(tmp_path / "run", recipe, tell=print) as run, pytest.raises(RecipeError, match="factor"):
        grow_when(recipe, run)
