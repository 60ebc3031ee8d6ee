"""Asking a model a set of items: priced beforehand, metered, kept answer by answer, as many as precision asks for.

What was answered is in the run's samples.jsonl at once, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from pydantic import Field
from rich.progress import Progress

from espalier import files, units
from espalier.budget import hardware, price
from espalier.budget.plan import BudgetRecipe
from espalier.errors import BudgetError
from espalier.evaluate.intervals import stderr
from espalier.evaluate.items import SAMPLES, Askable, Outcome, Scoring, fingerprint, read_outcomes
from espalier.infer.engine import Answer, Engine, open_engine
from espalier.infer.recipe import EngineRecipe
from espalier.ledger import Cost
from espalier.recipe import ByField
from espalier.report import Report
from espalier.run import Run

# Items of a task before its standard error says how many more are needed. Where a budget may end the asking no round
# has more: an engine answers in an order of its own, so only whole rounds are a fair sample.
ROUND = 50
# Seconds between two entries in the ledger: a process that is killed has spent no more than these unseen.
ENTERED_EVERY = 5.0


class AskRecipe(EngineRecipe):
    """Whom to ask, how many items, and for how much.

    limit    most items of a task, drawn by the seed; all if not stated
    stderr   the standard error that is enough: a task's items are asked until its scores are as sure as that
    scoring  "options" compares the probabilities of given options where an item has some; "written" has every answer
             written and compares the text
    """

    limit: int | None = Field(default=None, gt=0)
    stderr: float | None = Field(default=None, gt=0)
    scoring: Scoring = "options"
    seed: int = 0
    budget: ByField[BudgetRecipe] = BudgetRecipe()


def ask(items: Mapping[str, Sequence[Askable]], recipe: AskRecipe, run: Run, engine: Engine | None = None) -> Report:
    """Ask the items of each task; rows of (task, metric), outcomes in samples.jsonl, the cost in the ledger.

    Raises `BudgetError` when it would cost more than the budget; what was begun ends, with fewer items, at the cap.
    """
    _price(recipe, run)
    opened = engine or open_engine(recipe, run)
    try:
        run.charge("load")
        chosen = {task: _drawn(each, recipe) for task, each in items.items()}
        found = _Asked(chosen, recipe, run, opened)
        found.require_affordable()
        found.go_on()
        return _report(chosen, found.outcomes, recipe, opened)
    finally:
        if engine is None:
            opened.close()


class _Asked:
    """Items that are being asked, and what came of them."""

    def __init__(self, items: Mapping[str, Sequence[Askable]], recipe: AskRecipe, run: Run, engine: Engine) -> None:
        self.items, self.recipe, self.run, self.engine = items, recipe, run, engine
        self.path = run.folder / SAMPLES
        with self.path.open("a+b") as file:
            files.cut_torn_line(file)
        before = read_outcomes(self.path)
        self.outcomes = {outcome.id: outcome for outcome in before}

    def require_affordable(self) -> None:
        """Say what it will cost, at most where precision decides; refuse what the budget can't pay."""
        left = [item for each in self.items.values() for item in self._left(each)]
        asked = [request for item in left for request in item.requests(self.recipe.scoring)]
        expected = self.engine.estimate(asked)
        most = "at most " if self.recipe.stderr else ""
        self.run.tell(
            f"{len(left):,} items, {len(asked):,} requests: {most}{units.duration(expected.seconds)}, "
            f"{units.money(expected.usd)}, {units.si(expected.kwh * 1000, 'Wh')} (estimated)"
        )
        if not self.recipe.stderr and not self.run.affords(expected):
            short = self.run.ledger.cap.exceeded_by(self.run.ledger.total + expected)
            assert short, "what isn't affordable exceeds the cap"
            raise BudgetError(
                f"budget: {short}",
                found=units.amount(getattr(self.run.ledger.cap, short), short),
                expected=f"{units.amount(getattr(expected, short), short)} for {len(left):,} items",
                mend="Raise it, or ask less with limit=... or stderr=...",
            )

    def go_on(self) -> None:
        """Ask what is left: all at once, or by rounds until every task is as sure as the recipe wants."""
        while batch := [item for task in self.items for item in self._round(task)]:
            if not self._ask(batch):
                if any(self._round(task) for task in self.items):
                    self.run.tell("The budget is spent: the rest of the items isn't asked.")
                return

    def _left(self, items: Sequence[Askable]) -> list[Askable]:
        return [item for item in items if item.id not in self.outcomes]

    def _round(self, task: str) -> list[Askable]:
        """The next items of a task; none when it is sure enough or has no more."""
        left = self._left(self.items[task])
        done = [outcome for outcome in self.outcomes.values() if outcome.task == task]
        wanted = len(left)
        if self.recipe.stderr is not None and not (done and not done[0].scores):
            wanted = max(items_needed(done, self.recipe.stderr) - len(done), 0)
        return left[: min(wanted, ROUND) if self.run.ledger.cap.stated() else wanted]

    def _ask(self, items: Sequence[Askable]) -> bool:
        """Ask these items; whether the budget lasted."""
        asked = [item.requests(self.recipe.scoring) for item in items]
        owners = [(number, place) for number, each in enumerate(asked) for place in range(len(each))]
        answers: dict[int, dict[int, Answer]] = defaultdict(dict)
        spent, unpaid, done, lasts = Cost(), Cost(), 0, True
        try:
            with (
                contextlib.closing(self.engine.answers([one for each in asked for one in each])) as stream,
                Progress(transient=True) as progress,
                self.path.open("a", encoding="utf-8") as file,
            ):
                bar = progress.add_task("items", total=len(items))
                for index, answer in stream:
                    number, place = owners[index]
                    answers[number][place] = answer
                    cost = Cost(flops=answer.cost.flops, usd=answer.cost.usd)
                    spent, unpaid = spent + cost, unpaid + cost
                    if len(answers[number]) < len(asked[number]):
                        continue
                    outcome = items[number].judge([one for _, one in sorted(answers.pop(number).items())])
                    self.outcomes[outcome.id] = outcome
                    with files.disk_errors(self.path):
                        file.write(json.dumps(asdict(outcome), ensure_ascii=False) + "\n")
                        file.flush()
                    progress.advance(bar)
                    done += 1
                    if self.run.uncharged_seconds > ENTERED_EVERY:
                        unpaid = self._enter(unpaid)
                    lasts = self.run.affords(unpaid + spent * (1 / done))  # one more like these
                    if not lasts:
                        break
        except BudgetError:  # an engine that spends money knows what those in flight may cost
            lasts = False
        finally:  # what was spent is entered, however it ended
            self._enter(unpaid)
        return lasts

    def _enter(self, cost: Cost) -> Cost:
        """Put a cost into the ledger; what is left to put there."""
        self.run.charge("evaluate", flops=cost.flops, usd=cost.usd)
        return Cost()


