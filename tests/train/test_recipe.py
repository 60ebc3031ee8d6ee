"""The schedule is a function of the share that is done alone, within [0, 1], whatever its shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.train.recipe import ScheduleRecipe, Stretch

SHAPES = ("wsd", "cosine", "linear")
POLICIES = ("inherit", "rewind", "fresh", "segments")
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


@st.composite
def stretches(draw):
    """A share of a run, and the stage that it lies in."""
    begin, done, end = sorted(draw(st.lists(st.floats(0, 1), min_size=3, max_size=3, unique=True)))
    return done, Stretch(begin, end, draw(st.floats(0.1, 1)), draw(st.none() | st.floats(0.1, 1)))


@given(schedules, st.sampled_from(POLICIES), stretches())
def test_a_factor_is_between_nothing_and_the_peak_and_always_the_same(schedule, policy, place):
    schedule = ScheduleRecipe.model_validate(schedule.model_dump() | {"at_growth": policy})
    factor = schedule.factor(*place)
    assert 0 <= factor <= 1
    assert ScheduleRecipe.model_validate(schedule.model_dump()).factor(*place) == factor


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


@given(schedules, stretches())
def test_an_inherited_curve_goes_on_and_the_rate_comes_back_to_it_along_a_line(schedule, place):
    done, stage = place
    came_back = min(1.0, (done - stage.begin) / schedule.rewarm_ratio) if schedule.rewarm_ratio and stage.begin else 1
    assert schedule.factor(done, stage) == pytest.approx(stage.rate * schedule.factor(done) * came_back)


@given(schedules, stretches().filter(lambda place: 0.05 < place[1].begin < 0.95))
def test_fresh_and_rewound_curves_begin_again_over_what_is_left(schedule, place):
    done, stage = place
    fresh, rewound = (
        ScheduleRecipe.model_validate(schedule.model_dump() | {"at_growth": policy, "rewarm_ratio": 0.0})
        for policy in ("fresh", "rewind")
    )
    again = (done - stage.begin) / (1 - stage.begin)
    assert fresh.factor(done, stage) == pytest.approx(stage.rate * schedule.factor(again), abs=1e-9)
    if min(done, again) >= schedule.warmup_ratio:
        assert rewound.factor(done, stage) == pytest.approx(fresh.factor(done, stage), abs=1e-9)
    assert fresh.factor(stage.begin, stage) == pytest.approx(
        0 if schedule.warmup_ratio else stage.rate * schedule.factor(0)
    )


def test_segments_lead_from_one_stage_s_rate_to_the_next_s():
    schedule = ScheduleRecipe(at_growth="segments", min_ratio=0.015, rewarm_ratio=0.01, warmup_ratio=0.02)
    stages = Stretch(0.0, 0.4, 1.0, 0.85), Stretch(0.4, 0.7, 0.85, 0.5), Stretch(0.7, 1.0, 0.5)
    assert [schedule.factor(stage.end, stage) for stage in stages] == pytest.approx([0.85, 0.5, 0.015])
    assert [schedule.factor(stage.begin, stage) for stage in stages] == [0.0, 0.0, 0.0]
    assert schedule.factor(0.2, stages[0]) == pytest.approx((1 + 0.85) / 2)
    assert schedule.factor(0.41, stages[1]) == pytest.approx(0.85, abs=0.01)


def test_without_warm_up_decay_and_growth_the_rate_is_the_peak():
    flat = ScheduleRecipe(warmup_ratio=0.0, decay_ratio=0.0, rewarm_ratio=0.0)
    assert {flat.factor(done, stage) for done in (0.5, 1.0) for stage in (Stretch(), Stretch(0.5, 1.0))} == {1.0}


@pytest.mark.parametrize(
    "told", [{"decay_ratio": 0.3}, {"lr_scheduler_type": "cosine"}, {"lr_scheduler_type": "linear"}]
)
def test_the_rate_has_hardly_fallen_until_it_is_said_to_fall(told):
    schedule = ScheduleRecipe(**told, warmup_ratio=0.0)
    assert schedule.factor(schedule.falls_from) == pytest.approx(1.0 if "decay_ratio" in told else 0.5)
    assert schedule.factor(schedule.falls_from + 0.1) < schedule.factor(schedule.falls_from)
