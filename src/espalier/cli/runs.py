"""`espalier runs`, `show`, `report` and `env`: what is there."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from espalier import errors, records, units
from espalier.cli.methods import Runs
from espalier.ledger import Ledger
from espalier.report import Report
from espalier.run import FINAL, LEDGER, METRICS, PAGE, PLAN, RECIPE, RESULTS, status, why

Name = Annotated[str, typer.Argument(metavar="RUN", help="name or path of a run folder", show_default=False)]


def register(app: typer.Typer) -> None:
    app.command("runs")(list_runs)
    app.command("show")(show)
    app.command("report")(report)
    app.command("env")(env)


def list_runs(runs: Runs = Path("runs")) -> None:
    """List the runs: status, steps, held-out loss, cost."""
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "status", "step", "held-out loss", "time", "cost", box=None, pad_edge=False)
    for folder in sorted(runs.glob("*/")) if runs.is_dir() else []:
        if (folder / RECIPE).exists():
            try:
                table.add_row(folder.name, *_told(folder))
            except errors.RunError as error:
                table.add_row(folder.name, f"damaged: {Path(error.where).name}")
    if table.row_count:
        Console().print(table)
    else:
        typer.echo(f"No runs in {runs}. `espalier demo` makes one.")


def show(run: Name, runs: Runs = Path("runs")) -> None:
    """Show a run: plan against fact and stages, or what a method found, and where its files are."""
    from espalier import story

    folder = find(run, runs)
    if ended := why(folder):
        typer.echo(f"The run {ended}.")
    if (folder / PLAN).exists() or status(folder) != "finished":
        story.tell(folder)
    elif (folder / RESULTS).exists():
        typer.echo(Report.load(folder / RESULTS))
    else:
        typer.echo(folder)
    for path in (folder / FINAL, folder / PAGE):
        if path.exists():
            typer.echo(path)


def report(run: Name, runs: Runs = Path("runs")) -> None:
    """Make a run's page again, and print its path; a method's page is as the method left it."""
    from espalier import story

    folder = find(run, runs)
    left = (folder / PAGE).exists() and not (folder / PLAN).exists()
    typer.echo(folder / PAGE if left else story.write_page(folder))


def env() -> None:
    """Print versions and the machine, for a bug report."""
    typer.echo(f"python {platform.python_version()} on {platform.platform()}")
    for requirement in importlib.metadata.requires("espalier") or []:
        if "extra ==" not in requirement:
            name = requirement.split("<")[0].split(">")[0].split("=")[0].strip()
            typer.echo(f"{name} {importlib.metadata.version(name)} ({requirement})")


def find(run: str, runs: Path) -> Path:
    """The folder of a run named by its path or by its name in `runs`."""
    for folder in (Path(run), runs / run):
        if (folder / RECIPE).exists():
            return folder
    known = sorted(path.parent.name for path in runs.glob(f"*/{RECIPE}"))
    raise errors.RunError(
        run,
        found="no run of that name",
        expected=f"one of {', '.join(known)}" if known else f"a run in {runs}",
        mend="List them with `espalier runs`.",
    )


def _told(folder: Path) -> Iterator[str]:
    """The columns of a run: status, step, held-out loss, time, cost."""
    spent = Ledger(folder / LEDGER).total
    yield status(folder)
    yield str(_last(folder, "step", ""))
    yield _number(_last(folder, "eval_loss", None))
    yield units.duration(spent.seconds)
    yield units.money(spent.usd)


def _last(folder: Path, key: str, default: object) -> object:
    return next((line[key] for line in reversed(list(records.read_lines(folder / METRICS))) if key in line), default)


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else ""
