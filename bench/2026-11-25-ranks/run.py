"""Ranks: the same data, losses and bits as one process, and what sharing, hashing and saving cost.

    python bench/2026-11-25-ranks/run.py order       1, 2 and 4 ranks over 50 updates: order of the data, losses, bits
    python bench/2026-11-25-ranks/run.py resume      stopped and taken up, across a growth, on as many ranks and others
    python bench/2026-11-25-ranks/run.py overhead    the sharded loop on one rank beside the plain one, A B A B
    python bench/2026-11-25-ranks/run.py saving      hashing, and the stall of a save beside the training

Ranks are processes forked from this one, connected by gloo.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(ROOT))

import espalier  # isort: skip  # noqa: E402, F401  (before torch)
import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402

from espalier import pipeline, records  # noqa: E402
from espalier.data.pack import Shard, Tokens  # noqa: E402
from espalier.data.stream import Batch, Stream  # noqa: E402
from espalier.model import shards  # noqa: E402
from espalier.model.mup import Parametrization  # noqa: E402
from espalier.run import METRICS  # noqa: E402
from espalier.spec import ModelSpec  # noqa: E402
from espalier.train.checkpoint import Progress, Saver, When  # noqa: E402
from espalier.train.device import Device, initial_model  # noqa: E402
from espalier.train.loop import Segment, State, update  # noqa: E402
from espalier.train.objectives import NextToken, chunk_loss  # noqa: E402
from espalier.train.optim import Optimizer  # noqa: E402
from espalier.train.parallel import ALONE, Parallel, whole  # noqa: E402
from espalier.train.recipe import OptimizerRecipe, ParallelRecipe  # noqa: E402
from espalier.world import SINGLE, World  # noqa: E402

STEPS, ROWS, LENGTH = 50, 16, 64
MUP = Parametrization()
# Every rank of four has whole registers of each weight, and one whose vectors four ranks divide unevenly.
SHAPES = {"even": {"hidden_size": 128, "head_dim": 32}, "odd": {"hidden_size": 48, "head_dim": 16}}
LAYOUTS = {
    "2 shards": (2, {}),
    "4 shards": (4, {}),
    "2 copies of 2": (4, {"shard": 2}),
    "2 in a tensor group": (2, {"tensor": 2}),
}


def spec_of(**sizes: int) -> ModelSpec:
    stated = {"family": "granite", "vocab_size": 512, "num_hidden_layers": 3, **sizes}
    return MUP.carried_by(ModelSpec.stated(stated, where="bench"))


def stream_in(folder: Path, length: int = LENGTH, count: int = 400_000, vocabulary: int = 512) -> Stream:
    """Numbers of which every second one follows from the one before."""
    values = np.random.default_rng(0).integers(0, vocabulary, count)
    values[1::2] = (values[::2] * 7 + 3) % vocabulary
    content = values.astype("<u2").tobytes()
    (folder / "shard.bin").write_bytes(content)
    shard = Shard("shard.bin", count, 1, count, hashlib.sha256(content).hexdigest())
    return Stream(Tokens(folder, "<u2", 0, (shard,), True), sequence_length=length, seed=3, attend="row", eos_id=0)


def begin(spec: ModelSpec, parallel: Parallel, device: Device, optimizer: str) -> State:
    model = initial_model(spec, MUP, device, parallel, seed=1)
    return State(spec, model, Optimizer(model, spec, OptimizerRecipe(name=optimizer), MUP, parallel), Progress())


def digest(state: State) -> str:
    """Of all weights and moments, whole."""
    sha = hashlib.sha256()
    for _, weight in sorted(state.model.named_parameters()):
        sha.update(whole(weight.detach()).contiguous().numpy().tobytes())
    for _, quantities in sorted(state.optimizer.state().items()):
        for _, value in sorted(quantities.items()):
            sha.update(whole(value).contiguous().numpy().tobytes())
    return sha.hexdigest()


class Recorded(Stream):
    """A stream that knows which row it gave for each sample."""

    seen: dict[int, int] = {}  # noqa: RUF012

    def batch(self, start: int, count: int, *, rank: int = 0, ranks: int = 1, together: int = 1) -> Batch:
        samples = np.arange(start, start + count)[np.arange(count) // together % ranks == rank]
        rows = self.order(start, count)[samples - start]
        self.seen.update(zip(samples.tolist(), rows.tolist(), strict=True))
        return super().batch(start, count, rank=rank, ranks=ranks, together=together)


def follow(spec: ModelSpec, parallel: Parallel, stream: Stream, optimizer: str) -> dict[str, Any]:
    """Train STEPS updates: losses, digest, and the row behind every sample that any rank saw."""
    Recorded.seen.clear()
    device = Device()
    state = begin(spec, parallel, device, optimizer)
    segment = Segment(STEPS, ROWS, ROWS // 4, 1.0, lambda step: min(1.0, (step + 1) / 10))
    losses = [update(state, stream, segment, NextToken(), device, parallel).loss for _ in range(STEPS)]
    everyone = [pair for of_rank in parallel.world.gathered(list(Recorded.seen.items())) for pair in of_rank]
    order = sorted({(sample, row) for sample, row in everyone})
    return {
        "samples": len(order),
        "order": hashlib.sha256(json.dumps(order).encode()).hexdigest(),
        "losses": losses,
        "digest": digest(state),
    }


def order(folder: Path) -> dict[str, Any]:
    plain = stream_in(folder)
    stream = Recorded(plain.tokens, sequence_length=LENGTH, seed=3, attend="row", eos_id=0)
    rows = []
    for shape, sizes in SHAPES.items():
        for optimizer in ("muon", "adamw"):
            alone = follow(spec_of(**sizes), ALONE, stream, optimizer)
            for layout, (size, recipe) in LAYOUTS.items():
                if recipe.get("tensor") and shape == "odd":
                    continue  # three heads

                def work(world: World, recipe=recipe, sizes=sizes, optimizer=optimizer) -> dict[str, Any]:
                    parallel = Parallel.over(world, ParallelRecipe(**recipe), "cpu")
                    return follow(spec_of(**sizes), parallel, stream, optimizer)

                of_ranks = run_ranks(size, work, folder, seconds=300)
                apart = max(abs(a - b) / a for a, b in zip(alone["losses"], of_ranks[0]["losses"], strict=True))
                row = {
                    "shape": shape,
                    "optimizer": optimizer,
                    "layout": layout,
                    "same order": of_ranks[0]["order"] == alone["order"] and alone["samples"] == STEPS * ROWS,
                    "largest relative difference of a loss": apart,
                    "same bits": all(found["digest"] == alone["digest"] for found in of_ranks),
                    "last loss": alone["losses"][-1],
                }
                print(row, flush=True)
                rows.append(row)
    return {"steps": STEPS, "rows": rows}


RECIPE: dict[str, Any] = {
    "name": "run",
    "seed": 3,
    "data": {"sources": ["stdlib"], "max_bytes": "2MB", "held_out": 0.1, "vocab_size": 512, "sequence_length": 64},
    "model": {"head_dim": 16},
    "train": {
        "batch_tokens": 512,
        "per_device_train_batch_size": 2,
        "save_steps": 4,
        "logging_steps": 1,
        "evaluations": 4,
        "eval_tokens": 2048,
        "torch_compile": "off",
        "bf16": "off",
        "threads": 1,
    },
    "samples": {"prompts": ["import"], "max_new_tokens": 4},
}
SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "duration": "5k tokens"}
GROWN: dict[str, dict[str, Any]] = {
    "stack": {"num_hidden_layers": 2, "hidden_size": 64, "depth": "stack"},
    "zero_pad": {"num_hidden_layers": 1, "hidden_size": 128, "width": "zero_pad"},
    "fpi": {"num_hidden_layers": 1, "hidden_size": 128, "width": "fpi"},
    "masked": {"num_hidden_layers": 2, "hidden_size": 128, "depth": "masked", "width": "masked", "ramp": 1.0},
}
# Updates after which a signal stops the run: before the growth (10), right after it, and near the end.
STOPS = (7, 12, 18)
# Ranks that begin, ranks that go on, and how checkpoints are written.
WAYS = ((2, 2, "at once"), (2, 2, "beside"), (2, 1, "beside"), (2, 4, "at once"))


def carry_out(world: World, path: Path, runs: Path, stop: int | None = None) -> int:
    """The recipe by these ranks; a signal to the last of them after update `stop`."""

    def tell(line: str) -> None:
        pass

    if stop is not None and world.rank == world.size - 1:
        from espalier.train import loop

        original = loop.update

        def update_and_signal(state: State, *more: Any) -> Any:
            done = original(state, *more)
            if state.progress.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return done

        loop.update = update_and_signal  # type: ignore[assignment]
    return pipeline.main(path, [], runs=runs, dry_run=False, tell=tell)


def ends_with(run: Path) -> dict[str, Any]:
    """Weights and optimizer of a run's end, whoever wrote them, and its logged losses."""
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    from safetensors.torch import load_file

    found = hashlib.sha256()
    for folder, pattern in ((run / "final", "*.safetensors"), (newest / "trainer", "optimizer*.safetensors")):
        tensors = {name: value for file in folder.glob(pattern) for name, value in load_file(file).items()}
        for name in sorted(tensors):
            found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    losses = [line["loss"] for line in records.read_lines(run / METRICS) if "loss" in line]
    return {"digest": found.hexdigest(), "losses": losses}


