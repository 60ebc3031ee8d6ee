"""Ranks: the same order, losses and bits as one process; runs that are told to stop, and go on on other numbers of
them (F5, F11, G3).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tests.ranks import run_ranks

from espalier import files, records
from espalier.run import FINAL, METRICS
from espalier.train import checkpoint, loop
from espalier.world import World
from faults.resume import FROM, INTO
from faults.sheet import Row
from faults.small import NAME, RECIPE, Setting

# Micro-batches of one row: as many as four ranks can share.
TRAIN = RECIPE["train"] | {"per_device_train_batch_size": 1, "evaluations": 2}
STOP = 13  # three updates after the growth; nothing but the signal has it saved
GRACE = 30.0  # seconds; the shortest notice that a cloud gives before it takes a machine back
SIGNALLED = "signalled"  # a file that says when
SIZES = (2, 4)  # beside one process
# Ranks that begin, ranks that go on, how checkpoints are written, the optimizer and the growth.
CELLS = (
    (2, 2, "at once", "muon", "stack"),
    (2, 4, "at once", "adamw", "zero_pad"),
    (2, 1, "beside", "muon", "masked"),
    (4, 2, "beside", "adamw", "fpi"),
    (1, 2, "at once", "muon", "fpi"),
)


def ranks(setting: Setting) -> list[Row]:
    """The small recipe by 1, 2 and 4 ranks, and stopped and taken up by others."""
    return [_undisturbed(setting), *_resumed(setting)]


def _undisturbed(setting: Setting) -> Row:
    alone = _run(setting, _recipe("muon", "stack"), "alone", 1)
    wrong, apart = [], 0.0
    sizes = setting.some(SIZES, share=5)  # all of them with a fifth of everything
    for size in sizes:
        shared = _run(setting, _recipe("muon", "stack"), f"by {size}", size)
        pairs = zip(_losses(alone), _losses(shared), strict=True)
        apart = max(apart, *(abs(one - other) / one for one, other in pairs))
        wrong += [] if _same_end(alone, shared) else [f"{size} ranks: other bits"]
    by = " and ".join(map(str, [1, *sizes]))
    tried = f"the recipe of a growth by {by} ranks (gloo, FSDP2): every loss, and weights and moments at the end"
    figure = f"largest relative difference of a loss {apart:.0e}; {len(sizes) - len(wrong)} of {len(sizes)} bit-equal"
    reached = apart <= 1e-6 and not wrong
    return Row(
        "G3", tried, figure, "at most 1e-6; bit-equal", reached, "; ".join(wrong), trials=len(sizes), of=len(SIZES)
    )


def _resumed(setting: Setting) -> list[Row]:
    wrong, unsaved, slowest = [], [], 0.0
    cells = setting.some(CELLS, share=2)
    for number, (before, after, save, optimizer, operator) in enumerate(cells):
        recipe = _recipe(optimizer, operator, save=save)
        calm = _run(setting, recipe, f"calm {number}", 1)
        name = f"stopped {number}"
        stopped = _run(setting, recipe, name, before, stop=STOP)
        slowest = max(slowest, time.monotonic() - float((setting.place / SIGNALLED).read_text()))
        if checkpoint.list_steps(stopped)[0] != STOP or files.damage(stopped / f"checkpoint-{STOP}"):
            unsaved.append(f"{before} ranks, saved {save}: no whole checkpoint of step {STOP}")
        if not _same_end(calm, _run(setting, recipe, name, after)):
            wrong.append(f"{before} -> {after} ranks, {optimizer}, {operator}")
    return [
        Row(
            "G3",
            f"stopped by a signal to one rank after a growth, taken up by other numbers of ranks: {len(cells)} cells",
            f"{len(cells) - len(wrong)} bit-equal to one process",
            "all",
            not wrong,
            "; ".join(wrong),
            trials=len(cells),
            of=len(CELLS),
        ),
        Row(
            "F5",
            f"SIGTERM to one rank between two saves: {len(cells)} of those cells",
            f"{len(cells) - len(unsaved)} ended with a whole checkpoint of the step",
            f"all; within {GRACE:g} s",
            not unsaved and slowest <= GRACE,
            "; ".join(unsaved) or "a small model on a fast disk",
            trials=len(cells),
            of=len(CELLS),
            took=f"all ended {slowest:.1f} s after it",
        ),
    ]


def _recipe(optimizer: str, operator: str, **train: Any) -> dict[str, Any]:
    stages = [FROM, {**INTO[operator], "duration": "640 tokens"}]
    return {"stages": stages, "optimizer": {"name": optimizer}, "train": TRAIN | train}


def _run(setting: Setting, recipe: dict[str, Any], name: str, size: int, stop: int | None = None) -> Path:
    """The run folder after `size` ranks have carried the recipe out, or were told to stop after an update."""
    runs = setting.place / name
    runs.mkdir(exist_ok=True)
    (runs / "recipe.yaml").write_text(yaml.safe_dump(setting.small.recipe(**recipe)))
    codes = run_ranks(size, partial(_carry_out, setting, runs, stop), setting.place, seconds=120)
    assert codes == [143 if stop else 0] * size, codes
    return runs / NAME


def _carry_out(setting: Setting, runs: Path, stop: int | None, world: World) -> int:
    if stop is not None and world.rank == world.size - 1:
        loop.update = _then_signalled(loop.update, stop, setting.place / SIGNALLED)  # type: ignore[assignment]
    return setting.small.carry_out(runs)


def _then_signalled(update: Callable[..., Any], stop: int, when: Path) -> Callable[..., Any]:
    def updated(state: Any, *more: Any) -> Any:
        done = update(state, *more)
        if state.progress.step == stop:
            when.write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    return updated


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in records.read_lines(run / METRICS) if "loss" in line]


def _same_end(one: Path, other: Path) -> bool:
    """Whether final weights and the last checkpoint's optimizer are the same bits, however many ranks wrote them."""
    return all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        for ours, theirs in zip(_tensors(one), _tensors(other), strict=True)
    )


def _tensors(run: Path) -> list[dict[str, torch.Tensor]]:
    last = run / f"checkpoint-{checkpoint.list_steps(run)[0]}"
    folders = {run / FINAL: "*.safetensors", last / checkpoint.TRAINER: "optimizer*.safetensors"}
    return [
        {name: value for file in folder.glob(pattern) for name, value in load_file(file).items()}
        for folder, pattern in folders.items()
    ]
