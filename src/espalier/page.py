"""The page a run ends with: one HTML file that opens anywhere and asks nothing of the network.

A `View` holds what the page says, as plain values; `render` lays it out with the template beside this file.
Every number is written here, by `units`; the template's script places marks and writes no figures of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jinja2

from espalier import files
from espalier.report import Row
from espalier.units import DAY, HOUR, MINUTE, amount, count, duration, money, si, significant

# What the reader may set the loss against: field of a point, text of the button, title of the axis.
AXES = (
    ("flops", "FLOPs", "Training compute"),
    ("tokens", "Tokens", "Training tokens"),
    ("usd", "Money", "Money spent"),
    ("seconds", "Time", "Device time"),
)
# Times that a clock shows well, in seconds; beyond them come round numbers of days.
CLOCK = [unit * n for unit in (1, MINUTE) for n in (1, 2, 5, 10, 15, 30)] + [HOUR * n for n in (1, 2, 3, 6, 12)]
MOST_TICKS = 7
# On a linear axis the first drop would flatten all that follows, so this share of a curve's tokens may leave the frame.
# Where runs are compared it is their ends that matter.
FIRST_DROP, COMPARED_DROP = 0.02, 0.25
# How curves that are compared are told apart, by the template's classes; when they run out they come again, dotted.
HUES = {"train": [""], "validation": [f"hue-{n}" for n in range(7)], "baseline": ["neutral"]}


@dataclass(frozen=True)
class Figure:
    """A headline number: what it is, its text, and a line on how to read it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Point:
    """A loss in nats a token, and all that the run had spent by then; `usd` is None without a price."""

    tokens: float
    flops: float
    usd: float | None
    seconds: float
    step: int
    loss: float


@dataclass(frozen=True)
class Curve:
    """Points in the order of their steps. Training is drawn thin, validation with dots, a baseline dashed.

    band: the lowest and highest loss at each point, such as the range over seeds; empty where there is none
    """

    name: str
    points: list[Point]
    style: Literal["train", "validation", "baseline"]
    band: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class GrowthPoint:
    """Where the model grew, what had been spent by then, and the loss on either side of it."""

    label: str
    tokens: float
    flops: float
    usd: float | None
    seconds: float
    step: int
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class PlanRow:
    """A quantity as it was planned, an estimate always, and as it was; `basis` is how the latter is known.

    unit: a resource of the ledger ("flops", "usd", ...), "parameters", "steps", or a word to set after it.
    """

    quantity: str
    unit: str
    planned: float | None
    actual: float | None
    basis: Literal["measured", "estimated"]


@dataclass(frozen=True)
class Alternative:
    """What a way to the same model costs in all; None where it isn't known."""

    name: str
    tokens: float
    flops: float
    seconds: float | None
    usd: float | None
    kwh: float | None
    note: str = ""


@dataclass(frozen=True)
class StageRow:
    """A stage of the run: its model, what it alone spent, the validation loss at its end, how devices shared it."""

    name: str
    shape: str
    parameters: int
    tokens: float
    flops: float
    seconds: float
    loss: float | None
    layout: str = ""


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds and half the width of its 95% interval; None if there is none, as for one seed."""

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True)
class ArmRow:
    """A way to the same model, and how it compares on the same budget.

    rate        its peak learning rate
    jump        loss after growth minus before; None for baselines
    losses      at the shares of the budget that the view lists; None where nothing was measured
    difference  final loss minus the better baseline's, paired by seed
    flops       the share of the better baseline's FLOPs at which the mean loss was its final one; None if it never was
    reached     how many seeds came as low as the better baseline with the same seed
    seconds     the share of its wall-clock, likewise
    """

    name: str
    kind: Literal["baseline", "arm"]
    rate: float
    jump: Estimate | None
    losses: list[Estimate | None]
    difference: Estimate | None
    flops: Estimate | None
    reached: int
    seconds: Estimate | None


@dataclass(frozen=True)
class LawPoint:
    """A loss in nats a token at a number of parameters, with the interval in which it is expected."""

    parameters: float
    loss: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class LawLine:
    """Losses by a law, in the order of their parameters, and those of the runs that it was fitted on."""

    name: str
    points: list[LawPoint]
    runs: list[LawPoint]


@dataclass(frozen=True)
class Sample:
    """What the model wrote after a prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Ancestor:
    """A model or dataset that this one comes from, and the method that led on from it."""

    name: str
    method: str
    detail: str = ""


