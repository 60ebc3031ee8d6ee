"""Ask a model any items: a JSON lines file, such as the examination of an invented world."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from espalier.errors import DataError
from espalier.evaluate.ask import AskRecipe, ask
from espalier.evaluate.items import Item, read_items
from espalier.method import method
from espalier.report import Report
from espalier.run import RESULTS, Run


class ItemsRecipe(AskRecipe):
    """items: JSON lines of {task, prompt, gold, options?, tags?}; and whom to ask them."""

    items: Path


@method(needs="a model folder or a URL, and a file of items", costs="a pass an option, or a generation an item")
def evaluate_items(recipe: ItemsRecipe, run: Run) -> Report:
    """Ask a model the items of a file: a score a task, and an outcome an item in samples.jsonl."""
    report = ask(read_tasks(recipe.items), recipe, run)
    report.save(run.folder / RESULTS)
    return report


def read_tasks(path: Path) -> dict[str, list[Item]]:
    """The items of a file, by the task that they belong to; `DataError` for a file without any."""
    tasks: dict[str, list[Item]] = defaultdict(list)
    for item in read_items(path):
        tasks[item.task].append(item)
    if not tasks:
        raise DataError(str(path), found="no item", expected="a JSON line an item", mend="Name another file.")
    return dict(tasks)
