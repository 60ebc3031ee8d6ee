"""Guards: numbers that aren't finite change nothing; spikes are found, nothing else is, and the same after a resume."""

import errno
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.train.conftest import MUP

from espalier import files, records
from espalier.errors import NumericsError
from espalier.ledger import Cost
from espalier.model.build import build
from espalier.recipe import Recipe
from espalier.run import METRICS, Run
from espalier.train import guards
from espalier.train.checkpoint import Progress, Saver, load, newest, pass_over
from espalier.train.device import Device
from espalier.train.guards import Guards
from espalier.train.loop import Meter, State, train
from espalier.train.moments import Log
from espalier.train.objectives import NextToken
from espalier.train.optim import Optimizer
from espalier.train.parallel import Parallel, whole
from espalier.train.recipe import OptimizerRecipe, ParallelRecipe

LIMIT = 7.0
SEEDS = (0, 1, 2)
NEW = Guards()
VALUES = (math.nan, math.inf, -math.inf)
next_token = NextToken()


def spoiled(*at_calls: int, value: float = math.nan, place: int | None = None):
    """The objective, which at these micro-batches gives a loss of `value`, or with `place` a gradient that has it in an
    element of that parameter, counted round.
    """
    calls = iter(range(10_000))

    def objective(model, *inputs):
        loss = next_token(model, *inputs)
        if next(calls) not in at_calls:
            return loss
        if place is None:
            return loss * value
        weights = list(model.parameters())
        weight = weights[place % len(weights)]

        def spoil(gradient):
            hook.remove()
            gradient = gradient.clone()
            gradient.view(-1)[place % weight.numel()] = value
            return gradient

        hook = weight.register_hook(spoil)
        return loss

    return objective


def test_at_fifty_places_no_update_is_made_and_the_next_batch_is_taken(
    begin, stream, segment, device, make_run, weights, same, optimizer_recipe
):
    chosen = random.Random(0)
    for number in range(25):  # with each of two optimizers
        place = None if number < 6 else chosen.randrange(10_000)
        state, run = begin(optimizer_recipe), make_run()
        meter = Meter(run, Cost())
        train(state, stream, segment(number % 3), next_token, device, meter)
        before, progress = weights(state), state.progress
        objective = spoiled(number % 2, value=VALUES[number % 3], place=place)  # an update is two micro-batches
        train(state, stream, segment(progress.step + 1), objective, device, meter)
        assert same(weights(state), before)
        counts = {"step": progress.step + 1, "samples": progress.samples + 4, "tokens": progress.tokens + 64}
        assert state.progress.counts == progress.counts | counts | {"flops": progress.flops + 640}
        assert state.progress.guards == replace(progress.guards, broken=1)
        assert [line["step"] for line in records.read_lines(run.folder / METRICS) if "nonfinite" in line] == [
            progress.step + 1
        ]
        train(state, stream, segment(progress.step + 2), objective, device, meter)
        assert not same(weights(state), before) and state.progress.guards.broken == 0
        assert all(value.isfinite().all() for value in weights(state).values())
        assert run.ledger.total.tokens == state.progress.tokens


def test_training_around_a_broken_update_is_training_without_its_batch(
    begin, stream, segment, device, meter, weights, same
):
    guarded, state = begin(), begin()
    train(guarded, stream, segment(3), spoiled(3), device, meter)
    train(state, stream, segment(1), next_token, device, meter)
    state.progress = replace(state.progress, step=2, samples=8)
    train(state, stream, segment(3), next_token, device, meter)
    assert same(weights(guarded), weights(state))