@dataclass(frozen=True)
class View:
    """All that the page says; a part that is left empty leaves its section out. All numbers are finite.

    alternatives       this run first, then what it is compared with, such as training the final size from scratch
    comparison         ways to the same model, in the order to show; their curves have the same names
    comparison_shares  the shares of the budget at which their losses were taken, the last 1.0
    law                lines of a law of loss, each with the runs that it was fitted on
    lineage            the oldest first, this model last
    recipe             the resolved recipe as YAML
    """

    title: str
    subtitle: str
    made_at: str
    kind: str = "run report"
    headline: list[Figure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    growth: list[GrowthPoint] = field(default_factory=list)
    comparison: list[ArmRow] = field(default_factory=list)
    comparison_shares: list[float] = field(default_factory=list)
    law: list[LawLine] = field(default_factory=list)
    plan: list[PlanRow] = field(default_factory=list)
    alternatives: list[Alternative] = field(default_factory=list)
    stages: list[StageRow] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    lineage: list[Ancestor] = field(default_factory=list)
    results: list[Row] = field(default_factory=list)
    recipe: str = ""
    machine: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def save(view: View, path: Path) -> None:
    """Write the page to `path`, whole or not at all."""
    files.write_text(path, render(view))


def render(view: View, name: str = "page.html", **charts: Any) -> str:
    """The page as HTML, by page.html or a template that extends it and has charts of its own; equal views give equal
    text.
    """
    loss, schedule, difference = _loss_chart(view), _schedule_chart(view), _difference_chart(view)
    return template(name).render(
        view=view,
        charts={"loss": loss, "schedule": schedule, "difference": difference, "law": _law_chart(view.law), **charts},
        banded=any(curve.band for curve in view.curves),
        comparison=_comparison(view),
        axes=[axis for axis in AXES if loss and axis[0] in loss["axes"]],
        bars=_bars(view.alternatives),
        read=[curve for curve in view.curves if curve.style != "train"] or view.curves,
    )


@cache
def template(name: str) -> jinja2.Template:
    """A template of the package: page.html, or one that extends it by blocks of its own and so shares its style."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters.update(amount=_known(amount), count=count, duration=duration, loss=_known(_loss), si=si)
    environment.filters.update(ratio=_ratio, result=_result, share=_share, significant=significant)
    return environment.get_template(name)


def _known(write: Any) -> Any:
    """A writer that sets a dash for a number that isn't known."""
    return lambda value, *more: "–" if value is None else write(value, *more)


def _loss(nats: float) -> str:
    return f"{nats:.3f}"


def _signed(nats: float) -> str:
    return _minus(f"{round(nats, 3) + 0.0:+.3f}")  # no -0.000


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _share(value: float) -> str:
    return f"{value:.0%}"


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:,.2f}×" if value is not None and base else "–"


def _result(row: Row) -> str:
    return significant(row.value, 4) + (f" ± {significant(row.stderr, 2)}" if row.stderr is not None else "")


def _compared(curves: list[Curve]) -> bool:
    return sum(curve.style != "train" for curve in curves) > 1


def _hues(curves: list[Curve]) -> dict[str, str]:
    """By name, the classes that tell a curve from those it is compared with; none for the curves of a single run."""
    hues, seen = {}, Counter[str]()
    for curve in curves:
        again, place = divmod(seen[curve.style], len(HUES[curve.style]))
        hues[curve.name] = HUES[curve.style][place] + (" dotted" if again % 2 else "")
        seen[curve.style] += 1
    return hues if _compared(curves) else dict.fromkeys(hues, "")


def _loss_chart(view: View) -> dict[str, Any] | None:
    """What the script needs to draw loss against any axis: points, their words, and axes with written ticks."""
    points = [point for curve in view.curves for point in curve.points]
    spent = [*points, *view.growth]
    axes = {}
    for name, _, title in AXES:
        positive = [value for value in (getattr(point, name) for point in spent) if value]
        if positive:
            low, high = min(positive), max(positive)
            axes[name] = {"title": title, "linear": linear_axis(0, high, name), "log": log_axis(low, high, name)}
    if not points or not axes:
        return None
    around = [loss for point in view.growth for loss in (point.loss_before, point.loss_after)]
    compared, hues = _compared(view.curves), _hues(view.curves)
    drop = COMPARED_DROP if compared else FIRST_DROP
    settled = [loss for curve in view.curves for loss in _losses(curve, drop)]
    everything = [loss for curve in view.curves for loss in _losses(curve, 0.0)]
    return {
        "compared": compared,
        "axes": axes,
        "y": {
            "linear": loss_axis(settled + around),
            "log": loss_axis(everything + around),
        },
        "curves": [
            {
                "name": curve.name,
                "style": curve.style,
                "hue": hues[curve.name],
                "band": curve.band,
                "points": _told_points(curve),
            }
            for curve in view.curves
        ],
        "growth": [_told_growth(point) for point in view.growth],
    }


