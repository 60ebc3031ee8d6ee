"""Trials: curves are read between their points, and what is compared is refused unless it can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import RecipeError
from espalier.page import Point
from espalier.planner import PlannedRecipe
from espalier.run import Run
from espalier.trials import Figures, Way, carry_out, require_shares

losses = st.lists(st.floats(1, 10), min_size=2, max_size=12)


def curve(values: list[float]) -> Figures:
    """A trial that evaluated after every FLOP and every two seconds."""
    points = [Point(n, n, None, 2 * n, n, loss) for n, loss in enumerate(values, start=1)]
    return Figures(values[-1], len(values), 2 * len(values), points, [])


@given(losses, st.floats(0.5, 12))
def test_a_loss_is_reached_where_the_curve_first_is_as_low(values, loss):
    at = curve(values).reached(loss)
    low = [number for number, value in enumerate(values, start=1) if value <= loss]
    if not low:
        assert at is None
        return
    flops, seconds = at
    assert seconds == pytest.approx(2 * flops)
    assert flops == 1 if low[0] == 1 else low[0] - 1 < flops <= low[0]
    if low[0] > 1:
        assert curve(values).loss_at(flops) == pytest.approx(loss, abs=1e-6)


@given(losses)
def test_the_last_loss_is_that_of_all_flops(values):
    figures = curve(values)
    assert figures.loss_at(figures.flops) == pytest.approx(values[-1])
    assert figures.loss_at(0.5) is None and figures.loss_at(figures.flops + 1) is None


def test_a_growth_is_a_step_of_the_curve():
    points = [Point(n, n, None, n, n, loss) for n, loss in ((1, 3.0), (2, 2.5), (2, 4.0), (3, 2.0))]
    figures = Figures(2.0, 3, 3, points, [1.5])
    assert figures.loss_at(2.5) == pytest.approx(3.0), "after the growth"
    assert figures.reached(2.5) == (2, 2), "before it"
    assert figures.reached(2.25) == pytest.approx((2.875, 2.875))


def told(**more) -> PlannedRecipe:
    return PlannedRecipe(stages=[{"duration": "40%"}, {"duration": "60%", "num_hidden_layers": 3}], **more)


def test_a_way_has_its_flops_rate_and_seed():
    run = told(optimizer={"name": "adamw", "learning_rate": 0.01, "vector_learning_rate": 0.03})
    trial = Way("stack, fresh", "arm", run.stages, 1e9).trial(run, rate=0.02, seed=7)
    assert trial.recipe.name == "stack-fresh-rate0.02-seed7" and trial.recipe.seed == 7
    assert [stage.duration for stage in trial.recipe.stages] == ["4.000000000e+08 flops", "6.000000000e+08 flops"]
    assert trial.recipe.optimizer.learning_rate == 0.02
    assert trial.recipe.optimizer.vector_learning_rate == pytest.approx(0.06)


def test_two_trials_in_one_folder_are_refused(tmp_path):
    run = told()
    trials = [Way(name, "arm", run.stages, 1e9).trial(run, rate=0.02, seed=7) for name in ("a b", "a, b")]
    with pytest.raises(RecipeError, match=r"two that both mean a-b-rate0\.02-seed7"):
        carry_out(trials, Run(tmp_path, run, tell=print), workers=1, tell=print)


@pytest.mark.parametrize("durations", [("40%", "50%"), ("40%", "2e9 flops")], ids=["sum", "unit"])
def test_durations_that_are_not_shares_are_refused(durations):
    with pytest.raises(RecipeError, match=r"run\.stages: duration"):
        require_shares(PlannedRecipe(stages=[{"duration": duration} for duration in durations]))


def test_a_budget_beside_the_flops_is_refused():
    require_shares(told(budget={"usd_per_hour": 2.0}))
    with pytest.raises(RecipeError, match=r"run\.budget"):
        require_shares(told(budget={"hours": 1.0}))
