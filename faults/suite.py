"""The fault suite: its parts in the order in which the sheet shows them, carried out side by side in warm forks."""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from faults import (
    calls,
    changes,
    data,
    guards,
    mutations,
    numerics,
    power,
    ranks,
    refusals,
    resume,
    runs,
    shared,
    sweeps,
    untrusted,
)
from faults.sheet import SHEET, Row, Told, render, today
from faults.small import Setting, Small

Part = Callable[[Setting], list[Row]]

PARTS: dict[str, Part] = {
    "kills at file calls": sweeps.kills,
    "disk errors at file calls": sweeps.disk_errors,
    "power loss after file calls": power.power_loss,
    "random kills": runs.random_kills,
    "kills at the file calls of a run": runs.call_kills,
    "stopped and resumed": resume.matrix,
    "one, two and four ranks": shared.ranks,
    "dead and hung ranks": ranks.dead_or_hung,
    "mutations": mutations.mutations,
    "changed recipes": changes.changed_recipes,
    "changed data": data.changed_data,
    "hostile files": untrusted.hostile_files,
    "numbers": numerics.numerics,
    "refusals": refusals.refusals,
    "guards removed": guards.removed,
}


MEMORY = Path("/dev/shm")  # where flushing costs nothing; the calls are the same


def main(options: argparse.Namespace) -> int:
    """Carry out what the command line asks for; exit code 1 if a goal was missed."""
    names = [options.only] if options.only else list(PARTS)
    began = time.monotonic()
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            told = carry_out(names, Path(folder), seed=options.seed, share=options.share)
    text = render(told, seed=options.seed, share=options.share, seconds=time.monotonic() - began)
    if options.only:
        print(text)
    else:
        SHEET.write_text(text, encoding="utf-8")
        print(f"Written: {SHEET}")
    return 0 if all(row.reached for part in told for row in part.rows) else 1


def carry_out(names: Sequence[str], place: Path, *, seed: int, share: float) -> list[Told]:
    """The parts, as many at once as there are cores; what they tell, in order."""
    torch.set_num_threads(1)
    small = Small.make(place / "small")
    gc.collect()
    gc.freeze()  # what is warm stays shared with the forks
    waiting = list(enumerate(names))
    running: dict[int, int] = {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            number, name = waiting.pop(0)
            (place / str(number)).mkdir()
            running[_fork(PARTS[name], Setting(place / str(number), small, seed, share))] = number
        child, _ = os.wait()
        running.pop(child)
    return [_told(name, place / str(number)) for number, name in enumerate(names)]


def _fork(part: Part, setting: Setting) -> int:
    """Start a part in a child, which leaves its rows in told.json."""
    child = os.fork()
    if child:
        return child
    calls.end_with_parent()
    began = time.monotonic()
    try:
        rows = [asdict(row) for row in part(setting)]
        (setting.place / "told.json").write_text(json.dumps([rows, time.monotonic() - began]))
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def _told(name: str, place: Path) -> Told:
    path = place / "told.json"
    if not path.exists():
        return Told(name, [Row("-", name, "broke off", "an end", False, "a bug in the suite")], 0.0, today())
    rows, seconds = json.loads(path.read_text())
    return Told(name, [Row(**row) for row in rows], seconds, today())
