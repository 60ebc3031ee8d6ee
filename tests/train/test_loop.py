"""The loop: accumulation changes nothing, bad numbers change nothing, and it stops in time with a usable state."""

import math
import random
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier import run as run_module
from espalier.data.stream import Batch
from espalier.ledger import Cap, Cost, Rates
from espalier.recipe import Recipe
from espalier.run import Run
from espalier.train import loop
from espalier.train.checkpoint import Progress
from espalier.train.loop import Meter, Segment, State, Step, backward, train, update
from espalier.train.objectives import NextToken

next_token = NextToken()


def gradients(state, batch, micro_rows, device) -> tuple[float, dict[str, torch.Tensor]]:
    state.model.zero_grad()
    loss = sum(backward(state.model, batch, micro_rows, next_token, device))
    return loss, {name: weight.grad.clone() for name, weight in state.model.named_parameters()}


@pytest.fixture
def uneven() -> Batch:
    """Five rows, of which some have hardly a label."""
    random = np.random.default_rng(1)
    ids = random.integers(0, 300, (5, 17))
    labels = ids[:, 1:].copy()
    labels[0, 1:], labels[3, :] = -100, -100
    return Batch(ids[:, :-1].copy(), labels, None)


@pytest.mark.parametrize("micro_rows", [1, 2, 3, 7])
def test_accumulated_gradients_are_those_of_one_large_batch(begin, uneven, device, micro_rows):
    state = begin()
    with torch.no_grad():
        state.model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    whole_loss, whole = gradients(state, uneven, 5, device)
    loss, accumulated = gradients(state, uneven, micro_rows, device)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    for name, expected in whole.items():
        torch.testing.assert_close(accumulated[name], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_the_loss_is_the_mean_over_the_labels(begin, uneven, device):
    model = begin().model
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    logits = model(torch.from_numpy(uneven.input_ids)).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(uneven.labels).flatten())
    assert sum(backward(model, uneven, 2, next_token, device)) == pytest.approx(expected.item(), rel=1e-5)


