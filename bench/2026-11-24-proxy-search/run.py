"""Do values found on a narrow proxy hold for a model four times as wide, and what do they gain there?

    python bench/2026-11-24-proxy-search/run.py FOLDER

`espalier budget tune` searches learning rate, gain and output multiplier of Espalier's default recipe (Muon, muP) at
width 32: 2 layers, the stdlib corpus, 80 updates of 2,048 tokens, 24 trials. At width 128 these are trained with three
seeds: the recipe's own values, the proxy's best, the latter with learning rates on a grid of factor sqrt(2) around, and
the own values with some of these rates, to see what the other two axes are worth.
Runs that FOLDER has are only read; result.json is written anew.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path

import espalier  # noqa: F401  (before torch)
from espalier import files
from espalier.budget import hardware
from espalier.pipeline import PretrainRecipe
from espalier.report import Report
from espalier.run import RESULTS, Run
from espalier.trials import Trial, carry_out
from espalier.tune import RATE, TuneRecipe, tune

HERE = Path(__file__).parent
SEEDS, STEPS, ROWS, LENGTH = (1, 2, 3), 80, 32, 64
DURATION = f"{STEPS * ROWS * LENGTH} tokens"
NARROW, WIDE = 32, 128
GRID = (-2, -1, 0, 1, 2)  # steps of factor sqrt(2) from the proxy's best rate
ALONE = (-2, 0, 2)  # such steps with the own gain and output multiplier
SEARCH = TuneRecipe.model_validate(
    {
        "run": {
            "data": {"sources": ["stdlib"], "held_out": 0.05, "vocab_size": 512, "sequence_length": LENGTH},
            "model": {"hidden_size": WIDE, "num_hidden_layers": 2, "head_dim": 16},
            "stages": [{"duration": DURATION}],
            "schedule": {"warmup_ratio": 0.1},
            "train": {
                "batch_tokens": ROWS * LENGTH,
                "per_device_train_batch_size": ROWS,
                "evaluations": 1,
                "eval_tokens": 2**16,
                "save_steps": 1000,
                "threads": 1,
                "torch_compile": "off",
                "bf16": "off",
            },
        },
        "width": NARROW,
        "duration": DURATION,
        "trials": 24,
    }
)


def wide(name: str, values: dict[str, float], seed: int) -> Trial:
    """The model itself with these values."""
    told = SEARCH.told(values).model_dump() | {"name": f"{name}-seed{seed}", "seed": seed}
    return Trial(values[RATE], seed, PretrainRecipe.model_validate(told))


def main(folder: Path) -> None:
    # Threads and dtype are stated, so nothing hangs on this measurement; a busy machine would repeat it for every run.
    hardware.remember(hardware.measure(home=files.home()), files.home())
    with Run.start(folder / "search", SEARCH) as run:
        tune(SEARCH, run)
    found = Report.load(folder / "search" / RESULTS)
    own, best = found.context["own"], found.context["best"]
    rates = {step: {RATE: best[RATE] * math.sqrt(2) ** step} for step in {*GRID, *ALONE}}
    settings = {
        "own": own,
        **{f"step{step}": best | rates[step] for step in GRID},
        **{f"alone{step}": own | rates[step] for step in ALONE},
    }
    trials = [wide(name, values, seed) for name, values in settings.items() for seed in SEEDS]
    figures = carry_out(trials, folder / "wide", workers=1, tell=print, done=lambda one: None)
    each = [one.loss if one else None for one in figures]
    losses = {name: each[place * len(SEEDS) :][: len(SEEDS)] for place, name in enumerate(settings)}
    means = {name: statistics.mean(seeds) for name, seeds in losses.items() if None not in seeds}
    lowest = min((step for step in GRID if f"step{step}" in means), key=lambda step: means[f"step{step}"])
    gains = {
        name: [own_loss - loss for own_loss, loss in zip(losses["own"], seeds, strict=True)]
        for name, seeds in losses.items()
        if name in means and name != "own"
    }
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "narrow": {
            "own": found.value("own values", "loss"),
            "best": found.value("best values", "loss"),
            "values": {"own": own, "best": best},
            "importance": {row.task: row.value for row in found.rows if row.metric == "importance"},
            "losses": [row.value for row in found.rows if row.task.startswith("trial")],
            "edges": found.context["at the edge of their spans"],
            "diverged": found.context["diverged"],
        },
        "wide": {
            "losses": losses,
            "means": means,
            "lowest_step": lowest,
            "gains": {name: statistics.mean(each) for name, each in gains.items()},
            "stderr": {name: statistics.stdev(each) / math.sqrt(len(each)) for name, each in gains.items()},
        },
    }
    files.write_json(HERE / "result.json", result)
    print(json.dumps({**result["narrow"], **result["wide"]}, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
