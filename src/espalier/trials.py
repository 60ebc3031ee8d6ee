"""Trials: several ways to the same model, each an `espalier run` of its own, and what they came to.

A trial that is finished is only read, so a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Literal

from espalier import errors, files, records, units
from espalier.budget.plan import Duration
from espalier.errors import NumericsError, RecipeError
from espalier.grow.progressive import StageRecipe
from espalier.ledger import Cap, Cost, Ledger
from espalier.page import Point
from espalier.pipeline import PretrainRecipe, pretrain
from espalier.planner import PlannedRecipe
from espalier.report import Report
from espalier.run import LEDGER, METRICS, RESULTS, Run

# What counts as a trial's time: its updates, and its growths.
TIMED = ("train", "grow")
TRIALS = "trials"
DIVERGED = "diverged.json"
# Held-out text of every run where none is stated, or their losses would differ by the text.
EVAL_TOKENS = 2**18
PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class Way:
    """A way to a model: its stages, whose durations are shares of `flops`."""

    name: str
    kind: Literal["baseline", "arm"]
    stages: tuple[StageRecipe, ...]
    flops: float

    def trial(self, told: PlannedRecipe, *, rate: float, seed: int) -> Trial:
        """This way at one peak learning rate and seed; the rate of vectors keeps its ratio to that of matrices."""
        shares = [Duration.parse(stage.duration).amount for stage in self.stages]
        stages = [
            stage.model_copy(update={"duration": f"{share * self.flops:.9e} flops"})
            for stage, share in zip(self.stages, shares, strict=True)
        ]
        ratio = told.optimizer.vector_learning_rate / told.optimizer.learning_rate
        optimizer = told.optimizer.model_copy(update={"learning_rate": rate, "vector_learning_rate": rate * ratio})
        values = told.model_dump() | {
            "name": re.sub("[^A-Za-z0-9._]+", "-", f"{self.name} rate{rate:g} seed{seed}"),
            "seed": seed,
            "stages": [stage.model_dump() for stage in stages],
            "optimizer": optimizer.model_dump(),
            "samples": {"prompts": ("\n",), "max_new_tokens": 1},
        }
        return Trial(rate, seed, PretrainRecipe.model_validate(values))


@dataclass(frozen=True)
class Trial:
    """One run of a way."""

    rate: float
    seed: int
    recipe: PretrainRecipe


@dataclass(frozen=True)
class Figures:
    """What a finished trial came to.

    loss             final, held out, nats a token
    flops, seconds   of training and growing
    points           held-out losses in the order of the steps; after a growth those before it and after it
    jumps            by how much each growth raised the loss
    """

    loss: float
    flops: float
    seconds: float
    points: list[Point]
    jumps: list[float]

    @classmethod
    def read(cls, folder: Path) -> Figures:
        """Of a finished run's folder."""
        results = Report.load(folder / RESULTS)
        times = list(_times(Ledger(folder / LEDGER)))
        lines = list(records.read_lines(folder / METRICS))
        # A run that was taken up again at a growth has evaluated there twice.
        evaluated = {(line["step"], line["stage"]): line for line in lines if "eval_loss" in line}
        points = [
            Point(
                tokens=line["num_tokens"],
                flops=line["total_flos"],
                usd=line["cost_usd"],
                seconds=max((seconds for step, seconds in times if step <= line["step"]), default=0.0),
                step=line["step"],
                loss=line["eval_loss"],
            )
            for line in evaluated.values()
        ]
        jumps = [line["loss_after"] - line["loss_before"] for line in lines if "growth" in line]
        last = points[-1]
        return cls(results.value("held-out", "loss"), last.flops, last.seconds, points, jumps)

    def loss_at(self, flops: float) -> float | None:
        """The loss when so many FLOPs were spent, between points along a line; None outside them."""
        for one, other in pairwise(self.points):
            if one.flops <= flops <= other.flops and one.flops < other.flops:
                return one.loss + (other.loss - one.loss) * (flops - one.flops) / (other.flops - one.flops)
        return None

    def reached(self, loss: float) -> tuple[float, float] | None:
        """(FLOPs, seconds) at which the loss was first as low, between points along a line; None if it never was."""
        first = next((number for number, point in enumerate(self.points) if point.loss <= loss), None)
        if first is None:
            return None
        one, other = self.points[max(first - 1, 0)], self.points[first]
        part = (one.loss - loss) / (one.loss - other.loss) if first else 1.0
        between = lambda start, end: start + part * (end - start)  # noqa: E731
        return between(one.flops, other.flops), between(one.seconds, other.seconds)


def _times(ledger: Ledger) -> Iterator[tuple[int, float]]:
    """(step, seconds of training and growing until then) in order."""
    seconds = 0.0
    for entry in ledger.entries:
        if entry.kind in TIMED:
            seconds += entry.cost.seconds
            yield entry.step or 0, seconds


