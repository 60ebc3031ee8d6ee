"""The model card: README.md of a model folder, with the front matter that the Hub and its tools read."""

from __future__ import annotations

from typing import Any

import yaml

from espalier import units
from espalier.ledger import Cost
from espalier.report import Report
from espalier.spec import ModelSpec


def model_card(name: str, made: dict[str, Any], spec: ModelSpec, parameters: int, results: Report) -> str:
    """The card's text; numbers are those of made.json and the report."""
    cost = Cost(**made["cost"])
    measured = "measured" if "kwh" in made.get("measured", ()) else "estimated"
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["espalier", spec.family, "grown"],
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

A {spec.family} language model of {units.count(parameters)} parameters ({spec.num_hidden_layers} layers,
hidden size {spec.hidden_size}), trained with Espalier {made["versions"]["espalier"]}.

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

A small model trained on little text: it continues text of the kind it saw, and knows nothing reliable.
It was not tuned to follow instructions and has no safety training.
"""


def _index_entry(row: Any) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": row.task, "type": row.task},
        "metrics": [{"type": row.metric, "value": row.value}],
    }
