"""Numbers that go wrong: losses and gradients that aren't finite at fifty places, and spikes planted among losses."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from espalier import records
from espalier.data.pack import Shard, Tokens
from espalier.data.stream import Stream
from espalier.errors import NumericsError
from espalier.ledger import Cost
from espalier.model import build
from espalier.model.mup import Parametrization
from espalier.recipe import Recipe
from espalier.run import METRICS, Run
from espalier.spec import ModelSpec
from espalier.train.checkpoint import Progress
from espalier.train.device import Device
from espalier.train.guards import MOST_BROKEN, Guards
from espalier.train.loop import Meter, Objective, Segment, State, train
from espalier.train.objectives import NextToken
from espalier.train.optim import Optimizer
from espalier.train.recipe import OptimizerRecipe, TrainRecipe
from faults.sheet import Row
from faults.small import Setting, silent

PLACES, SEEDS, PLANTED, STEPS, NOISE = 50, 3, 20, 4000, 0.03
VALUES = (math.nan, math.inf, -math.inf)
SPEC = ModelSpec(vocab_size=300, hidden_size=32, head_dim=16, num_hidden_layers=2, max_position_embeddings=64)
MICRO_BATCHES = 2  # of an update


def numerics(setting: Setting) -> list[Row]:
    """What becomes of an update, of a run and of its verdicts."""
    return [not_finite(setting), in_a_row(setting), planted(setting)]


def not_finite(setting: Setting) -> Row:
    """One loss or gradient element at a time, by either optimizer: the update isn't made and the next one is."""
    dice, wrong = setting.dice("not finite"), []
    places = setting.some(range(PLACES))
    for number in places:
        case = Case(setting, f"place{number}", "muon" if number % 2 else "adamw")
        case.train(number % 3)
        before, at = case.weights(), case.state.progress
        element = None if number % 5 == 0 else dice.randrange(10_000)
        bad = spoiled([dice.randrange(MICRO_BATCHES)], dice.choice(VALUES), element)
        case.train(at.step + 1, bad)
        kept = same(case.weights(), before) and case.state.progress.samples == at.samples + case.rows
        case.train(at.step + 2, bad)
        goes_on = not same(case.weights(), before) and case.skipped() == [at.step + 1]
        if not (kept and goes_on):
            wrong.append(number)
    return Row(
        "G7",
        f"non-finite loss or gradient at {len(places)} places: micro-batch, parameter, element, step, optimizer",
        f"{len(wrong)} updates made of them or others lost",
        "0 non-finite updates, 1 NaN = 1 skip",
        not wrong,
        trials=len(places),
        of=PLACES,
    )


def in_a_row(setting: Setting) -> Row:
    """As many as are borne, and one more."""
    ends = []
    for count in (MOST_BROKEN - 1, MOST_BROKEN):
        case = Case(setting, f"row{count}", "muon")
        try:
            case.train(6, spoiled([MICRO_BATCHES * (1 + number) for number in range(count)], math.nan, None))
            ends.append("goes on")
        except NumericsError:
            ends.append("stops")
    return Row(
        "G7",
        f"non-finite updates in a row: {MOST_BROKEN - 1}, and {MOST_BROKEN}",
        ", ".join(ends),
        "goes on, stops",
        ends == ["goes on", "stops"],
        trials=len(ends),
        of=len(ends),
    )


