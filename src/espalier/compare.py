"""Compare: growth operators against each other and against both ways without growth, on one budget of FLOPs.

Growth has to beat the better of two baselines, each with its own tuned rate: the large model from scratch, and the
small one alone. Without the small one growth looks better than it is, since a small model may do as well on a budget
that is too short for the large one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from espalier import page, units
from espalier.budget.plan import Duration
from espalier.errors import ModelError, RecipeError
from espalier.grow.operators import DEPTH, WIDTH, DepthOperator, WidthOperator
from espalier.grow.progressive import Fit, OptimizerState, Ramp, RateFactor, StageRecipe
from espalier.method import method
from espalier.page import ArmRow, Curve, Estimate, Figure, Point, View
from espalier.planner import PlannedRecipe
from espalier.recipe import Recipe, dump
from espalier.report import Report
from espalier.run import PAGE, RESULTS, Run
from espalier.story import Story, shape
from espalier.trials import TRIALS, Figures, Trial, Way, carry_out, require_shares

LARGE, SMALL = "large from scratch", "small only"
SHARES = [0.25, 0.5, 1.0]
TABLE_WIDTH = 110

Rates = Annotated[tuple[float, ...], Field(min_length=1)]


class ArmRecipe(Recipe):
    """What one arm's growths are told in the place of the path's own settings; what isn't stated stays."""

    depth: DepthOperator | None = None
    width: WidthOperator | None = None
    optimizer_state: OptimizerState | None = None
    fit: Fit | None = None
    ramp: Ramp | None = None
    rate: RateFactor | None = None
    rates: Rates | None = Field(default=None, description="to try for this arm, in the place of rates.grown")

    def stages(self, path: Sequence[StageRecipe]) -> tuple[StageRecipe, ...]:
        """The path with this arm's settings after its first stage."""
        change = self.model_dump(exclude_none=True, exclude={"rates"})
        return (path[0], *(StageRecipe.model_validate(stage.model_dump() | change) for stage in path[1:]))


class RatesRecipe(Recipe):
    """Peak learning rates to try; the best with the first seed is taken for the others."""

    large: Rates
    small: Rates
    grown: Rates
    between: Rates | None = Field(default=None, description="those of large, if not stated")


class CompareRecipe(Recipe):
    """What is compared, on how much training.

    run      what every way is told, as in `espalier run`; its stages are the growth path, with shares as durations
    flops    of each baseline's training; the grown ways have `share` of it, their first stages counted
    between  stages of the path, counted from 1, whose size is trained from scratch too: where the large model has just
             overtaken the small one, a size between them may beat both
    arms     settings by name; if none are stated, every operator that can take the path
    """

    run: PlannedRecipe
    flops: float = Field(gt=0)
    share: float = Field(default=1.0, gt=0, le=1)
    rates: RatesRecipe
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1, 2, 3)
    between: tuple[int, ...] = ()
    arms: dict[str, ArmRecipe] = Field(default_factory=dict)
    workers: int = Field(default=1, ge=1, description="trials side by side, each in a process of its own")

    def ways(self) -> list[Way]:
        """Both baselines and every arm, each checked to be possible."""
        require_shares(self.run)
        path = self.run.stages
        alone = {LARGE: len(path), SMALL: 1} | {_only(stage): stage for stage in self._between()}
        ways = [
            Way(name, "baseline", (path[stage - 1].model_copy(update={"duration": "100%"}),), self.flops)
            for name, stage in alone.items()
        ]
        arms = {name: arm.stages(path) for name, arm in self.arms.items()} or dict(_possible(self.run))
        return ways + [Way(name, "arm", stages, self.share * self.flops) for name, stages in arms.items()]

    def tried(self, way: Way) -> tuple[float, ...]:
        """The rates to try for a way."""
        own = {name: arm.rates for name, arm in self.arms.items() if arm.rates}
        own |= {_only(stage): self.rates.between or self.rates.large for stage in self.between}
        return ({LARGE: self.rates.large, SMALL: self.rates.small} | own).get(way.name, self.rates.grown)

    def _between(self) -> tuple[int, ...]:
        last = len(self.run.stages)
        if outside := [stage for stage in self.between if not 1 < stage < last]:
            raise RecipeError(
                "between",
                found=f"stage {outside[0]} of a path of {last}",
                expected=f"stages 2 to {last - 1}" if last > 2 else "none: the path has no stage between its ends",
                mend="Leave it out; the first and the last stage are baselines anyway.",
            )
        return self.between


