"""The IQ evaluation of FLM-101B: four groups of tasks that ask for thinking in the context, not for knowledge."""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from espalier.errors import RecipeError
from espalier.evaluate.ask import AskRecipe, ask
from espalier.evaluate.intervals import binomial
from espalier.evaluate.iq.alphabets import Split
from espalier.evaluate.iq.files import FILES, items_of
from espalier.evaluate.iq.setting import Instruction
from espalier.evaluate.iq.tasks import GROUPS, TASKS, UNMEASURED, WRITTEN, Task
from espalier.evaluate.items import SAMPLES, Item, Outcome, read_outcomes
from espalier.evaluate.told import tell_and_save
from espalier.method import method
from espalier.report import Report, Row
from espalier.run import Run

OVERALL = "iq"
GROUP_OF = {name: task.group for name, task in (*TASKS.items(), *FILES.items())}


class IqRecipe(AskRecipe):
    """Which tasks, in which languages, and how hard.

    tasks        names of tasks or groups; all that need no file, and those whose file is named, if not stated
    languages    of the items, in turn; a task has those in which it can be said
    n            items of each task; the paper's numbers if not stated
    split        which half of the letters, words and names
    shots        examples before each question (of each class), of tasks that show some
    lengths      least and most, by task: letters, words, numbers or sentences, as the task counts
    instruction  what classes mean is left to the examples, or "guided"
    files        the user's own, by task: boolq, wic, rte, wsc, afqmc, csl, ocnli, cluewsc2020, babi_1, babi_2
    """

    tasks: tuple[str, ...] = ()
    languages: tuple[str, ...] = Field(default=("en",), min_length=1)
    n: int | None = Field(default=None, gt=0)
    split: Split = "test"
    shots: int | None = Field(default=None, gt=0, le=8)
    lengths: dict[str, tuple[int, int]] = Field(default_factory=dict)
    instruction: Instruction = "induction"
    files: dict[str, Path] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name, (least, most) in self.lengths.items():
            if name not in TASKS or TASKS[name].lengths == UNMEASURED:
                raise ValueError(f"lengths of {name}, which has none")
            if not TASKS[name].shortest <= least <= most:
                raise ValueError(f"lengths of {name} from {least} to {most}, where {TASKS[name].shortest} is the least")
        return self


@method(paper="arXiv 2309.03852", needs="a model folder or a URL", costs="the tokens of the items", status="proven")
def evaluate_iq(recipe: IqRecipe, run: Run) -> Path:
    """Ask for rules, patterns and facts that only the prompt holds, with letters and words drawn anew for each item."""
    items = chosen_items(recipe)
    report = ask(items, recipe, run)
    add_scores(report, read_outcomes(run.folder / SAMPLES))
    return tell_and_save(report, run)


def chosen_items(recipe: IqRecipe) -> dict[str, list[Item]]:
    """The items of each task that a recipe asks for, in the order of the groups."""
    for name in recipe.files:
        _require_known(name, FILES, "files")
    for language in recipe.languages:
        _require_known(language, WRITTEN, "languages")
    return {name: _items(name, recipe) for name in _chosen(recipe)}


def add_scores(report: Report, outcomes: Sequence[Outcome]) -> None:
    """Add the intervals of the tasks, the balanced accuracy of classes, and the means of the groups and of all.

    A group's score is the mean of its tasks' scores, whatever their sizes, and so is the whole's.
    """
    scored: dict[str, list[Row]] = defaultdict(list)
    for row in [row for row in report.rows if row.metric in ("acc", "exact_match")]:
        assert row.n, "a task without an answer has no row"
        about = report.context["tasks"][row.task]
        interval = binomial(row.value * row.n, row.n)
        about |= {"group": GROUP_OF[row.task], "metric": row.metric, "interval": [interval.low, interval.high]}
        scored[GROUP_OF[row.task]].append(row)
    for task, value in balanced_accuracies(outcomes).items():
        report.add(task, "balanced_acc", value, note="mean of the classes")
    report.context["groups"] = {group: [row.task for row in scored[group]] for group in GROUPS if scored[group]}
    for group in report.context["groups"]:
        report.rows.append(_mean(group, scored[group]))
    if scored:  # the budget may have ended before the first answer
        report.rows.append(_mean(OVERALL, [row for rows in scored.values() for row in rows]))


def balanced_accuracies(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Of each task with classes the mean over them of the share that is right."""
    right: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for outcome in outcomes:
        if "label" in outcome.tags:
            metric = "acc" if "acc" in outcome.scores else "exact_match"
            right[outcome.task][outcome.tags["label"]].append(outcome.scores[metric])
    return {
        task: sum(sum(scores) / len(scores) for scores in labels.values()) / len(labels)
        for task, labels in right.items()
    }


def _mean(name: str, rows: Sequence[Row]) -> Row:
    """The mean of tasks' scores; they are independent, so their variances add."""
    errors = [row.stderr for row in rows if row.stderr is not None]
    sure = math.hypot(*errors) / len(rows) if len(errors) == len(rows) else None
    value = sum(row.value for row in rows) / len(rows)
    return Row(name, "score", value, stderr=sure, n=sum(row.n or 0 for row in rows), note="mean of the tasks")


def _chosen(recipe: IqRecipe) -> list[str]:
    """The names of the tasks, those that a group stands for one by one."""
    for name in recipe.tasks:
        _require_known(name, (*GROUPS, *GROUP_OF), "tasks")
        if name in FILES and name not in recipe.files:
            raise RecipeError(f"tasks: {name}", found="no file", expected="its rows", mend=f"Set files.{name}=PATH.")
        if name in TASKS and not _spoken(TASKS[name], recipe):
            raise RecipeError(
                f"tasks: {name}",
                found=f"languages {', '.join(recipe.languages)}",
                expected=f"one of {', '.join(TASKS[name].languages)}",
                mend="Add one to languages.",
            )
    wanted = set(recipe.tasks or GROUPS)
    possible = [name for name in GROUP_OF if name in recipe.files or (name in TASKS and _spoken(TASKS[name], recipe))]
    chosen = [name for name in possible if {name, GROUP_OF[name]} & wanted]
    return sorted(chosen, key=lambda name: GROUPS.index(GROUP_OF[name]))


def _spoken(task: Task, recipe: IqRecipe) -> list[str]:
    """The languages of a recipe in which a task can be said."""
    return [language for language in recipe.languages if language in task.languages]


def _items(name: str, recipe: IqRecipe) -> list[Item]:
    if name in FILES:
        return items_of(
            name,
            recipe.files[name],
            recipe.n or FILES[name].n,
            split=recipe.split,
            shots=recipe.shots,
            instruction=recipe.instruction,
            seed=recipe.seed,
        )
    task = TASKS[name]
    return list(
        task.items(
            recipe.n or task.n,
            _spoken(task, recipe),
            split=recipe.split,
            shots=recipe.shots,
            lengths=recipe.lengths.get(name),
            instruction=recipe.instruction,
            seed=recipe.seed,
        )
    )


def _require_known(name: str, known: Mapping[str, object] | Sequence[str], key: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    raise RecipeError(
        key,
        found=repr(name),
        expected=f"one of {', '.join(known)}",
        mend=f"Did you mean {near[0]!r}?" if near else "Choose one of these.",
    )
