"""Do tiny muP widths tell the loss of one twice as wide? Laws fitted on the narrower ones, beside their largest's loss.

    python bench/2026-11-24-loss-laws/run.py [FOLDER]

Trains ladder.yaml in FOLDER (runs/loss-laws, if not stated), or only reads it there once it is finished.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import espalier  # noqa: F401  (before torch)
from espalier import recipe
from espalier.budget.fit import LAW, fit
from espalier.budget.observations import Observation
from espalier.budget.scaling import Form, Law
from espalier.ladder import LadderRecipe, ladder
from espalier.ledger import Ledger
from espalier.run import LEDGER, Run

HERE = Path(__file__).parent


def prediction(law: Law, narrower: list[Observation], runs: list[Observation]) -> dict:
    """The widest model's mean loss over seeds at one length: measured, predicted, and by the largest fitted model."""
    parameters, tokens = runs[0].parameters, runs[0].tokens
    measured = sum(one.loss for one in runs) / len(runs)
    largest = [one.loss for one in narrower if (one.parameters, one.tokens) == (law.parameters.high, tokens)]
    found = law.predict(parameters, None if law.form == "size" else tokens)
    assert found.interval
    low, high = found.interval
    return {
        "tokens": tokens,
        "measured": measured,
        "predicted": found.loss,
        "interval": [low, high],
        "runs inside": sum(low <= one.loss <= high for one in runs),
        "runs": len(runs),
        "error": found.loss / measured - 1,
        "error of the largest fitted model's loss": sum(largest) / len(largest) / measured - 1,
        "reach": found.reach,
    }


def by_law(law: Law, form: Form, widths: int) -> list[dict]:
    """Predictions of the widest model from the `widths` narrowest, length by length."""
    sizes = sorted({one.parameters for one in law.observations})
    lengths = sorted({one.tokens for one in law.observations})
    narrower = [one for one in law.observations if one.parameters in sizes[:widths]]
    widest = {
        tokens: [o for o in law.observations if (o.parameters, o.tokens) == (sizes[-1], tokens)] for tokens in lengths
    }
    if form == "size_and_data":
        fitted = fit(narrower, form, about=law.about)
        return [prediction(fitted, narrower, widest[tokens]) for tokens in lengths]
    alike = {tokens: [one for one in narrower if one.tokens == tokens] for tokens in lengths}
    return [prediction(fit(alike[tokens], form, about=law.about), alike[tokens], widest[tokens]) for tokens in lengths]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/loss-laws")
    told = recipe.load(LadderRecipe, HERE / "ladder.yaml")
    if not (folder / LAW).exists():
        with Run.start(folder, told) as run:
            ladder(told, run)
            run.finish("finished")
    law = Law.load(str(folder / LAW))
    found = {
        f"{form}, {widths} widths": by_law(law, form, widths)
        for form in ("size", "size_and_data")
        for widths in range(len(told.sizes) - 1, 2, -1)
    }
    spent = Ledger(folder / LEDGER).total
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "seconds": spent.seconds,
        "flops": spent.flops,
        "observations": [one.model_dump() for one in law.observations],
        "law of all": {name: [value, law.interval(name)] for name, value in law.values.items()},
        "noise": law.noise,
        "predictions": found,
    }
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, rows in found.items():
        for row in rows:
            baseline = row["error of the largest fitted model's loss"]
            print(
                f"{name}  {row['tokens']:>9,.0f} tokens  measured {row['measured']:.4f}  "
                f"predicted {row['predicted']:.4f} ({row['error']:+.2%}; {row['runs inside']} inside)  "
                f"largest fitted {baseline:+.2%}"
            )


if __name__ == "__main__":
    main()
