"""`espalier budget placement`: where each rank goes and why, beside placements made without looking at the networks."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from espalier import files, units
from espalier import recipe as recipes
from espalier.budget import hardware, layouts, memory, parallel, placement
from espalier.budget.clusters import Clusters, ClustersRecipe, Device
from espalier.budget.hardware import Hardware
from espalier.budget.parallel import Layout, Links, Update
from espalier.budget.placement import Job, Placement
from espalier.errors import RecipeError
from espalier.folder import read_spec
from espalier.method import method
from espalier.recipe import Recipe
from espalier.report import Report
from espalier.run import RESULTS, Run
from espalier.spec import ModelSpec

PLACEMENT = "placement.json"
WIDTH = 110
AXES = {
    "tensor": "sends most, several times a layer: inside a node",
    "data": "sends gradients and weights once an update: inside a cluster's own network",
    "pipeline": "sends a layer's output a micro-batch, the least of the three: it alone crosses clusters",
}
TODAY = (
    "`espalier run` trains with data and tensor ranks, not in a pipeline: of a placement with several stages it can "
    "carry out one stage's cluster by itself."
)


class PlacementRecipe(Recipe):
    """What is placed.

    clusters     a file of clusters, their networks and the speed across
    model        a model folder or a config.json, or sizes: model.family=llama model.hidden_size=4096 ...
    batch        rows of an update; micro_batch of them go through a stage at a time
    sharding     what data ranks divide; more than the optimizer's state would be sent with every micro-batch
    overlap      the share of what data ranks send that hides behind products
    alpha        of the published split by speed, which is timed for comparison
    """

    clusters: Path
    model: ModelSpec | Path
    batch: int = Field(gt=0)
    micro_batch: int = Field(default=1, gt=0)
    sequence_length: int = Field(default=2048, gt=0)
    compute: memory.Dtype = "bfloat16"
    recompute: memory.Recompute = "none"
    sharding: Literal["none", "zero1"] = "zero1"
    overlap: float = Field(default=0.0, ge=0, le=1)
    alpha: float = Field(default=1.05, gt=0)

    def update(self) -> Update:
        return Update(self.batch, self.micro_batch, self.sequence_length, self.compute, self.recompute)


@dataclass(frozen=True)
class Option:
    """A placement by name, how long its update takes, and what it is."""

    name: str
    placement: Placement
    seconds: float


@method(paper="arXiv 2312.03549", needs="a file of clusters", costs="nothing: arithmetic")
def place(recipe: PlacementRecipe, run: Run) -> str:
    """Say which ranks of several clusters do what, how many layers each stage has, how fast it is, and why."""
    job = job_of(recipe)
    chosen = placement.best(job)
    if chosen is None:
        raise _nothing_fits(recipe, job)
    options = compared(job, chosen, recipe.alpha)
    report = Report(str(recipe.clusters), context={"batch": recipe.batch, "alpha": recipe.alpha})
    for option in options:
        for metric, value in _figures(job, option).items():
            report.add(option.name, metric, value, note=units.amount(value, metric))
    report.save(run.folder / RESULTS)
    files.write_json(run.folder / PLACEMENT, as_json(job, chosen))
    return _shown(job, options)


def job_of(recipe: PlacementRecipe) -> Job:
    """What a recipe asks to place; `RecipeError` where its batch doesn't divide."""
    if recipe.batch % recipe.micro_batch:
        raise RecipeError(
            "batch",
            found=f"{recipe.batch} rows, {recipe.micro_batch} at a time",
            expected=f"a multiple of {recipe.micro_batch}",
            mend="Change batch or micro_batch.",
        )
    spec = recipe.model if isinstance(recipe.model, ModelSpec) else read_spec(recipe.model)
    stated = recipes.load(ClustersRecipe, recipe.clusters)
    rows = tuple(_row(recipe.clusters, number, cluster.hardware) for number, cluster in enumerate(stated.clusters))
    return Job(spec, Clusters(stated, rows), recipe.update(), recipe.sharding, recipe.overlap)


def compared(job: Job, chosen: Placement, alpha: float) -> list[Option]:
    """The chosen placement and what it is measured against; those that don't fit a device are left out."""
    layers, stages = job.spec.num_hidden_layers, chosen.layout.pipeline
    speeds = [
        min(job.clusters.speed(device.cluster, job.update.compute) for device in chosen.stage(number))
        for number in range(stages)
    ]
    others = {
        "chosen": chosen,
        "layers by speed": replace(chosen, layers=placement.by_speed(layers, speeds, alpha)),
        "even layers": replace(chosen, layers=placement.even(layers, stages)),
        "nodes in turn": replace(chosen, devices=in_turn(chosen.devices), layers=placement.even(layers, stages)),
        "blind to networks": blind(job),
    }
    options = [Option(name, one, placement.seconds(job, one)) for name, one in others.items() if one]
    return [option for option in options if option.seconds < float("inf")]


def in_turn(devices: tuple[Device, ...]) -> tuple[Device, ...]:
    """The same devices as a launcher numbers them that takes a node of each cluster in turn."""
    return tuple(sorted(devices, key=lambda device: (device.node, device.cluster, device.place)))