def planted(setting: Setting) -> Row:
    """Spikes among losses that fall, wave and jump at a growth, the verdicts with a resume at every fiftieth update."""
    limit, found, false, changed = TrainRecipe().spike_sigmas, 0, 0, 0
    for seed in range(SEEDS):
        numbers = np.random.default_rng([setting.seed, seed])
        step = np.arange(STEPS)
        losses = 2 + 8 * (1 + step / 30) ** -0.5 + 0.05 * np.sin(step / 400) + NOISE * numbers.standard_normal(STEPS)
        losses += np.where(step >= STEPS // 2, 0.5, 0)
        spikes = {STEPS // PLANTED * n + 150 + int(numbers.integers(40)) for n in range(PLANTED)}
        losses[sorted(spikes)] += NOISE * numbers.uniform(12, 30, PLANTED)
        whole, resumed = (verdicts(losses.tolist(), limit, resumes) for resumes in (False, True))
        found, false = found + len(whole & spikes), false + len(whole - spikes)
        changed += len(whole ^ resumed)
    return Row(
        "G7",
        f"{PLANTED * SEEDS} spikes of 12 to 30 times the noise in {SEEDS * STEPS} losses: found, false, changed",
        f"{found} / {false} / {changed}",
        f"{PLANTED * SEEDS} / at most {SEEDS * STEPS // 10_000} / 0",
        found == PLANTED * SEEDS and false <= SEEDS * STEPS // 10_000 and not changed,
        "the losses are made up; those of real runs are in bench/2026-11-25-guards",
        trials=PLANTED * SEEDS,
        of=PLANTED * SEEDS,
    )


def verdicts(losses: Sequence[float], limit: float, resumes: bool) -> set[int]:
    """The updates that are spikes, the growth being in the middle."""
    state, found = Guards(), set()
    for step, loss in enumerate(losses):
        state = (state.anew() if step == STEPS // 2 else state).after(loss, finite=True, limit=limit)
        if resumes and step % 50 == 0:
            state = Guards.from_json(json.loads(json.dumps(vars(state))))
        if state.sigmas > limit:
            found.add(step)
    return found


class Case:
    """A tiny model in a run of its own."""

    rows = 4

    def __init__(self, setting: Setting, name: str, optimizer: str) -> None:
        folder = setting.folder(name)
        content = np.random.default_rng(0).integers(0, 300, 2000).astype("<u2").tobytes()
        (folder / "shard.bin").write_bytes(content)
        tokens = Tokens(folder, "<u2", 0, (Shard("shard.bin", 2000, 1, 2000, ""),), True)
        self.stream = Stream(tokens, sequence_length=16, seed=0, attend="row", eos_id=0)
        model, recipe = build.build(SPEC, Parametrization(), seed=0), OptimizerRecipe(name=optimizer)  # type: ignore[arg-type]
        self.state = State(SPEC, model, Optimizer(model, SPEC, recipe, Parametrization()), Progress())
        self.run = Run(folder, Recipe(), tell=silent)

    def train(self, until: int, objective: Objective | None = None) -> None:
        segment = Segment(until, self.rows, self.rows // MICRO_BATCHES, 1.0, lambda step: 1.0)
        train(self.state, self.stream, segment, objective or NextToken(), Device(), Meter(self.run, Cost()))

    def weights(self) -> dict[str, Tensor]:
        """A copy of all that an update changes."""
        moments = {
            f"{name} {key}": value for name, of in self.state.optimizer.state().items() for key, value in of.items()
        }
        return {name: value.clone() for name, value in (self.state.model.state_dict() | moments).items()}

    def skipped(self) -> list[int]:
        """The steps that the run's metrics call non-finite."""
        return [line["step"] for line in records.read_lines(self.run.folder / METRICS) if "nonfinite" in line]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def spoiled(calls: Sequence[int], value: float, element: int | None) -> Objective:
    """The objective, whose calls of these numbers give a loss of `value`; or a gradient with it in one element."""
    counted = itertools.count()

    def objective(model: build.PreTrainedModel, *batch: Tensor | None) -> Tensor:
        loss = NextToken()(model, *batch)  # type: ignore[arg-type]
        if next(counted) not in calls:
            return loss
        if element is None:
            return loss * value
        weights = list(model.parameters())
        weight = weights[element % len(weights)]
        hook = weight.register_hook(_spoil(element % weight.numel(), value, lambda: hook.remove()))
        return loss

    return objective


def _spoil(place: int, value: float, done: Callable[[], None]) -> Callable[[Tensor], Tensor]:
    def spoil(gradient: Tensor) -> Tensor:
        done()
        gradient = gradient.clone()
        gradient.view(-1)[place] = value
        return gradient

    return spoil