@pytest.mark.parametrize("updates, stops", [((0, 1), False), ((0, 1, 3, 4), False), ((1, 2, 3), True)])
def test_the_third_in_a_row_stops_the_run(begin, stream, segment, device, make_run, weights, same, updates, stops):
    run, state = make_run(), begin()
    objective = spoiled(*(2 * update for update in updates))
    log = Log(run, every=1, learning_rate=1.0, peak_flops=1.0, samples_per_epoch=62)
    if stops:
        with pytest.raises(NumericsError, match=r"step 4, .*3 times in a row.*nonfinite/step-4") as refusal:
            train(state, stream, segment(6), objective, device, Meter(run, Cost()), [log])
        assert refusal.value.exit_code == 7
        assert state.progress.step == 4
    else:
        assert train(state, stream, segment(6), objective, device, Meter(run, Cost()), [log]) == "done"
    assert run.ledger.total.tokens == state.progress.tokens
    lines = list(records.read_lines(run.folder / METRICS))
    assert [line["step"] - 1 for line in lines if "nonfinite" in line] == list(updates)
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_a_bundle_says_what_was_not_finite(begin, stream, segment, device, make_run, told):
    run, state = make_run(), begin()
    log = spoiled(1, value=math.inf)
    train(state, stream, segment(1), log, device, Meter(run, Cost()))
    bundle = run.folder / guards.BUNDLES / "step-1"
    assert files.damage(bundle) is None
    known, rows = json.loads((bundle / "bundle.json").read_text()), stream.order(0, 4)
    assert known["rows"] == rows.tolist()
    assert math.isfinite(known["losses"][0]) and known["losses"][1] == "inf"
    assert set(known["norms"]) == {name for name, _ in state.model.named_parameters()}
    assert known["progress"] == state.progress.counts
    batch = load_file(bundle / "batch.safetensors")
    assert np.array_equal(batch["input_ids"], stream.take(rows).input_ids)
    suspects = ", ".join(map(str, rows[2:]))
    assert (
        told[-1]
        == f"Non-finite loss at step 1, rows {suspects} of the training split; no update made; bundle at {bundle}"
    )


def test_a_gradient_alone_is_told_with_the_parameter_that_it_is_of(begin, stream, segment, device, make_run, told):
    run, state = make_run(), begin()
    names = [name for name, _ in state.model.named_parameters()]
    train(state, stream, segment(1), spoiled(0, place=2), device, Meter(run, Cost()))
    known = json.loads((run.folder / guards.BUNDLES / "step-1" / "bundle.json").read_text())
    assert [name for name, norm in known["norms"].items() if norm == "nan"] == [names[2]]
    assert "Non-finite gradient at step 1" in told[-1]


@pytest.mark.parametrize("bad", VALUES)
def test_a_held_out_loss_that_is_not_finite_is_refused_by_its_step(bad):
    guards.require_finite(2.5, 70)
    with pytest.raises(NumericsError, match=f"step 70: found held-out loss {bad}"):
        guards.require_finite(bad, 70)


def test_few_bundles_are_kept(begin, stream, segment, device, make_run):
    run, state = make_run(), begin()
    (run.folder / guards.BUNDLES / ".partial-step-5-1").mkdir(parents=True)  # a kill left it
    train(state, stream, segment(12), spoiled(0, 4, 8, 12, 20), device, Meter(run, Cost()))
    kept = sorted(int(path.name.removeprefix("step-")) for path in (run.folder / guards.BUNDLES).iterdir())
    assert kept == [5, 7, 11]


def test_a_run_that_went_back_keeps_the_bundles_from_before_and_those_from_after(
    begin, stream, segment, device, make_run, told
):
    """Steps 8 to 12 before it went back to 4, and 5 to 9 afterwards."""
    run, state = make_run(), begin()
    train(state, stream, segment(7), next_token, device, Meter(run, Cost()))
    for rewinds, step in ((0, 7), (1, 4), (2, 4)):
        guarded = Guards(rewinds=rewinds)
        state.progress = replace(state.progress, step=step, samples=4 * step + rewinds, guards=guarded)
        train(state, stream, segment(step + 5), spoiled(0, 4, 8), device, Meter(run, Cost()))
        bundles = {path.name: json.loads((path / "bundle.json").read_text()) for path in bundles_of(run)}
        branch = f"-rewind-{rewinds}" if rewinds else ""
        assert set(bundles) == {f"step-{step + more}{branch}" for more in (1, 3, 5)}
        assert [bundle["progress"]["samples"] % 4 for bundle in bundles.values()] == [rewinds] * 3
        assert all(any(f"bundle at {path}" in line for line in told) for path in bundles_of(run))


def test_what_was_just_told_of_is_kept_whatever_its_number(begin, stream, segment, device, make_run):
    run, state = make_run(), begin()
    for step in (20, 22, 24, 5):
        state.progress = replace(state.progress, step=step, guards=Guards())
        train(state, stream, segment(step + 1), spoiled(0), device, Meter(run, Cost()))
    assert {path.name for path in bundles_of(run)} == {"step-6", "step-23", "step-25"}


