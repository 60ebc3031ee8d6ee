"""The schedule is a function of the step alone, within [0, 1], whatever its shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.train.recipe import ScheduleRecipe

SHAPES = ("wsd", "cosine", "linear")
ratio = st.floats(0, 1)
part = st.floats(0, 0.99)
schedules = st.builds(
    ScheduleRecipe,
    lr_scheduler_type=st.sampled_from(SHAPES),
    warmup_ratio=part,
    decay_ratio=ratio,
    min_ratio=ratio,
    rewarm_ratio=part,
)
totals = st.integers(1, 400)
settled = {"warmup_ratio": 0.1, "decay_ratio": 0.25, "min_ratio": 0.2, "rewarm_ratio": 0.05}


@given(schedules, totals, st.data())
def test_a_factor_is_between_nothing_and_the_peak(schedule, total, data):
    step = data.draw(st.integers(0, total))
    grown_at = data.draw(st.none() | st.integers(0, step))
    assert 0 <= schedule.factor(step, total, grown_at) <= 1


@given(schedules, totals, st.data())
def test_a_factor_does_not_depend_on_what_was_asked_before(schedule, total, data):
    steps = data.draw(st.permutations(range(min(total, 20))))
    in_order = [schedule.factor(step, total, 3) for step in sorted(steps)]
    shuffled = {step: schedule.factor(step, total, 3) for step in steps}
    assert [shuffled[step] for step in sorted(steps)] == in_order


@given(schedules, totals)
def test_warm_up_and_decay_never_turn(schedule, total):
    factors = [schedule.factor(step, total) for step in range(total + 1)]
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    if schedule.lr_scheduler_type == "wsd" and schedule.warmup_ratio + schedule.decay_ratio <= 1:
        assert factors[peak:] == pytest.approx(sorted(factors[peak:], reverse=True), abs=1e-12)


@given(schedules.filter(lambda s: s.decay_ratio > 0.01), totals)
def test_the_end_of_the_decay_is_the_smallest_ratio(schedule, total):
    warm = min(1.0, (total + 1) / (schedule.warmup_ratio * total + 1))
    assert schedule.factor(total, total) == pytest.approx(schedule.min_ratio * warm, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_rises_in_equal_steps_to_the_peak(shape):
    schedule = ScheduleRecipe(lr_scheduler_type=shape, **settled)
    rising = [schedule.factor(step, 200) for step in range(20)]
    assert rising == pytest.approx([(step + 1) / 21 for step in range(20)])
    assert schedule.factor(20, 200) == pytest.approx(1.0)


def test_the_shapes_are_those_of_their_names():
    wsd, cosine, linear = (ScheduleRecipe(lr_scheduler_type=shape, **settled) for shape in SHAPES)
    assert {wsd.factor(step, 200) for step in range(20, 151)} == {1.0}
    assert wsd.factor(175, 200) == pytest.approx(0.6)
    assert linear.factor(110, 200) == pytest.approx(0.6) == cosine.factor(110, 200)
    assert linear.factor(65, 200) == pytest.approx(0.8)
    assert cosine.factor(65, 200) == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)


@given(schedules, st.integers(50, 400), st.data())
def test_after_a_growth_the_rate_comes_back_from_almost_nothing(schedule, total, data):
    grown_at = data.draw(st.integers(1, total - 1))
    length = schedule.rewarm_ratio * total
    for step in range(grown_at, total):
        plain = schedule.factor(step, total)
        expected = plain * min(1.0, (step - grown_at + 1) / (length + 1))
        assert schedule.factor(step, total, grown_at) == pytest.approx(expected)
