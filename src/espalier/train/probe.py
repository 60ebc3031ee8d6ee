"""Probe: how fast this machine trains a shape, from a few real steps, so that a plan's hours come true."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from espalier import files, records
from espalier.data.stream import Batch
from espalier.model.mup import Parametrization
from espalier.spec import ModelSpec
from espalier.train.device import Device, initial_model
from espalier.train.loop import Objective, backward
from espalier.train.optim import Optimizer
from espalier.train.parallel import ALONE, Parallel
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
    parallel: Parallel = ALONE,
) -> Speed:
    """Time real micro-batches and updates of a model of this shape on random tokens; kept for the next run here.

    Ranks that share the training are timed together, and what the leader measures counts.
    """
    key = files.digest(
        {
            "spec": spec.model_dump(),
            "optimizer": optimizer_recipe.name,
            "device": asdict(device),
            "batch": [micro_rows, sequence_length],
            "torch": torch.__version__,
            "machine": [platform.node(), _model_of(device.kind), os.cpu_count()],
            **parallel.described(),
        }
    )
    world, path = parallel.world, home / "speeds" / f"{key}.json"
    if kept := world.told(_kept(path) if world.leads else None):
        return Speed(**kept)
    speed = _measure(
        spec, parametrization, optimizer_recipe, objective, device, micro_rows, sequence_length, repeats, parallel
    )
    if world.leads:
        files.make_folder(path.parent)
        records.write(path, asdict(speed))
    return Speed(**world.told(asdict(speed)))


def _kept(path: Path) -> dict[str, Any] | None:
    """A measured speed; None if there is none, or none that can be read."""
    try:
        return records.parse(path.read_text(encoding="utf-8"), path.name)
    except (OSError, ValueError):
        return None


def _measure(
    spec: ModelSpec,
    parametrization: Parametrization,
    optimizer_recipe: OptimizerRecipe,
    objective: Objective,
    device: Device,
    micro_rows: int,
    sequence_length: int,
    repeats: int,
    parallel: Parallel,
) -> Speed:
    model = initial_model(spec, parametrization, device, parallel, seed=0)
    optimizer = Optimizer(model, spec, optimizer_recipe, parametrization, parallel)
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, (micro_rows, sequence_length + 1))
    batch = Batch(ids[:, :-1], ids[:, 1:], None)
    begin = time.perf_counter()
    passes, updates = [], []
    for _ in range(repeats + 1):
        passes.append(_timed(lambda: backward(model, batch, micro_rows, objective, device, parallel), device.kind))
        updates.append(_timed(lambda: _update(optimizer), device.kind))
    per_pass, per_update = statistics.median(passes[1:]), statistics.median(updates[1:])
    ready = time.perf_counter() - begin - sum(passes[1:]) - sum(updates[1:])
    return Speed(per_pass / (batch.input_ids.size * parallel.data_ranks), per_update, ready)


def _update(optimizer: Optimizer) -> None:
    optimizer.clip()
    optimizer.step()


def _timed(work: Callable[[], object], kind: str) -> float:
    """Seconds until the device has done what `work` asks of it; a call returns as soon as a GPU knows what to do."""
    synchronize = getattr(torch, kind).synchronize
    synchronize()  # what came before is another's time
    begin = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begin


def _model_of(kind: str) -> str:
    """The GPU's name, or what the platform says of the processor."""
    return torch.cuda.get_device_name() if kind == "cuda" else platform.processor()