def _only(stage: int) -> str:
    """The name of the way that trains one stage's size from scratch."""
    return f"stage {stage} only"


def _possible(told: PlannedRecipe) -> Iterable[tuple[str, tuple[StageRecipe, ...]]]:
    """Every operator that can take the path, with the path's own for the other of width and depth: (name, stages)."""
    vocabulary = told.model.vocab_size or told.data.vocab_size
    changes = {key for stage in told.path(vocabulary) for growth in stage.growths for key in growth.record()["changed"]}
    deeper, wider = "num_hidden_layers" in changes, bool(changes - {"num_hidden_layers", "rms_norm_eps"})
    both = DEPTH.keys() & WIDTH.keys()  # these go together
    settings = {name: {"depth": name, "width": name} for name in DEPTH if name in both}
    settings |= {name: {"depth": name} for name in DEPTH if deeper and name not in both}
    settings |= {name: {"width": name} for name in WIDTH if wider and name not in both}
    seen: list[list] = []
    for name, setting in settings.items():
        stages = ArmRecipe.model_validate(setting).stages(told.stages)
        try:
            path = told.model_copy(update={"stages": stages}).path(vocabulary)
        except ModelError:
            continue
        does = [[growth.learned, *growth.identity()[1:]] for stage in path for growth in stage.growths]
        if does not in seen:  # on short paths some operators come to the same
            seen.append(does)
            yield name, stages


@dataclass(frozen=True)
class Outcome:
    """A way at its best rate: figures by seed, in the recipe's order."""

    way: Way
    rate: float
    figures: list[Figures]

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return statistics.mean(figures.loss for figures in self.figures)


@method(needs="a growth path and its data", costs="the stated FLOPs for every way, rate and seed")
def grow_compare(recipe: CompareRecipe, run: Run) -> Path:
    """Train by several operators and by both baselines, on one budget, with tuned rates, and compare."""
    outcomes = _carry_out(recipe, recipe.ways(), recipe.tried, recipe.seeds, recipe.workers, run)
    rows = _rows(outcomes)
    _report(run.name, outcomes, rows).save(run.folder / RESULTS)
    _tell(rows, run)
    page.save(_view(run, outcomes, rows, recipe), run.folder / PAGE)
    return run.folder / PAGE


class SearchRecipe(Recipe):
    """When to grow, found by short trials.

    run     as in `compare`; the shares of its stages after the first keep their ratios
    flops   of each trial
    shares  of the first stage, each a trial
    """

    run: PlannedRecipe
    flops: float = Field(gt=0)
    shares: Annotated[tuple[float, ...], Field(min_length=2)] = (0.05, 0.1, 0.2, 0.4)
    rates: Rates | None = Field(default=None, description="peak learning rates to try; the run's own, if not stated")
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    workers: int = Field(default=1, ge=1, description="trials side by side, each in a process of its own")


