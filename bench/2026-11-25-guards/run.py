"""Guards of the numbers: planted spikes found, false alarms of healthy runs, what a step pays, what a rewind saves.

    python bench/2026-11-25-guards/run.py [RUNS]

Made-up losses fall by a power law, wave, jump at a growth and decay; their noise is normal or has heavy tails. Real
ones are those of three growth runs of 3,900 updates. A smaller run has a few updates of random tokens: what does its
held-out loss come to when a spike is told only, and when it leads back? A finished run under RUNS is only read.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import arms  # noqa: E402
import numpy as np  # noqa: E402

from espalier import files, records  # noqa: E402
from espalier.data import stream  # noqa: E402
from espalier.data.stream import Batch, Stream  # noqa: E402
from espalier.model import build  # noqa: E402
from espalier.model.mup import Parametrization  # noqa: E402
from espalier.run import METRICS, RESULTS  # noqa: E402
from espalier.spec import ModelSpec  # noqa: E402
from espalier.train.device import Device  # noqa: E402
from espalier.train.guards import Guards  # noqa: E402
from espalier.train.loop import backward  # noqa: E402
from espalier.train.objectives import NextToken  # noqa: E402
from espalier.train.optim import Optimizer  # noqa: E402
from espalier.train.recipe import OptimizerRecipe, TrainRecipe  # noqa: E402

LIMIT = TrainRecipe().spike_sigmas
LIMITS = (5.0, 6.0, LIMIT, 8.0)
SEEDS = range(10)
NOISE = {"normal": None, "t, 12 degrees": 12, "t, 8 degrees": 8}
STEPS, PLANTED, SCALE = 10_000, 20, 0.03
SMALL = {"num_hidden_layers": 2, "hidden_size": 48}
RECIPE: dict[str, Any] = {
    "data": {"sources": ["stdlib"], "vocab_size": 2048, "sequence_length": 128},
    "model": {"head_dim": 16, "max_position_embeddings": 512},
    "stages": [
        {**SMALL, "duration": "2M tokens"},
        {"num_hidden_layers": 4, "hidden_size": 64, "duration": "2M tokens", "depth": "stack"},
    ],
    "train": {
        "batch_tokens": 1024,
        "logging_steps": 1,
        "evaluations": 2,
        "eval_tokens": 65536,
        "torch_compile": "off",
        "bf16": "off",
        "threads": 1,
    },
    "samples": {"prompts": ["import"], "max_new_tokens": 4},
}
ADAMW = {"name": "adamw", "learning_rate": 0.004}
HEALTHY: dict[str, dict[str, Any]] = {
    "muon-1": {"seed": 1},
    "muon-2": {"seed": 2},
    "adamw-1": {"seed": 1, "optimizer": ADAMW},
}
POISON = 700  # the first update of random tokens
LENGTHS = (1, 12)
WAYS = ("tell", "rewind")
ROWS = 8  # of an update


def made_up(seed: int, tails: int | None) -> np.ndarray:
    """Losses of STEPS updates, a growth in the middle; `tails` are degrees of freedom of Student's t."""
    generator, step = np.random.default_rng(seed), np.arange(STEPS)
    mean = 2 + 8 * (1 + step / 30) ** -0.5 + 0.05 * np.sin(step / 400)
    mean -= 0.25 * np.clip((step / STEPS - 0.6) / 0.4, 0, 1)
    mean += np.where(step >= STEPS // 2, 0.5 * np.exp(-(step - STEPS // 2) / 200), 0)
    noise = generator.standard_t(tails, STEPS) if tails else generator.standard_normal(STEPS)
    return mean + SCALE * noise


def plant(losses: np.ndarray, seed: int) -> list[int]:
    """Raise PLANTED of the losses by 10 to 30 times the noise, away from the start and the growth; which they are."""
    generator = np.random.default_rng(1000 + seed)
    every = STEPS // PLANTED
    at = [every * number + 200 + int(generator.integers(every - 250)) for number in range(PLANTED)]
    losses[at] += generator.uniform(10, 30, PLANTED) * SCALE
    return at


def spikes(losses: list[float], growths: set[int], limit: float) -> tuple[list[int], float]:
    """The updates that are spikes, and the furthest out that any loss was."""
    state, found, furthest = Guards(), [], 0.0
    for step, loss in enumerate(losses):
        state = (state.anew() if step in growths else state).after(loss, finite=True, limit=limit)
        furthest = max(furthest, state.sigmas)
        if state.sigmas > limit:
            found.append(step)
    return found, furthest


def detection() -> list[dict[str, Any]]:
    rows = []
    for name, tails in NOISE.items():
        for limit in LIMITS:
            hit = false = 0
            for seed in SEEDS:
                losses = made_up(seed, tails)
                planted = set(plant(losses, seed))
                found = set(spikes(losses.tolist(), {STEPS // 2}, limit)[0])
                hit, false = hit + len(found & planted), false + len(found - planted)
            rows.append(
                {
                    "noise": name,
                    "sigmas": limit,
                    "planted": PLANTED * len(SEEDS),
                    "found": hit,
                    "false_per_10k": false / len(SEEDS) * 10_000 / STEPS,
                }
            )
    return rows


def carried_out(recipe: dict[str, Any], runs: Path) -> dict[str, Any]:
    folder = runs / recipe["name"]
    return arms.figures(folder) if (folder / RESULTS).exists() else arms.run(recipe, runs)


def healthy(runs: Path) -> list[dict[str, Any]]:
    """How far out the losses of real runs are, and the logarithms of their gradient norms by the same measure."""
    rows = []
    for name, told in HEALTHY.items():
        carried_out({"name": name, **RECIPE, **told}, runs)
        lines = [line for line in records.read_lines(runs / name / METRICS) if "loss" in line]
        growths = {n for n in range(1, len(lines)) if lines[n]["stage"] != lines[n - 1]["stage"]}
        norms = [math.log(line["grad_norm"]) for line in lines]
        rows.append(
            {
                "run": name,
                "updates": len(lines),
                "furthest_loss": spikes([line["loss"] for line in lines], growths, math.inf)[1],
                "furthest_norm": spikes(norms, growths, math.inf)[1],
                "false": len(spikes([line["loss"] for line in lines], growths, LIMIT)[0]),
            }
        )
    return rows


def cost() -> dict[str, float]:
    """CPU seconds of the guard and of a whole update of the smaller model, taken in turn; medians of 100."""
    parametrization = Parametrization()
    spec = ModelSpec(vocab_size=2048, head_dim=16, max_position_embeddings=512, **SMALL)
    model = build.build(spec, parametrization, seed=0)
    optimizer = Optimizer(model, spec, OptimizerRecipe(), parametrization)
    ids = np.random.default_rng(0).integers(0, 2048, (ROWS, 129))
    batch, objective, state = Batch(ids[:, :-1], ids[:, 1:], None), NextToken(), Guards()
    guard, update = [], []
    for loss in made_up(0, None)[:300].tolist():
        began = time.process_time()
        backward(model, batch, ROWS, objective, Device())
        optimizer.clip()
        optimizer.step()
        middle = time.process_time()
        state = state.after(loss, finite=True, limit=LIMIT)
        guard.append(time.process_time() - middle)
        update.append(middle - began)
    seconds, step_seconds = statistics.median(guard[200:]), statistics.median(update[200:])
    return {"seconds": seconds, "step_seconds": step_seconds, "share": seconds / step_seconds}


class Poisoned(Stream):
    """A stream in which samples [begin, end) are random tokens."""

    def __init__(self, *arguments: Any, begin: int, end: int, **more: Any) -> None:
        super().__init__(*arguments, **more)
        object.__setattr__(self, "range", range(begin, end))

    def batch(self, start: int, count: int, **more: int) -> Batch:
        batch = super().batch(start, count, **more)
        if start not in self.__dict__["range"]:
            return batch
        ids = np.random.default_rng(start).integers(0, 2048, (count, self.sequence_length + 1))
        return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), None)


def poisoned(runs: Path) -> list[dict[str, Any]]:
    """What runs come to of whose updates from POISON on so many are of random tokens."""
    rows = []
    for length, seed, way in [(0, seed, "tell") for seed in (1, 2)] + list(itertools.product(LENGTHS, (1, 2), WAYS)):
        name = f"random-{length}-seed{seed}-{way}"
        begin = ROWS * (POISON - 1)
        train = {**RECIPE["train"], "on_spike": way, "save_steps": 50}
        told = {"name": name, "seed": seed, **RECIPE, "stages": [{**SMALL, "duration": "800k tokens"}], "train": train}
        with mock.patch.object(stream, "Stream", functools.partial(Poisoned, begin=begin, end=begin + ROWS * length)):
            figures = carried_out(told, runs)
        lines = list(records.read_lines(runs / name / METRICS))
        rewinds = sum("rewound_from" in line for line in lines)
        told_only = sum("spike" in line for line in lines) - rewinds
        rows.append(
            {"random_updates": length, "seed": seed, "way": way, "loss": figures["loss"], "rewinds": rewinds}
            | {"told_only": told_only, "tokens": figures["tokens"]}
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    result: dict[str, Any] = {"detection": detection()}
    print(json.dumps(result, indent=1), flush=True)
    result["poisoned"] = poisoned(runs)
    result["healthy"] = healthy(runs)
    result["cost"] = cost()
    files.write_json(HERE / "result.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