def bundles_of(run: Run) -> list[Path]:
    return list((run.folder / guards.BUNDLES).iterdir())


def losses_of(seed: int, steps: int, *, growth: int | None = None, tails: int | None = None) -> np.ndarray:
    """A loss that falls by a power law and waves, jumps up at a growth, and decays over the last 40%.

    tails  degrees of freedom of its noise by Student's t; normal if not stated. Its scale is 0.03 nats.
    """
    generator, step = np.random.default_rng(seed), np.arange(steps)
    mean = 2 + 8 * (1 + step / 30) ** -0.5 + 0.05 * np.sin(step / 400)
    mean -= 0.25 * np.clip((step / steps - 0.6) / 0.4, 0, 1)
    if growth is not None:
        mean += np.where(step >= growth, 0.5 * np.exp(-(step - growth) / 200), 0)
    noise = generator.standard_t(tails, steps) if tails else generator.standard_normal(steps)
    return mean + 0.03 * noise


def spikes(losses: np.ndarray, state: Guards = NEW, growth: int | None = None) -> tuple[list[int], Guards]:
    """The steps that are spikes, and what is remembered at the end."""
    found = []
    for step, loss in enumerate(losses.tolist()):
        state = (state.anew() if step == growth else state).after(loss, finite=True, limit=LIMIT)
        if state.sigmas > LIMIT:
            found.append(step)
    return found, state


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tails", [None, 12])
def test_a_healthy_run_has_no_spikes(seed, tails):
    losses = losses_of(seed, 10_000, growth=5000, tails=tails)
    assert len(spikes(losses, growth=5000)[0]) <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_planted_spikes_are_found_and_nothing_else_is(seed):
    losses = losses_of(seed, 4000, growth=2000)
    generator = np.random.default_rng(seed)
    planted = [150 + 190 * number + int(generator.integers(90)) for number in range(20)]
    losses[planted] += generator.uniform(0.5, 3, 20)
    assert spikes(losses, growth=2000)[0] == planted


def test_without_a_new_window_a_growth_would_be_a_spike():
    losses = losses_of(0, 3000, growth=2000)
    assert spikes(losses)[0] == [2000] and spikes(losses, growth=2000)[0] == []


@pytest.mark.parametrize("slope", [-0.1, 0.1])
@pytest.mark.parametrize("noise", [0.0, 0.01, 1.0])
def test_a_steady_slope_is_no_spike(slope, noise):
    losses = 30 + slope * np.arange(200) + noise * np.random.default_rng(0).standard_normal(200)
    assert spikes(losses)[0] == []


@pytest.mark.parametrize("level", [0.0, 1e-9, 3.0])
def test_losses_that_hardly_differ_are_no_spikes(level):
    assert spikes(np.array([level] * 100 + [level * 1.01]))[0] == []


@given(at=st.integers(0, 400))
def test_after_a_resume_the_verdicts_are_the_same(at):
    losses = losses_of(1, 400)
    losses[[100, 260, 399]] += 3
    found, end = spikes(losses)
    first, state = spikes(losses[:at])
    state = Guards.from_json(json.loads(json.dumps(vars(state))))
    second, resumed = spikes(losses[at:], state)
    assert first + [at + step for step in second] == found == [100, 260, 399]
    assert resumed == end


@pytest.mark.parametrize("bad", VALUES)
def test_a_loss_that_is_not_finite_does_not_enter_the_window(bad):
    state = spikes(losses_of(0, 60))[1]
    broken = state.after(bad, finite=False, limit=LIMIT)
    assert broken == replace(state, broken=1, sigmas=0.0)


ranges = st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda pair: (pair[0], sum(pair)))


@given(skipped=st.lists(ranges, max_size=4), start=st.integers(0, 60), count=st.integers(1, 12))
def test_the_next_samples_are_the_first_of_which_none_is_passed_over(skipped, start, count):
    state = replace(Guards(), skipped=tuple(sorted(set(skipped))))
    over = {sample for begin, end in skipped for sample in range(begin, end)}
    found = state.next_samples(start, count)
    whole = [begin for begin in range(start, 200) if not over.intersection(range(begin, begin + count))]
    assert found == whole[0]


