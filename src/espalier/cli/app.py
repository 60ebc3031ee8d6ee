"""The `espalier` command: its verbs, and how what goes wrong is shown."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import typer

from espalier import __version__, errors, files
from espalier.cli import launch, methods, run, runs
from espalier.world import World

app = typer.Typer(
    name="espalier",
    help="Train, grow and evaluate language models within a stated budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
run.register(app)
launch.register(app)
runs.register(app)
methods.register(app)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True)) -> None:
    if version:
        typer.echo(f"espalier {__version__}")
        raise typer.Exit


def run_app(arguments: list[str]) -> int:
    """Run a command line; the exit code."""
    try:
        return app(arguments, standalone_mode=False) or 0
    except errors.UserError as error:
        if World.here().leads or not getattr(error, "told_by_leader", False):
            show(error)
        return error.exit_code
    except typer.TyperException as error:
        print(f"{error.format_message()}\nSee `espalier --help`.", file=sys.stderr)
        return errors.RecipeError.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        return errors.EXIT_INTERRUPTED
    except Exception as error:
        path = getattr(error, "log", None) or _note(error)
        print(f"This is a bug in Espalier: {error!r}. Please report it with {path}.", file=sys.stderr)
        return 1


def show(error: errors.UserError) -> None:
    """A refusal on the terminal: where, found, expected, mend."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    for label, text in error.lines():
        below = text.replace("\n", "\n" + " " * 11)
        console.print(Text(f"{label:>9}  ", style="bold red" if label == "where" else "bold"), Text(below), sep="")


def _note(error: Exception) -> Path:
    """Keep the traceback of an error outside any run."""
    path = files.home() / "bug.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return path
