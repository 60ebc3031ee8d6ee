"""How much of its way a stacked model goes again: why `espalier plan` takes none for `relearned`.

    python bench/2026-11-24-growth-compare/relearned.py

A law of size and data is fitted on the ways without growth (result*.json); then the share is looked for with which the
law's trajectory along the growth path ends at the loss that the stacked runs had.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from scipy.optimize import brentq

from espalier import recipe
from espalier.budget import fit, flops, schedule
from espalier.budget.observations import About, Observation
from espalier.budget.plan import Duration
from espalier.budget.schedule import Size
from espalier.compare import CompareRecipe

HERE = Path(__file__).parent
# The layers of each way without growth, by its name in the results.
ALONE = {"large from scratch": 24, "small only": 2, "stage 3 only": 6, "stage 4 only": 10}
RESULTS = ("result-between.json", "result-crossover.json")


def _between(behind: Callable[[float], float]) -> float | None:
    """The share at which a rising function is zero; None if it is nowhere between 0 and 1."""
    return brentq(behind, 0.0, 1.0) if behind(0.0) < 0 < behind(1.0) else None


def main() -> None:
    told = recipe.load(CompareRecipe, HERE / "adamw.yaml", [])
    specs = told.run.specs()
    length = told.run.data.sequence_length
    each = {spec.num_hidden_layers: flops.training_flops(spec, length) for spec in specs}
    sizes = [Size(flops.parameters(spec), each[spec.num_hidden_layers]) for spec in specs]
    by_layers = {spec.num_hidden_layers: size for spec, size in zip(specs, sizes, strict=True)}
    observations, grown = [], []
    for name in RESULTS:
        for way, seeds in json.loads((HERE / name).read_text())["context"]["seeds"].items():
            for seed in seeds:
                if layers := ALONE.get(way):
                    size = by_layers[layers]
                    tokens = seed["flops"] / size.cost_per_token
                    observations.append(Observation(parameters=size.parameters, tokens=tokens, loss=seed["loss"]))
                elif way == "stack":
                    grown.append((seed["flops"], seed["loss"]))
    law = fit.fit(observations, "size_and_data", about=About(source="growth-compare"))
    shares = [Duration.parse(stage.duration).amount for stage in told.run.stages]

    def ends(relearned: float, spent: float) -> float:
        stages = [
            (n, share * spent / size.cost_per_token) for n, (share, size) in enumerate(zip(shares, sizes, strict=True))
        ]
        return schedule.trajectory(law.terms, sizes, stages, lambda before, after: relearned).loss

    found = [
        {
            "flops": spent,
            "loss": loss,
            "if nothing is lost": ends(0.0, spent),
            "if all is": ends(1.0, spent),
            "relearned": _between(lambda share, spent=spent, loss=loss: ends(share, spent) - loss),
        }
        for spent, loss in grown
    ]
    result = {"law": law.values, "noise": law.noise, "relearned": found, "runs": len(observations)}
    (HERE / "relearned.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
