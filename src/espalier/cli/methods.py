"""`espalier methods`, `espalier schema`, and a command `espalier VERB METHOD key=value ...` for every method."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from espalier import method, recipe

Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value settings", show_default=False)]
File = Annotated[Path | None, typer.Option("--recipe", help="YAML file with settings.")]
RunName = Annotated[str | None, typer.Option("--name", help="Name of the run folder.")]
OnlyResolve = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")]
AcceptChanges = Annotated[
    str, typer.Option(metavar="KEY,KEY", help="Changed keys by which the rest of a run may be computed otherwise.")
]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of the run folders.", envvar="ESPALIER_RUNS")]
AcceptData = Annotated[str, typer.Option(metavar="HASH", help="Go on with these other data.")]


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)
    app.command("methods")(list_methods)
    app.command("schema")(print_schema)
    for verb in method.VERBS:
        app.command(verb, help=f"Methods that {_PURPOSE[verb]}; alone, lists them.")(_verb_command(verb))


_PURPOSE = {
    "budget": "measure and price",
    "data": "prepare text",
    "grow": "make a model larger",
    "synth": "write data",
    "evaluate": "find out what a model can do",
}


def list_methods(verb: Annotated[str | None, typer.Argument(help="only this verb's")] = None) -> None:
    """List the methods: what each does, from which paper, and whether its effect is proven here."""
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "what it does", "paper", "status", box=None, pad_edge=False)
    for card in method.cards():
        if verb in (None, card.verb):
            table.add_row(card.full_name, card.summary, card.paper, card.status)
    Console().print(table)


def print_schema(
    name: Annotated[str, typer.Argument(metavar="METHOD", help="'run', or a name from `methods`")],
) -> None:
    """Print a recipe's JSON schema."""
    if name == "run":
        from espalier.pipeline import PretrainRecipe

        typer.echo(recipe.schema(PretrainRecipe))
    else:
        typer.echo(recipe.schema(method.find(name).recipe()))


def _verb_command(verb: str) -> Callable[..., None]:
    def command(
        name: Annotated[str | None, typer.Argument(metavar="METHOD", show_default=False)] = None,
        overrides: Overrides = None,
        file: File = None,
        run_name: RunName = None,
        runs: Runs = Path("runs"),
        dry_run: OnlyResolve = False,
        accept_changes: AcceptChanges = "",
    ) -> None:
        settings = overrides or []
        if name and "=" in name and (default := method.default(verb)):
            name, settings = default, [name, *settings]
        if name is None:
            list_methods(verb)
        else:
            _carry_out(f"{verb}.{name}", settings, file, run_name, runs, dry_run, accept_changes)

    return command


def plan(
    overrides: Overrides = None,
    file: File = None,
    run_name: RunName = None,
    runs: Runs = Path("runs"),
    dry_run: OnlyResolve = False,
    accept_changes: AcceptChanges = "",
) -> None:
    """Say what to train for a sum of money, hours or energy, and why; writes the recipe for `espalier run`."""
    _carry_out("budget.plan", overrides, file, run_name, runs, dry_run, accept_changes)


def _carry_out(
    name: str,
    overrides: list[str] | None,
    file: Path | None,
    run_name: str | None,
    runs: Path,
    dry_run: bool,
    accept_changes: str,
) -> None:
    from espalier.run import Run

    card = method.find(name)
    resolved = recipe.load(card.recipe(), file, overrides or [])
    if dry_run:
        typer.echo(recipe.dump(resolved))
        return
    folder = runs / (run_name or f"{name.replace('.', '-')}-{time.strftime('%Y%m%d-%H%M%S')}")
    with Run.start(folder, resolved, tell=typer.echo, accept=accept_changes.split(",")) as run:
        if run.state["status"] == "finished":
            run.tell(f"{folder} is finished; nothing to do. Choose another --name to run it again.")
            return
        result = card.load()(run.recipe, run)
        run.charge(card.full_name)
        run.finish("finished")
    typer.echo(getattr(result, "path", result))