def blind(job: Job) -> Placement | None:
    """What is best if all devices and links were the first cluster's: ranks in the file's order, even layers.

    None where that fits no device, or no layout takes all of them.
    """
    row, first = job.clusters.hardware[0], job.clusters.recipe.clusters[0]
    links = Links(within=job.clusters.within(0), between=first.between, per_node=first.devices)
    products = job.clusters.speed(0, job.update.compute) / row.part(1).peak_flops[job.update.compute]
    alike = layouts.cluster(row.part(1), job.clusters.count, links, products)
    update = job.update
    work = layouts.Work(update.rows, update.sequence_length, "adamw", (update.micro_rows,), (update.recompute,))
    found = layouts.best(job.spec, alike, work)
    if found is None:
        return None
    devices = [device for number in range(len(job.clusters.hardware)) for device in job.clusters.devices(number)]
    layers = placement.even(job.spec.num_hidden_layers, found.layout.pipeline)
    return Placement(found.layout, tuple(devices), layers)


def as_json(job: Job, chosen: Placement) -> dict[str, Any]:
    """The placement for a launcher: each rank's device, each group's ranks, network and environment."""
    layout, names = chosen.layout, [cluster.name for cluster in job.clusters.recipe.clusters]
    ranks = [
        {
            "rank": rank,
            "cluster": names[device.cluster],
            "node": device.node,
            "device": device.place,
            "tensor": rank % layout.tensor,
            "data": rank // layout.tensor % layout.data,
            "stage": rank // (layout.tensor * layout.data),
        }
        for rank, device in enumerate(chosen.devices)
    ]
    groups = [
        {
            "axis": axis,
            "ranks": list(group),
            "network": link.network,
            "bandwidth": link.bandwidth,
            "environment": dict(link.environment),
        }
        for axis in AXES
        for group in chosen.groups(axis)
        if len(group) > 1
        for link in [chosen.link(job.clusters, group)]
    ]
    degrees = {axis: getattr(layout, axis) for axis in ("data", "tensor", "pipeline")}
    return {
        **degrees,
        "sharding": layout.sharding,
        "layers": list(chosen.layers),
        "seconds": placement.seconds(job, chosen),
        "idle_devices": job.clusters.count - layout.ranks,
        "ranks": ranks,
        "groups": groups,
    }


def _row(path: Path, number: int, key: str) -> Hardware:
    try:
        return hardware.named(key, home=files.home())
    except RecipeError as error:
        where = f"{path}: clusters.{number}.hardware"
        raise RecipeError(where, found=error.found, expected=error.expected, mend=error.mend) from None


def _nothing_fits(recipe: PlacementRecipe, job: Job) -> RecipeError:
    """Why: what a device needs in the most divided layout that the clusters allow is more than it has."""
    room = max(job.clusters.room(number) for number in range(len(job.clusters.hardware)))
    state = parallel.rank_memory(job.spec, Layout(), replace(job.update, rows=job.update.micro_rows)).total
    return RecipeError(
        str(recipe.clusters),
        found=f"{job.clusters.count} devices, {units.si(room, 'B')} the largest",
        expected=f"room for {units.si(state, 'B')} and what dividing them adds",
        mend="Choose a smaller model, recompute=layers, a smaller micro_batch, or more devices.",
    )


def _figures(job: Job, option: Option) -> dict[str, float]:
    tokens = job.update.rows * job.update.sequence_length
    usd = job.clusters.usd_per_hour() * option.seconds / 3600
    return {"seconds": option.seconds, "tokens/s": tokens / option.seconds, "usd": usd * 1e9 / tokens}


def _shown(job: Job, options: list[Option]) -> str:
    """The placement, its reasons, and the others beside it, as text."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=io.StringIO(), width=WIDTH)
    chosen = options[0].placement
    for line in _reasons(job, chosen):
        console.print(line, highlight=False)
    table = Table("stage", "cluster", "ranks", "nodes", "layers", box=None, pad_edge=False)
    size = chosen.layout.tensor * chosen.layout.data
    for number, layers in enumerate(chosen.layers):
        members = chosen.stage(number)
        name = job.clusters.recipe.clusters[members[0].cluster].name
        nodes = sorted({device.node for device in members})
        ranks = f"{number * size} to {(number + 1) * size - 1}"
        table.add_row(str(number), name, ranks, f"{nodes[0]} to {nodes[-1]}", str(layers))
    console.print("", table, "")
    table = Table("placement", "data × tensor × pipeline", "layers", "update", "tokens/s", "a billion tokens", box=None)
    for option in options:
        layout, figures = option.placement.layout, _figures(job, option)
        table.add_row(
            option.name,
            f"{layout.data} × {layout.tensor} × {layout.pipeline}",
            ", ".join(map(str, option.placement.layers)),
            units.duration(option.seconds),
            units.significant(figures["tokens/s"]),
            units.money(figures["usd"]),
        )
    console.print(table, "", TODAY if chosen.layout.pipeline > 1 else "")
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _reasons(job: Job, chosen: Placement) -> list[str]:
    """A line an axis: how many ranks, over what, and why; then what is left idle."""
    lines = []
    for axis, why in AXES.items():
        ranks = getattr(chosen.layout, axis)
        if ranks > 1:
            over = sorted({chosen.link(job.clusters, group).network for group in chosen.groups(axis)})
            lines.append(f"{axis} × {ranks}, over {', '.join(over)}: it {why}.")
        else:
            lines.append(f"{axis} × 1: more ranks would fit less or take longer.")
    idle = job.clusters.count - chosen.layout.ranks
    if idle:
        lines.append(f"{idle} of {job.clusters.count} devices are idle: with them an update would take longer.")
    return lines