def items_needed(outcomes: Sequence[Outcome], wanted: float) -> int:
    """How many items a task needs for the standard error that is wanted, by those that were answered.

    Scores that are all alike so far are taken as if one more had been 1 away.
    """
    n = len(outcomes)
    if n < ROUND:
        return ROUND
    most = 0.0
    for scores in by_metric(outcomes).values():
        spread = statistics.pvariance(scores)
        most = max(most, spread or n / (n + 1) ** 2)
    return math.ceil(most / wanted**2) + 1


def by_metric(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """The scores of each metric; a task may have some that not every document has."""
    found: dict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        for metric, score in outcome.scores.items():
            found[metric].append(score)
    return dict(found)


def _drawn(items: Sequence[Askable], recipe: AskRecipe) -> list[Askable]:
    """As many items as the limit says, each once, in an order that the seed draws."""
    drawn = list({item.id: item for item in items}.values())
    random.Random(recipe.seed).shuffle(drawn)
    return drawn[: recipe.limit]


def _price(recipe: AskRecipe, run: Run) -> None:
    """What a second costs here; a model behind a URL costs by the token, not by this machine's seconds."""
    run.ledger.cap = recipe.budget.cap()
    if not recipe.url:
        row = hardware.here(home=files.home())
        told = recipe.budget.model_dump(include={"pue", "usd_per_hour", "watts", "kgco2e_per_kwh"})
        run.price(price.rates(row, **told))


def _report(
    items: Mapping[str, Sequence[Askable]], outcomes: Mapping[str, Outcome], recipe: AskRecipe, engine: Engine
) -> Report:
    """A row a task and metric, in the order of the tasks."""
    report = Report(recipe.model, context={"model": engine.identity, "scoring": recipe.scoring, "tasks": {}})
    for task, each in items.items():
        done = [outcomes[item.id] for item in each if item.id in outcomes]
        report.context["tasks"][task] = {
            "items": fingerprint(each),
            "answered": len(done),
            "of": len(each),
            "chance": sum(outcome.chance for outcome in done) / max(len(done), 1),
        }
        for metric, scores in by_metric(done).items():
            report.add(task, metric, sum(scores) / len(scores), stderr=stderr(scores), n=len(scores))
    return report
