"""Launch: a recipe as a job of somebody else's machines: a batch script for Slurm, a task for SkyPilot.

A job of several devices calls `espalier launch here` on each machine, which starts a process for each device. Jobs keep
the run folder where the next attempt finds it and goes on from the newest checkpoint; a spent budget is the end of a
run that left its model, and no failure. The resolved recipe lies beside the job as `NAME.recipe.yaml`, so that editing
the first one changes nothing that is under way.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from espalier import errors, files, planner, recipe, torchrun, units
from espalier.budget import hardware
from espalier.budget.hardware import Hardware
from espalier.data.sources import HUB, STDLIB
from espalier.errors import BudgetError, RecipeError
from espalier.pipeline import PretrainRecipe
from espalier.world import World

if TYPE_CHECKING:
    from espalier.train.parallel import Parallel

# RAM beside what an update holds: the longest document takes 1.8 GB to tokenise (data/sources.py), the rest is slack.
PREPARING = 8e9
CPUS_BESIDE_A_GPU = 8
# Slurm sends the signal up to so many seconds earlier than was asked for (sbatch's manual, --signal).
EARLY = 60
# Where a SkyPilot machine has the storage that outlives it.
STORAGE = "/espalier"
# How often the processes on a SkyPilot machine are started again, and seconds in which they may save.
RESTARTS, GRACE = 3, 60
# SkyPilot's names for the rows of the catalogue, where it has one for just that GPU.
ACCELERATORS = {
    "a10": "A10",
    "a100-40g": "A100",
    "a100-80g": "A100-80GB",
    "a40": "A40",
    "b200": "B200",
    "h100-80g": "H100",
    "h200": "H200",
    "l4": "L4",
    "l40": "L40",
    "l40s": "L40S",
    "mi300x": "MI300X",
    "rtx-3090": "RTX3090",
    "rtx-4090": "RTX4090",
    "rtx-5090": "RTX5090",
    "t4": "T4",
    "v100-32g": "V100-32GB",
}


@dataclass(frozen=True)
class Job:
    """A run, the machine that it is to have, and how Espalier is called there.

    key        the machine's key in the catalogue
    row        all machines together
    seconds    what the run takes by its `basis`
    basis      "budget", at whose end it stops, or "estimated", from its stages, where the budget doesn't limit time
    usd        what so long costs
    cpus       cores of each machine
    memory     GB of RAM of each machine
    setup      shell commands that make Espalier ready, "" for none
    command    what calls it
    processes  of each machine
    nodes      machines
    """

    recipe: PretrainRecipe
    key: str
    row: Hardware
    seconds: float
    basis: Literal["budget", "estimated"]
    usd: float
    cpus: int
    memory: int
    setup: str
    command: str
    processes: int
    nodes: int

    @classmethod
    def of(
        cls,
        resolved: PretrainRecipe,
        key: str,
        *,
        setup: str,
        command: str,
        devices: int = 1,
        nodes: int = 1,
        cpus: int | None = None,
        memory: int | None = None,
    ) -> Job:
        """Price a recipe on machines of a row of the catalogue; what can't be trained there is refused.

        Each device has a process, which beside others holds its part of the model, as train.parallel has it; a machine
        of processors is one.
        BudgetError when a stage doesn't fit the memory, or when neither the budget nor the stages say how long the
        run may take.
        """
        row = hardware.named(key, home=files.home())
        if row.kind == "cpu" and devices > 1:
            raise RecipeError(
                "--devices",
                found=f"{devices} of {row.name}, which works as one",
                expected="1",
                mend="State --nodes for more machines.",
            )
        one = _machine(row, cpus, memory)
        ranks = devices * nodes
        row = one.part(ranks)
        machine = planner.at_prices(resolved, row)
        if ranks == 1:
            planner.require_memory(resolved, row)
            need = planner.most_memory(resolved)
        else:
            parallel = _parallel(resolved, devices, nodes)
            planner.require_memory_of_ranks(resolved, row, parallel)
            need = max(planner.memory_of_ranks(resolved, parallel))
        estimated = planner.estimate(resolved, machine).total.seconds
        share = resolved.budget.cap().share_spent(machine.rates.cost(1.0))
        seconds = 1 / share if share else estimated
        return cls(
            recipe=resolved,
            key=key,
            row=row,
            seconds=seconds,
            basis="budget" if share else "estimated",
            usd=machine.rates.cost(seconds).usd,
            cpus=cpus or (one.count if one.kind == "cpu" else CPUS_BESIDE_A_GPU * devices),
            memory=memory or math.ceil((need * devices + PREPARING) / 1e9),
            setup=setup,
            command=command,
            processes=devices,
            nodes=nodes,
        )

    def told(self) -> str:
        """The job in a line."""
        limit = "at most, by its budget" if self.basis == "budget" else "estimated"
        cost = f"{units.duration(self.seconds)} and {units.money(self.usd)}"
        devices = f"{self.ranks} × " if self.ranks > 1 else ""
        return f"{self.recipe.name} on {devices}{self.row.name}: {cost} {limit}"

    @property
    def ranks(self) -> int:
        """Processes of all machines."""
        return self.processes * self.nodes

    def calls(self, recipe_file: str, runs: str, *, meet: str, job: str, restarts: int, grace: int) -> str:
        """What each machine calls, in a shell: the run itself, or what starts the run's processes there.

        The texts are quoted already; `meet` and `job` as in `torchrun.Start`.
        """
        if self.ranks == 1:
            return f"{self.command} run {recipe_file} --runs {runs}"
        several = f"--processes {self.processes}"
        if self.nodes > 1:
            several += f" --nodes {self.nodes} --meet {meet} --job {job}"
        return (
            f"{self.command} launch here {recipe_file} --runs {runs} {several} "
            f"--max-restarts {restarts} --grace {grace}"
        )

    def write(self, folder: Path, suffix: str, text: str) -> Path:
        """Put the job's file and its recipe into `folder`; the path of the file."""
        with files.disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        files.write_text(self.recipe_file(folder), recipe.dump(self.recipe))
        path = folder / f"{self.recipe.name}{suffix}"
        files.write_text(path, text)
        return path

    def recipe_file(self, folder: Path) -> Path:
        """Where the job finds the resolved recipe."""
        return folder / f"{self.recipe.name}.recipe.yaml"


