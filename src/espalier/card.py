"""The model card: README.md of a model folder, with the front matter that the Hub and its tools read."""

from __future__ import annotations

from typing import Any, Protocol

import yaml

from espalier import units
from espalier.ledger import Cost
from espalier.report import Report


class Sized(Protocol):
    """What the card says of a model's shape."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...


PRETRAINED = """A small model trained on little text: it continues text of the kind it saw, and knows nothing reliable.
It was not tuned to follow instructions and has no safety training."""
GROWN = """Parts of this model are new and have learned nothing yet: train it on before you use it. Whatever limits its
parent has, it has too."""


def model_card(
    name: str,
    family: str,
    shape: Sized,
    parameters: int,
    made: dict[str, Any],
    results: Report,
    *,
    limits: str = PRETRAINED,
) -> str:
    """The card's text; numbers are those of made.json and the report."""
    cost = Cost(**made["cost"])
    measured = "measured" if "kwh" in made.get("measured", ()) else "estimated"
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["espalier", family, "grown"],
        "model-index": [{"name": name, "results": [_index_entry(row) for row in results.rows]}],
        "co2_eq_emissions": {
            "emissions": round(cost.kgco2e * 1000, 6),
            "source": f"{measured} energy x grid factor",
            "training_type": "pre-training",
            "hardware_used": made.get("hardware", "unknown"),
        },
    }
    rows = "\n".join(
        f"| {row.task} | {row.metric} | {row.value:.4f}{f' ± {row.stderr:.4f}' if row.stderr else ''} | {row.n or ''} |"
        for row in results.rows
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# {name}

A {family} language model of {units.count(parameters)} parameters ({shape.num_hidden_layers} layers,
hidden size {shape.hidden_size}), made with Espalier {made["versions"]["espalier"]}.

## How it was made

Method `{made["method"]}`, seed {made["seed"]}. The whole recipe, the growth steps and the parents are in `made.json`.

## What it cost

{units.duration(cost.seconds)} of device time, {units.si(cost.flops, "FLOP")}, {units.money(cost.usd)} (estimated),
{units.si(cost.kwh * 1000, "Wh")} ({measured}), {units.si(cost.kgco2e * 1000, "g")} CO2e (estimated).

## What it can do

| task | metric | value | n |
|---|---|---|---|
{rows}

## Limits

{limits}
"""


def _index_entry(row: Any) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": row.task, "type": row.task},
        "metrics": [{"type": row.metric, "value": row.value}],
    }
