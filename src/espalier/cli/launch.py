"""`espalier launch here`, `slurm` and `skypilot`: a recipe carried out by several processes, a cluster or a cloud."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from espalier import errors, files, recipe
from espalier.cli.methods import AcceptChanges, AcceptData, Overrides, Runs

if TYPE_CHECKING:
    from espalier.pipeline import PretrainRecipe

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file", show_default=False)]
Key = Annotated[str, typer.Option("--hardware", help="Row of the hardware catalogue.", show_default=False)]
Devices = Annotated[int, typer.Option(min=1, help="Devices of each machine; each has a process.")]
Nodes = Annotated[int, typer.Option(min=1, help="Machines.")]
Cpus = Annotated[int | None, typer.Option(min=1, help="Cores.", show_default="the row's, or 8 beside a GPU")]
Memory = Annotated[int | None, typer.Option(min=1, help="GB of RAM.", show_default="what the run needs")]
Out = Annotated[Path, typer.Option(help="Folder for the file and its recipe.")]


def register(app: typer.Typer) -> None:
    launch = typer.Typer(
        help="Start a recipe's processes, or write the file by which a cluster or a cloud does.", no_args_is_help=True
    )
    launch.command("here")(here)
    launch.command("slurm")(slurm)
    launch.command("skypilot")(skypilot)
    app.add_typer(launch, name="launch")


def here(
    recipe: RecipeFile,
    overrides: Overrides = None,
    *,
    processes: Annotated[int, typer.Option(min=1, help="Processes of this machine.", show_default=False)],
    nodes: Nodes = 1,
    meet: Annotated[
        str | None, typer.Option(help="HOST:PORT of the first machine.", show_default="none, for one machine")
    ] = None,
    job: Annotated[str, typer.Option(help="Name that the machines of one attempt share.")] = "espalier",
    max_restarts: Annotated[int, typer.Option(min=0, help="How often all start again after one failed.")] = 0,
    grace: Annotated[int, typer.Option(min=0, help="Seconds in which a run that is told to stop can save.")] = 300,
    runs: Runs = Path("runs"),
    accept_changes: AcceptChanges = "",
    accept_data: AcceptData = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print torchrun's command, and stop.")] = False,
) -> None:
    """Start a recipe's processes on this machine by torchrun; the same on every machine, if there are several.

    The first one's output is shown, that of the others is kept in RUNS/NAME.ranks.
    """
    from espalier import torchrun

    resolved = _resolved(recipe, overrides)
    _require_meeting(nodes, meet)
    start = torchrun.Start(
        processes=processes,
        nodes=nodes,
        meet=meet,
        job=job,
        restarts=max_restarts,
        grace=grace,
        logs=runs / f"{resolved.name}.ranks",
    )
    arguments = ["run", str(recipe), *(overrides or []), "--runs", str(runs)]
    arguments += ["--accept-changes", accept_changes] if accept_changes else []
    arguments += ["--accept-data", accept_data] if accept_data else []
    if dry_run:
        typer.echo(shlex.join(start.command(arguments)))
        return
    raise typer.Exit(torchrun.carry_out(start, arguments))


def slurm(
    recipe: RecipeFile,
    overrides: Overrides = None,
    *,
    hardware: Key,
    devices: Devices = 1,
    nodes: Nodes = 1,
    cpus: Cpus = None,
    memory: Memory = None,
    hours: Annotated[
        float | None, typer.Option(min=0.01, help="Time limit of an attempt.", show_default="what the run needs")
    ] = None,
    margin: Annotated[float, typer.Option(min=0, help="Share of time on top of what the run needs.")] = 0.25,
    notice: Annotated[int, typer.Option(min=60, max=65535, help="Seconds in which a run can save.")] = 300,
    restarts: Annotated[int, typer.Option(min=0, help="How often it goes on when time was up.")] = 10,
    gres: Annotated[str, typer.Option(help="The GPU's name there: gpu for any, or gpu:TYPE.")] = "gpu",
    partition: Annotated[str | None, typer.Option(help="Partition.", show_default="the cluster's")] = None,
    account: Annotated[str | None, typer.Option(help="Who is charged.", show_default="the cluster's")] = None,
    setup: Annotated[str, typer.Option(help="Commands beforehand, such as module load cuda.")] = "",
    command: Annotated[str, typer.Option(help="What calls Espalier.", show_default="the one that runs now")] = "",
    runs: Runs = Path("runs"),
    out: Out = Path(),
) -> None:
    """Write a batch script that saves before its time is up, requeues itself and goes on.

    The folders that it names, and what calls Espalier, must be there on every node.
    """
    from espalier import launch

    job = launch.Job.of(
        _resolved(recipe, overrides),
        hardware,
        setup=setup,
        command=command or f"{shlex.quote(sys.executable)} -m espalier",
        devices=devices,
        nodes=nodes,
        cpus=cpus,
        memory=memory,
    )
    script = launch.slurm(
        job,
        out,
        runs=runs,
        hours=hours,
        margin=margin,
        notice=notice,
        restarts=restarts,
        gres=gres,
        partition=partition,
        account=account,
    )
    with files.disk_errors(runs):
        runs.mkdir(parents=True, exist_ok=True)  # Slurm opens the log there, and makes no folder
    path = job.write(out, ".sbatch", script)
    typer.echo(f"{job.told()}\n{path}\nStart it with: sbatch {shlex.quote(str(path))}")


def skypilot(
    recipe: RecipeFile,
    overrides: Overrides = None,
    *,
    hardware: Key,
    storage: Annotated[
        str, typer.Option(help="Bucket (s3://NAME, gs://NAME) or volume that keeps the run.", show_default=False)
    ],
    setup: Annotated[str, typer.Option(help="Commands that install Espalier on a new machine.", show_default=False)],
    devices: Devices = 1,
    nodes: Nodes = 1,
    cpus: Cpus = None,
    memory: Memory = None,
    accelerator: Annotated[
        str | None, typer.Option(help="SkyPilot's name of the GPU.", show_default="by the row")
    ] = None,
    infra: Annotated[
        str | None, typer.Option(help="cloud/region/zone or k8s/context.", show_default="the cheapest")
    ] = None,
    use_spot: Annotated[bool, typer.Option("--use-spot", help="Take machines that may be taken away.")] = False,
    max_hourly_cost: Annotated[
        float | None, typer.Option(min=0.001, help="USD an hour that a machine may cost.", show_default="any")
    ] = None,
    workdir: Annotated[
        Path | None, typer.Option(help="Folder that is copied to the machine.", show_default="none")
    ] = None,
    command: Annotated[str, typer.Option(help="What calls Espalier there.")] = "espalier",
    out: Out = Path(),
) -> None:
    """Write a task for a managed job, which is taken up again on another machine when one is lost."""
    from espalier import launch

    job = launch.Job.of(
        _resolved(recipe, overrides),
        hardware,
        setup=setup,
        command=command,
        devices=devices,
        nodes=nodes,
        cpus=cpus,
        memory=memory,
    )
    task = launch.skypilot(
        job,
        out,
        storage=storage,
        accelerator=accelerator,
        infra=infra,
        use_spot=use_spot,
        max_hourly_cost=max_hourly_cost,
        workdir=workdir,
    )
    path = job.write(out, ".sky.yaml", task)
    typer.echo(f"{job.told()}\n{path}\nStart it with: sky jobs launch {shlex.quote(str(path))}")


def _require_meeting(nodes: int, meet: str | None) -> None:
    if nodes > 1 and meet is None:
        raise errors.RecipeError(
            "--meet",
            found=f"nothing, with {nodes} machines",
            expected="HOST:PORT of the first machine, the same on all",
            mend="State --meet HOST:PORT, or leave --nodes out.",
        )


def _resolved(path: Path, overrides: list[str] | None) -> PretrainRecipe:
    from espalier.pipeline import PretrainRecipe

    return recipe.load(PretrainRecipe, path, overrides or [])
