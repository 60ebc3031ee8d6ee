"""`espalier run` and `espalier demo`: the main job."""

from __future__ import annotations

from importlib.resources import files as package_files
from pathlib import Path
from typing import Annotated

import typer

from espalier.cli.methods import AcceptChanges, AcceptData, Overrides, Runs

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and its price, and stop.")]


def register(app: typer.Typer) -> None:
    app.command("run")(run)
    app.command("demo")(demo)


def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file", show_default=False)],
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    dry_run: DryRun = False,
    accept_changes: AcceptChanges = "",
    accept_data: AcceptData = "",
) -> None:
    """Plan, train by growing, evaluate and report, as a recipe says. Run it again to take up an unfinished run."""
    from espalier import pipeline

    raise typer.Exit(
        pipeline.main(
            recipe,
            overrides or [],
            runs=runs,
            dry_run=dry_run,
            tell=typer.echo,
            accept=accept_changes.split(","),
            accept_data=accept_data,
        )
    )


def demo(overrides: Overrides = None, runs: Runs = Path("runs"), dry_run: DryRun = False) -> None:
    """Grow a small model on Python's own library sources, in minutes on two CPU cores."""
    run(Path(str(package_files("espalier") / "recipes" / "pretrain" / "demo.yaml")), overrides, runs, dry_run)
