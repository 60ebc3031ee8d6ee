"""The schedule is a function of the share that is done alone, within [0, 1], whatever its shape."""

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
settled = {"warmup_ratio": 0.1, "decay_ratio": 0.25, "min_ratio": 0.2, "rewarm_ratio": 0.05}


@given(schedules, ratio, st.none() | ratio)
def test_a_factor_is_between_nothing_and_the_peak_and_always_the_same(schedule, done, since_growth):
    factor = schedule.factor(done, since_growth)
    assert 0 <= factor <= 1
    assert ScheduleRecipe.model_validate(schedule.model_dump()).factor(done, since_growth) == factor


@given(schedules, st.lists(ratio, min_size=2, max_size=30).map(sorted))
def test_the_rate_rises_while_it_warms_up_and_never_again(schedule, shares):
    warm = [schedule.factor(done) for done in shares if done >= schedule.warmup_ratio]
    assert warm == pytest.approx(sorted(warm, reverse=True), abs=1e-12)
    if schedule.lr_scheduler_type != "wsd" or schedule.warmup_ratio + schedule.decay_ratio <= 1:
        cold = [schedule.factor(done) for done in shares if done < schedule.warmup_ratio]
        assert cold == pytest.approx(sorted(cold), abs=1e-12)


@given(schedules.filter(lambda schedule: schedule.decay_ratio > 1e-6))
def test_the_decay_ends_at_the_smallest_ratio(schedule):
    assert schedule.factor(1.0) == pytest.approx(schedule.min_ratio, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_is_a_line_from_nothing_to_the_peak(shape):
    schedule = ScheduleRecipe(lr_scheduler_type=shape, **settled)
    shares = [0.0, 0.025, 0.05, 0.075, 0.1]
    assert [schedule.factor(done) for done in shares] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])


def test_the_shapes_are_those_of_their_names():
    wsd, cosine, linear = (ScheduleRecipe(lr_scheduler_type=shape, **settled) for shape in SHAPES)
    assert [wsd.factor(done) for done in (0.1, 0.4, 0.75)] == [1.0, 1.0, 1.0]
    assert wsd.factor(0.875) == pytest.approx(0.6)
    assert linear.factor(0.55) == pytest.approx(0.6) == cosine.factor(0.55)
    assert linear.factor(0.325) == pytest.approx(0.8)
    assert cosine.factor(0.325) == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)


@given(schedules, ratio, ratio)
def test_after_a_growth_the_rate_comes_back_along_a_line(schedule, done, since_growth):
    length = schedule.rewarm_ratio
    back = min(1.0, since_growth / length) if length else 1.0
    assert schedule.factor(done, since_growth) == pytest.approx(schedule.factor(done) * back)


def test_without_warm_up_decay_and_growth_the_rate_is_the_peak():
    flat = ScheduleRecipe(warmup_ratio=0.0, decay_ratio=0.0, rewarm_ratio=0.0)
    assert {flat.factor(done, since) for done in (0.0, 0.5, 1.0) for since in (None, 0.0)} == {1.0}
