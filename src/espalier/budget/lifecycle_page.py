"""What training and serving cost by size, as a table on the terminal and as a page with a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

from espalier import page, units
from espalier.budget.ways import Resource, Way, Ways
from espalier.ledger import Cost
from espalier.page import Figure, View

TITLES: dict[Resource, str] = {"usd": "Money", "kwh": "Energy", "kgco2e": "Carbon", "flops": "Compute"}
PHASES = {"training": "hue-0", "serving": "hue-1"}
# Sizes that cost more than so many times the chosen one would only make the others small.
SHOWN = 4.0
COLUMNS = ("size", "shape", "tokens", "training", "serving", "total", "devices", "loss")


def tell(ways: Ways, same: Sequence[float | None]) -> None:
    """The sizes in question on the terminal; `same` are their losses on what the chosen one costs."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column(min_width=7)  # the longest word of a mark
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in _written(ways, same):
        table.add_row(row["mark"], *row["cells"])
    Console().print(table)


def render(
    name: str, ways: Ways, same: Sequence[float | None], reasons: list[str], *, devices: int, recipe: str
) -> str:
    """The page as HTML; `devices` train."""
    return page.template("budget/lifecycle.html").render(
        view=_view(name, ways, reasons, devices, recipe),
        charts={"lifecycle": _chart(ways)},
        phases=PHASES,
        columns=COLUMNS,
        rows=_written(ways, same),
    )


def _view(name: str, ways: Ways, reasons: list[str], devices: int, recipe: str) -> View:
    chosen, candidate = ways.chosen, ways.chosen.candidate
    length = units.duration(chosen.training.seconds / devices)
    return View(
        title=name,
        subtitle=f"The size for which training and serving together cost the least, to a loss of {ways.loss:.4f}",
        made_at=f"Estimated on {date.today()}",
        headline=[
            Figure("Size", units.count(candidate.parameters), candidate.shape),
            Figure("Training", _amount(ways, chosen.training), f"{units.count(chosen.tokens)} tokens, {length}"),
            Figure("Serving", _amount(ways, chosen.serving), f"{_busy(chosen)} devices busy on average"),
            Figure("Saved", units.amount(ways.saved, ways.resource), "against the size chosen without serving"),
        ],
        notes=reasons,
        recipe=recipe,
    )


def _shown(ways: Ways) -> list[Way]:
    """The sizes in question."""
    most = SHOWN * ways.of(ways.chosen.cost)
    return [way for way in ways.all if ways.of(way.cost) <= most or way == ways.alone]


def _written(ways: Ways, same: Sequence[float | None]) -> list[dict[str, Any]]:
    """The sizes in question as texts for people, marked if they are chosen."""
    shown = _shown(ways)
    return [
        {"mark": _mark(ways, way), "cells": list(_cells(ways, way, loss))}
        for way, loss in zip(ways.all, same, strict=True)
        if way in shown
    ]


def _cells(ways: Ways, way: Way, same: float | None) -> Iterator[str]:
    """In the order of the columns."""
    yield units.count(way.candidate.parameters)
    yield f"{way.candidate.spec.num_hidden_layers} × {way.candidate.spec.hidden_size}"
    yield units.count(way.tokens)
    for cost in (way.training, way.serving, way.cost):
        yield _amount(ways, cost)
    yield _busy(way)
    yield "–" if same is None else f"{same:.4f}"


def _busy(way: Way) -> str:
    """Devices at work on average."""
    busy = way.candidate.served.busy
    return units.significant(busy) if busy >= 0.01 or not busy else "<0.01"


def _mark(ways: Ways, way: Way) -> str:
    """What a size would be chosen for, if for anything."""
    names = {"chosen": ways.chosen, "without serving": ways.alone}
    return ", ".join(name for name, best in names.items() if way == best)


def _chart(ways: Ways) -> dict[str, Any]:
    """What the script needs: a bar a size with its two parts, and an axis with written ticks."""
    shown = _shown(ways)
    return {
        "y": page.linear_axis(0, 1.05 * max(ways.of(way.cost) for way in shown), ways.resource),
        "title": TITLES[ways.resource],
        "bars": [
            {
                "name": units.count(way.candidate.parameters),
                "mark": _mark(ways, way),
                "parts": [
                    {"hue": PHASES["training"], "amount": ways.of(way.training)},
                    {"hue": PHASES["serving"], "amount": ways.of(way.serving)},
                ],
                "told": [
                    way.candidate.shape,
                    f"training {_amount(ways, way.training)}, on {units.count(way.tokens)} tokens",
                    f"serving {_amount(ways, way.serving)}",
                    f"{_amount(ways, way.cost)} in all",
                ],
            }
            for way in shown
        ],
    }


def _amount(ways: Ways, cost: Cost) -> str:
    return units.amount(ways.of(cost), ways.resource)