@pytest.fixture
def resume(begin, device):
    """The state that a checkpoint holds, as a new process takes it up."""

    def resume(path) -> State:
        blank = begin()
        model, moments, progress = load(path, device)
        optimizer = Optimizer(model, blank.spec, blank.optimizer.recipe, MUP)
        optimizer.load_state(moments)
        return State(blank.spec, model, optimizer, progress)

    return resume


@pytest.fixture
def keep(tmp_path):
    """Save a state below tmp_path."""

    def keep(state: State) -> Path:
        saver = Saver(tmp_path, tokenizer=None, keep=2)
        saver.begin(state.model, state.optimizer.state(), state.progress, need_bytes=0)
        saver.finish()
        return tmp_path / f"checkpoint-{state.progress.step}"

    return keep


def test_a_loop_ends_at_a_spike_and_goes_on_from_there(begin, stream, segment, device, meter):
    calls = iter(range(10_000))
    objective = lambda *inputs: next_token(*inputs) * (10 if next(calls) == 2 * 40 else 1)  # noqa: E731
    state, told, seen = begin(), segment(60, spike_sigmas=LIMIT), []
    watched = [lambda state, step: seen.append(state.progress.step)]
    ends = {"moments": watched, "ends_at": lambda state: state.progress.step == 41}
    assert train(state, stream, told, objective, device, meter, **ends) == "spike"
    assert (state.progress.step, state.progress.guards.losses) == (41, ())
    assert seen == list(range(1, 41)), "what ends at a spike isn't logged, evaluated or saved"
    assert train(state, stream, told, objective, device, meter, **ends) == "done"


def test_a_loop_goes_on_at_a_spike_that_nobody_ends_at(begin, stream, segment, device, meter):
    calls, asked = iter(range(10_000)), []
    objective = lambda *inputs: next_token(*inputs) * (10 if next(calls) == 2 * 40 else 1)  # noqa: E731
    ends_at = lambda state: asked.append(state.progress.step)  # noqa: E731
    state = begin()
    assert train(state, stream, segment(60, spike_sigmas=LIMIT), objective, device, meter, ends_at=ends_at) == "done"
    assert (state.progress.step, asked) == (60, [41])


@pytest.mark.parametrize("at", [5, 7, 9])
def test_a_resume_inside_what_is_passed_over_goes_on_with_the_same_samples(
    begin, resume, keep, stream, segment, device, meter, weights, same, monkeypatch, tmp_path, at
):
    asked = []
    original = type(stream).batch
    monkeypatch.setattr(type(stream), "batch", lambda *args, **more: asked.append(args[1:]) or original(*args, **more))
    state = begin()
    train(state, stream, segment(4), next_token, device, meter)
    pass_over(keep(state), state.progress.guards, 22, 33)
    whole = resume(newest(tmp_path, print))
    asked.clear()
    train(whole, stream, segment(12), next_token, device, meter)
    assert asked == [(16, 4), *((start, 4) for start in range(33, 33 + 28, 4))]
    broken_off = resume(newest(tmp_path, print))
    train(broken_off, stream, segment(at), next_token, device, meter)
    resumed = resume(keep(broken_off))
    train(resumed, stream, segment(12), next_token, device, meter)
    assert same(weights(resumed), weights(whole)) and resumed.progress == whole.progress


def test_passing_over_keeps_the_state_and_deletes_what_came_later(begin, keep, resume, tmp_path, weights, same):
    state = begin()
    paths = []
    for step in (3, 6):
        state.progress = Progress(step=step, samples=4 * step, guards=Guards(losses=(float(step),)))
        paths.append(keep(state))
    later = Guards(losses=(9.0,), rewinds=1, skipped=((40, 50),))
    assert newest(tmp_path, print, until=5) == paths[0]
    progress = pass_over(paths[0], later, 20, 24)
    assert newest(tmp_path, print) == paths[0] and not paths[1].exists()
    assert progress.guards == Guards(losses=(3.0,), rewinds=2, skipped=((20, 24), (40, 50)))
    again = resume(paths[0])
    assert again.progress == progress and same(weights(again), weights(state))


