"""How an evaluation ends: results in a file, a table on the terminal, a page to look at."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from espalier.evaluate import page
from espalier.evaluate.evaluation import Evaluation, training_cost
from espalier.report import Report
from espalier.run import RESULTS, VERSIONED, Run


def tell_and_save(report: Report, run: Run) -> Path:
    """Write results.json and the page, and show the figures; the page's path.

    What the model had cost and where it was asked are kept with the results.
    """
    report.context["trained"] = training_cost(report.subject)
    report.context["machine"] = machine()
    report.save(run.folder / RESULTS)
    run.charge("evaluate")
    evaluation = Evaluation.read(run.folder)
    _show(evaluation)
    return page.write(run.folder, page.render(run.folder, {run.name: evaluation}, report.subject))


def machine() -> dict[str, str]:
    """Where this is, in words."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    return {"machine": f"{platform.machine()}, {os.cpu_count()} CPUs", "python": platform.python_version(), **versions}


def _show(evaluation: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", "value", "95%", "chance", "items", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in evaluation.report.rows:
        chance = evaluation.chance_of(row.task, row.metric)
        guessed = "" if chance is None else page.text_of(row.metric, chance)
        sure = page.between(row.metric, evaluation.interval(row))
        items = f"{row.n:,}" if row.n else ""
        table.add_row(row.task, row.metric, page.text_of(row.metric, row.value), sure, guessed, items)
    Console().print(table)
