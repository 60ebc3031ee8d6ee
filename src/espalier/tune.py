"""Tune: hyper-parameters found on a narrow proxy of a model, for the model itself.

Under muP the best learning rate, initial values and output multiplier don't depend on the width (arXiv 2203.03466), so
that finding them costs what a narrow model costs: FLM-101B searched these three with a proxy of width 256
(arXiv 2309.03852). A trial that is finished is only read, and what is tried next depends on the losses so far alone: a
search that was stopped goes on where it was, and ends as it would have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, Field, PositiveFloat, model_validator

from espalier import files, page, units
from espalier.budget import flops
from espalier.budget.plan import Duration, DurationText
from espalier.errors import BudgetError, RecipeError
from espalier.grow.progressive import ShapeRecipe
from espalier.method import method
from espalier.page import Figure, View
from espalier.pipeline import PretrainRecipe
from espalier.planner import PlannedRecipe
from espalier.recipe import Recipe, dump, parse
from espalier.report import Report
from espalier.run import PAGE, RESULTS, Run
from espalier.story import Story, shape
from espalier.trials import EVAL_TOKENS, TRIALS, Trial, carry_out

if TYPE_CHECKING:
    import optuna

TUNED = "tuned.yaml"
RATE, VECTOR_RATE = "optimizer.learning_rate", "optimizer.vector_learning_rate"
AXES = (RATE, "parametrization.gain", "parametrization.output_multiplier")
# A span that isn't stated reaches from the recipe's own value over this factor to its own value times it.
AROUND = 8.0
# A best value this near to an end of its span, as a share of the span's logarithm, may have better ones beyond it.
EDGE = 0.1
# The better trials, as a share, whose losses fit into the page's charts; the others would flatten them.
FRAMED = 0.75


def _rising(span: tuple[float, float]) -> tuple[float, float]:
    low, high = span
    if not low < high < math.inf:
        raise ValueError(f"[{low:g}, {high:g}] isn't a span; write the lower end first, as in [1e-3, 1e-1]")
    return span


Span = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_rising)]


def _around(told: dict[str, Any]) -> dict[str, Span]:
    """Spans of the usual axes around the run's own values."""
    own = {axis: _value(told["run"], axis) for axis in AXES}
    return {axis: (value / AROUND, value * AROUND) for axis, value in own.items()}


