"""Pipelining: the formula beside the schedule followed pass by pass."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.budget import placement
from espalier.budget.pipelining import Stage, estimated, pace, simulated

times = st.floats(0.5, 1.5)
sends = st.floats(0.0, 1.0)


@st.composite
def pipelines(draw, least=1, most=6):
    count = draw(st.integers(least, most))
    stages = [Stage(draw(times), 2 * draw(times), draw(sends), draw(st.floats(0, 5))) for _ in range(count)]
    return [*stages[:-1], Stage(stages[-1].forward, stages[-1].backward, 0.0, stages[-1].tail)]


@settings(deadline=None, max_examples=200)
@given(pipelines(), st.integers(1, 40), st.sampled_from([0.0, 2.0]))
def test_the_formula_never_takes_less_and_at_most_a_little_more(stages, batches, tied):
    true = simulated(stages, batches, tied)
    assert true * (1 - 1e-9) <= estimated(stages, batches, tied) <= true * (1 + 2 * placement.TOLERANCE)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 30), times)
def test_even_stages_take_what_the_published_bubble_says(count, batches, forward):
    stages = [Stage(forward, 2 * forward, 0.0, 1.0)] * count
    wanted = (batches + count - 1) * 3 * forward + 1
    assert simulated(stages, batches) == pytest.approx(wanted)
    assert estimated(stages, batches) == pytest.approx(wanted)


@settings(deadline=None, max_examples=50)
@given(pipelines(most=4))
def test_once_it_is_full_a_pipe_keeps_its_pace(stages):
    later, much_later = (simulated(stages, batches) for batches in (400, 800))
    assert (much_later - later) / 400 == pytest.approx(pace(stages), rel=5e-3)


@given(pipelines(least=2), st.integers(1, 20))
def test_nothing_is_sooner_for_a_slower_stage_or_link(stages, batches):
    slower = [Stage(s.forward * 1.5, s.backward, s.onward * 2, s.tail) for s in stages]
    assert simulated(slower, batches) >= simulated(stages, batches)
    assert simulated(stages, batches, tied=1.0) >= simulated(stages, batches)


def test_neighbours_far_apart_wait_for_each_other():
    near, far = ([Stage(1, 2, way, 0), Stage(1, 2, 0, 0)] for way in (0, 6))
    assert pace(near) == 3
    assert pace(far) == (3 + 3 + 2 * 6) / 2
