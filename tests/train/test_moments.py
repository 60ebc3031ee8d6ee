"""Moments: each is due when it should be, says what was, and what it costs is in the ledger."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from espalier import records
from espalier.errors import NumericsError
from espalier.ledger import Cost
from espalier.run import METRICS
from espalier.train.checkpoint import Progress
from espalier.train.loop import Meter, State, Step
from espalier.train.moments import Bar, Log, Save, Validate
from espalier.train.validate import HeldOut


def steps(count: int, stage: int = 0):
    """(state, step) after each of `count` updates of 64 tokens and 640 FLOPs in a second."""
    state = State(None, None, None, Progress(stage=stage))
    for number in range(1, count + 1):
        progress = state.progress
        state.progress = replace(progress, step=number, samples=4 * number, tokens=64 * number, flops=640.0 * number)
        yield state, Step(float(number), 2.0 * number, 0.1 * number, tokens=64, flops=640.0, seconds=1.0)


@pytest.fixture
def lines():
    return lambda run: list(records.read_lines(run.folder / METRICS))


@pytest.fixture
def run(make_run):
    return make_run(usd=2.0)


@pytest.fixture
def log():
    told = {"learning_rate": 0.5, "peak_flops": 6400.0, "samples_per_epoch": 16}
    return lambda run, every: Log(run, every=every, **told)


def test_a_line_has_the_means_since_the_last_under_the_field_s_keys(run, log, lines):
    logged = log(run, 2)
    run.charge("start")
    for state, step in steps(5):
        logged(state, step)
    first, second = lines(run)
    assert (first["step"], second["step"]) == (2, 4)
    assert (first["loss"], second["loss"]) == (1.5, 3.5)
    assert (second["grad_norm"], second["learning_rate"]) == (8.0, pytest.approx(0.2))
    assert (second["num_tokens"], second["total_flos"], second["epoch"]) == (256, 2560.0, 1.0)
    assert (second["tokens_per_sec"], second["step_time"], second["mfu"]) == (64.0, 1.0, 0.1)
    assert second["tflops"] == pytest.approx(640 / 1e12)
    assert (second["seconds"], second["cost_usd"]) == (run.ledger.total.seconds, run.ledger.total.usd)
    assert second["stage"] == 0


@pytest.mark.parametrize("cap, left", [({}, None), ({"usd": 2.0}, 0.75), ({"usd": 2.0, "tokens": 100}, 0.4)])
def test_what_is_left_is_that_of_the_tightest_cap(make_run, log, lines, cap, left):
    run = make_run(**cap)
    run.ledger.total = Cost(tokens=60, usd=0.5)
    for state, step in steps(1):
        log(run, 1)(state, step)
    assert lines(run)[0]["budget_left"] == (None if left is None else pytest.approx(left))


def test_held_out_loss_is_taken_when_due_logged_and_paid_for(run, lines):
    taken = []

    def held_out(state):
        taken.append(state.progress.step)
        return HeldOut(loss=2.5, bpb=1.25, tokens=100, stderr=0.1)

    validate = Validate(run, Meter(run, Cost()), held_out, every=3, flops_per_token=7.0)
    for state, step in steps(7, stage=1):
        validate(state, step)
    assert taken == [3, 6]
    assert [(line["step"], line["eval_loss"], line["eval_stderr"], line["val_bpb"]) for line in lines(run)] == [
        (3, 2.5, 0.1, 1.25),
        (6, 2.5, 0.1, 1.25),
    ]
    spent = run.ledger.spent(kind="evaluate", stage=1)
    assert (spent.flops, spent.tokens) == (1400.0, 0.0)


def test_a_held_out_loss_that_is_not_finite_is_refused(run, lines):
    validate = Validate(
        run, Meter(run, Cost()), lambda state: HeldOut(float("nan"), 1.0, 1, 0.0), every=1, flops_per_token=1.0
    )
    with pytest.raises(NumericsError, match="step 1: found held-out loss nan"):
        for state, step in steps(1):
            validate(state, step)
    assert lines(run) == []


def test_time_before_an_evaluation_is_charged_to_training(run):
    meter = Meter(run, Cost(), every_seconds=1e9)
    meter.count(State(None, None, None, Progress()), Step(1.0, 1.0, 1.0, tokens=64, flops=640.0, seconds=0.0))
    kinds_at_evaluation = []

    def held_out(state):
        kinds_at_evaluation.extend(entry.kind for entry in run.ledger.entries)
        return HeldOut(1.0, 1.0, 1, 0.0)

    Validate(run, meter, held_out, every=1, flops_per_token=1.0).now(State(None, None, None, Progress()))
    assert kinds_at_evaluation == ["train"]
    assert run.ledger.spent(kind="train").tokens == 64


def test_saving_is_done_when_due_and_paid_for(run):
    begun, polled = [], []

    class Noted:
        def begin(self, model, moments, progress, *, need_bytes):
            begun.append((progress.step, need_bytes))

        def poll(self):
            polled.append(1)

    save = Save(run, Meter(run, Cost()), Noted(), every=4, need_bytes=lambda state: state.progress.step * 10)
    for state, step in steps(9):
        state.optimizer = SimpleNamespace(state=dict)
        save(state, step)
    assert begun == [(4, 40), (8, 80)] and len(polled) == 7
    assert [entry.step for entry in run.ledger.entries if entry.kind == "checkpoint"] == [4, 8]


def plan_of(steps):
    """As much of a plan as a bar looks at, with two stages."""
    return SimpleNamespace(steps=steps, stages=(None, None))


@pytest.mark.parametrize("count", [1, 7, 10, 95])
def test_without_a_terminal_at_most_ten_lines_are_told(run, told, count):
    with Bar(run, lambda: plan_of(count), terminal=False) as bar:
        for state, step in steps(count):
            bar(state, step)
    assert len(told) == min(count, 10)
    assert told[-1].startswith(f"step {count}/{count} · stage 1/2 · loss {count}.000 · 64 tok/s · 0 s left")
    assert "100% of the budget left" not in told[-1], "without anything spent there is nothing to say"


def test_what_is_left_of_the_budget_is_told(make_run, told):
    run = make_run(usd=2.0)
    run.ledger.total = Cost(usd=0.5)
    with Bar(run, lambda: plan_of(1), terminal=False) as bar:
        for state, step in steps(1):
            bar(state, step)
    assert told == ["step 1/1 · stage 1/2 · loss 1.000 · 64 tok/s · 0 s left · $0.50 · 75% of the budget left"]


def test_on_a_terminal_the_bar_takes_the_place_of_the_lines(run, told, capsys):
    with Bar(run, lambda: plan_of(20), terminal=True) as bar:
        for state, step in steps(20):
            bar(state, step)
    assert told == []
