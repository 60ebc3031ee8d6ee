"""Probe: how fast this machine trains a shape, from a few real steps, so that a plan's hours come true."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from espalier import files
from espalier.data.stream import Batch
from espalier.model import build
from espalier.model.mup import Parametrization
from espalier.spec import ModelSpec
from espalier.train.device import Device
from espalier.train.loop import Objective, backward
from espalier.train.optim import Optimizer
from espalier.train.recipe import OptimizerRecipe


@dataclass(frozen=True)
class Speed:
    """Seconds of a forward and backward pass per token, of an optimizer update, and of getting ready (compile)."""

    per_token: float
    per_update: float
    ready: float

    def seconds_per_token(self, step_tokens: int) -> float:
        """Seconds a token when an update is made every `step_tokens`."""
        return self.per_token + self.per_update / step_tokens


def probe(
    spec: ModelSpec,
    parametrization: Parametrization,
    optimizer_recipe: OptimizerRecipe,
    objective: Objective,
    device: Device,
    *,
    micro_rows: int,
    sequence_length: int,
    home: Path,
    repeats: int = 3,
) -> Speed:
    """Time real micro-batches and updates of a model of this shape on random tokens; kept for the next run here."""
    key = files.digest(
        {
            "spec": spec.model_dump(),
            "optimizer": optimizer_recipe.name,
            "device": asdict(device),
            "batch": [micro_rows, sequence_length],
            "torch": torch.__version__,
            "machine": [platform.node(), platform.processor(), os.cpu_count()],
        }
    )
    path = home / "speeds" / f"{key}.json"
    if path.exists():
        return Speed(**json.loads(path.read_text()))
    speed = _measure(spec, parametrization, optimizer_recipe, objective, device, micro_rows, sequence_length, repeats)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, asdict(speed))
    return speed


def _measure(
    spec: ModelSpec,
    parametrization: Parametrization,
    optimizer_recipe: OptimizerRecipe,
    objective: Objective,
    device: Device,
    micro_rows: int,
    sequence_length: int,
    repeats: int,
) -> Speed:
    model = build.build(spec, parametrization, seed=0)
    device.place(model)
    optimizer = Optimizer(model, spec, optimizer_recipe, parametrization)
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, (micro_rows, sequence_length + 1))
    batch = Batch(ids[:, :-1], ids[:, 1:], None)
    begin = time.perf_counter()
    passes, updates = [], []
    for _ in range(repeats + 1):
        passes.append(_timed(lambda: backward(model, batch, micro_rows, objective, device)))
        updates.append(_timed(lambda: _update(optimizer)))
    per_pass, per_update = statistics.median(passes[1:]), statistics.median(updates[1:])
    ready = time.perf_counter() - begin - sum(passes[1:]) - sum(updates[1:])
    return Speed(per_pass / batch.input_ids.size, per_update, ready)


def _update(optimizer: Optimizer) -> None:
    optimizer.clip()
    optimizer.step()


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