def _machine(row: Hardware, cpus: int | None, memory: int | None) -> Hardware:
    """One GPU of a row; of a CPU's row as many as there are to be cores, with the memory that is stated."""
    if row.kind == "cuda":
        return row.part(1)
    row = row.part(math.ceil((cpus or row.count) / row.count))
    return replace(row, memory_bytes=round(memory * 1e9)) if memory else row


def _parallel(resolved: PretrainRecipe, processes: int, nodes: int) -> Parallel:
    """How so many processes of each machine share the training; `RecipeError` where the recipe doesn't let them."""
    from espalier.train.parallel import Parallel, divided

    world = World(0, processes * nodes, 0, processes)
    parallel = Parallel(world, *divided(world, resolved.train.parallel))
    parallel.require_rows(resolved.rows)
    return parallel


def slurm(
    job: Job,
    folder: Path,
    *,
    runs: Path,
    hours: float | None = None,
    margin: float = 0.25,
    notice: int = 300,
    restarts: int = 10,
    gres: str = "gpu",
    partition: str | None = None,
    account: str | None = None,
) -> str:
    """The batch script of a job whose files lie in `folder`, on a file system that all nodes share.

    hours     time limit of one attempt; else what the run needs, with `margin` (a share) and `notice` on top
    notice    seconds before the limit at which the run is told to save
    restarts  how often a run that was told to save goes on, in a new attempt of the same job; and, within an attempt,
              how often the processes of several devices are started again after one of them failed
    gres      the GPU's name in the cluster: gpu for any, or gpu:TYPE

    The signal goes to the step that srun starts, not to the script: so only a run that saved because its time was up
    asks for another attempt. `scancel` ends the script itself, and with it the job.
    """
    limit = _time_limit(job, hours, margin, notice, restarts)
    name, runs = job.recipe.name, runs.resolve()
    directives = {
        "job-name": name,
        "time": limit,
        "nodes": job.nodes,
        "ntasks-per-node": 1,  # which starts the processes of its node
        "cpus-per-task": job.cpus,
        "mem": f"{job.memory}G",
        "gres": f"{gres}:{job.processes}" if job.row.kind == "cuda" else None,
        "partition": partition,
        "account": account,
        "output": f"{runs}/{name}-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{notice}",
    }
    stated = "\n".join(_directive(key, value) for key, value in directives.items() if value is not None)
    recipe_file, here = (shlex.quote(str(path)) for path in (job.recipe_file(folder.resolve()), Path.cwd()))
    call = job.calls(
        recipe_file,
        shlex.quote(str(runs)),
        meet='"$head:$port"',
        job='"$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
        restarts=restarts,
        grace=notice,
    )
    head = """head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
"""
    return f"""#!/bin/bash
# {job.told()}. Written by `espalier launch slurm`.
{stated}
#SBATCH --requeue

set -e
cd {here}
export PYTHONUNBUFFERED=1
{job.setup}
{head if job.nodes > 1 else ""}code=0
srun --cpus-per-task={job.cpus} {call} || code=$?
case $code in
    {errors.EXIT_BUDGET_SPENT}) exit 0 ;; # the budget is spent, and the model is there
    {errors.EXIT_TERMINATED}) # told to save before the time limit
        if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
            scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
esac
exit $code
"""