def _losses(curve: Curve, drop: float) -> list[float]:
    """The losses of a curve and its band, without those of the first share `drop` of its tokens."""
    start = drop * max((point.tokens for point in curve.points), default=0.0)
    spans: Sequence[tuple[float, ...]] = curve.band or [()] * len(curve.points)
    pairs = zip(curve.points, spans, strict=True)
    return [loss for point, span in pairs if point.tokens >= start for loss in (point.loss, *span)]


def _comparison(view: View) -> dict[str, Any] | None:
    """The table of arms: its shares, and a row an arm of written cells; lower is better in every column."""
    rows = view.comparison
    if not rows:
        return None
    losses = zip(*(row.losses for row in rows), strict=True)
    columns = [
        _column([row.jump for row in rows], _signed),
        *(_column(list(at), _loss) for _, at in zip(view.comparison_shares, losses, strict=True)),
        _column([row.difference for row in rows], _signed),
        _column([row.flops for row in rows], _share),
        _column([row.seconds for row in rows], _share),
    ]
    seeds = [max((loss.n for loss in row.losses if loss), default=row.reached) for row in rows]
    hues = _hues(view.curves)
    return {
        "shares": [_share(share) for share in view.comparison_shares],
        "rows": [
            {
                "arm": row,
                "style": "baseline" if row.kind == "baseline" else "validation",
                "hue": hues.get(row.name, ""),
                "cells": list(cells),
                "reached": f"{row.reached} of {n}" if row.reached else "not reached",
            }
            for row, cells, n in zip(rows, zip(*columns, strict=True), seeds, strict=True)
        ],
    }


def _column(estimates: list[Estimate | None], write: Callable[[float], str]) -> list[dict[str, Any] | None]:
    """Written estimates; the lowest, and any that reads the same, are marked best."""
    known = [estimate.mean for estimate in estimates if estimate]
    best = write(min(known)) if known else ""
    cells = []
    for estimate in estimates:
        mean = write(estimate.mean) if estimate else ""
        cells.append({"mean": mean, "spread": _spread(estimate, write), "best": mean == best} if estimate else None)
    return cells


def _spread(estimate: Estimate, write: Callable[[float], str]) -> str:
    return "" if estimate.half_width is None else f" ± {write(estimate.half_width).removeprefix('+')}"


def _difference_chart(view: View) -> dict[str, Any] | None:
    """The differences in final loss, a dot and its interval an arm, around zero: the better baseline."""
    arms = [(row.name, row.difference) for row in view.comparison if row.difference]
    if not arms:
        return None
    hues = _hues(view.curves)
    spans = [
        (estimate.mean - half, estimate.mean + half) for _, estimate in arms for half in [estimate.half_width or 0]
    ]
    low, high = min(0.0, *(low for low, _ in spans)), max(0.0, *(high for _, high in spans))
    room = 0.002 + 0.05 * (high - low)
    axis = linear_axis(low - room, high + room, "")
    return {
        "x": {**axis, "ticks": [(at, _minus(text)) for at, text in axis["ticks"]]},
        "arms": [
            {
                "name": name,
                "hue": hues.get(name, ""),
                "mean": estimate.mean,
                "low": low,
                "high": high,
                "told": [name, _signed(estimate.mean) + _spread(estimate, _signed), _seeds(estimate.n)],
            }
            for (name, estimate), (low, high) in zip(arms, spans, strict=True)
        ],
    }


def _law_chart(lines: list[LawLine]) -> dict[str, Any] | None:
    """Lines with their bands and the runs that they were fitted on, over the logarithm of the parameters."""
    points = [point for line in lines for point in (*line.points, *line.runs)]
    if not points:
        return None
    losses = [loss for point in points for loss in (point.loss, *(point.interval or ()))]
    sizes = [point.parameters for point in points]
    return {
        "x": log_axis(min(sizes), max(sizes), "parameters"),
        "y": loss_axis(losses),
        "lines": [
            {
                "name": line.name,
                "hue": HUES["validation"][number % len(HUES["validation"])],
                "points": [_told_law(f"{line.name}: expected", point) for point in line.points],
                "runs": [_told_law(f"{line.name}: measured", point) for point in line.runs],
            }
            for number, line in enumerate(lines)
        ],
    }


def _told_law(name: str, point: LawPoint) -> dict[str, Any]:
    between = [f"95% between {_loss(point.interval[0])} and {_loss(point.interval[1])}"] if point.interval else []
    return {**asdict(point), "told": [f"{name} {_loss(point.loss)}", *between, amount(point.parameters, "parameters")]}


def _seeds(n: int) -> str:
    return f"{n} seed" + ("s" if n > 1 else "")


