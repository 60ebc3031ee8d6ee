"""Pace: a run that turns out slower still ends with its last stage, inside its budget; a counted one is let be."""

from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espalier import records
from espalier.budget.plan import Duration, Plan, plan
from espalier.grow.pace import DRIFT, FEWEST, STRETCH, Pace
from espalier.ledger import Cap, Cost, Entry, Ledger, Rates
from espalier.recipe import Recipe
from espalier.run import METRICS, Run
from espalier.spec import ModelSpec
from espalier.train.checkpoint import Progress

ROWS, LENGTH, SPEED = 4, 16, 1e-3
STEP = ROWS * LENGTH * SPEED  # seconds of a step of the first stage; of the second, twice as many
END = Cost(seconds=2.0)


def planned(cap: Cap, *durations: str, reserve: float = 0.1) -> Plan:
    specs = [ModelSpec(vocab_size=100, hidden_size=32, head_dim=16, num_hidden_layers=layers) for layers in (1, 2)]
    return plan(
        [(spec, Duration.parse(text)) for spec, text in zip(specs, durations, strict=True)],
        rows=ROWS,
        sequence_length=LENGTH,
        seconds_per_token=[SPEED, 2 * SPEED],
        basis="measured",
        rates=Rates(),
        cap=cap,
        reserve=reserve,
    )


class Case:
    """A run with a plan, of which `step` steps are said to be done, in `seconds` a planned one."""

    def __init__(self, run: Run, *durations: str, step: int = 0, seconds: float = 1.0, reserve: float = 0.1) -> None:
        self.kept: list[Plan] = []
        self.first = planned(run.ledger.cap, *durations, reserve=reserve)
        self.step, self.seconds, self.run = min(step, self.first.steps), seconds, run
        stage = int(self.step > self.first.stages[0].last_step)
        done = self.first.total.seconds - self.first.left(self.step).seconds
        flops = self.first.total.flops - self.first.left(self.step).flops
        run.ledger.add(Entry("train", Cost(seconds=done * seconds, flops=flops), stage=stage, step=self.step))
        self.progress = Progress(step=self.step, stage=stage)
        stated = [Duration.parse(text) for text in durations]
        self.pace = Pace(
            run, self.first, stated, share=reserve, growth=Cost(seconds=1.0), end=END, keep=self.kept.append
        )

    def adapted(self, **more) -> Plan:
        self.pace.adapt(self.progress, self.seconds, **more)
        return self.pace.plan


@pytest.mark.parametrize("seconds", [1.2, 2.0, 4.0])
def test_a_slower_run_is_shortened_to_what_is_left(make_run, seconds):
    case = Case(make_run(seconds=1000.0), "30%", "70%", step=500, seconds=seconds)
    adapted = case.adapted()
    left, rest = adapted.left(500).seconds * seconds, 1000.0 - case.run.ledger.total.seconds
    assert 0.8 * rest < left <= 0.9 * rest
    assert case.kept == [adapted] and adapted.stages[-1].steps > 1
    before, after = ([stage.cost.seconds for stage in made.stages] for made in (case.first, adapted))
    assert after[0] / after[1] == pytest.approx(before[0] / before[1], rel=0.5), "it still grows"


def test_the_change_is_told_and_logged(make_run, told):
    case = Case(make_run(seconds=1000.0), "30%", "70%", step=500, seconds=2.0)
    adapted = case.adapted()
    assert "Planned anew at step 500" in told[-1] and str(adapted.steps) in told[-1]
    (line,) = records.read_lines(case.run.folder / METRICS)
    assert (line["step"], line["pace"], line["planned_steps"]) == (500, 2.0, adapted.steps)
    assert line["planned_anew"] < 1


@pytest.mark.parametrize("seconds", [1.0, 1.0 + DRIFT / 2, 1.0 - DRIFT / 2])
def test_a_run_that_keeps_to_its_plan_is_let_be(make_run, seconds):
    case = Case(make_run(seconds=1000.0), "30%", "70%", step=100, seconds=seconds)
    assert case.adapted() is case.first and not case.kept


def test_a_faster_run_is_stretched_where_durations_are_shares(make_run):
    shares = Case(make_run(seconds=1000.0), "30%", "70%", step=500, seconds=0.5)
    assert shares.adapted().steps > 1.3 * shares.first.steps
    stated = Case(make_run(seconds=1000.0), "30%", "100k tokens", step=500, seconds=0.5)
    assert stated.adapted() is stated.first