def test_an_update_counts_and_takes_the_next_samples(begin, stream, segment, device, monkeypatch):
    asked = []
    original = type(stream).batch
    monkeypatch.setattr(type(stream), "batch", lambda *args, **more: asked.append(args[1:]) or original(*args, **more))
    state = begin()
    state.progress = Progress(step=7, samples=28, tokens=100, flops=5.0, stage=1)
    step = update(state, stream, segment(9, factor=lambda step: step / 10), next_token, device)
    assert state.progress.counts == Progress(step=8, samples=32, tokens=164, flops=645.0, stage=1).counts
    assert (step.tokens, step.flops, step.factor) == (64, 640.0, 0.7)
    assert asked == [(28, 4)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_of_a_loss_that_is_not_finite_no_update_is_made_even_if_its_gradient_is(
    begin, stream, segment, device, weights, same, value
):
    state = begin()
    before = weights(state)
    step = update(state, stream, segment(1), lambda *inputs: next_token(*inputs) + value, device)
    assert math.isfinite(step.grad_norm) and not math.isfinite(step.loss)
    assert step.broken and state.progress.guards.broken == 1
    assert same(weights(state), before)


def test_training_learns_and_is_the_same_each_time(begin, stream, segment, device, meter, weights, same):
    losses = []
    states = [begin(), begin()]
    for state in states:
        watch = lambda state, step: losses.append(step.loss)  # noqa: E731
        assert train(state, stream, segment(25), next_token, device, meter, [watch]) == "done"
    assert same(weights(states[0]), weights(states[1]))
    assert losses[:25] == losses[25:]
    assert losses[24] < 0.7 * losses[0]


def test_training_draws_nothing_from_random_numbers_that_others_use(begin, stream, segment, device, meter):
    state = begin()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    train(state, stream, segment(3), next_token, device, meter)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_every_token_and_flop_is_in_the_ledger_once(begin, stream, segment, device, make_run):
    run = make_run()
    for every_seconds in (0.0, 1e9):
        state = begin()
        train(state, stream, segment(5), next_token, device, Meter(run, Cost(), every_seconds=every_seconds))
    spent = run.ledger.spent(kind="train", stage=0)
    assert (spent.tokens, spent.flops) == (2 * state.progress.tokens, 2 * state.progress.flops)
    assert len(run.ledger.entries) == 5 + 1 + 1


def test_a_signal_that_comes_while_ranks_agree_is_heard_at_the_next_step(make_run):
    run = make_run()
    meter = Meter(run, Cost())
    agreed = run.world.largest

    def interrupted(*numbers: int) -> list[int]:
        run.stop_signal = signal.SIGTERM
        return agreed(*numbers)

    run.world = SimpleNamespace(largest=interrupted)
    assert meter.ended() is None
    assert meter.ended() == "signal" and run.stop_signal == signal.SIGTERM


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_a_budget_of_so_many_steps_gives_so_many(begin, stream, segment, device, make_run, weights, same, steps):
    enough, capped = begin(), begin()
    train(enough, stream, segment(steps), next_token, device, Meter(make_run(), Cost()))
    meter = Meter(make_run(tokens=64 * steps + 63), Cost())
    meter.expect(Cost(tokens=64))
    assert train(capped, stream, segment(9), next_token, device, meter) == "budget"
    assert capped.progress.step == steps
    assert same(weights(capped), weights(enough))


amounts = st.floats(0.5, 40)


@settings(deadline=None, max_examples=40)
@given(
    caps=st.fixed_dictionaries({}, optional=dict.fromkeys(("tokens", "flops", "seconds", "usd", "kwh"), amounts)),
    rates=st.builds(Rates, usd_per_hour=st.floats(0, 7200), watts=st.floats(0, 7.2e6)),
    seconds=st.lists(st.floats(0.01, 3), min_size=1, max_size=30),
    reserve=st.builds(Cost, flops=st.floats(0, 5), seconds=st.floats(0, 5)),
    expected=st.floats(0.01, 3),
)
def test_a_cap_is_never_passed_by_more_than_one_step_took_unforeseen(caps, rates, seconds, reserve, expected):
    """Fake steps of one token and one FLOP, on a clock of their own."""
    clock = SimpleNamespace(now=0.0)
    durations = iter(seconds)

    def fake_update(state, *_):
        took = next(durations)
        clock.now += took
        state.progress = replace(state.progress, step=state.progress.step + 1)
        return Step(1.0, 1.0, 1.0, tokens=1, flops=1.0, seconds=took)

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(run_module, "time", SimpleNamespace(time=lambda: clock.now, monotonic=lambda: clock.now))
        patch.setattr(loop, "update", fake_update)
        run = Run(Path(folder), Recipe(), cap=Cap(**caps), tell=print)
        run.price(rates)
        meter = Meter(run, reserve)
        meter.expect(rates.cost(expected, tokens=1, flops=1))
        state = State(None, None, None, Progress())
        ending = train(state, None, Segment(len(seconds), 1, 1, 1.0, lambda step: 1.0), None, None, meter)
    dearest = [sorted([expected, expected, *seconds[:step]][-loop.LATEST :])[-2] for step in range(len(seconds))]
    surprise = max([0.0, *(seconds[step] - dearest[step] for step in range(state.progress.step))])
    over = rates.cost(surprise)
    total = run.ledger.total
    for name, cap in caps.items():
        assert getattr(total + reserve, name) <= cap + getattr(over, name) + 1e-9 or state.progress.step == 0
    if ending == "done":
        assert state.progress.step == len(seconds)
    else:
        next_one = rates.cost(dearest[state.progress.step], tokens=1, flops=1)
        assert run.ledger.cap.exceeded_by(total + next_one + reserve)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_honoured_after_the_step(begin, stream, segment, device, make_run, told, number):
    run, state = make_run(), begin()
    before = signal.getsignal(number)

    def interrupt(state, step):
        if state.progress.step == 3:
            signal.raise_signal(number)

    with run.signals():
        assert train(state, stream, segment(9), next_token, device, Meter(run, Cost()), [interrupt]) == "signal"
        assert state.progress.step == 3
        assert run.stop_signal == number
        assert signal.Signals(number).name in told[-1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before
