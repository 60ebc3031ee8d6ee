"""Dead and hung ranks (FAULTS F5): every rank of a world ends in time and names the one at fault."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.ranks import fates

from espalier import watch
from espalier.errors import RankError
from espalier.world import World
from faults.sheet import Row
from faults.small import Setting

DEADLINE = 2.0  # seconds
LATEST = DEADLINE + 2.0
LAST = 6
FAULTS: dict[str, Callable[[], object]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hung": lambda: time.sleep(60),
}


def dead_or_hung(setting: Setting) -> list[Row]:
    """One of two or three ranks is killed, stopped or hung in the middle of a step."""
    trials = [(name, size, culprit) for name in FAULTS for size in (2, 3) for culprit in range(size)]
    rows = []
    for name in FAULTS:
        kind = [trial for trial in trials if trial[0] == name]
        some = setting.some(kind, share=5)  # all of them with a fifth of everything
        sizes = " and ".join(str(size) for size in sorted({size for _, size, _ in some}))
        outcomes = [_outcome(*trial, setting.place) for trial in some]
        slowest, wrong = max(seconds for seconds, _ in outcomes), sum(not named for _, named in outcomes)
        rows.append(
            Row(
                "F5",
                f"one rank {name} in a step: {len(some)} worlds of {sizes} gloo ranks, deadline {DEADLINE:g} s",
                f"{wrong} worlds in which a rank named another or none",
                f"0; all ended within {LATEST:g} s",
                slowest <= LATEST and not wrong,
                "processes of one machine; what a network that falls silent does is judged by the same rule",
                trials=len(some),
                of=len(kind),
                took=f"all ended {slowest:.1f} s after it",
            )
        )
    return rows


def _outcome(name: str, size: int, culprit: int, place: Path) -> tuple[float, bool]:
    """(seconds from the fault to the last rank's end, whether every rank that lived named it)."""

    def work(world: World) -> None:
        for step in range(1, LAST + 1):
            watch.at(step, "reading data")
            watch.at(step, "forward and backward")
            if step == LAST and world.rank == culprit:
                (place / "culprit").write_text(f"{os.getpid()} {time.monotonic()}")
                FAULTS[name]()
            world.gathered(step)

    ended = fates(size, work, place, deadline=DEADLINE)
    pid, began = (place / "culprit").read_text().split()
    others = [fate for rank, fate in enumerate(ended) if rank != culprit]
    seconds = max(fate.time for fate in ended) - float(began)
    named = f"rank {culprit} (pid {pid} on "
    return seconds, all(fate.code == RankError.exit_code and named in fate.said for fate in others)
