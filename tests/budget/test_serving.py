"""Serving: by hand on simple hardware, and what must hold for any traffic."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.budget import flops
from espalier.budget.hardware import Hardware
from espalier.budget.serving import DAYS_A_MONTH, ServingRecipe, served
from espalier.errors import ResourceError
from espalier.ledger import RESOURCES
from espalier.spec import ModelSpec

SPEC = ModelSpec(family="llama", vocab_size=100, hidden_size=64, num_hidden_layers=2, head_dim=32)
PRODUCTS = 2 * (4 * 64 * 64 + 3 * 64 * SPEC.intermediate_size) + 64 * 100  # weights that a pass multiplies by
# Either computing or memory is for nothing.
COMPUTES = Hardware(
    name="row",
    kind="cuda",
    count=1,
    peak_flops={"float32": 1e9, "bfloat16": 1e9},
    memory_bytes=10**9,
    memory_bandwidth=1e30,
    watts=500.0,
    usd_per_hour=3.6,
    kgco2e_per_kwh=0.5,
    sources={},
    link_bandwidth=1e30,
)
MOVES = replace(COMPUTES, peak_flops={"float32": 1e30, "bfloat16": 1e30}, memory_bandwidth=1e9)


def told(**more) -> ServingRecipe:
    return ServingRecipe.model_validate({"queries_per_day": 100.0, "prompt_tokens": 3, "output_tokens": 2} | more)


def test_a_query_by_hand_where_computing_is_all_that_counts():
    # Three tokens read and the first logits, then one more token that attends to four.
    layers = 2 * (PRODUCTS - 64 * 100)
    attention = [2 * 2 * 2 * tokens * 64 for tokens in (3, 4)]  # two products in each of two layers
    expected = 3 * (layers + attention[0]) + (layers + attention[1]) + 2 * 2 * 64 * 100
    found = served(SPEC, told(months=2, utilization=0.5), COMPUTES)
    queries = 2 * DAYS_A_MONTH * 100
    assert found.query.flops == expected
    assert found.query.seconds == pytest.approx(expected / 1e9 / 0.5)
    assert found.query.tokens == 5
    assert found.busy == pytest.approx(100 * found.query.seconds / 86_400)
    assert found.cost.seconds == pytest.approx(queries * found.query.seconds)
    assert found.cost.usd == pytest.approx(found.cost.seconds / 1000)
    assert found.cost.kwh == pytest.approx(found.cost.seconds / 3600 * 0.5)
    assert found.cost.kgco2e == pytest.approx(found.cost.kwh / 2)
    assert (found.cost.flops, found.cost.tokens) == pytest.approx((queries * expected, queries * 5))


@pytest.mark.parametrize("batch", [1, 4])
def test_every_pass_reads_the_weights_once_for_the_whole_batch(batch):
    """So a byte less a weight saves a second for each GB and pass, divided by the batch."""
    wide, narrow = (
        served(SPEC, told(output_tokens=11, batch=batch, utilization=1, weight_bits=bits), MOVES).query.seconds
        for bits in (16, 8)
    )
    assert wide - narrow == pytest.approx(11 * PRODUCTS / 1e9 / batch)


@given(st.floats(0, 1e6), st.floats(0.1, 100), st.floats(1, 10))
def test_what_is_used_grows_with_traffic_and_with_months(queries, months, more):
    found = served(SPEC, told(queries_per_day=queries, months=months), COMPUTES)
    for changed in (
        {"queries_per_day": queries * more, "months": months},
        {"queries_per_day": queries} | {"months": months * more},
    ):
        larger = served(SPEC, told(**changed), COMPUTES)
        assert larger.query == found.query
        for name in RESOURCES:
            assert getattr(larger.cost, name) == pytest.approx(more * getattr(found.cost, name))


@given(st.floats(0, 1e9), st.integers(1, 4))
def test_whole_devices_are_as_few_as_do_the_work(queries, devices):
    used, whole = (
        served(SPEC, told(queries_per_day=queries, devices=devices, charged=charged), COMPUTES)
        for charged in ("used", "whole")
    )
    charged = whole.cost.seconds / (12 * DAYS_A_MONTH * 86_400)
    assert charged == pytest.approx(round(charged)) and round(charged) % devices == 0
    assert used.busy <= charged * (1 + 1e-9) and charged < used.busy + devices + 1e-6
    assert (used.query, used.busy) == (whole.query, whole.busy)
    assert (used.cost.flops, used.cost.tokens) == (whole.cost.flops, whole.cost.tokens)


def test_devices_of_a_copy_are_all_charged():
    """Two that share the work take half as long, and together as much."""
    one, two = (served(SPEC, told(devices=devices), COMPUTES) for devices in (1, 2))
    assert two.query.seconds == pytest.approx(one.query.seconds)
    with_link = served(SPEC, told(devices=2), replace(COMPUTES, link_bandwidth=1e3))
    assert with_link.query.seconds > 1.1 * one.query.seconds


def test_no_queries_cost_nothing_however_they_are_charged():
    for charged in ("used", "whole"):
        cost = served(SPEC, told(queries_per_day=0, charged=charged), COMPUTES).cost
        assert all(getattr(cost, name) == 0 for name in RESOURCES)


def test_a_larger_model_costs_more_of_everything():
    larger = SPEC.changed(num_hidden_layers=3)
    for row in (COMPUTES, MOVES):
        small, large = (served(spec, told(), row).cost for spec in (SPEC, larger))
        assert all(getattr(large, name) > getattr(small, name) for name in RESOURCES if name != "tokens")


def test_a_model_that_does_not_fit_is_refused_and_told_what_would_help():
    bytes_of_weights = 2 * flops.parameters(SPEC)
    small = replace(COMPUTES, memory_bytes=bytes_of_weights)
    with pytest.raises(ResourceError, match=r"1 × row.*serving.devices") as refused:
        served(SPEC, told(), small)
    assert "kparameters" in refused.value.expected
    assert served(SPEC, told(devices=2), small) and served(SPEC, told(weight_bits=4), small)
    with pytest.raises(ResourceError, match="batch of 100000"):
        served(SPEC, told(batch=100_000), replace(COMPUTES, memory_bytes=3 * bytes_of_weights))


def test_devices_without_a_link_can_not_share_a_model():
    with pytest.raises(ResourceError, match="no link"):
        served(SPEC, told(devices=2), replace(COMPUTES, link_bandwidth=0.0))
