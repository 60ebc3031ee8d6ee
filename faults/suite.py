"""The fault suite: its parts in the order in which the sheet shows them, carried out side by side in warm forks."""

from __future__ import annotations

import argparse
import json
import os
import shutil
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
    rounds,
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
    "rounds compared": rounds.compared,
}
REMEMBERED = ("guards removed", "rounds compared")  # what was found another time
AFTER_ALL = ("refusals",)  # what looks at what the others met
ALL = "all parts"
MOST_SECONDS = 120
MEMORY = Path("/dev/shm")  # where flushing costs nothing; the calls are the same


def main(options: argparse.Namespace) -> int:
    """Carry out what the command line asks for; exit code 1 if a goal was missed, or rounds differ."""
    names = [options.only] if options.only else list(PARTS)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        if options.repeat > 1:
            return _compare([name for name in names if name not in REMEMBERED], Path(folder), options)
        return _write(names, Path(folder), options)


def _write(names: Sequence[str], place: Path, options: argparse.Namespace) -> int:
    """One round, as the sheet."""
    began = time.monotonic()
    told = carry_out(names, place, seed=options.seed, share=options.share)
    seconds = time.monotonic() - began
    told.append(Told(ALL, [_in_time(names, options.share, seconds)], seconds, today()))
    text = render(told, seed=options.seed, share=options.share)
    if options.only:
        print(text)
    else:
        SHEET.write_text(text, encoding="utf-8")
        print(f"Written: {SHEET}")
    return 1 if _short(told) else 0


def _compare(names: Sequence[str], place: Path, options: argparse.Namespace) -> int:
    """Rounds in a row; what differs between them is said at once, and written down if they had all parts."""
    done: list[list[Told]] = []
    found: list[str] = []
    for number in range(1, options.repeat + 1):
        # In the same place each time: refusals name it.
        done.append(carry_out(names, place / "round", seed=options.seed, share=options.share))
        shutil.rmtree(place / "round")
        known, found = found, rounds.flakes(done)
        head = f"round {number}: {_short(done[-1])} rows short of their goal"
        print(head, *(flake for flake in found if flake not in known), sep="\n  ", flush=True)
        if not options.only:
            rounds.remember(done, found, seed=options.seed, share=options.share)
    return 1 if found else 0


def _short(told: Sequence[Told]) -> int:
    """How many rows aren't reached, or weren't tried."""
    return sum(row.verdict != "yes" for part in told for row in part.rows)


def _in_time(names: Sequence[str], share: float, seconds: float) -> Row:
    tried, wanted = f"the suite itself: {len(names)} parts with {share:.0%} of the trials", f"at most {MOST_SECONDS} s"
    reached = seconds <= MOST_SECONDS
    return Row("G11", tried, f"{seconds:.0f} s", wanted, reached, trials=len(names), of=len(PARTS))


def carry_out(names: Sequence[str], place: Path, *, seed: int, share: float) -> list[Told]:
    """The parts, as many at once as there are cores; what they tell, in order."""
    torch.set_num_threads(1)
    small = Small.make(place / "small")
    calls.share_memory()
    places = {name: place / str(number) for number, name in enumerate(names)}
    for some in ([name for name in names if name not in AFTER_ALL], [name for name in names if name in AFTER_ALL]):
        _side_by_side({name: Setting(places[name], small, seed, share) for name in some})
    return [_told(name, path) for name, path in places.items()]


def _side_by_side(settings: dict[str, Setting]) -> None:
    waiting, running = list(settings), set[int]()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            name = waiting.pop(0)
            settings[name].place.mkdir()
            running.add(_fork(PARTS[name], settings[name]))
        running.remove(os.wait()[0])


def _fork(part: Part, setting: Setting) -> int:
    """Start a part in a child, which leaves its rows in told.json."""
    child = os.fork()
    if child:
        return child
    calls.end_with_parent()
    began = time.monotonic()
    try:
        rows = part(setting)
    except BaseException as error:
        traceback.print_exc()
        rows = [_broken_off(traceback.format_exception_only(error)[-1].strip())]
    try:
        told = [[asdict(row) for row in rows], time.monotonic() - began]
        (setting.place / "told.json").write_text(json.dumps(told))
    finally:
        os._exit(0)


def _broken_off(why: str) -> Row:
    return Row("-", "the part itself", "broke off", "an end", False, why, trials=1, of=1)


def _told(name: str, place: Path) -> Told:
    path = place / "told.json"
    if not path.exists():
        return Told(name, [_broken_off("ended without a word")], 0.0, today())
    rows, seconds = json.loads(path.read_text())
    return Told(name, [Row(**row) for row in rows], seconds, today())
