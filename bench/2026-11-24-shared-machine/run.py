"""Training speed (wall clock) while another program keeps one of two cores busy.

    python bench/2026-11-24-shared-machine/run.py        on a machine that does nothing else

Fresh processes in turn, A B C ... C B A: one thread on the idle machine (the base), two threads on the idle machine;
then with a busy loop pinned to core 0: the threads that Espalier chooses (`hardware.free_cores`), two threads with
OpenMP's passive waiting (which Espalier sets), and two threads with OpenMP's own default, spinning.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROUNDS, SECONDS = 3, 6.0
ARMS = {  # name: (core 0 busy, threads, OMP_WAIT_POLICY)
    "1 thread, idle machine": (False, "1", "PASSIVE"),
    "2 threads, idle machine": (False, "2", "PASSIVE"),
    "busy core, Espalier's choice": (True, "free", "PASSIVE"),
    "busy core, 2 threads, passive": (True, "2", "PASSIVE"),
    "busy core, 2 threads, OpenMP's default": (True, "2", "default"),
}


def work(threads: str) -> None:
    """Print tokens a second of the product's loop over SECONDS."""
    import espalier  # isort: skip  # noqa: F401  (before torch)
    import numpy as np

    from espalier.budget import hardware
    from espalier.data.stream import Batch
    from espalier.model import build
    from espalier.model.mup import Parametrization
    from espalier.spec import ModelSpec
    from espalier.train.device import Device
    from espalier.train.loop import backward
    from espalier.train.objectives import NextToken, chunk_loss
    from espalier.train.optim import Optimizer
    from espalier.train.recipe import OptimizerRecipe

    count = hardware.free_cores() if threads == "free" else int(threads)
    parametrization = Parametrization(base_width=256)
    spec = ModelSpec(vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4, head_dim=64)
    device = Device(threads=count, compute="bfloat16", compile="layers", attention="causal_halves")
    device.prepare()
    model = build.build(spec, parametrization, seed=1)
    device.place(model)
    optimizer = Optimizer(model, spec, OptimizerRecipe(name="adamw"), parametrization)
    objective = NextToken(device.compiled(chunk_loss))
    ids = np.random.default_rng(0).integers(0, 4096, (8, 257))
    batch = Batch(ids[:, :-1], ids[:, 1:], None)

    def step() -> None:
        backward(model, batch, 8, objective, device)
        optimizer.clip()
        optimizer.step()

    for _ in range(3):
        step()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        step()
        steps += 1
    print(json.dumps({"speed": steps * batch.input_ids.size / (time.perf_counter() - began), "threads": count}))


def measure(busy: bool, threads: str, waiting: str) -> dict:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    # An empty OMP_WAIT_POLICY is what libgomp takes for "not set"; Espalier leaves a set variable alone.
    environment["OMP_WAIT_POLICY"] = "" if waiting == "default" else waiting
    hog = subprocess.Popen(["taskset", "-c", "0", sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        out = subprocess.run(
            [sys.executable, __file__, "--work", threads], env=environment, capture_output=True, text=True, check=True
        )
    finally:
        if hog:
            hog.kill()
            hog.wait()
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    load, speeds, threads = os.getloadavg(), {name: [] for name in ARMS}, {}
    measure(*ARMS["1 thread, idle machine"])  # fills the compile cache
    for round_ in range(ROUNDS):
        for name in list(ARMS) if round_ % 2 == 0 else list(ARMS)[::-1]:
            found = measure(*ARMS[name])
            speeds[name].append(found["speed"])
            threads[name] = found["threads"]
    base = speeds["1 thread, idle machine"]
    rows = {}
    for name, values in speeds.items():
        ratios = [a / b for a, b in zip(values, base, strict=True)]
        rows[name] = {
            "tokens_per_second": statistics.median(values),
            "ratio": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "threads": threads[name],
        }
        print(
            f"{name:42} {rows[name]['tokens_per_second']:6.0f} tok/s  {rows[name]['ratio']:.2f} "
            f"[{min(ratios):.2f}-{max(ratios):.2f}] of one thread ({threads[name]} threads)"
        )
    (HERE / "result.json").write_text(json.dumps({"arms": rows, "load": [load, os.getloadavg()]}, indent=2) + "\n")


if __name__ == "__main__":
    work(sys.argv[2]) if sys.argv[1:2] == ["--work"] else main()