@method(needs="a growth path and its data", costs="the stated FLOPs for every share, rate and seed")
def grow_search(recipe: SearchRecipe, run: Run) -> str:
    """Find by short trials when to grow, where no formula holds."""
    require_shares(recipe.run)
    path = recipe.run.stages
    if len(path) < 2:
        raise RecipeError("run.stages", found="one", expected="two or more", mend="State the stages to grow into.")
    ways = [Way(f"first stage {share:g}", "arm", _rescaled(path, share), recipe.flops) for share in recipe.shares]
    rates = recipe.rates or (recipe.run.optimizer.learning_rate,)
    outcomes = _carry_out(recipe, ways, lambda way: rates, recipe.seeds, recipe.workers, run)
    report = Report(run.name, context={"flops": recipe.flops})
    for outcome in outcomes:
        loss = _estimate([figures.loss for figures in outcome.figures])
        report.add(outcome.way.name, "loss", loss.mean, stderr=_stderr(outcome.figures), n=loss.n)
    report.save(run.folder / RESULTS)
    run.tell(str(report))
    best = min(outcomes, key=lambda outcome: outcome.loss)
    at = outcomes.index(best)
    if at in (0, len(outcomes) - 1):
        run.tell("The best share is at the edge of those tried: try more beyond it.")
    return "durations: " + ", ".join(stage.duration for stage in best.way.stages)


def _rescaled(path: Sequence[StageRecipe], share: float) -> tuple[StageRecipe, ...]:
    """The path with another share for its first stage, what is left divided as before."""
    parts = [Duration.parse(stage.duration).amount for stage in path]
    left = (1 - share) / sum(parts[1:])
    shares = [share, *(part * left for part in parts[1:])]
    changes = [{"duration": f"{100 * part:.6g}%"} for part in shares]
    return tuple(stage.model_copy(update=change) for stage, change in zip(path, changes, strict=True))


def _carry_out(
    recipe: CompareRecipe | SearchRecipe,
    ways: Sequence[Way],
    rates: Callable[[Way], Sequence[float]],
    seeds: Sequence[int],
    workers: int,
    run: Run,
) -> list[Outcome]:
    """Every way with every rate and the first seed, then with its best rate and the other seeds."""
    first, *others = seeds
    tried = [(way, rate, way.trial(recipe.run, rate=rate, seed=first)) for way in ways for rate in rates(way)]
    finals = len(ways) * len(others)
    total = sum(way.flops for way, *_ in tried) + sum(way.flops for way in ways) * len(others)
    run.tell(f"{len(tried)} runs to find rates, then {finals} with other seeds: {units.si(total, 'FLOP')} of training.")

    def carried(trials: Sequence[Trial], first: int) -> list[Figures | None]:
        return carry_out(trials, run, workers=workers, tell=run.tell, first=first)

    losses: dict[str, list[tuple[float, float, Figures | None]]] = {}
    for (way, rate, _), figures in zip(tried, carried([trial for *_, trial in tried], 0), strict=True):
        losses.setdefault(way.name, []).append((figures.loss if figures else math.inf, rate, figures))
    best = {name: min(found, key=lambda one: one[:2]) for name, found in losses.items()}
    if failed := [name for name, (loss, *_) in best.items() if loss == math.inf]:
        raise RecipeError(
            "rates",
            found=f"none at which {', '.join(failed)} didn't diverge",
            expected="one at least",
            mend="State lower rates.",
        )
    again = [(way, way.trial(recipe.run, rate=best[way.name][1], seed=seed)) for way in ways for seed in others]
    figures_of = {way.name: [best[way.name][2]] for way in ways}
    for (way, trial), figures in zip(again, carried([trial for _, trial in again], len(tried)), strict=True):
        if figures is None:
            raise RecipeError(
                f"{way.name}, seed {trial.seed}",
                found=f"numbers that diverged at a rate of {trial.rate:g}",
                expected="a rate that holds for every seed",
                mend="Leave that rate out.",
            )
        figures_of[way.name].append(figures)
    return [Outcome(way, best[way.name][1], [f for f in figures_of[way.name] if f]) for way in ways]


def _better(outcomes: Sequence[Outcome]) -> Outcome:
    """The better baseline."""
    return min((outcome for outcome in outcomes if outcome.way.kind == "baseline"), key=lambda outcome: outcome.loss)