def skypilot(
    job: Job,
    folder: Path,
    *,
    storage: str,
    accelerator: str | None = None,
    infra: str | None = None,
    use_spot: bool = False,
    max_hourly_cost: float | None = None,
    workdir: Path | None = None,
) -> str:
    """The task of a job whose files lie in `folder`, for `sky jobs launch`.

    storage          the bucket (s3://NAME, gs://NAME ...) or SkyPilot volume that keeps the run folder
    accelerator      SkyPilot's name of the GPU, where the catalogue's row doesn't say it
    infra            cloud/region/zone or k8s/context; the cheapest, if not stated
    max_hourly_cost  USD an hour that a machine may cost
    workdir          a folder that is copied to the machine; the job starts in it

    A machine that is lost is replaced by SkyPilot, and so is one on which the run was told to save.
    """
    _require_there(job.recipe, workdir)
    _require_shared(job, storage)
    there = f"~/{job.recipe_file(folder).name}"
    bucket = "://" in storage
    call = job.calls(
        there,
        f"{STORAGE}/runs",
        meet=f'"$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{torchrun.PORT}"',
        job='"$SKYPILOT_TASK_ID"',
        restarts=RESTARTS,
        grace=GRACE,
    )
    resources: dict[str, Any] = {
        "infra": infra,
        "accelerators": f"{_accelerator(job, accelerator)}:{job.processes}" if job.row.kind == "cuda" else None,
        "cpus": f"{job.cpus}+",
        "memory": f"{job.memory}+",
        "use_spot": use_spot,
        "max_hourly_cost": max_hourly_cost,
        "job_recovery": {"recover_on_exit_codes": [errors.EXIT_TERMINATED]},
    }
    task: dict[str, Any] = {
        "name": re.sub(r"[._-]+", "-", job.recipe.name).strip("-"),
        "num_nodes": job.nodes if job.nodes > 1 else None,
        "workdir": str(workdir.resolve()) if workdir else None,
        "resources": _without_none(resources),
        "envs": {"PYTHONUNBUFFERED": "1"},
        "file_mounts": {
            there: str(job.recipe_file(folder.resolve())),
            # Writes are cached on the machine's disk: only so can files be appended to and renamed.
            **({STORAGE: {"source": storage, "mode": "MOUNT_CACHED"}} if bucket else {}),
        },
        "volumes": None if bucket else {STORAGE: storage},
        "setup": job.setup,
        "run": f"""code=0
{call} || code=$?
if [ $code -eq {errors.EXIT_BUDGET_SPENT} ]; then exit 0; fi # the budget is spent, and the model is there
exit $code
""",
    }
    return f"# {job.told()}. Written by `espalier launch skypilot`.\n" + yaml.dump(
        _without_none(task), Dumper=_Literal, sort_keys=False, width=120
    )


