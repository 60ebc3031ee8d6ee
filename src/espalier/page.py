"""The page a run ends with: one HTML file that opens anywhere and asks nothing of the network.

A `View` holds what the page says, as plain values; `render` lays it out with the template beside this file.
Every number is written here, by `units`; the template's script places marks and writes no figures of its own.
"""

from __future__ import annotations

import math
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
# On a linear axis the first drop would flatten all that follows, so this share of the tokens may leave the frame.
FIRST_DROP = 0.02


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
    """Points in the order of their steps. Training is drawn thin, validation with dots."""

    name: str
    points: list[Point]
    style: Literal["train", "validation"]


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
    """A stage of the run: its model, what it alone spent, and the validation loss at its end."""

    name: str
    shape: str
    parameters: int
    tokens: float
    flops: float
    seconds: float
    loss: float | None


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

    alternatives  this run first, then what it is compared with, such as training the final size from scratch
    lineage       the oldest first, this model last
    recipe        the resolved recipe as YAML
    """

    title: str
    subtitle: str
    made_at: str
    headline: list[Figure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    growth: list[GrowthPoint] = field(default_factory=list)
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


def render(view: View) -> str:
    """The page as HTML; equal views give equal text."""
    loss, schedule = _loss_chart(view), _schedule_chart(view)
    return _template().render(
        view=view,
        charts={"loss": loss, "schedule": schedule},
        axes=[axis for axis in AXES if loss and axis[0] in loss["axes"]],
        bars=_bars(view.alternatives),
        read=[curve for curve in view.curves if curve.style == "validation"] or view.curves,
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters.update(amount=_known(amount), count=count, duration=duration, loss=_known(_loss), si=si)
    environment.filters.update(ratio=_ratio, result=_result)
    return environment.get_template("page.html")


def _known(write: Any) -> Any:
    """A writer that sets a dash for a number that isn't known."""
    return lambda value, *more: "–" if value is None else write(value, *more)


def _loss(nats: float) -> str:
    return f"{nats:.3f}"


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:,.2f}×" if value is not None and base else "–"


def _result(row: Row) -> str:
    return significant(row.value, 4) + (f" ± {significant(row.stderr, 2)}" if row.stderr is not None else "")


def _loss_chart(view: View) -> dict[str, Any] | None:
    """What the script needs to draw loss against any axis: points, their words, and axes with written ticks."""
    points = [point for curve in view.curves for point in curve.points]
    spent = [*points, *view.growth]
    axes = {}
    for name, _, title in AXES:
        positive = [value for value in (getattr(point, name) for point in spent) if value]
        if positive:
            low, high = min(positive), max(positive)
            axes[name] = {"title": title, "linear": _linear(0, high, name), "log": _log(low, high, name)}
    if not points or not axes:
        return None
    around = [loss for point in view.growth for loss in (point.loss_before, point.loss_after)]
    dropped = FIRST_DROP * max(point.tokens for point in points)
    settled = [point.loss for point in points if point.tokens >= dropped]
    return {
        "axes": axes,
        "y": {
            "linear": _loss_axis(settled + around),
            "log": _loss_axis([point.loss for point in points] + around),
        },
        "curves": [
            {"name": curve.name, "style": curve.style, "points": [_told(p, curve.name) for p in curve.points]}
            for curve in view.curves
        ],
        "growth": [_told_growth(point) for point in view.growth],
    }


def _schedule_chart(view: View) -> dict[str, Any] | None:
    """Parameters against tokens, a step a stage, and the rectangle of what the run is first compared with."""
    if not view.stages:
        return None
    scratch = view.alternatives[1] if len(view.alternatives) > 1 else None
    tokens = sum(stage.tokens for stage in view.stages)
    parameters = max(stage.parameters for stage in view.stages)
    most_tokens = max(tokens, scratch.tokens) if scratch else tokens
    return {
        "x": _linear(0, most_tokens, "tokens"),
        "y": _linear(0, 1.12 * parameters, "parameters"),
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


def _told(point: Point, name: str) -> dict[str, Any]:
    return {**asdict(point), "told": [f"{name} {_loss(point.loss)}", *_spent(point)]}


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


def _loss_axis(losses: list[float]) -> dict[str, Any]:
    low, high = min(losses), max(losses)
    room = 0.05 + 0.05 * (high - low)
    return _linear(max(0.0, low - room), high + room, "")


def _linear(low: float, high: float, unit: str) -> dict[str, Any]:
    return {"low": low, "high": high, "log": False, "ticks": _written(_multiples(low, high, unit), unit)}


def _log(low: float, high: float, unit: str) -> dict[str, Any]:
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