def _rows(outcomes: Sequence[Outcome]) -> list[ArmRow]:
    """The baselines, then the arms with the best first."""
    base = _better(outcomes).figures
    baselines = [outcome for outcome in outcomes if outcome.way.kind == "baseline"]
    arms = sorted((outcome for outcome in outcomes if outcome.way.kind == "arm"), key=lambda outcome: outcome.loss)
    return [_row(outcome, base) for outcome in baselines + arms]


def _row(outcome: Outcome, base: Sequence[Figures]) -> ArmRow:
    figures, way = outcome.figures, outcome.way
    met = [one.reached(target.loss) for one, target in zip(figures, base, strict=True)]
    jumps = [max(one.jumps) for one in figures if one.jumps]
    return ArmRow(
        name=way.name,
        kind=way.kind,
        rate=outcome.rate,
        jump=_estimate(jumps) if jumps else None,
        losses=[_estimate_or_none([one.loss_at(share * one.flops) for one in figures]) for share in SHARES],
        difference=_estimate([one.loss - target.loss for one, target in zip(figures, base, strict=True)]),
        flops=_share_reached(figures, base, "flops"),
        reached=sum(at is not None for at in met),
        seconds=_share_reached(figures, base, "seconds"),
    )


def _share_reached(
    figures: Sequence[Figures], base: Sequence[Figures], spent: Literal["flops", "seconds"]
) -> Estimate | None:
    """The share of the baseline's FLOPs or seconds at which the mean over seeds was as low as the baseline's mean.

    None if it never was; with an interval if every seed came as low as the baseline with that seed.
    """

    def share(one: Figures, target: Figures) -> float | None:
        at = one.reached(target.loss)
        return at[spent == "seconds"] / getattr(target, spent) if at else None

    whole = share(_mean_of(figures), _mean_of(base))
    each = _estimate_or_none([share(one, target) for one, target in zip(figures, base, strict=True)])
    return None if whole is None else Estimate(whole, each.half_width if each else None, len(figures))


def _mean_of(figures: Sequence[Figures]) -> Figures:
    """The means over seeds, which evaluate at the same steps."""
    points = []
    for same in zip(*(one.points for one in figures), strict=True):
        mean = lambda key: statistics.mean(getattr(point, key) for point in same)  # noqa: B023, E731
        usd = mean("usd") if all(point.usd for point in same) else None
        points.append(Point(mean("tokens"), mean("flops"), usd, mean("seconds"), same[0].step, mean("loss")))
    loss = statistics.mean(one.loss for one in figures)
    return Figures(loss, points[-1].flops, points[-1].seconds, points, [])


def _estimate(values: Sequence[float]) -> Estimate:
    """Mean and half of the 95% interval, by Student's t."""
    if len(values) < 2:
        return Estimate(values[0], None, 1)
    from scipy import stats

    spread = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.mean(values), float(stats.t.ppf(0.975, len(values) - 1)) * spread, len(values))