def _schedule_chart(view: View) -> dict[str, Any] | None:
    """Parameters against tokens, a step a stage, and the rectangle of what the run is first compared with."""
    if not view.stages:
        return None
    scratch = view.alternatives[1] if len(view.alternatives) > 1 else None
    tokens = sum(stage.tokens for stage in view.stages)
    parameters = max(stage.parameters for stage in view.stages)
    most_tokens = max(tokens, scratch.tokens) if scratch else tokens
    return {
        "x": linear_axis(0, most_tokens, "tokens"),
        "y": linear_axis(0, 1.12 * parameters, "parameters"),
        "stages": [
            {
                "name": stage.name,
                "parameters": stage.parameters,
                "tokens": stage.tokens,
                "told": [
                    stage.name,
                    amount(stage.parameters, "parameters"),
                    amount(stage.tokens, "tokens"),
                    amount(stage.flops, "flops"),
                    duration(stage.seconds),
                ],
            }
            for stage in view.stages
        ],
        "scratch": scratch and {"name": scratch.name, "tokens": scratch.tokens, "parameters": parameters},
    }


def _bars(alternatives: list[Alternative]) -> list[dict[str, Any]]:
    """A group of bars per resource that two alternatives or more all have; `share` is percent of the longest."""
    groups = []
    for name, title in (("flops", "Compute"), ("seconds", "Time"), ("usd", "Money"), ("kwh", "Energy")):
        values = [getattr(alternative, name) for alternative in alternatives]
        if len(values) > 1 and all(values):
            bars = [
                {
                    "name": alternative.name,
                    "text": amount(value, name),
                    "share": round(100 * value / max(values), 2),
                    "ratio": _ratio(value, values[0]),
                }
                for alternative, value in zip(alternatives, values, strict=True)
            ]
            groups.append({"title": title, "bars": bars})
    return groups


def _told_points(curve: Curve) -> list[dict[str, Any]]:
    ranges = [[f"between {_loss(low)} and {_loss(high)}"] for low, high in curve.band] or [[]] * len(curve.points)
    return [
        {**asdict(point), "told": [f"{curve.name} {_loss(point.loss)}", *span, *_spent(point)]}
        for point, span in zip(curve.points, ranges, strict=True)
    ]


def _told_growth(point: GrowthPoint) -> dict[str, Any]:
    losses = f"loss {_loss(point.loss_before)} → {_loss(point.loss_after)}"
    return {**asdict(point), "told": [point.label, losses, *_spent(point)]}


def _spent(point: Point | GrowthPoint) -> list[str]:
    """Exact figures of what had been spent, a line each."""
    lines = [
        f"step {point.step:,}",
        f"{round(point.tokens):,} tokens",
        si(point.flops, "FLOP", 4),
        duration(point.seconds),
    ]
    return lines + ([money(point.usd)] if point.usd else [])


def loss_axis(losses: list[float]) -> dict[str, Any]:
    low, high = min(losses), max(losses)
    room = 0.05 + 0.05 * (high - low)
    return linear_axis(max(0.0, low - room), high + room, "")


def linear_axis(low: float, high: float, unit: str) -> dict[str, Any]:
    """An axis from one value to another, ticked by round steps; on a clock's for seconds."""
    return {"low": low, "high": high, "log": False, "ticks": _written(_multiples(low, high, unit), unit)}


def log_axis(low: float, high: float, unit: str) -> dict[str, Any]:
    """A logarithmic axis around positive values, ticked by decades, 1-2-5 or linear steps as the span asks."""
    if high < 1.05 * low:  # ticks so near one another would read the same
        low, high = low / 2, high * 2
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    lead = (1,) if high / low > 1000 else (1, 2, 5)
    round_values = [digit * 10.0**power for power in powers for digit in lead]
    if unit == "seconds":
        days = [DAY * value for value in round_values if value >= 1]
        round_values = [value for value in round_values if value < 1] + CLOCK + days
    ticks = [value for value in round_values if low <= value <= high]
    if len(ticks) < 3:
        ticks = _multiples(low, high, unit)
    return {"low": low, "high": high, "log": True, "ticks": _written(ticks, unit)}


def _multiples(low: float, high: float, unit: str) -> list[float]:
    """The multiples of a round step between two values."""
    step = _step(high - low, unit)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _step(span: float, unit: str) -> float:
    """The smallest round step that cuts `span` into at most `MOST_TICKS`; time is cut as a clock is."""
    if unit == "seconds" and span > MOST_TICKS:
        return next((step for step in CLOCK if span <= MOST_TICKS * step), DAY * _decimal_step(span / DAY))
    return _decimal_step(span)


def _decimal_step(span: float) -> float:
    power = 10.0 ** math.floor(math.log10(span / MOST_TICKS))
    return next(digit * power for digit in (1, 2, 5, 10) if span <= MOST_TICKS * digit * power)


def _written(ticks: list[float], unit: str) -> list[tuple[float, str]]:
    """Ticks with their texts; a unit that is a word would only be said again at each."""
    words = ("tokens", "parameters")
    return [(at, "0" if at == 0 else count(at) if unit in words else amount(at, unit)) for at in ticks]
