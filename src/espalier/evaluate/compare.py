"""Comparing evaluations: the same items, paired; how sure each difference is; and what a point has cost.

Two models that are asked the same items differ less by chance than two that are asked different ones, so differences
are taken item by item. Many tasks are many tests, so their probabilities are corrected (Holm).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from espalier import units
from espalier.errors import RecipeError, RunError
from espalier.evaluate import page
from espalier.evaluate.evaluation import LOWER_IS_BETTER, NORMAL_95, Evaluation, labels, mean_pair
from espalier.evaluate.intervals import DRAWS, holm, mean_of_means, paired_bootstrap, sign_test
from espalier.method import method
from espalier.recipe import Recipe
from espalier.report import Report
from espalier.report import compare as compare_rows
from espalier.run import RESULTS, Run

OVERALL = "overall"


class CompareRecipe(Recipe):
    """Which evaluations, against which; draws of the bootstrap and its seed."""

    POSITIONAL: ClassVar[str] = "runs"

    runs: tuple[Path, ...] = Field(min_length=2, description="run folders of evaluations")
    baseline: Path | None = Field(default=None, description="one of them; the first, if not stated")
    draws: int = Field(default=DRAWS, ge=1000)
    seed: int = 0

    @model_validator(mode="after")
    def _each_once(self) -> CompareRecipe:
        if len(set(self.runs)) < len(self.runs):
            raise ValueError("a run that is named twice")
        return self

    @property
    def base(self) -> Path:
        """What the others are compared with."""
        return self.baseline or self.runs[0]


@dataclass(frozen=True)
class Difference:
    """How a run does on a task, by one metric, against the baseline.

    before, after  the baseline's figure and the run's, on the items that both answered
    low, high      of the 95% interval of after - before; None where nothing is known of it
    n              items that both answered; None where the figures aren't of the same items
    chance         the sign test's probability if neither were better; None for `overall` and without items
    corrected      by Holm, over all tests of the comparison
    """

    run: str
    task: str
    metric: str
    before: float
    after: float
    low: float | None
    high: float | None
    n: int | None = None
    chance: float | None = None
    corrected: float | None = None

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def lower_is_better(self) -> bool:
        return self.metric in LOWER_IS_BETTER

    @property
    def sure(self) -> bool:
        """Whether it would be believed: by the corrected test, or by the interval where there is no test."""
        if self.corrected is not None:
            return self.corrected < 0.05
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@method(needs="run folders of evaluations", costs="seconds")
def evaluate_compare(recipe: CompareRecipe, run: Run) -> Path:
    """Compare evaluations item by item: differences with intervals, tests, cost a point, and a page."""
    if recipe.base not in recipe.runs:
        raise RecipeError(
            "baseline",
            found=str(recipe.base),
            expected=f"one of {', '.join(map(str, recipe.runs))}",
            mend="Name one of the runs that are compared.",
        )
    names = labels(recipe.runs)
    evaluations = dict(zip(names, map(Evaluation.read, recipe.runs), strict=True))
    base = names[recipe.runs.index(recipe.base)]
    found, notes = compare(evaluations, base, seed=recipe.seed, draws=recipe.draws)
    report = Report(f"against {base}", context={"baseline": base, "notes": notes})
    report.context["runs"] = {name: str(folder) for name, folder in zip(names, recipe.runs, strict=True)}
    report.context["differences"] = [asdict(each) for each in found]
    report.context["cost"] = {name: cost_per_point(each) for name, each in evaluations.items()}
    for each in found:
        spread = None if each.low is None or each.high is None else (each.high - each.low) / (2 * NORMAL_95)
        report.add(f"{each.run}: {each.task}", f"{each.metric} difference", each.change, stderr=spread, n=each.n)
    report.save(run.folder / RESULTS)
    for line in (*notes, *map(told, (each for each in found if each.sure or each.task == OVERALL))):
        run.tell(line)
    run.charge("compare")
    html = page.render(run.folder, evaluations, f"Compared with {base}", found, notes=notes)
    return page.write(run.folder, html)


def compare(
    evaluations: dict[str, Evaluation], base: str, *, seed: int = 0, draws: int = DRAWS
) -> tuple[list[Difference], list[str]]:
    """The differences of all others from the baseline, and in words what could not be compared.

    `RunError` for a run that has nothing in common with the baseline.
    """
    found: list[Difference] = []
    notes: list[str] = []
    for name, evaluation in evaluations.items():
        if name == base:
            continue
        before = evaluations[base]
        pairs = list(_paired(name, before, evaluation, seed, draws))
        pairs += _unpaired(name, before, evaluation, {(each.task, each.metric) for each in pairs})
        if not pairs:
            raise RunError(
                str(evaluation.folder),
                found="no item and no figure that the baseline has too",
                expected=f"the same tasks, with the same items, as {before.folder}",
                mend="Evaluate both with the same recipe, but for the model.",
            )
        found += pairs
        notes += _left_out(name, before, evaluation)
    return _corrected(found), notes


def cost_per_point(evaluation: Evaluation) -> dict[str, Any]:
    """What the model cost and what evaluating it did, in all and for each hundredth above chance.

    A model that isn't above chance has no points, so what one cost is None.
    """
    points = evaluation.points
    costs = {"training": evaluation.trained, "evaluation": evaluation.spent}
    return {
        "points": points,
        **{name: cost and vars(cost) for name, cost in costs.items()},
        **{
            f"{name} a point": vars(cost * (1 / points)) if cost and points > 0 else None
            for name, cost in costs.items()
        },
    }


def told(each: Difference) -> str:
    """A difference in a line."""
    figures = f"{each.before:.4f} -> {each.after:.4f}, {each.change:+.4f}"
    between = "" if each.low is None else f" (95%: {each.low:+.4f} to {each.high:+.4f})"
    items = "" if each.n is None else f", {units.count(each.n)} items"
    return f"{each.run}: {each.task} {each.metric} {figures}{between}{items}"


def _paired(name: str, before: Evaluation, after: Evaluation, seed: int, draws: int) -> Iterator[Difference]:
    """The mean over the tasks' main metrics; then every task and metric of which both answered the same items."""
    each: list[Difference] = []
    main: list[list[float]] = []
    figures: list[tuple[float, float]] = []
    for row in after.report.rows:
        one, other = before.scores(row.task, row.metric), after.scores(row.task, row.metric)
        both = sorted(one.keys() & other.keys())
        if not both:
            continue
        first, second = [one[key] for key in both], [other[key] for key in both]
        differences = [new - old for old, new in zip(first, second, strict=True)]
        sure = paired_bootstrap(first, second, seed=seed, draws=draws)
        means = sum(first) / len(both), sum(second) / len(both)
        found = Difference(name, row.task, row.metric, *means, sure.low, sure.high, len(both), sign_test(differences))
        each.append(found)
        if after.main_metrics[row.task] == row.metric and row.task in after.shares():
            main.append(differences)
            figures.append(means)
    if len(main) > 1:
        sure = mean_of_means(main, seed=seed, draws=draws)
        # A task of one item says nothing of how much it varies.
        low, high = (sure.low, sure.high) if min(map(len, main)) > 1 else (None, None)
        yield Difference(name, OVERALL, "score", *mean_pair(figures), low, high, sum(map(len, main)))
    yield from each