def resume(folder: Path) -> dict[str, Any]:
    rows = []
    for optimizer in ("muon", "adamw"):
        for operator, sizes in GROWN.items():
            path = folder / f"{optimizer}-{operator}.yaml"
            stages = [SMALL, {**sizes, "duration": "5k tokens"}]
            path.write_text(yaml.safe_dump(RECIPE | {"stages": stages, "optimizer": {"name": optimizer}}))
            calm = folder / f"calm-{path.stem}"
            assert carry_out(SINGLE, path, calm) == 0
            expected = ends_with(calm / "run")
            for number, (ranks, later, save) in enumerate(WAYS):
                stop = STOPS[len(rows) // len(WAYS) % len(STOPS) - number % len(STOPS)]
                changed = {
                    "stages": stages,
                    "optimizer": {"name": optimizer},
                    "train": RECIPE["train"] | {"save": save},
                }
                path.write_text(yaml.safe_dump(RECIPE | changed))
                runs = folder / f"{path.stem}-{number}"
                stopped = partial(carry_out, path=path, runs=runs, stop=stop)
                assert run_ranks(ranks, stopped, folder, seconds=300) == [143] * ranks
                assert run_ranks(later, partial(carry_out, path=path, runs=runs), folder, seconds=300) == [0] * later
                row = {
                    "optimizer": optimizer,
                    "operator": operator,
                    "ranks": [ranks, later],
                    "save": save,
                    "stopped after": stop,
                    "same bits as one process that was never stopped": ends_with(runs / "run") == expected,
                }
                print(row, flush=True)
                rows.append(row)
                shutil.rmtree(runs)
    same = sum(row["same bits as one process that was never stopped"] for row in rows)
    return {"cells": len(rows), "same bits": same, "rows": rows}


def overhead(folder: Path) -> dict[str, Any]:
    """CPU seconds of an update, plain and sharded over one rank, in turns."""
    results = {}
    stream = stream_in(folder, length=256, vocabulary=2048)
    for name, sizes in {"5M": {"hidden_size": 256, "num_hidden_layers": 6}, "1M": {"hidden_size": 128}}.items():

        def work(world: World, sizes=sizes) -> dict[str, Any]:
            spec = spec_of(vocab_size=2048, head_dim=64, **sizes)
            device = Device(compute="bfloat16", compile="layers")
            device.prepare()
            segment = Segment(10**9, 32, 8, 1.0, lambda step: 1.0)
            ways = {"plain": ALONE, "sharded": Parallel.over(world, ParallelRecipe(), "cpu")}
            states = {way: begin(spec, parallel, device, "muon") for way, parallel in ways.items()}
            objective = NextToken(device.compiled(chunk_loss))
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(13):
                for way, parallel in ways.items():
                    began = time.process_time()
                    update(states[way], stream, segment, objective, device, parallel)
                    if turn:
                        seconds[way].append(time.process_time() - began)
            medians = {way: statistics.median(values) for way, values in seconds.items()}
            same = digest(states["plain"]) == digest(states["sharded"])
            return {
                "seconds": medians,
                "speed of the sharded": medians["plain"] / medians["sharded"],
                "same bits": same,
            }

        results[name] = of_one(work, folder)
        print(name, results[name], flush=True)
    return results


def of_one(work: Callable[[World], Any], folder: Path) -> Any:
    """What one rank that is joined by itself makes of `work`."""
    from torch import distributed

    store = folder / f"store-{time.monotonic_ns()}"
    distributed.init_process_group("gloo", store=distributed.FileStore(str(store), 1), rank=0, world_size=1)
    try:
        return work(World())
    finally:
        distributed.destroy_process_group()


class Unhashed:
    """Takes the place of a hash, to time a save without one."""

    def update(self, data: bytes) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 64


def saving(folder: Path) -> dict[str, Any]:
    """Seconds of a save on this disk, in turns: at once, the same without hashing, and beside the training."""
    spec = spec_of(vocab_size=8192, hidden_size=512, num_hidden_layers=8, head_dim=64)
    device = Device()
    state = begin(spec, ALONE, device, "muon")
    stream = stream_in(folder, length=64)
    segment = Segment(10**9, 8, 8, 1.0, lambda step: 1.0)
    update(state, stream, segment, NextToken(), device)
    ways: dict[str, list[float]] = {
        "at once": [],
        "at once, unhashed": [],
        "beside": [],
        "beside, until it is there": [],
    }
    savers = {way: Saver(folder / way, tokenizer=None, keep=1, when=_when(way)) for way in list(ways)[:3]}
    for _ in range(13):
        for way, saver in savers.items():
            with mock.patch.object(shards.hashlib, "sha256", Unhashed if "unhashed" in way else hashlib.sha256):
                began = time.perf_counter()
                saver.begin(state.model, state.optimizer.state(), state.progress, need_bytes=0)
                ways[way].append(time.perf_counter() - began)
                saver.finish()
            if way == "beside":
                ways["beside, until it is there"].append(time.perf_counter() - began)
            update(state, stream, segment, NextToken(), device)
    medians = {way: statistics.median(values[1:]) for way, values in ways.items()}
    turns = list(zip(ways["at once"][1:], ways["at once, unhashed"][1:], strict=True))
    result = {
        "bytes": sum(path.stat().st_size for path in (folder / "at once").rglob("*.safetensors")),
        "seconds": medians,
        "hashing share of a save": statistics.median(1 - unhashed / hashed for hashed, unhashed in turns),
        "stall beside / at once": medians["beside"] / medians["at once"],
    }
    print(result, flush=True)
    return result


def _when(way: str) -> When:
    return "beside" if way == "beside" else "at once"


PARTS = {"order": order, "resume": resume, "overhead": overhead, "saving": saving}

if __name__ == "__main__":
    torch.set_num_threads(1)
    record = HERE / "result.json"
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory(dir=HERE) as place:
            found = PARTS[name](Path(place))
        kept = json.loads(record.read_text()) if record.exists() else {}
        record.write_text(json.dumps({**kept, name: found}, indent=2) + "\n")