def require_shares(told: PlannedRecipe) -> None:
    """Refuse stages whose durations aren't shares of the whole, and a budget: each way has its own FLOPs."""
    stages = told.stages
    durations = [Duration.parse(stage.duration) for stage in stages]
    total = sum(duration.amount for duration in durations)
    if any(duration.unit != "share" for duration in durations) or abs(total - 1) > 1e-6:
        raise RecipeError(
            "run.stages: duration",
            found=", ".join(stage.duration for stage in stages),
            expected="shares that add up to 100%: each way has its own FLOPs",
            mend="Write 25% and the like.",
        )
    if told.budget.cap() != Cap():
        raise RecipeError(
            "run.budget",
            found="a cap",
            expected="none: each way has its own FLOPs",
            mend="Leave it out; `flops` says how much each may train.",
        )


def carry_out(
    trials: Sequence[Trial], run: Run, *, workers: int, tell: Callable[[str], None], first: int = 0
) -> list[Figures | None]:
    """Run the trials in the run's folder, `workers` at a time; their figures, None for one whose numbers diverged.

    Each is entered in the run's ledger once, as the stage of its number, counted from `first` on.
    Raises KeyboardInterrupt when a signal ended one: each has saved what it did, and the next call goes on.
    """
    _require_distinct(trials)
    for trial in trials:
        trial.recipe.specs()  # what can't be built is refused before anything is trained
    folder = run.folder / TRIALS
    figures: list[Figures | None] = []
    arguments = [(trial.recipe.model_dump(mode="json"), str(folder)) for trial in trials]
    with _Workers(min(workers, len(trials))) as each:
        for trial, code in zip(trials, each(_carry_out, arguments), strict=True):
            if code not in (0, NumericsError.exit_code):
                raise KeyboardInterrupt
            found = Figures.read(folder / trial.recipe.name) if code == 0 else None
            _charge(run, trial, first + len(figures))
            figures.append(found)
            ended = f"loss {found.loss:.4f}, {units.duration(found.seconds)}" if found else "its numbers diverged"
            tell(f"{len(figures)} of {len(trials)}  {trial.recipe.name}: {ended}")
    return figures


def _charge(run: Run, trial: Trial, number: int) -> None:
    """Enter what a trial trained, whether it diverged or not, unless it was entered before the run was stopped."""
    if run.ledger.spent(kind="train", stage=number) == Cost():
        spent = Ledger(run.folder / TRIALS / trial.recipe.name / LEDGER).spent(kind="train")
        run.charge("train", tokens=spent.tokens, flops=spent.flops, stage=number)


def _require_distinct(trials: Sequence[Trial]) -> None:
    """Refuse two trials that would share a folder."""
    names = Counter(trial.recipe.name for trial in trials)
    if twice := [name for name, times in names.items() if times > 1]:
        raise RecipeError(
            "arms, rates or seeds",
            found=f"two that both mean {twice[0]}",
            expected="each once, and names that differ in letters or digits",
            mend="Leave one out, or rename it.",
        )


class _Workers:
    """This process, or several others, to call a function over a list of arguments.

    Where something ends it early, what was begun in other processes saves and ends, and nothing more is begun.
    """

    def __init__(self, count: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.stop = spawn.Event()
        self.pool = ProcessPoolExecutor(count, spawn, _begin_worker, (self.stop,)) if count > 1 else None

    def __enter__(self) -> Callable[[Callable[..., int], Sequence[tuple]], Iterator[int]]:
        return lambda function, arguments: (self.pool.map if self.pool else map)(function, arguments)

    def __exit__(self, kind: type | None, *error: object) -> None:
        if self.pool:
            if kind:
                self.stop.set()
            self.pool.shutdown(cancel_futures=True)


_stop: Event | None = None


def _begin_worker(stop: Event) -> None:
    """In a worker: begin nothing once `stop` is set, and end, as at any SIGTERM, when the process that asks dies."""
    global _stop
    _stop = stop
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _carry_out(argument: tuple[dict, str]) -> int:
    """Run one trial, in a process that may have run others; its exit code."""
    import torch

    if _stop and _stop.is_set():
        return errors.EXIT_INTERRUPTED
    values, folder = argument
    recipe = PretrainRecipe.model_validate(values)
    torch._dynamo.reset()  # graphs of the trial before would count towards the limit
    with Run.start(Path(folder) / recipe.name, recipe, cap=recipe.budget.cap(), tell=lambda line: None) as run:
        if run.state["status"] == "finished":
            return 0
        if (run.folder / DIVERGED).exists():
            return NumericsError.exit_code
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                code = pretrain(recipe, run)
        except NumericsError as error:
            files.write_json(run.folder / DIVERGED, {"found": error.found})
            return error.exit_code
    if _stop and code in (errors.EXIT_INTERRUPTED, errors.EXIT_TERMINATED):
        _stop.set()  # what was queued for this process isn't to begin either
    return code
