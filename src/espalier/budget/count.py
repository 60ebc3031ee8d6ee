"""Count: what a shape computes and holds, operator by operator, and what each rank of a layout holds and sends."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pydantic import Field

from espalier import files, units
from espalier.budget import flops, hardware, memory, parallel
from espalier.budget.parallel import Layout, Links, Update
from espalier.errors import RecipeError
from espalier.folder import read_spec
from espalier.method import method
from espalier.recipe import Recipe
from espalier.report import Report, Row
from espalier.run import RESULTS, Run
from espalier.spec import ModelSpec

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 110
COUNT, PARAMETERS, FLOPS, SHARE, TOTAL = "count", "parameters", "FLOPs a token", "share", "total"
BYTES, SECONDS = "bytes", "seconds"


class CountRecipe(Recipe):
    """What to count.

    model            a model folder or a config.json, or sizes: model.family=llama model.hidden_size=4096 ...
    sequence_length  tokens of a row
    batch            rows of an update; micro_batch of them go through a rank at a time, all of its own if not stated
    layout           how devices share the work; one device, if not stated
    hardware         `here` or a row of hardware.yaml, for the time of an update; several ranks need links too
    efficiency       the share of the hardware's peak that products reach
    overlap          the share of what data ranks send that hides behind products
    """

    model: ModelSpec | Path
    sequence_length: int = Field(default=2048, gt=0)
    batch: int = Field(default=1, gt=0)
    micro_batch: int | None = Field(default=None, gt=0)
    compute: memory.Dtype = "bfloat16"
    recompute: memory.Recompute = "none"
    layout: Layout = Layout()
    hardware: str | None = None
    links: Links | None = None
    efficiency: float = Field(default=1.0, gt=0, le=1)
    overlap: float = Field(default=0.0, ge=0, le=1)

    def update(self) -> Update:
        rows = self.micro_batch or max(self.batch // self.layout.data, 1)
        return Update(self.batch, rows, self.sequence_length, self.compute, self.recompute)


@method(paper="arXiv 2402.16363", costs="nothing: arithmetic")
def count(recipe: CountRecipe, run: Run) -> str:
    """Count a model's parameters, FLOPs, bytes and traffic, on one device or many."""
    spec = recipe.model if isinstance(recipe.model, ModelSpec) else read_spec(recipe.model)
    report = Report(str(recipe.model) if isinstance(recipe.model, Path) else spec.family, context=spec.model_dump())
    _operators(report, spec, recipe)
    _model(report, spec, recipe)
    _memory(report, spec, recipe)
    if recipe.layout.ranks > 1:
        _rank(report, spec, recipe)
    if recipe.hardware:
        _time(report, spec, recipe, recipe.hardware)
    report.save(run.folder / RESULTS)
    return _shown(report)


def _operators(report: Report, spec: ModelSpec, recipe: CountRecipe) -> None:
    total = flops.forward_flops(spec, recipe.sequence_length)
    for op in flops.operators(spec, recipe.sequence_length):
        report.add(op.name, COUNT, op.count)
        report.add(op.name, PARAMETERS, op.parameters * op.count)
        report.add(op.name, FLOPS, op.flops * op.count, note="forward")
        report.add(op.name, SHARE, op.flops * op.count / total, note="of the forward pass")


def _model(report: Report, spec: ModelSpec, recipe: CountRecipe) -> None:
    length = recipe.sequence_length
    report.add("model", PARAMETERS, flops.parameters(spec))
    report.add("model", "active parameters", flops.active_parameters(spec), note="that a token passes")
    report.add("model", "forward FLOPs", flops.forward_flops(spec, length), note="a token")
    report.add("model", "training FLOPs", flops.training_flops(spec, length, recipe.recompute), note="a token")
    report.add("model", "prefill FLOPs", flops.prefill_flops(spec, length), note=f"of {length:,} tokens")
    report.add("model", "decode FLOPs", flops.decode_flops(spec, length), note=f"of token {length:,}")
    for dtype in memory.SIZE:
        report.add("model", f"cache bytes, {dtype}", memory.cache_bytes_per_token(spec, dtype), note="a token")