def test_stated_tokens_are_shortened_rather_than_cut_off(make_run):
    case = Case(make_run(seconds=300.0), "100k tokens", "50k tokens", step=500, seconds=3.0)
    assert case.adapted().steps < case.first.steps


def test_what_is_counted_never_differs_however_slow_the_machine(make_run):
    case = Case(make_run(flops=1e10), "30%", "70%", step=500, seconds=10.0)
    assert case.adapted() is case.first


def test_a_changed_budget_is_looked_at_even_where_it_is_counted(make_run):
    case = Case(make_run(flops=1e10), "30%", "70%", step=100)
    case.run.ledger.cap = Cap(flops=2e10)
    assert case.adapted() is case.first
    more = case.adapted(changed=True)
    spent = case.run.ledger.total.flops
    assert more.left(100).flops == pytest.approx(0.9 * (2e10 - spent), rel=0.01)


def test_without_a_budget_there_is_nothing_to_keep_to(make_run):
    case = Case(make_run(), "100k tokens", "50k tokens", step=500, seconds=3.0)
    assert case.adapted(changed=True) is case.first


@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_the_end_is_shortened_but_not_stretched(make_run, seconds):
    """What is kept back isn't spent on the last steps, and the decay doesn't begin again."""
    first = Case(make_run(seconds=1000.0), "30%", "70%").first
    late = Case(make_run(seconds=1000.0), "30%", "70%", step=first.steps - 100)
    late.run.ledger.add(Entry("train", Cost(seconds=80.0)))  # so that not much is left
    late.pace.adapt(late.progress, seconds)
    assert (late.pace.plan.steps < first.steps) if seconds > 1 else (late.pace.plan is late.first)
    late.pace.adapt(Progress(step=late.pace.plan.steps, stage=1), seconds)


def test_it_looks_every_twentieth_of_the_way_and_at_the_end_of_a_stage(make_run):
    case = Case(make_run(seconds=1000.0), "30%", "70%")
    one, looks = case.first.stages[0], [0]
    while looks[-1] < one.last_step:
        looks.append(case.pace.next_look(Progress(step=looks[-1])))
    assert looks[-1] == one.last_step
    assert looks[1] * one.cost.flops / one.steps == pytest.approx(STRETCH * case.first.total.flops, rel=0.02)
    short = Case(make_run(seconds=6.0), "30%", "70%")
    assert short.pace.next_look(Progress()) == FEWEST < short.first.stages[0].last_step


def test_a_pace_is_that_of_nine_in_ten_steps_and_none_of_too_few(make_run):
    """One step compiles, or the machine sleeps; that time is gone, and the rest goes on as planned."""
    case = Case(make_run(seconds=1000.0), "30%", "70%", step=100)
    state = SimpleNamespace(progress=case.progress)
    for seconds in [50 * STEP] + [STEP] * (FEWEST - 1):
        case.pace.look(case.progress)
        case.pace(state, SimpleNamespace(seconds=seconds))
    case.pace.look(case.progress)
    assert not case.kept
    for _ in range(FEWEST):
        case.pace(state, SimpleNamespace(seconds=2 * STEP))
    case.pace.look(case.progress)
    (adapted,) = case.kept
    assert adapted.left(100).seconds == pytest.approx(case.first.left(100).seconds / 2, rel=0.02)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.floats(0.2, 8.0), st.integers(1, 9000), st.floats(0.0, 0.3))
def test_what_is_planned_anew_fits_what_is_left(tmp_path_factory, seconds, step, reserve):
    folder = tmp_path_factory.mktemp("pace") / "run"
    with Run.start(folder, Recipe(), cap=Cap(seconds=1000.0), tell=lambda line: None) as run:
        case = Case(run, "30%", "70%", step=step, seconds=seconds, reserve=reserve)
        adapted = case.adapted()
        rest = 1000.0 - run.ledger.total.seconds
        if adapted is not case.first and rest > 20:
            assert adapted.left(case.step).seconds * seconds + END.seconds <= rest + 2 * STEP * seconds
        assert Ledger(folder / "ledger.jsonl").total == run.ledger.total
