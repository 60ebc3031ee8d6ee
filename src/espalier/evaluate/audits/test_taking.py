"""How much of a score is knowledge: what cues alone earn, and what was gained by learning.

A model that answers an invented world's items before it has read the world's book shows its test-taking skill alone
(arXiv 2406.02394). What the same model answers better afterwards is knowledge, since nothing else has changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from espalier.errors import DataError
from espalier.evaluate.ask import AskRecipe, ask
from espalier.evaluate.asked import read_tasks
from espalier.evaluate.audits.cues import cues
from espalier.evaluate.intervals import Interval, binomial, paired_bootstrap, stderr
from espalier.evaluate.items import SAMPLES, Item, Outcome, read_outcomes
from espalier.evaluate.told import tell_and_save
from espalier.method import method
from espalier.report import Report
from espalier.run import Run


class TakingRecipe(AskRecipe):
    """items: a file of items with options; model: who answers them; after: the same model when it has learnt."""

    items: Path
    after: str = ""


@method(
    paper="arXiv 2406.02394",
    needs="a model, and a file of items with options",
    costs="a pass an option, of each model; the cues cost no model",
)
def evaluate_test_taking(recipe: TakingRecipe, run: Run) -> Path:
    """Tell knowledge from test-taking: a model's score beside what cues alone earn, and its gain by learning.

    Rows a task: the model's own; `cue: RULE` of every rule of `cues`; `explained`, the share of the score above chance
    that the best cue earns too, where the score is above chance for sure (the best of five on these very items: with
    few of them rather too much); with `after`, that model's own rows and the `gain`, a difference of scores. Raises
    `DataError` for an item without options.
    """
    tasks = read_tasks(recipe.items)
    _require_options(tasks, recipe.items)
    report = ask(tasks, recipe, run)
    if recipe.after:
        later = {_later(task): [_again(item) for item in items] for task, items in tasks.items()}
        learnt = ask(later, recipe.model_copy(update={"model": recipe.after}), run)
        report.rows += learnt.rows
        report.context["after"] = learnt.context
    outcomes = {outcome.id: outcome for outcome in read_outcomes(run.folder / SAMPLES)}
    for task, items in tasks.items():
        if any(item.id in outcomes for item in items):  # the budget may have ended before
            run.tell(f"{task}: {_audited(report, task, items, outcomes)}.")
    return tell_and_save(report, run)


def _audited(report: Report, task: str, items: Sequence[Item], outcomes: Mapping[str, Outcome]) -> str:
    """Add a task's rows; what they say in a line."""
    answered = [item for item in items if item.id in outcomes]
    before = [_score(outcomes[item.id]) for item in answered]
    own = binomial(sum(before), len(before))
    chance = sum(item.chance for item in answered) / len(answered)
    earned = {}
    for rule, scores in cues(answered).items():
        earned[rule] = sum(scores) / len(scores)
        report.add(task, f"cue: {rule}", earned[rule], stderr=stderr(scores), n=len(scores))
    best = max(earned, key=lambda rule: earned[rule])
    said = [f"{_share(own)}, where chance is {chance:.1%} and the best cue ({best}) earns {earned[best]:.1%}"]
    if own.low > chance:
        explained = min(max(earned[best] - chance, 0.0) / (own.value - chance), 1.0)
        report.add(task, "explained", explained, n=len(before), note=f"share of what is above chance, by {best}")
        said.append(f"cues explain {explained:.0%} of what is above chance")
    pairs = [(item, later) for item in answered if (later := _again(item)).id in outcomes]
    if pairs:
        first, second = ([_score(outcomes[item.id]) for item in side] for side in zip(*pairs, strict=True))
        gain = paired_bootstrap(first, second)
        report.add(task, "gain", gain.value, n=len(pairs), note=f"{gain.low:.4f} to {gain.high:.4f}")
        said.append(f"learning gained {100 * gain.value:.1f} points ({100 * gain.low:.1f} to {100 * gain.high:.1f})")
    return "; ".join(said)


def _later(task: str) -> str:
    return f"{task} (after)"


def _again(item: Item) -> Item:
    """The same item when it is asked of the model that has learnt: an outcome of its own in the same file."""
    return replace(item, task=_later(item.task))


def _score(outcome: Outcome) -> float:
    """By the first metric: whether the most probable option is right, or what was written."""
    return next(iter(outcome.scores.values()))


def _share(interval: Interval) -> str:
    return f"{interval.value:.1%} ({interval.low:.1%} to {interval.high:.1%})"


def _require_options(tasks: Mapping[str, Sequence[Item]], path: Path) -> None:
    without = next((item for items in tasks.values() for item in items if not item.options), None)
    if without:
        raise DataError(
            str(path),
            found=f"an item without options: {without.prompt[:60]!r}",
            expected="items with options to choose among",
            mend="Leave such items out; `espalier evaluate items` asks them.",
        )
