"""Wall-clock of the better baseline and of one grown way, one after the other on a machine that does nothing else.

    python bench/2026-11-24-growth-compare/wallclock.py [WAY] [SEED ...]

The ways, rates and seeds are those of adamw.yaml; in turn, A B A B, one thread each. Prints for each seed the share of
the baseline's seconds (updates and growths) at which the way had the baseline's final loss, and writes wallclock.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

from espalier import recipe
from espalier.compare import LARGE, CompareRecipe
from espalier.trials import carry_out

HERE = Path(__file__).parent
RATE = 0.02  # the best of each in result.json


def main(name: str, seeds: list[int]) -> None:
    told = recipe.load(CompareRecipe, HERE / "adamw.yaml", [])
    ways = {way.name: way for way in told.ways() if way.name in (LARGE, name)}
    trials = [ways[way].trial(told.run, rate=RATE, seed=seed) for seed in seeds or told.seeds for way in (LARGE, name)]
    figures = carry_out(trials, Path(tempfile.mkdtemp()), workers=1, tell=print, done=lambda figures: None)
    found = []
    for base, grown in zip(figures[::2], figures[1::2], strict=True):
        assert base and grown
        at = grown.reached(base.loss)
        found.append(
            {
                "baseline seconds": base.seconds,
                "seconds": grown.seconds,
                "share of time": at and at[1] / base.seconds,
                "share of FLOPs": at and at[0] / base.flops,
            }
        )
        print(json.dumps(found[-1]))
    times = [one["share of time"] for one in found if one["share of time"]]
    print(f"{name}: {statistics.median(times):.2f} of the wall-clock of {LARGE}, {len(times)} of {len(found)} seeds")
    (HERE / "wallclock.json").write_text(json.dumps({"way": name, "seeds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "stack", [int(seed) for seed in sys.argv[2:]])
