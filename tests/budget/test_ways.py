"""Ways to a loss: by hand for two sizes, and what traffic must and mustn't change."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.budget import flops
from espalier.budget.lifecycle import LifecycleRecipe, _candidates
from espalier.budget.scaling import Law, Terms
from espalier.budget.serving import DAYS_A_MONTH, Served
from espalier.budget.ways import Candidate, Way, Ways, lowest_loss, ways_to
from espalier.ledger import Cost
from espalier.spec import ModelSpec

HOFFMANN = Law.load("hoffmann-2022").terms
DAYS = 12 * DAYS_A_MONTH
budgets, losses, traffic = (st.floats(low, high) for low, high in ((4, 8), (2.0, 2.8), (0, 9)))


@cache
def candidates() -> tuple[Candidate, ...]:
    """Real sizes, up to those that eight large devices hold, each with what a single query costs."""
    serving = {"queries_per_day": 0, "hardware": "mi300x", "devices": 8, "output_tokens": 16}
    return tuple(_candidates(LifecycleRecipe(loss=3, hardware="h100-80g", serving=serving)))


def asked(queries_per_day: float) -> list[Candidate]:
    """The sizes, to answer so many queries a day for a year."""
    return [
        replace(one, served=replace(one.served, cost=one.served.query * (DAYS * queries_per_day)))
        for one in candidates()
    ]


def by_loss(queries_per_day: float, loss: float) -> Ways:
    return Ways(loss, "usd", ways_to(HOFFMANN, asked(queries_per_day), loss))


def by_budget(queries_per_day: float, budget: float) -> Ways | None:
    loss = lowest_loss(HOFFMANN, asked(queries_per_day), budget, "usd")
    return None if loss is None else by_loss(queries_per_day, loss)


def size(ways: Ways) -> int:
    return ways.chosen.candidate.parameters


def test_two_sizes_by_hand():
    """1 / N + 1 / D = loss; a query costs as much as a token of training, and a thousand are asked."""
    specs = [ModelSpec(vocab_size=words, hidden_size=2, head_dim=2, num_hidden_layers=1) for words in (10, 62)]
    few, many = map(flops.parameters, specs)
    priced = [
        Candidate(spec, Cost(tokens=1, usd=usd), Served(Cost(usd=usd), 1.0, Cost(usd=1000 * usd)))
        for spec, usd in zip(specs, (1.0, 2.0), strict=True)
    ]
    loss = 1.25 / few
    found = Ways(loss, "usd", ways_to(Terms(A=1.0, B=1.0), priced, loss))
    on_few, on_many = 4 * few, 1 / (loss - 1 / many)
    assert [way.tokens for way in found.all] == pytest.approx([on_few, on_many])
    assert [way.cost.usd for way in found.all] == pytest.approx([on_few + 1000, 2 * on_many + 2000])
    assert 2 * on_many < on_few < 2 * on_many + 1000, "so serving decides"
    assert (found.chosen, found.alone, found.rival) == (found.all[0], found.all[1], found.all[0])
    assert found.saved == pytest.approx(2 * on_many + 1000 - on_few)
    assert found.break_even(10) == pytest.approx((on_few - 2 * on_many) / 10)


@given(losses, traffic, st.floats(0, 3))
def test_more_traffic_never_chooses_a_larger_size_for_a_loss(loss, queries, more):
    assert size(by_loss(10 ** (queries + more), loss)) <= size(by_loss(10**queries, loss))


@given(budgets, traffic, st.floats(0, 3))
def test_more_traffic_never_chooses_a_larger_size_for_a_budget_nor_a_lower_loss(budget, queries, more):
    few, many = (by_budget(10**exponent, 10**budget) for exponent in (queries, queries + more))
    if few and many:
        assert size(many) <= size(few)
        assert many.loss >= few.loss
    assert few or not many, "what doesn't pay for few queries doesn't pay for more"


@given(losses, traffic)
def test_serving_only_ever_makes_the_choice_smaller_and_the_choice_is_the_cheapest(loss, queries):
    ways = by_loss(10**queries, loss)
    assert size(ways) <= ways.alone.candidate.parameters
    assert ways.saved >= 0
    assert ways.chosen in (ways.alone, ways.rival)
    assert all(way.cost.usd >= ways.chosen.cost.usd for way in ways.all)
    assert all(way.cost == way.training + way.serving for way in ways.all)
    for way in ways.all:
        assert HOFFMANN.loss(way.candidate.parameters, way.tokens) == pytest.approx(loss)


@given(st.floats(19, 24))
def test_without_traffic_the_size_is_the_compute_optimal_one_of_the_grid(exponent):
    """The law's own optimum, for the FLOPs that tokens of these very sizes take, lies between its neighbours."""
    budget, every = 10**exponent, candidates()
    parameters = [one.parameters for one in every]
    each = [one.token.flops / one.parameters for one in every]
    law = Law.load("hoffmann-2022")
    best, _ = law.optimal(budget, lambda n: n * float(np.interp(np.log(n), np.log(parameters), each)))
    loss = lowest_loss(HOFFMANN, asked(0), budget, "flops")
    chosen = Ways(loss, "flops", ways_to(HOFFMANN, asked(0), loss)).chosen
    place = every.index(next(one for one in every if one.spec == chosen.candidate.spec))
    assert every[place - 1].parameters < best < every[place + 1].parameters
    assert chosen.training.flops == pytest.approx(budget)


@given(budgets, traffic)
def test_the_choice_for_a_budget_spends_all_of_it_and_no_other_size_comes_lower(budget, queries):
    ways = by_budget(10**queries, 10**budget)
    if ways:
        assert ways.chosen.cost.usd == pytest.approx(10**budget)
        found = [one.loss_on(HOFFMANN, 10**budget, "usd") for one in asked(10**queries)]
        assert min(loss for loss in found if loss is not None) == ways.loss
        assert ways.chosen.candidate.loss_on(HOFFMANN, 10**budget, "usd") == ways.loss


@given(losses)
def test_at_the_break_even_traffic_both_cost_the_same_and_beyond_it_the_smaller_less(loss):
    ways = by_loss(0, loss)
    even = ways.break_even(DAYS)
    if even is None:
        assert ways.alone is ways.all[0]
        return
    pair = [ways.rival.candidate.spec, ways.alone.candidate.spec]
    assert pair[0].hidden_size < pair[1].hidden_size

    def costs(queries):
        found = {way.candidate.spec: way.cost.usd for way in by_loss(queries, loss).all}
        return [found[spec] for spec in pair]

    smaller, larger = costs(even)
    assert smaller == pytest.approx(larger)
    smaller, larger = costs(1.1 * even)
    assert smaller < larger
    smaller, larger = costs(0.9 * even)
    assert smaller > larger


def test_a_size_that_can_not_come_to_the_loss_is_no_way():
    ways = by_loss(1e3, 2.0)
    smallest = min(way.candidate.parameters for way in ways.all)
    below = [one for one in candidates() if one.parameters < smallest]
    assert below and all(HOFFMANN.loss(one.parameters, np.inf) >= 2.0 for one in below)


def test_free_queries_have_no_break_even():
    ways = by_loss(0, 2.3)
    free = [replace(way.candidate, served=Served(Cost(), 0.0, Cost())) for way in ways.all]
    free_ways = Ways(2.3, "usd", tuple(Way(one, way.tokens) for one, way in zip(free, ways.all, strict=True)))
    assert ways.break_even(DAYS) and free_ways.break_even(DAYS) is None
