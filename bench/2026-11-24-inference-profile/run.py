"""Two questions about the price of inference, answered on models with random weights.

    python bench/2026-11-24-inference-profile/run.py

1. Does a profile fitted to 30% of a grid of (prompt, generated) predict the rest? Three models; against a cost that
   is proportional to the number of tokens, fitted to the same cells.
2. Does the roofline, with this machine's measured peak, bandwidth and overhead, predict how long a decoding step takes?
   Against 2 FLOPs a parameter at the peak.

Every cell is a generation of its own. All times are CPU time of this process on one thread, so that others who use
the machine don't count.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from pathlib import Path
from unittest import mock

import numpy
import psutil
import torch
import transformers
from scipy.stats import spearmanr

from espalier.budget import flops, hardware
from espalier.budget.inference import Cell, Query, fit
from espalier.budget.roofline import Roofline, Setting
from espalier.infer.profile import generation_times
from espalier.spec import ModelSpec

HERE = Path(__file__).parent
REPEATS, SHARE, SEED = 3, 0.3, 0
PROMPTS, GENERATED = (1, 32, 64, 128, 192, 256, 384, 512), (1, 2, 4, 8, 16, 32)
VOCABULARY, POSITIONS = 2048, 1024
MODELS = {
    "1M": {"hidden_size": 128, "num_hidden_layers": 4, "head_dim": 32},
    "4M": {"hidden_size": 256, "num_hidden_layers": 4, "head_dim": 32},
    "14M": {"hidden_size": 384, "num_hidden_layers": 7, "head_dim": 64},
}
# Models, batches and contexts of the second question; the larger ones are bound by memory, the small ones by overhead.
DECODED = {
    **MODELS,
    "60M": {"hidden_size": 768, "num_hidden_layers": 8, "head_dim": 64},
    "150M": {"hidden_size": 1152, "num_hidden_layers": 9, "head_dim": 64},
}
BATCHES, CONTEXTS, STEPS = (1, 8, 32), (64, 512), 9


def build(sizes: dict[str, int]) -> tuple[ModelSpec, transformers.PreTrainedModel]:
    spec = ModelSpec(family="llama", vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, **sizes)
    torch.manual_seed(SEED)
    config = spec.to_config()
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    return spec, transformers.AutoModelForCausalLM.from_config(config).eval()


def measured_cells(model: transformers.PreTrainedModel) -> list[Cell]:
    """Each cell by generations of its own, in a new random order every round."""
    order = [Query(prompt, generated) for prompt in PROMPTS for generated in GENERATED]
    times: dict[Query, list[float]] = {query: [] for query in order}
    generation_times(model, PROMPTS[-1], GENERATED, time.process_time)
    for number in range(REPEATS):
        random.Random(number).shuffle(order)
        for query in order:
            times[query] += generation_times(model, query.prompt, [query.generated], time.process_time)
    return [Cell(query, tuple(seconds)) for query, seconds in times.items()]


def chosen(cells: list[Cell]) -> set[Query]:
    """A share of the grid: one token after every other prompt (and the longest), the rest at random."""
    first = {Query(prompt, 1) for prompt in (*PROMPTS[::2], PROMPTS[-1])}
    others = [cell.query for cell in cells if cell.query.generated > 1]
    return first | set(random.Random(SEED).sample(others, round(SHARE * len(cells)) - len(first)))


def judged(predicted: list[float], true: list[float]) -> dict[str, float]:
    p, t = numpy.array(predicted), numpy.array(true)
    left, variance = ((p - t) ** 2).sum(), ((t - t.mean()) ** 2).sum()
    return {"median_error": float(numpy.median(abs(p / t - 1))), "r2": float(1 - left / variance)}


def profile(model: transformers.PreTrainedModel) -> dict:
    cells = measured_cells(model)
    kept = chosen(cells)
    train, held_out = ([cell for cell in cells if (cell.query in kept) == side] for side in (True, False))
    fitted = fit(train, "median")
    time_of = {cell.query: statistics.median(cell.seconds) for cell in cells}
    queries = [cell.query for cell in held_out]
    true = [time_of[query] for query in queries]
    # The baseline is fitted as well as it can be: to the relative errors, which it is judged by.
    a_token = statistics.median(time_of[query] / (query.prompt + query.generated) for query in kept)
    return {
        "cells": len(cells),
        "fitted_to": len(train),
        "ms_a_token": 1e3 * fitted.token.per_token,
        "fit_r2": fitted.token.r2,
        "fit_r2_context": fitted.context.r2,
        "token": judged([fitted.seconds(query) for query in queries], true),
        "context": judged([fitted.seconds(query, "context") for query in queries], true),
        "proportional": judged([a_token * (query.prompt + query.generated) for query in queries], true),
        "times": [[*vars(cell.query).values(), *cell.seconds] for cell in cells],
    }


@torch.inference_mode()
def decode_seconds(model: transformers.PreTrainedModel, batch: int, context: int) -> float:
    """The median step with `context` tokens to attend to, the first steps left out."""
    out = model(torch.randint(VOCABULARY, (batch, context - STEPS // 2)), use_cache=True, logits_to_keep=1)
    ids, cache, times = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values, []
    for _ in range(STEPS + 2):
        begin = time.process_time()
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        times.append(time.process_time() - begin)
    return statistics.median(times[2:])


def measured_hardware() -> hardware.Hardware:
    """This machine by the same clock: the benchmark's own is the wall's, on which others have their share."""
    with mock.patch.object(time, "perf_counter", time.process_time):
        return hardware.measure(seconds=8.0)


def decoded(row: hardware.Hardware, sizes: dict[str, int]) -> list[dict]:
    spec, model = build(sizes)
    points = []
    for batch in BATCHES:
        setting = Setting(batch, weight_bits=32, activation_bits=32, cache_bits=32)
        for context in CONTEXTS:
            phase = Roofline(spec, row, setting).decode(context)
            naive = 2 * flops.parameters(spec) * batch / row.peak_flops["float32"]
            points.append(
                {
                    "batch": batch,
                    "context": context,
                    "measured": decode_seconds(model, batch, context),
                    "roofline": phase.seconds,
                    "bound": phase.bound,
                    "flops_alone": naive,
                }
            )
    return points


def factor(points: list[dict], by: str) -> float:
    """The median factor between prediction and measurement, whichever is larger."""
    return statistics.median(max(p[by] / p["measured"], p["measured"] / p[by]) for p in points)


def main() -> None:
    torch.set_num_threads(1)
    row = measured_hardware()
    profiles = {name: profile(build(sizes)[1]) for name, sizes in MODELS.items()}
    points = [{"model": name, **point} for name, sizes in DECODED.items() for point in decoded(row, sizes)]
    single = [point for point in points if point["batch"] == 1]
    decode = {
        "spearman": float(spearmanr([p["roofline"] for p in points], [p["measured"] for p in points]).statistic),
        "factor": {by: factor(points, by) for by in ("roofline", "flops_alone")},
        "factor_batch_1": {by: factor(single, by) for by in ("roofline", "flops_alone")},
    }
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"cpu": row.name, "cores": row.count, "threads": 1, "load_at_end": psutil.getloadavg()},
        "hardware": {
            "peak_float32": row.peak_flops["float32"],
            "memory_bandwidth": row.memory_bandwidth,
            "kernel_seconds": row.kernel_seconds,
        },
        "profile": profiles,
        "decode": decode,
        "points": points,
    }
    (HERE / "result.json").write_text(json.dumps(result) + "\n")
    for name, found in profiles.items():
        print(name, {key: value for key, value in found.items() if key != "times"})
    for point in points:
        print(point)
    print(decode)


if __name__ == "__main__":
    main()