def _estimate_or_none(values: Sequence[float | None]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return _estimate(known) if len(known) == len(values) else None


def _stderr(figures: Sequence[Figures]) -> float | None:
    losses = [one.loss for one in figures]
    return statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None


def _report(name: str, outcomes: Sequence[Outcome], rows: Sequence[ArmRow]) -> Report:
    """What the page says, to be computed with."""
    report = Report(name, context={"better baseline": _better(outcomes).way.name})
    by_name = {outcome.way.name: outcome for outcome in outcomes}
    for row in rows:
        outcome = by_name[row.name]
        stderr = _stderr(outcome.figures)
        report.add(row.name, "loss", outcome.loss, stderr=stderr, n=len(outcome.figures), note=f"rate {row.rate:g}")
        for metric, estimate in (("jump", row.jump), ("share of FLOPs", row.flops), ("share of time", row.seconds)):
            if estimate:
                report.add(row.name, metric, estimate.mean, n=estimate.n)
    report.context["seeds"] = {
        outcome.way.name: [
            {"loss": f.loss, "flops": f.flops, "seconds": f.seconds, "jumps": f.jumps} for f in outcome.figures
        ]
        for outcome in outcomes
    }
    return report


def _tell(rows: Sequence[ArmRow], run: Run) -> None:
    """The comparison as a table on the terminal."""
    from rich.console import Console
    from rich.table import Column, Table

    heads = ["way", "rate", "jump", *(f"{share:.0%}" for share in SHARES), "difference", "FLOPs*", "time*", "seeds*"]
    table = Table(*(Column(head, no_wrap=True) for head in heads), box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.rate:g}",
            _mean(row.jump, "+.3f"),
            *(_mean(loss, ".3f") for loss in row.losses),
            _interval(row.difference, ".3f"),
            _mean(row.flops, ".0%"),
            _mean(row.seconds, ".0%"),
            f"{row.reached} of {row.difference.n if row.difference else 0}",
        )
    # A narrower terminal breaks lines; cut figures would say nothing.
    console = Console(width=max(Console().width, TABLE_WIDTH))
    console.print(table)
    for note in (
        "losses: at shares of each way's own FLOPs; difference: to the better baseline, ± half of the 95% interval",
        "* until the means are those of that baseline, as shares of its own; the page has all intervals",
    ):
        console.print(note, style="dim", highlight=False)


def _mean(estimate: Estimate | None, form: str) -> str:
    return "–" if estimate is None else f"{estimate.mean:{form}}"


def _interval(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return "–"
    return f"{estimate.mean:+{form}}" + (f" ± {estimate.half_width:{form}}" if estimate.half_width else "")


def _view(run: Run, outcomes: Sequence[Outcome], rows: list[ArmRow], recipe: CompareRecipe) -> View:
    by_name = {outcome.way.name: outcome for outcome in outcomes}
    base = _better(outcomes)
    best = next((row for row in rows if row.kind == "arm"), None)
    some = Story(run.folder / TRIALS / base.way.trial(recipe.run, rate=base.rate, seed=recipe.seeds[0]).recipe.name)
    specs = recipe.run.specs()
    figures = [Figure("Better baseline", f"{base.loss:.3f}", f"{base.way.name}, at {units.si(recipe.flops, 'FLOP')}")]
    if best:
        arm = by_name[best.name]
        figures.append(Figure("Best growth", f"{arm.loss:.3f}", f"{best.name}, at {recipe.share:.0%} of that"))
        if best.flops and best.seconds:
            figures.append(Figure("FLOPs to that loss", f"{best.flops.mean:.0%}", "of the better baseline's"))
            figures.append(Figure("Time to that loss", f"{best.seconds.mean:.0%}", "of training and growing alone"))
    return View(
        title=run.name,
        subtitle=f"{shape(specs[0])} → {shape(specs[-1])}; seeds {', '.join(map(str, recipe.seeds))}",
        made_at=time.strftime("%Y-%m-%d %H:%M"),
        kind="comparison",
        headline=figures,
        curves=[_curve(by_name[row.name]) for row in rows],
        comparison=rows,
        comparison_shares=SHARES,
        recipe=dump(recipe),
        machine=some.view().machine,
        notes=[
            "Each way has the best of the rates that were tried with the first seed, whose runs count as well.",
            "FLOPs and time to the better baseline's loss are those of the means; seeds are counted one by one.",
            "Losses on the way are at a rate that hasn't decayed yet, so they say less than those at the end.",
        ],
    )


def _curve(outcome: Outcome) -> Curve:
    """Means over the seeds, with the lowest and the highest loss."""
    by_point = zip(*([point.loss for point in figures.points] for figures in outcome.figures), strict=True)
    band = [(min(losses), max(losses)) for losses in by_point] if len(outcome.figures) > 1 else []
    style: Literal["baseline", "validation"] = "baseline" if outcome.way.kind == "baseline" else "validation"
    return Curve(outcome.way.name, _mean_of(outcome.figures).points, style, band)