def _memory(report: Report, spec: ModelSpec, recipe: CountRecipe) -> None:
    """Training on one device, by each optimizer, with and without recomputation."""
    update = recipe.update()
    for optimizer in get_args(memory.Optimizer):
        for recompute in get_args(memory.Recompute):
            need = memory.training_memory(
                spec,
                rows=update.micro_rows,
                sequence_length=recipe.sequence_length,
                optimizer=optimizer,
                compute=recipe.compute,
                loss_chunk=update.tokens,
                attention="sdpa",
                recompute=recompute,
            )
            task = optimizer if recompute == "none" else f"{optimizer}, recomputing"
            _parts(report, task, {**vars(need), TOTAL: need.total}, BYTES)


def _rank(report: Report, spec: ModelSpec, recipe: CountRecipe) -> None:
    layout, update = recipe.layout, recipe.update()
    need = parallel.rank_memory(spec, layout, update)
    _parts(report, f"a rank of {layout.ranks}", {**vars(need), TOTAL: need.total}, BYTES)
    for transfer in parallel.traffic(spec, layout, update):
        if transfer.bytes:
            report.add("sent by a rank", f"{transfer.axis} {transfer.kind}", transfer.bytes, note="bytes an update")


def _parts(report: Report, task: str, parts: dict[str, float], note: str) -> None:
    for part, value in parts.items():
        report.add(task, part, value, note=note)


def _time(report: Report, spec: ModelSpec, recipe: CountRecipe, name: str) -> None:
    if recipe.layout.ranks > 1 and recipe.links is None:
        raise RecipeError(
            "links",
            found="nothing, with several ranks",
            expected="B/s that a rank sends within its node and between nodes",
            mend="Set links.within=... and links.between=..., or leave hardware out.",
        )
    links = recipe.links or Links(within=1, between=1)  # one rank sends nothing
    time = parallel.step_time(
        spec,
        recipe.layout,
        recipe.update(),
        hardware.named(name, home=files.home()),
        links,
        efficiency=recipe.efficiency,
        overlap=recipe.overlap,
    )
    _parts(report, "an update", {**vars(time), TOTAL: time.total}, SECONDS)
    tokens = recipe.batch * recipe.sequence_length
    report.add("an update", "tokens", tokens)
    report.add("an update", "tokens/s", tokens / time.total, note="of all ranks")


def _shown(report: Report) -> str:
    """The report as tables: an operator a line, then single figures, then bytes side by side."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=WIDTH)
    operators = [row.task for row in report.rows if row.metric == COUNT]
    holders = [row.task for row in report.rows if (row.metric, row.note) == (TOTAL, BYTES)]
    parts = [*dict.fromkeys(row.metric for row in report.rows if row.task in holders and row.metric != TOTAL), TOTAL]
    console.print(_table("operator", operators, [COUNT, PARAMETERS, FLOPS, SHARE], report))
    console.print(_list([row for row in report.rows if row.task not in {*operators, *holders}]))
    console.print(_table("bytes", parts, holders, report))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _table(corner: str, lines: list[str], columns: list[str], report: Report) -> Table:
    """Figures of tasks by metrics, or of metrics by tasks; what one lacks stays empty."""
    from rich.table import Table

    figures = {(row.task, row.metric): _written(row) for row in report.rows}
    figures |= {(metric, task): figure for (task, metric), figure in figures.items()}
    table = Table(corner, box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(line, *(figures.get((line, column), "") for column in columns))
    return table


def _list(rows: list[Row]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for justify in ("left", "left", "right", "left"):
        table.add_column(justify=justify)
    for before, row in zip([None, *rows], rows, strict=False):
        again = before is not None and before.task == row.task
        note = "" if row.note in (BYTES, SECONDS) else row.note
        table.add_row("" if again else row.task, row.metric, _written(row), note)
    return table


def _written(row: Row) -> str:
    if row.note.startswith(BYTES):
        return units.si(row.value, "B")
    if row.note == SECONDS:
        return units.duration(row.value)
    return f"{row.value:.1%}" if row.metric == SHARE else f"{row.value:,.0f}"
