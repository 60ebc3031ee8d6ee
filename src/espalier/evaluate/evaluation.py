"""An evaluation as its run folder keeps it: what came of it, answer by answer, and what it and the model have cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from espalier import records
from espalier.errors import RunError
from espalier.evaluate.intervals import Interval, binomial, stderr
from espalier.evaluate.items import SAMPLES, Outcome, read_outcomes
from espalier.folder import MADE, ModelFolder
from espalier.ledger import Cost, Ledger
from espalier.report import Report, Row
from espalier.run import LEDGER, RECIPE, RESULTS

# Metrics of which less is better, ours and lm-eval's; of all others more is.
LOWER_IS_BETTER = ("loss", "bpb", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score")
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Evaluation:
    """A run folder's files, read once.

    outcomes  of the items that were answered; none where a method keeps none
    spent     what the evaluation cost
    recipe    as it was resolved, in YAML
    """

    folder: Path
    report: Report
    outcomes: tuple[Outcome, ...]
    spent: Cost
    recipe: str

    @classmethod
    def read(cls, folder: Path) -> Evaluation:
        """`RunError` where no evaluation was finished."""
        if not (folder / RESULTS).is_file():
            raise RunError(
                str(folder),
                found=f"no {RESULTS}",
                expected="the run folder of a finished evaluation",
                mend="List the runs with `espalier runs`, and finish this one by running its recipe again.",
            )
        samples = folder / SAMPLES
        return cls(
            folder,
            Report.load(folder / RESULTS),
            tuple(read_outcomes(samples)) if samples.exists() else (),
            Ledger(folder / LEDGER).total,
            records.read_signed(folder / RECIPE),
        )

    @property
    def trained(self) -> Cost | None:
        """What the model and its ancestors had cost; None where nobody recorded it."""
        told = self.report.context.get("trained")
        return Cost(**told) if told else None

    @cached_property
    def main_metrics(self) -> dict[str, str]:
        """Of each task whose items were answered, the metric of single items that is reported first."""
        scored = {(outcome.task, metric) for outcome in self.outcomes for metric in outcome.scores}
        found: dict[str, str] = {}
        for row in self.report.rows:
            if (row.task, row.metric) in scored:
                found.setdefault(row.task, row.metric)
        return found

    def scores(self, task: str, metric: str) -> dict[str, float]:
        """Of each item of a task by its id."""
        return {
            outcome.id: outcome.scores[metric]
            for outcome in self.outcomes
            if outcome.task == task and metric in outcome.scores
        }

    def chance(self, task: str) -> float:
        """The mean score of an answerer that knows nothing."""
        chances = [outcome.chance for outcome in self.outcomes if outcome.task == task]
        return sum(chances) / len(chances) if chances else 0.0

    def chance_of(self, task: str, metric: str) -> float | None:
        """That of a score which single items have; None of what is made of scores, such as a gain, and of losses."""
        known = self.scores(task, metric) and self._is_share(task, metric)
        return self.chance(task) if known else None

    def shares(self) -> dict[str, tuple[float, float]]:
        """(score, chance) of each task whose main metric is a share."""
        return {
            task: (self.report.value(task, metric), self.chance(task))
            for task, metric in self.main_metrics.items()
            if self._is_share(task, metric)
        }

    def _is_share(self, task: str, metric: str) -> bool:
        higher = (
            self.report.context.get("higher_is_better", {}).get(task, {}).get(metric, metric not in LOWER_IS_BETTER)
        )
        return higher is not False and all(0 <= score <= 1 for score in self.scores(task, metric).values())

    def groups(self) -> dict[str, tuple[float, float]]:
        """(score, chance) of each group that the results name, its tasks counting alike."""
        shares = self.shares()
        by_group = {
            group: [shares[task] for task in tasks if task in shares]
            for group, tasks in self.report.context.get("groups", {}).items()
        }
        return {group: mean_pair(each) for group, each in by_group.items() if each}

    @property
    def overall(self) -> tuple[float, float] | None:
        """(score, chance), every task counting alike; None where no task has a share."""
        shares = self.shares()
        return mean_pair([shares[task] for task in self._own]) if self._own else None

    @property
    def overall_interval(self) -> Interval | None:
        """Of the overall score."""
        return self._together(self._own)

    @property
    def _own(self) -> list[str]:
        """The tasks whose scores are shares, but for those that another model was asked (evaluate.test_taking)."""
        others = self.report.context.get("after", {}).get("tasks", {})
        return [task for task in self.shares() if task not in others]

    def _together(self, tasks: Sequence[str]) -> Interval | None:
        """Of the mean over tasks: independent, so what each lies away from its ends adds up in squares."""
        known = [sure for task in tasks if (sure := self.interval(self.row(task)))]
        if not known or len(known) < len(tasks):
            return None
        value = sum(each.value for each in known) / len(known)
        ends = zip(*((each.value - each.low, each.high - each.value) for each in known), strict=True)
        low, high = (math.hypot(*side) / len(known) for side in ends)
        return Interval(value, value - low, value + high)

    def row(self, task: str) -> Row:
        """Of a task's main metric."""
        return next(row for row in self.report.rows if (row.task, row.metric) == (task, self.main_metrics[task]))

    @property
    def points(self) -> float:
        """How many hundredths the score is above chance."""
        score, chance = self.overall or (0.0, 0.0)
        return 100 * (score - chance)

    def interval(self, row: Row) -> Interval | None:
        """Of a row: Wilson's where each item is right or wrong, else by its standard error, if there is one.

        A group's is made of its tasks'.
        """
        if row.metric == "score" and (tasks := self.report.context.get("groups", {}).get(row.task)):
            return self._together([task for task in tasks if task in self.main_metrics])
        scores = list(self.scores(row.task, row.metric).values())
        if scores and all(score in (0, 1) for score in scores):
            return binomial(sum(scores), len(scores))
        error = row.stderr if row.stderr is not None else stderr(scores)
        if error == 0 and row.n and row.value in (0, 1):
            return binomial(row.value * row.n, row.n)  # all went one way, so their spread says nothing
        return (
            None if error is None else Interval(row.value, row.value - NORMAL_95 * error, row.value + NORMAL_95 * error)
        )


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest names that tell folders apart: their own, or their paths."""
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def training_cost(model: str) -> dict[str, Any] | None:
    """What a model folder and its ancestors cost, by their made.json; None for what isn't one of ours."""
    if not (Path(model) / MADE).is_file():
        return None
    costs = [Cost(**made["cost"]) for made in ModelFolder(Path(model)).lineage() if "cost" in made]
    return vars(sum(costs, Cost())) if costs else None


def mean_pair(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The means of what comes first and of what comes second."""
    return sum(one for one, _ in pairs) / len(pairs), sum(other for _, other in pairs) / len(pairs)
