"""Does the best learning rate of a narrow model hold for a wide one? With muP, and without.

    python bench/2026-11-24-mup/run.py

Granite, 2 layers, widths 64 and 256 (head size 32), AdamW, the stdlib corpus, 80 updates of 2,048 tokens; rates on a
grid of factor sqrt(2). The answer is the number of grid steps between the two widths' best rates, by the mean over
seeds. Cells that result.json has are kept: delete it to measure all anew.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import espalier  # noqa: F401  (before torch)
from espalier import files
from espalier.data import pack, tokenizer
from espalier.data.prepare import DataRecipe, prepare
from espalier.data.stream import Stream
from espalier.model import build
from espalier.model.mup import Parametrization
from espalier.spec import ModelSpec
from espalier.train.checkpoint import Progress
from espalier.train.device import Device
from espalier.train.loop import Segment, State, update
from espalier.train.objectives import NextToken
from espalier.train.optim import Optimizer
from espalier.train.recipe import OptimizerRecipe, ScheduleRecipe
from espalier.train.validate import validate

HERE = Path(__file__).parent
WIDTHS, SEEDS, STEPS = (64, 256), (1, 2, 3), 80
VOCABULARY, LENGTH, ROWS = 512, 64, 32
# Exponents of 2.
RATES = {
    "mup": (-7, -6.5, -6, -5.5, -5),
    "standard": (-10, -9.5, -9, -8.5, -8, -7.5, -7),
}
GRID_STEP = 0.5
DEVICE = Device(threads=1, compute="float32")


def streams() -> tuple[dict[int, Stream], Stream, list[int]]:
    recipe = DataRecipe(sources=["stdlib"], held_out=0.05, vocab_size=VOCABULARY, sequence_length=LENGTH)
    quiet = lambda line: None  # noqa: E731
    dataset = prepare(recipe, home=files.home(), tell=quiet)
    words = tokenizer.choose(None, dataset, VOCABULARY, home=files.home(), tell=quiet)
    train, held_out = (
        pack.tokenize(dataset, split, words, home=files.home(), tell=quiet) for split in ("train", "validation")
    )
    make = lambda tokens, seed: Stream(tokens, sequence_length=LENGTH, seed=seed, attend="row", eos_id=0)  # noqa: E731
    return {seed: make(train, seed) for seed in SEEDS}, make(held_out, 0), tokenizer.byte_lengths(tokenizer.load(words))


def final_loss(kind: str, width: int, rate: float, seed: int, stream: Stream, held_out: Stream, lengths) -> float:
    parametrization = Parametrization(kind=kind, base_width=64)
    shape = ModelSpec(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=2, head_dim=32)
    spec = parametrization.carried_by(shape)
    model = build.build(spec, parametrization, seed=seed)
    recipe = OptimizerRecipe(name="adamw", learning_rate=rate, vector_learning_rate=rate)
    state = State(spec, model, Optimizer(model, spec, recipe, parametrization), Progress())
    schedule = ScheduleRecipe(warmup_ratio=0.1, decay_ratio=0.3)
    segment = Segment(STEPS, ROWS, ROWS, 0.0, lambda step: schedule.factor((step + 0.5) / STEPS))
    for _ in range(STEPS):
        update(state, stream, segment, NextToken(), DEVICE)
    return validate(model, held_out, lengths, NextToken(), DEVICE, rows=512, micro_rows=64).loss


def main() -> None:
    DEVICE.prepare()
    train, held_out, lengths = streams()
    path = HERE / "result.json"
    losses = json.loads(path.read_text())["losses"] if path.exists() else {}
    for kind, exponents in RATES.items():
        for width in WIDTHS:
            table = losses.setdefault(kind, {}).setdefault(str(width), {})
            for exponent in exponents:
                if f"{exponent:g}" not in table:
                    table[f"{exponent:g}"] = [
                        final_loss(kind, width, 2.0**exponent, seed, train[seed], held_out, lengths) for seed in SEEDS
                    ]
                    path.write_text(json.dumps({"losses": losses}))
    means = {
        kind: {width: {e: statistics.mean(v) for e, v in table.items()} for width, table in by_width.items()}
        for kind, by_width in losses.items()
    }
    best = {
        kind: {width: float(min(table, key=table.__getitem__)) for width, table in by_width.items()}
        for kind, by_width in means.items()
    }
    steps = {kind: (found["256"] - found["64"]) / GRID_STEP for kind, found in best.items()}
    result = {"date": time.strftime("%Y-%m-%d"), "losses": losses, "best_exponent": best, "grid_steps": steps}
    path.write_text(json.dumps(result, indent=2) + "\n")
    for kind, by_width in means.items():
        for width, table in by_width.items():
            row = " ".join(f"2^{e}:{table[e]:.3f}" for e in sorted(table, key=float))
            print(f"{kind:9} {width:>4} {row}")
        print(f"{kind:9} best exponents {best[kind]}, grid steps between the widths: {steps[kind]:g}")


if __name__ == "__main__":
    main()
