"""Ladder: small models of several sizes and lengths, trained alike, and the loss law that they follow.

Under muP one learning rate suits every width, so a ladder needs no tuning of its own (mu-Scaling, arXiv 2304.06875).
A run that is finished is only read, so a ladder that was stopped goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from espalier import page, units
from espalier.budget import fit, flops
from espalier.budget.observations import read_runs
from espalier.budget.plan import Duration
from espalier.budget.scaling import Form, Law
from espalier.errors import RecipeError
from espalier.grow.progressive import ShapeRecipe
from espalier.method import method
from espalier.pipeline import PretrainRecipe
from espalier.planner import PlannedRecipe
from espalier.recipe import Recipe
from espalier.report import Report
from espalier.run import PAGE, RESULTS, Run
from espalier.story import Story
from espalier.trials import EVAL_TOKENS, TRIALS, Trial, carry_out


def tokens_of(length: str, parameters: float) -> float:
    """'3M tokens' is as many for every size, '20x' twenty for each parameter; ValueError otherwise."""
    if length.endswith("x"):
        return Duration.parse(f"{length[:-1]} tokens").amount * parameters
    duration = Duration.parse(length)
    if duration.unit != "tokens":
        raise ValueError(f"{length!r} isn't a length; write '3M tokens', or '20x' for as many a parameter")
    return duration.amount


def _checked(length: str) -> str:
    tokens_of(length, 1)
    return length


Length = Annotated[str, BeforeValidator(str), AfterValidator(_checked)]


class LadderRecipe(Recipe):
    """Every size on every length with every seed.

    run     what all runs are told, as in `espalier run`; the sizes and duration of its one stage are replaced
    sizes   as in a stage
    tokens  lengths: '3M tokens', or '20x' for as many a parameter
    flops   the most that one run may take: large sizes are trained on the short lengths only
    form    of the law; size takes one length for all
    """

    run: PlannedRecipe
    sizes: Annotated[tuple[ShapeRecipe, ...], Field(min_length=3)]
    tokens: Annotated[tuple[Length, ...], Field(min_length=1)]
    flops: float = Field(default=math.inf, gt=0)
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1, 2)
    form: Form = "size_and_data"
    workers: int = Field(default=1, ge=1, description="runs side by side, each in a process of its own")

    @model_validator(mode="after")
    def _one_stage(self) -> Self:
        if len(self.run.stages) > 1:
            raise ValueError("run.stages has more than one: a ladder's runs don't grow")
        return self

    def trials(self) -> list[Trial]:
        """Those that are worth no more than `flops`, the cheapest first."""
        trials = (
            _trial(self.run, size, length, seed) for size in self.sizes for length in self.tokens for seed in self.seeds
        )
        return sorted((trial for trial in trials if _flops(trial) <= self.flops), key=_flops)


def _trial(told: PlannedRecipe, size: ShapeRecipe, length: str, seed: int) -> Trial:
    """One size on one length, in whole steps."""
    stage = told.stages[0].model_copy(update=size.sizes())
    [spec] = told.model_copy(update={"stages": (stage,)}).specs()
    step = told.rows * told.data.sequence_length
    tokens = max(round(tokens_of(length, flops.parameters(spec)) / step), 1) * step
    values = told.model_dump() | {
        "name": f"{flops.parameters(spec)}-parameters-{tokens}-tokens-seed{seed}",
        "seed": seed,
        "stages": [stage.model_dump() | {"duration": f"{tokens} tokens"}],
        "train": told.train.model_dump() | {"eval_tokens": told.train.eval_tokens or EVAL_TOKENS},
        "samples": {"prompts": ("\n",), "max_new_tokens": 1},
    }
    return Trial(told.optimizer.learning_rate, seed, PretrainRecipe.model_validate(values))


def _size(trial: Trial) -> tuple[float, float]:
    """(parameters, tokens) of a run."""
    [spec] = trial.recipe.specs()
    return flops.parameters(spec), Duration.parse(trial.recipe.stages[0].duration).amount


def _flops(trial: Trial) -> float:
    [spec] = trial.recipe.specs()
    return flops.training_flops(spec, trial.recipe.data.sequence_length) * _size(trial)[1]


@method(paper="arXiv 2304.06875", needs="sizes and lengths, and a rate that suits them", costs="training them all")
def ladder(recipe: LadderRecipe, run: Run) -> Path:
    """Train small models of several sizes, and fit the law by which larger ones can be predicted."""
    trials = recipe.trials()
    fit.require_told([_size(trial) for trial in trials], recipe.form)
    run.tell(f"{len(trials)} runs, {units.si(sum(map(_flops, trials)), 'FLOP')} of training.")
    _carry_out(trials, recipe.workers, run)
    observations, about = read_runs(run.folder / TRIALS)
    law = fit.fit(observations, recipe.form, about=about.model_copy(update={"source": f"the ladder {run.name}"}))
    law.save(run.folder / fit.LAW)
    report = _report(run.name, law)
    report.save(run.folder / RESULTS)
    fit.tell(law, run)
    machine = Story(run.folder / TRIALS / trials[-1].recipe.name).view().machine
    page.save(replace(fit.view(law, run, recipe), results=report.rows, machine=machine), run.folder / PAGE)
    return run.folder / fit.LAW


def _carry_out(trials: Sequence[Trial], workers: int, run: Run) -> None:
    figures = carry_out(trials, run, workers=workers, tell=run.tell)
    if diverged := [trial.recipe.name for trial, found in zip(trials, figures, strict=True) if found is None]:
        raise RecipeError(
            "run.optimizer.learning_rate",
            found=f"numbers that diverged in {', '.join(diverged)}",
            expected="a rate that holds for every size and seed",
            mend="Lower it.",
        )


def _report(name: str, law: Law) -> Report:
    """The losses that were measured, and how well the largest model was predicted."""
    report = Report(name, context={"values": law.values, "noise": law.noise})
    for one in law.observations:
        report.add(f"{one.parameters:,.0f} parameters, {one.tokens:,.0f} tokens", "loss", one.loss)
    if law.check:
        report.add("largest model, predicted", "relative error", law.check.error)
        report.add("largest model, by the next smaller one's loss", "relative error", law.check.baseline)
    return report
