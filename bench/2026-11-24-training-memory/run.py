"""The memory that an update takes: predicted before it, and as torch's allocator reports it.

    python bench/2026-11-24-training-memory/run.py

Every cell is a process of its own: the product's model, device, optimizer and loop, on random tokens. The second
update is watched: weights and moments are there by then, gradients aren't. The CPU allocator's own reports are added
up, so what lives inside an operator counts, in compiled layers too. Resident memory (VmHWM above what the imports take)
is beside it, of a first update that nobody watched, and the CPU time of forward and backward of all the update's rows.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SIZES = {
    "0.3M": {"hidden_size": 64, "num_hidden_layers": 4, "head_dim": 32, "vocab_size": 512},
    "5M": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768},
    "20M": {"hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1280},
}
PASSES = 5  # forward and backward passes that are timed, not while they are watched
# size, rows of an update, rows of a pass, tokens of a row, optimizer, dtype, attention, recomputation, compilation
CELLS = [
    ("0.3M", 32, 32, 256, "adamw", "float32", "sdpa", "none", "off"),
    ("0.3M", 32, 16, 256, "adamw", "bfloat16", "eager", "layers", "off"),
    ("5M", 8, 8, 256, "adamw", "float32", "sdpa", "none", "off"),
    ("5M", 8, 8, 256, "muon", "float32", "eager", "none", "off"),
    ("5M", 16, 8, 256, "muon", "bfloat16", "sdpa", "none", "off"),
    ("5M", 8, 8, 256, "muon", "bfloat16", "sdpa", "none", "off"),
    ("5M", 8, 8, 256, "muon", "bfloat16", "sdpa", "layers", "off"),
    ("5M", 4, 1, 64, "adamw", "bfloat16", "sdpa", "layers", "off"),
    ("20M", 4, 4, 256, "muon", "bfloat16", "sdpa", "none", "off"),
    ("20M", 4, 4, 256, "adamw", "float32", "sdpa", "layers", "off"),
    ("20M", 2, 1, 1024, "adamw", "float32", "eager", "none", "off"),
    ("20M", 1, 1, 1024, "adamw", "bfloat16", "eager", "layers", "off"),
    ("20M", 1, 1, 32, "muon", "bfloat16", "sdpa", "none", "off"),
    ("5M", 8, 8, 256, "muon", "bfloat16", "causal_halves", "none", "layers"),
    ("5M", 8, 8, 256, "muon", "bfloat16", "causal_halves", "layers", "layers"),
    ("20M", 4, 4, 256, "muon", "bfloat16", "causal_halves", "none", "layers"),
    ("20M", 4, 4, 256, "muon", "bfloat16", "causal_halves", "layers", "layers"),
]
KEYS = ("size", "rows", "pass_rows", "length", "optimizer", "compute", "attention", "recompute", "compile")


def measure(cell: dict) -> dict:
    import espalier  # isort: skip  # noqa: F401  (sets OpenMP's waiting before torch loads)
    import numpy as np
    import torch
    from torch.profiler import ProfilerActivity, profile

    from espalier.budget import flops, memory
    from espalier.data.stream import Batch
    from espalier.model import build
    from espalier.model.mup import Parametrization
    from espalier.spec import ModelSpec
    from espalier.train.device import Device
    from espalier.train.loop import backward
    from espalier.train.objectives import CHUNK, NextToken, chunk_loss
    from espalier.train.optim import Optimizer
    from espalier.train.recipe import OptimizerRecipe

    spec = ModelSpec(**{"vocab_size": 4096, "head_dim": 64, **SIZES[cell["size"]]})
    device = Device(**{key: cell[key] for key in ("compute", "attention", "recompute", "compile")})
    torch.set_num_threads(1)
    before = resident()
    model = build.build(spec, Parametrization(), seed=0)
    device.place(model)
    optimizer = Optimizer(model, spec, OptimizerRecipe(name=cell["optimizer"]), Parametrization())
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, (cell["rows"], cell["length"] + 1))
    batch, objective = Batch(ids[:, :-1], ids[:, 1:], None), NextToken(device.compiled(chunk_loss))

    def update():
        loss = backward(model, batch, cell["pass_rows"], objective, device)
        optimizer.clip()
        optimizer.step()
        return loss

    update()
    held = sum(weight.nbytes for weight in model.parameters())
    held += sum(value.nbytes for quantities in optimizer.state().values() for value in quantities.values())
    high_water = resident() - before
    seconds = []
    for _ in range(PASSES):
        begin = time.process_time()
        backward(model, batch, cell["pass_rows"], objective, device)
        seconds.append(time.process_time() - begin)
        model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiled:
        update()
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    measured = held + max(itertools.accumulate(sizes))
    predicted = memory.training_memory(
        spec,
        rows=cell["pass_rows"],
        sequence_length=cell["length"],
        loss_chunk=CHUNK,
        passes=-(-cell["rows"] // cell["pass_rows"]),
        **{key: cell[key] for key in ("optimizer", "compute", "attention", "recompute", "compile")},
    )
    return {
        **cell,
        "parameters": flops.parameters(spec),
        "predicted": predicted.total,
        "measured": measured,
        "ratio": predicted.total / measured,
        "resident": high_water,
        "backward_cpu_seconds": statistics.median(seconds),
    }


def resident() -> int:
    """The most bytes that were resident so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    rows = []
    for cell in CELLS:
        told = json.dumps(dict(zip(KEYS, cell, strict=True)))
        done = subprocess.run([sys.executable, __file__, told], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print({key: rows[-1][key] for key in (*KEYS, "predicted", "measured", "ratio", "resident")}, flush=True)
    (HERE / "result.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1])))) if sys.argv[1:] else main()