class TuneRecipe(Recipe):
    """What is searched, on which proxy, and for how long.

    run       the run to find values for, as in `espalier run`: it needs muP, and its own values are the first trial
    width     hidden_size of the proxy, which is otherwise alike: its layers are those of the last stage, and heads,
              key-value heads and feed-forward keep their ratios to the width
    duration  of each trial: '500k tokens' or '2e11 flops'; as many updates as the run will have, or the rate that is
              found is too high for it (LOG.md)
    axes      keys of `run` and the spans that they are searched in, [low, high], on a logarithmic scale; if none are
              stated, learning rate, gain of the initial values and output multiplier, each from an eighth of the run's
              own value to eight times it. The rate of vectors keeps its ratio to that of matrices unless it is an axis
    flops     the most that all trials together may take, beside their number
    seed      of the search; all trials have the run's own
    workers   runs side by side, each in a process of its own; what is tried depends on their number
    """

    run: PlannedRecipe
    width: int = Field(gt=0)
    duration: DurationText
    axes: dict[str, Span] = Field(default_factory=_around, min_length=1)
    trials: int = Field(default=24, ge=2)
    flops: float | None = Field(default=None, gt=0)
    seed: int = 1
    workers: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _can_be_searched(self) -> Self:
        if self.run.parametrization.kind != "mup":
            raise ValueError("run.parametrization.kind isn't mup: only under it do values hold at another width")
        if Duration.parse(self.duration).unit == "share":
            raise ValueError(f"duration {self.duration}: a trial has no budget to take a share of; state tokens")
        self.told({axis: low for axis, (low, _) in self.axes.items()})  # refuses a key that isn't there
        for axis, (low, high) in self.axes.items():
            own = _value(self.run, axis)
            if not isinstance(own, float):
                raise ValueError(f"axes.{axis}: {own!r} isn't a number that may have a fraction")
            if not low <= own <= high:
                raise ValueError(f"axes.{axis}: [{low:g}, {high:g}] is without the run's own value {own:g}")
        return self

    @property
    def own(self) -> dict[str, float]:
        """The run's own values on the axes."""
        return {axis: _value(self.run, axis) for axis in self.axes}

    def settings(self, values: Mapping[str, float]) -> dict[str, float]:
        """Values on the axes, and the rate of vectors that goes with them."""
        if RATE not in values or VECTOR_RATE in self.axes:
            return dict(values)
        own = self.run.optimizer
        return {**values, VECTOR_RATE: own.vector_learning_rate * (values[RATE] / own.learning_rate)}

    def told(self, values: Mapping[str, float]) -> PlannedRecipe:
        """The run with these values on the axes."""
        overrides = [f"{key}={value!r}" for key, value in self.settings(values).items()]
        return parse(PlannedRecipe, dump(self.run), overrides, where="axes")

    def shape(self) -> ShapeRecipe:
        """The sizes of the proxy."""
        model = self.run.specs()[-1]
        heads_apart = model.hidden_size // math.gcd(model.hidden_size, model.num_attention_heads)
        if self.width % heads_apart or self.width > model.hidden_size:
            raise RecipeError(
                "width",
                found=str(self.width),
                expected=f"a multiple of {heads_apart}, for whole heads, up to the model's own {model.hidden_size}",
                mend="Set width to one of these.",
            )
        heads = model.num_attention_heads * self.width // model.hidden_size
        return ShapeRecipe(
            hidden_size=self.width,
            intermediate_size=round(model.intermediate_size * self.width / model.hidden_size),
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=max(heads * model.num_key_value_heads // model.num_attention_heads, 1),
        )

    def trial(self, number: int, values: Mapping[str, float]) -> Trial:
        """The proxy with these values on the axes."""
        told = self.told(values)
        stage = told.stages[-1].model_copy(update={**self.shape().sizes(), "duration": self.duration})
        recipe = told.model_dump() | {
            "name": f"trial-{number:03}",
            "stages": [stage.model_dump()],
            "budget": told.budget.model_dump() | dict.fromkeys(("usd", "hours", "kwh", "flops", "tokens")),
            "train": told.train.model_dump() | {"eval_tokens": told.train.eval_tokens or EVAL_TOKENS},
            "samples": {"prompts": ("\n",), "max_new_tokens": 1},
        }
        return Trial(told.optimizer.learning_rate, told.seed, PretrainRecipe.model_validate(recipe))

    def trial_flops(self) -> float:
        """What the training of one trial takes."""
        duration = Duration.parse(self.duration)
        if duration.unit == "flops":
            return duration.amount
        [spec] = self.trial(0, self.own).recipe.specs()
        per_token = flops.training_flops(spec, self.run.data.sequence_length, self.run.train.recompute)
        return per_token * duration.amount

    def count(self) -> int:
        """How many trials there are: as many as are asked for and as the FLOPs suffice for."""
        if self.flops is None:
            return self.trials
        each = self.trial_flops()
        if self.flops < 2 * each:
            raise BudgetError(
                "flops",
                found=units.si(self.flops, "FLOP"),
                expected=f"enough for two trials of {units.si(each, 'FLOP')}: the run's own values and others",
                mend="Raise flops, or lower width or duration.",
            )
        return min(self.trials, int(self.flops / each))


def _value(told: PlannedRecipe, axis: str) -> Any:
    """What a run says under a dotted key that it has."""
    place: Any = told
    for part in axis.split("."):
        place = place[int(part)] if part.isdecimal() else getattr(place, part)
    return place


@dataclass(frozen=True)
class Tried:
    """Values on the axes, and the proxy's held-out loss with them, nats a token; infinite where it diverged."""

    name: str
    values: dict[str, float]
    loss: float


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    recipe: TuneRecipe
    tried: list[Tried]

    @property
    def own(self) -> Tried:
        return self.tried[0]

    @property
    def best(self) -> Tried:
        return min(self.tried, key=lambda one: one.loss)

    @property
    def importances(self) -> dict[str, float]:
        return importances(self.tried)

    @property
    def tuned(self) -> PretrainRecipe:
        """The run, as it was told, with the best values."""
        told = self.recipe.told(self.best.values)
        return PretrainRecipe.model_validate(told.model_dump() | {"name": "tuned"})

    def edges(self) -> list[str]:
        """The axes whose best value lies at an end of its span."""

        def place(axis: str) -> float:
            low, high = self.recipe.axes[axis]
            return math.log(self.best.values[axis] / low) / math.log(high / low)

        return [axis for axis in self.recipe.axes if not EDGE <= place(axis) <= 1 - EDGE]

    def notes(self) -> list[str]:
        """What a reader should know before using the values."""
        edges = [f"{axis} is best at an end of its span: search beyond it." for axis in self.edges()]
        return [
            *edges,
            f"The best of {len(self.tried)} runs of one seed looks better than it is; other seeds say by how much.",
        ]


def importances(tried: Sequence[Tried]) -> dict[str, float]:
    """How much each axis alone says about which trial is better, as shares of what all say; {} for too few trials.

    A parabola in the logarithm of every axis is fitted to the ranks of the losses (least squares). Ranks, because a
    trial that diverged has no other number, and one that nearly did would outweigh all others.
    """
    import numpy as np
    from scipy import stats

    axes = list(tried[0].values)
    if len(tried) <= 2 * len(axes) + 1:
        return {}
    ranks = stats.rankdata([one.loss for one in tried])
    logs_TA = np.log([list(one.values.values()) for one in tried])
    logs_TA = (logs_TA - logs_TA.mean(axis=0)) / logs_TA.std(axis=0)
    terms_TAP = np.stack([logs_TA, logs_TA**2 - 1], axis=-1)
    factors, *_ = np.linalg.lstsq(terms_TAP.reshape(len(tried), -1), ranks - ranks.mean(), rcond=None)
    parts_A = (terms_TAP * factors.reshape(len(axes), 2)).sum(axis=-1).var(axis=0)
    return dict(zip(axes, (parts_A / (parts_A.sum() or 1.0)).tolist(), strict=True))


@method(paper="arXiv 2304.06875", needs="a run under muP, and its data", costs="training a narrow proxy many times")
def tune(recipe: TuneRecipe, run: Run) -> Path:
    """Find a run's rate and initial values on a narrow proxy, and write its recipe with them."""
    count = recipe.count()
    total = units.si(count * recipe.trial_flops(), "FLOP")
    run.tell(f"{count} runs at width {recipe.width}, {total} of training; the first has the recipe's own values.")
    found = Found(recipe, _search(recipe, count, run))
    if found.best.loss == math.inf:
        raise RecipeError(
            "axes",
            found="numbers that diverged in every trial",
            expected="values at which some hold",
            mend=f"Lower the span of {RATE}.",
        )
    files.write_text(run.folder / TUNED, "".join(f"# {note}\n" for note in found.notes()) + dump(found.tuned))
    _report(run.name, found).save(run.folder / RESULTS)
    run.tell("\n".join(_lines(found)))
    files.write_text(run.folder / PAGE, _render(run, found))
    return run.folder / TUNED


def _search(recipe: TuneRecipe, count: int, run: Run) -> list[Tried]:
    """The trials in their order, `workers` at a time: the search names their values, and is told their losses."""
    study, spans = _study(recipe)
    tried: list[Tried] = []
    while len(tried) < count:
        asked = [study.ask(spans) for _ in range(min(recipe.workers, count - len(tried)))]
        trials = [recipe.trial(one.number, one.params) for one in asked]
        figures = carry_out(trials, run, workers=recipe.workers, tell=_silent, first=len(tried))
        for one, trial, ended in zip(asked, trials, figures, strict=True):
            tried.append(Tried(trial.recipe.name, one.params, ended.loss if ended else math.inf))
            study.tell(one, tried[-1].loss)
            run.tell(f"{len(tried)} of {count}  {_told_loss(tried[-1])}: {_told_values(tried[-1])}")
    return tried


def _study(recipe: TuneRecipe) -> tuple[optuna.Study, dict[str, optuna.distributions.BaseDistribution]]:
    """A search by tree-structured Parzen estimators that begins with the run's own values, and the spans it is in."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=recipe.seed))
    study.enqueue_trial(recipe.own)
    return study, {
        axis: optuna.distributions.FloatDistribution(low, high, log=True) for axis, (low, high) in recipe.axes.items()
    }


def _silent(what: object) -> None:
    """The search tells each trial itself, with its values."""


def _report(name: str, found: Found) -> Report:
    """Every trial's loss, what the best values are and gain, and how much each axis matters."""
    own, best = found.own, found.best
    report = Report(
        name,
        context={
            "best": best.values,
            "own": own.values,
            "at the edge of their spans": found.edges(),
            "diverged": [one.name for one in found.tried if one.loss == math.inf],
        },
    )
    report.add("best values", "loss", best.loss, n=1, note=best.name)
    if own.loss < math.inf:
        report.add("own values", "loss", own.loss, n=1, note=own.name)
        report.add("best values", "gain", own.loss - best.loss, note="nats a token")
    for axis, share in found.importances.items():
        report.add(axis, "importance", share, n=len(found.tried))
    for one in found.tried:
        if one.loss < math.inf:
            report.add(one.name, "loss", one.loss, note=_told_values(one))
    return report


def _lines(found: Found) -> list[str]:
    """What the search came to, for the terminal."""
    best, own, shares = found.best, found.own, found.importances
    width = max(map(len, found.recipe.axes))
    axes = [
        f"{axis:{width}}  {best.values[axis]:<8.4g}"
        + (f"  importance {shares[axis]:<4.0%}" if shares else "")
        + f"  own {own.values[axis]:.4g}"
        for axis in found.recipe.axes
    ]
    settings = (f"{key}={value:.4g}" for key, value in found.recipe.settings(best.values).items())
    return [
        f"best: {best.name}, {_told_loss(best)}; with the recipe's own values {_told_loss(own)}",
        *axes,
        *found.notes(),
        f"as settings: {' '.join(settings)}",
    ]


def _told_loss(one: Tried) -> str:
    return f"loss {one.loss:.4f}" if one.loss < math.inf else "its numbers diverged"


def _told_values(one: Tried) -> str:
    return ", ".join(f"{axis.rpartition('.')[2]} {value:.3g}" for axis, value in one.values.items())


def _render(run: Run, found: Found) -> str:
    """The page as HTML."""
    recipe, best, own = found.recipe, found.best, found.own
    shares = found.importances
    gain = f"{own.loss - best.loss:.3f} nats a token below the recipe's own" if own.loss < math.inf else "own diverged"
    values = [
        Figure(axis.rpartition(".")[2].replace("_", " "), f"{best.values[axis]:.3g}", f"own: {own.values[axis]:.3g}")
        for axis in recipe.axes
    ]
    [proxy], model = recipe.trial(0, own.values).recipe.specs(), recipe.run.specs()[-1]
    view = View(
        title=run.name,
        subtitle=f"found on {shape(proxy)}, for {shape(model)}",
        made_at=time.strftime("%Y-%m-%d %H:%M"),
        kind="search",
        headline=[Figure("Best loss", f"{best.loss:.3f}", gain), *values],
        recipe=dump(recipe),
        machine=Story(run.folder / TRIALS / best.name).view().machine,
        notes=found.notes(),
    )
    axes = [
        {
            "name": axis,
            "lead": f"{shares[axis]:.0%} of what the axes say about which trial is better." if shares else "",
        }
        for axis in recipe.axes
    ]
    trials = [
        {
            "name": one.name,
            "loss": f"{one.loss:.4f}" if one.loss < math.inf else "diverged",
            "values": [f"{value:.3g}" for value in one.values.values()],
        }
        for one in sorted(found.tried, key=lambda one: one.loss)
    ]
    charts = {"axes": _charts(found)}
    return page.template("tune.html").render(view=view, charts=charts, axes=axes, trials=trials)


def _charts(found: Found) -> list[dict[str, Any]]:
    """What the script needs to draw the loss against each axis; trials of the worst losses stand at the upper edge."""
    losses = sorted(one.loss for one in found.tried if one.loss < math.inf)
    y = page.loss_axis(losses[: max(math.ceil(FRAMED * len(losses)), 2)])

    def mark(axis: str, one: Tried) -> dict[str, Any]:
        told = [f"{one.name}: {_told_loss(one)}", *(f"{key} {value:.4g}" for key, value in one.values.items())]
        at = {"x": one.values[axis], "y": min(one.loss, y["high"])}
        return {**at, "own": one is found.own, "best": one is found.best, "told": told}

    return [
        {"name": axis, "x": page.log_axis(*span, ""), "y": y, "marks": [mark(axis, one) for one in found.tried]}
        for axis, span in found.recipe.axes.items()
    ]
