"""How long until something useful: `--help`, `methods`, and the first optimizer step with a warm compile cache.

    python bench/2026-11-24-start/run.py

Each is a fresh process; the median CPU time (user + system) of seven is quoted, children included.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
FIRST_STEP = """
import espalier, time
import numpy as np
from espalier.data.stream import Batch
from espalier.model import build
from espalier.model.mup import Parametrization
from espalier.spec import ModelSpec
from espalier.train.device import Device
from espalier.train.loop import backward
from espalier.train.objectives import NextToken, chunk_loss
from espalier.train.optim import Optimizer
from espalier.train.recipe import OptimizerRecipe

parametrization = Parametrization(base_width=256)
spec = ModelSpec(vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4, head_dim=64)
device = Device(threads=1, compute="bfloat16", compile="layers", attention="causal_halves")
device.prepare()
model = build.build(spec, parametrization, seed=1)
device.place(model)
optimizer = Optimizer(model, spec, OptimizerRecipe(), parametrization)
ids = np.zeros((8, 257), dtype=np.int64)
backward(model, Batch(ids[:, :-1], ids[:, 1:], None), 8, NextToken(device.compiled(chunk_loss)), device)
optimizer.clip()
optimizer.step()
"""
COMMANDS = {
    "import espalier": [sys.executable, "-c", "import espalier"],
    "espalier --help": [sys.executable, "-m", "espalier", "--help"],
    "espalier methods": [sys.executable, "-m", "espalier", "methods"],
    "import torch, transformers": [sys.executable, "-c", "import torch, transformers"],
    "first step, 5M, bf16, warm compile cache": [sys.executable, "-c", FIRST_STEP],
}


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """CPU and wall seconds of a process and its children."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.monotonic() - began


def main() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp()}
    result = {}
    for name, command in COMMANDS.items():
        cold = timed(command, environment)
        runs = [timed(command, environment) for _ in range(7)]
        cpu, wall = (statistics.median(run[i] for run in runs) for i in (0, 1))
        result[name] = {"cpu": cpu, "wall": wall, "first_run_cpu": cold[0]}
        print(f"{name:45} {cpu:.2f} CPU-s, {wall:.2f} s of wall (the first time {cold[0]:.1f} CPU-s)")
    (HERE / "result.json").write_text(json.dumps({**result, "load": os.getloadavg()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
