"""Run recipes of `espalier run` in this process, and read what they came to. Shared by the benchmarks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import yaml

from espalier import pipeline, records
from espalier.ledger import Ledger
from espalier.report import Report


def run(recipe: dict[str, Any], runs: Path) -> dict[str, Any]:
    """Carry out a recipe under `runs` (a finished one is only read) and return its figures."""
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    began = time.time()
    torch._dynamo.reset()
    pipeline.main(path, [], runs=runs, dry_run=False, tell=lambda line: None)
    return {"name": recipe["name"], **figures(runs / recipe["name"]), "wall_seconds": time.time() - began}


def figures(folder: Path) -> dict[str, Any]:
    """Final held-out loss, training FLOPs, tokens and seconds of a finished run, and its curve."""
    results = Report.load(folder / "results.json")
    trained = Ledger(folder / "ledger.jsonl").spent(kind="train")
    metrics = list(records.read_lines(folder / "metrics.jsonl"))
    return {
        "loss": results.value("held-out", "loss"),
        "flops": trained.flops,
        "tokens": trained.tokens,
        "train_seconds": trained.seconds,
        "curve": [[m["total_flos"], m["eval_loss"]] for m in metrics if "eval_loss" in m],
    }