class _Literal(yaml.SafeDumper):
    """Writes texts of several lines as they stand."""


_Literal.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _time_limit(job: Job, hours: float | None, margin: float, notice: int, restarts: int) -> str:
    """Slurm's D-HH:MM:SS, whole minutes: the hours that are stated, or what the run needs."""
    if hours is None:
        seconds = job.seconds * (1 + margin) + notice + EARLY
    else:
        seconds = hours * 3600
        _require_enough(job, seconds, notice, restarts)
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"


def _require_enough(job: Job, seconds: float, notice: int, restarts: int) -> None:
    """Refuse attempts of so many seconds in which the run can't be done."""
    usable = seconds - notice - EARLY
    if usable <= 0:
        raise BudgetError(
            "--hours",
            found=f"a time limit of {units.duration(seconds)}, at most {units.duration(notice + EARLY)} before which "
            "the run is told to save",
            expected="time to train before that",
            mend="Raise --hours or lower --notice.",
        )
    attempts = math.ceil(job.seconds / usable)
    if attempts > restarts + 1:
        raise BudgetError(
            "--hours",
            found=f"{attempts:,} attempts of {units.duration(seconds)} for a run of {units.duration(job.seconds)}",
            expected=f"at most {restarts + 1:,}, the first and its restarts",
            mend=f"Raise --hours, set --restarts {attempts - 1}, or lower the budget.",
        )


def _directive(name: str, value: object) -> str:
    """A line for sbatch, which splits at spaces and doesn't say so."""
    if re.search(r"\s", str(value)):
        raise RecipeError(
            f"--{name}",
            found=repr(value),
            expected="a name or path without spaces",
            mend="Choose another one; for a path, name another --runs.",
        )
    return f"#SBATCH --{name}={value}"


def _accelerator(job: Job, stated: str | None) -> str:
    name = stated or ACCELERATORS.get(job.key)
    if name is None:
        raise RecipeError(
            "--accelerator",
            found=f"nothing, and no name that SkyPilot has for {job.key}",
            expected=f"a name from `sky gpus list`, or hardware that is one of {', '.join(ACCELERATORS)}",
            mend="State --accelerator NAME.",
        )
    return name


def _require_there(resolved: PretrainRecipe, workdir: Path | None) -> None:
    """Refuse a recipe that reads files which the machine won't have."""
    for path in _local_files(resolved):
        if workdir is None or Path(path).is_absolute() or path.startswith("~") or not (workdir / path).exists():
            raise RecipeError(
                "data",
                found=f"{path}, a file or folder that the machine won't have",
                expected="stdlib, hub:OWNER/NAME, or a path below --workdir, which is copied there",
                mend="State --workdir FOLDER and name the path as seen from it.",
            )


def _require_shared(job: Job, storage: str) -> None:
    """Refuse a bucket that several machines would each see through a cache of their own."""
    if job.nodes > 1 and "://" in storage:
        raise RecipeError(
            "--storage",
            found=f"{storage}, a bucket, of which each of {job.nodes} machines sees its own cache",
            expected="a volume that all machines share",
            mend="Name a SkyPilot volume that many machines may write to, or take one machine.",
        )


def _local_files(resolved: PretrainRecipe) -> Iterable[str]:
    data = resolved.data
    paths = [source.path for source in data.sources if source.path != STDLIB and not source.path.startswith(HUB)]
    return [*paths, data.tokenizer] if data.tokenizer else paths