@pytest.mark.parametrize("links", [True, False])
def test_what_passing_over_does_not_change_is_not_written_again(begin, keep, monkeypatch, tmp_path, links):
    def refused(*_):
        raise PermissionError(errno.EPERM, "a disk without links")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refused)
    state = begin()
    state.optimizer.load_state({name: {"momentum": torch.ones(2)} for name in state.optimizer.names.values()})
    path = keep(state)
    before = {file: (file.read_bytes(), file.stat().st_ino) for file in path.rglob("*") if file.is_file()}
    read, sha256 = [], files.sha256
    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256", lambda file: read.append(file.name) or sha256(file))
        pass_over(path, state.progress.guards, 20, 24)
    assert read == ["progress.json"]
    assert files.damage(path) is None and list(tmp_path.glob("*checkpoint*")) == [path]
    changed = {path / files.MANIFEST, path / "trainer/progress.json"}
    assert {file for file in path.rglob("*") if file.is_file()} == set(before)
    for file, (content, number) in before.items():
        assert (file.read_bytes() == content) == (file not in changed)
        assert (file.stat().st_ino == number) == (links and file not in changed)
        assert file.stat().st_nlink == 1


def test_a_kill_at_any_file_call_of_a_rewind_leaves_what_can_be_taken_up(begin, keep, tmp_path):
    state = begin()
    for step in (3, 6):
        state.progress = Progress(step=step, samples=4 * step)
        keep(state)
    original = shutil.copytree(tmp_path, tmp_path.with_name("original"))
    reached, calls = set(), 0
    while killed(calls, lambda: pass_over(tmp_path / "checkpoint-3", Guards(), 20, 24)):
        files.remove_partials(tmp_path)
        path = newest(tmp_path, print)
        progress = json.loads((path / "trainer/progress.json").read_text())
        reached.add((path.name, progress["guards"]["rewinds"]))
        assert files.damage(tmp_path / "checkpoint-3") is None and not list(tmp_path.glob(".*checkpoint*"))
        shutil.rmtree(tmp_path)
        shutil.copytree(original, tmp_path)
        calls += 1
    assert calls > 20 and reached == {("checkpoint-6", 0), ("checkpoint-3", 1)}


def killed(after: int, work: Callable[[], object]) -> bool:
    """Whether a process was killed that did `work` and had made so many calls that change a folder."""
    names = ("link", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
    pid = os.fork()
    if not pid:
        left = iter(range(after))

        def counted(call, *arguments, **more):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **more)

        for name in names:
            setattr(os, name, partial(counted, getattr(os, name)))
        work()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("size", [2, 4])
def test_what_one_rank_finds_no_rank_updates_by_and_it_is_named(ranks, spec, stream, segment, tmp_path, size):
    def work(world):
        parallel, device = Parallel.over(world, ParallelRecipe(), "cpu"), Device()
        model = build(spec, MUP, seed=0)
        device.place(model, parallel)
        state = State(spec, model, Optimizer(model, spec, OptimizerRecipe(), MUP, parallel), Progress())
        run = Run.start(tmp_path / f"run{size}", Recipe(), tell=print, world=world)
        bad = world.rank == 1
        objective = spoiled(*([1] if bad else []))
        told = {"rows": 8, "micro_rows": 1}
        arguments = (objective, device, Meter(run, Cost()), (), parallel)
        train(state, stream, segment(1, **told), *arguments)  # the second micro-batch is spoiled, if there is one
        first = [float(whole(weight.detach()).double().sum()) for weight in model.parameters()]
        train(state, stream, segment(2, **told), *arguments)
        second = [float(whole(weight.detach()).double().sum()) for weight in model.parameters()]
        return [state.progress.step, state.progress.guards.broken, first, second]

    answers = ranks(size, work)
    assert all(answer == answers[0] for answer in answers)
    bundle = tmp_path / f"run{size}" / guards.BUNDLES / "step-1"
    known = json.loads((bundle / "bundle.json").read_text())
    culprits = [number for number, loss in enumerate(known["losses"]) if loss == "nan"]
    assert culprits == [size + 1], "dealt out in turn"
    rows = stream.order(0, 8)
    (line,) = (line for line in records.read_lines(tmp_path / f"run{size}" / METRICS) if "nonfinite" in line)
    assert line["where"] == f"rank 1, row {rows[size + 1]} of the training split"
    new = build(spec, MUP, seed=0)
    assert answers[0][2] == [float(weight.detach().double().sum()) for weight in new.parameters()]
    assert answers[0][3] != answers[0][2] and answers[0][1] == 0