def _unpaired(name: str, before: Evaluation, after: Evaluation, paired: set[tuple[str, str]]) -> Iterator[Difference]:
    """Figures that no items pair, as independent samples of the same data.

    Bits a byte are such between vocabularies; scores of items that aren't the same are not compared at all.
    """
    if before.report.context.get("data") != after.report.context.get("data"):
        return
    same = {each.id for each in before.outcomes} == {each.id for each in after.outcomes}
    rows = [{(row.task, row.metric): row for row in each.report.rows} for each in (before, after)]
    for row in compare_rows(before.report, after.report):
        key = row.task, row.metric
        answered = row.task in before.main_metrics and row.task in after.main_metrics
        if key in paired or (row.metric != "bpb" and (answered or not same)):
            continue
        sure = [each.interval(by_key[key]) for each, by_key in zip((before, after), rows, strict=True)]
        halves = [(each.high - each.low) / 2 for each in sure if each]
        half = math.hypot(*halves) if len(halves) == 2 else None
        low, high = (None, None) if half is None else (row.change - half, row.change + half)
        yield Difference(name, row.task, row.metric, row.old, row.new, low, high)


def _left_out(name: str, before: Evaluation, after: Evaluation) -> Iterator[str]:
    """Tasks that the two runs don't share, wholly or in part."""
    ids = [
        {task: set(each.scores(task, metric)) for task, metric in each.main_metrics.items()} for each in (before, after)
    ]
    for task in dict.fromkeys([*ids[0], *ids[1]]):
        one, other = (each.get(task, set()) for each in ids)
        if not one & other:
            yield f"{name}: {task} is left out, since no item of it was answered in both runs."
        elif one != other:
            yield f"{name}: of {task}, {len(one & other)} of {len(one | other)} items were answered in both runs."


def _corrected(found: Sequence[Difference]) -> list[Difference]:
    """With Holm's probabilities, over all tests at once."""
    corrected = iter(holm([each.chance for each in found if each.chance is not None]))
    return [each if each.chance is None else replace(each, corrected=next(corrected)) for each in found]
