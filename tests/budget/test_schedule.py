"""Schedules: the cheapest way to a loss, by a law that is known."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.budget import schedule
from espalier.budget.scaling import Terms
from espalier.budget.schedule import Size, cheapest, from_scratch, trajectory

# Hoffmann's law, arXiv 2203.15556.
LAW = Terms(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
SIZES = [Size(n, 6 * n) for n in (1e8, 3e8, 1e9, 3e9)]
BUDGET = 1e21


def keep(share):
    return lambda before, after: share


def alone(budget=BUDGET, sizes=SIZES):
    return min(from_scratch(LAW, sizes, size, budget).loss for size in range(len(sizes)))


@pytest.mark.parametrize("relearned", [0.0, 0.1, 0.3, 1.0, math.inf])
@pytest.mark.parametrize("budget", [1e19, 1e21, 1e23])
def test_it_is_never_worse_than_any_size_from_scratch_and_spends_the_budget(relearned, budget):
    found = cheapest(LAW, SIZES, budget, keep(relearned))
    assert found.loss <= alone(budget) + 1e-12
    assert sum(stage.cost for stage in found.stages) == pytest.approx(budget)
    sizes = [stage.size for stage in found.stages]
    assert sizes == sorted(set(sizes))
    losses = [stage.loss for stage in found.stages]
    assert losses == sorted(losses, reverse=True)


def test_what_is_kept_in_full_saves_and_what_begins_anew_does_not_grow():
    free, half = (cheapest(LAW, SIZES, BUDGET, keep(share)) for share in (0.0, 0.2))
    assert len(free.stages) > 1
    assert free.loss < half.loss <= alone()
    assert cheapest(LAW, SIZES, BUDGET, keep(1.0)).loss == pytest.approx(alone(), abs=1e-4)
    assert len(cheapest(LAW, SIZES, BUDGET, keep(math.inf)).stages) == 1
    last = SIZES[free.stages[-1].size]
    assert last.cost_per_token * LAW.tokens_for(free.loss, last.parameters) > 1.05 * BUDGET, (
        "the same loss from scratch"
    )


@pytest.mark.parametrize("relearned", [0.0, 0.1])
@pytest.mark.parametrize(
    "after", [(0, 0, 0, 0), (0.03, 0.09, 0.3, 0.9), (math.inf, math.inf, math.inf, 0), (math.inf, 1, 1, 0.8)]
)
def test_no_schedule_on_a_grid_is_clearly_better(relearned, after):
    """Also where what follows takes a part of the budget, and where only the largest may be the last."""
    sizes = [
        Size(one.parameters, one.cost_per_token, after=part * BUDGET) for one, part in zip(SIZES, after, strict=True)
    ]
    found = cheapest(LAW, sizes, BUDGET, keep(relearned)).loss
    parts = (0.01, 0.03, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
    paths = [
        [(i, part * BUDGET / SIZES[i].cost_per_token), (k, 0)]
        for i, k in itertools.combinations(range(len(SIZES)), 2)
        for part in parts
    ]
    tried = [schedule.spend(LAW, sizes, path, BUDGET, keep(relearned)) for path in paths]
    assert found <= min(one.loss for one in tried if one) + 1e-5


def test_a_fixed_cost_of_a_stage_makes_stages_fewer():
    free = cheapest(LAW, SIZES, BUDGET, keep(0.0))
    dear = cheapest(LAW, [Size(s.parameters, s.cost_per_token, 0.2 * BUDGET) for s in SIZES], BUDGET, keep(0.0))
    assert len(dear.stages) < len(free.stages)


def test_what_follows_makes_the_final_model_smaller():
    """Serving costs by the parameter: the more of it, the smaller the model and the more tokens it is trained on."""
    finals, parameters = [], []
    for served in (0.0, 3e11, 1e12):
        sizes = [Size(s.parameters, s.cost_per_token, after=served * s.parameters) for s in SIZES]
        found = cheapest(LAW, sizes, BUDGET, keep(0.1))
        last = sizes[found.stages[-1].size]
        assert sum(stage.cost for stage in found.stages) + last.after == pytest.approx(BUDGET)
        finals.append(found.loss)
        parameters.append(last.parameters)
    assert parameters[0] > parameters[1] > parameters[2]
    assert finals == sorted(finals)


def test_growth_takes_the_size_that_gains_most_for_its_cost():
    """Where nothing has to be learned again, the model grows where the larger size begins to gain more per FLOP."""
    found = cheapest(LAW, SIZES, BUDGET, keep(0.0))

    def gain(size, loss):
        tokens = LAW.tokens_for(loss, size.parameters)
        slope = LAW.B * LAW.beta * tokens ** (-LAW.beta - 1)
        return slope / size.cost_per_token

    for before, after in itertools.pairwise(found.stages):
        one, other = (gain(SIZES[stage.size], before.loss) for stage in (before, after))
        assert one == pytest.approx(other, rel=0.05)
    last = found.stages[-1]
    larger = [gain(size, last.loss) for size in SIZES[last.size + 1 :]]
    assert all(other <= 1.05 * gain(SIZES[last.size], last.loss) for other in larger)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e8, 1e11), min_size=1, max_size=4), st.floats(0, 1))
def test_a_trajectory_learns_on_from_what_it_keeps(tokens, share):
    stages = list(enumerate(tokens))
    found = trajectory(LAW, SIZES, stages, keep(share))
    for (size, more), stage in zip(stages, found.stages, strict=True):
        assert stage.loss <= LAW.loss(SIZES[size].parameters, more) + 1e-12  # never behind one that begins anew
        assert stage.cost == pytest.approx(6 * SIZES[size].parameters * more)
    assert found.tokens == pytest.approx(sum(tokens))
    assert schedule.growth_points(found) == pytest.approx(list(itertools.accumulate(tokens))[:-1])
    assert sum(schedule.shares(found)) == pytest.approx(1)


@given(st.floats(1e9, 1e11), st.floats(1e8, 1e11), st.floats(0, 1))
def test_a_grown_model_stands_where_its_loss_is_less_what_it_learns_again(first, then, share):
    small, large = SIZES[0].parameters, SIZES[2].parameters
    found = trajectory(LAW, SIZES, [(0, first), (2, then)], keep(share))
    standing = float(LAW.tokens_for(LAW.loss(small, first), large))
    assert found.loss == pytest.approx(LAW.loss(large, (1 - share) * standing + then))


def test_a_budget_that_pays_for_nothing_gives_none():
    sizes = [Size(1e8, 6e8, ready=10.0)]
    assert cheapest(LAW, sizes, 5.0, keep(0.0)) is None
    assert from_scratch(LAW, sizes, 0, 5.0) is None
    assert schedule.spend(LAW, sizes, [(0, 1.0)], 5.0, keep(0.0)) is None


@pytest.mark.parametrize("last", [0.0, 0.2, 0.4, 0.7])
def test_the_last_stage_has_its_share_and_no_schedule_on_a_grid_that_gives_it_is_clearly_better(last):
    found = cheapest(LAW, SIZES, BUDGET, keep(0.0), last)
    shares = schedule.shares(found)
    assert len(shares) == 1 or shares[-1] >= last - 1e-9
    assert sum(stage.cost for stage in found.stages) == pytest.approx(BUDGET)
    tried = [
        schedule.spend(LAW, SIZES, [(i, part * BUDGET / SIZES[i].cost_per_token), (k, 0)], BUDGET, keep(0.0))
        for i, k in itertools.combinations(range(len(SIZES)), 2)
        for part in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
        if part <= 1 - last
    ]
    assert found.loss <= min(one.loss for one in tried if one) + 1e-3


def test_stages_that_cannot_end_in_time_are_no_way():
    dear = [Size(s.parameters, s.cost_per_token, ready=0.5 * BUDGET) for s in SIZES[:2]]
    assert schedule._grown_by(dear, [(0, 1e10), (1, 1e10)], 0.4 * BUDGET) is None
    assert len(cheapest(LAW, dear, BUDGET, keep(0.0), 0.6).stages) == 1
