"""Rounds: the suite again and again with one seed; a row that says something else than before is a flake (FAULTS G11).

    python -m faults --repeat N [--share S]

Too slow for the sheet; what was found stands in rounds.json, with its date, and the sheet shows it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from faults.sheet import Row, Told, today
from faults.small import Setting

FOUND = Path(__file__).with_name("rounds.json")
WANTED = 50
TIMES = ("took",)  # what may differ


def compared(setting: Setting) -> list[Row]:
    """What the last comparison of rounds found."""
    found: dict[str, Any] = json.loads(FOUND.read_text())
    rounds, flakes = found["rounds"], found["flakes"]
    tried = (
        f"the suite {rounds} times with seed {found['seed']} and {found['share']:.0%} of the trials, all but times "
        f"compared ({found['date']})"
    )
    figure, wanted = f"{len(flakes)} of {found['rows']} rows differed", f"0 in {WANTED} rounds"
    reached = rounds >= WANTED and not flakes
    return [Row("G11", tried, figure, wanted, reached, "; ".join(flakes), trials=rounds, of=max(rounds, WANTED))]


def remember(rounds: Sequence[Sequence[Told]], flakes: Sequence[str], *, seed: int, share: float) -> None:
    """Write down how many rounds were compared and what differed."""
    rows = sum(len(told.rows) for told in rounds[0])
    found = {"rounds": len(rounds), "seed": seed, "share": share, "rows": rows, "flakes": flakes, "date": today()}
    FOUND.write_text(json.dumps(found, indent=2) + "\n")


def flakes(rounds: Sequence[Sequence[Told]]) -> list[str]:
    """The rows of which some round says something else than the first: their part and name, and both values."""
    found: dict[tuple[int, int], str] = {}
    for number, parts in enumerate(rounds, start=1):
        for part, (first, now) in enumerate(zip(rounds[0], parts, strict=True)):
            for place, (before, after) in enumerate(zip_longest(first.rows, now.rows)):
                if _said(before) != _said(after):
                    found.setdefault((part, place), f"{now.part}, round {number}: {_difference(before, after)}")
    return list(found.values())


def _said(row: Row | None) -> dict[str, Any]:
    """All that a row says but times."""
    return {name: value for name, value in asdict(row).items() if name not in TIMES} if row else {}


def _difference(before: Row | None, after: Row | None) -> str:
    """What two rows say differently, with their times, which may be why."""
    if before is None or after is None:
        return f"{after.tried} is new" if after else f"{before.tried if before else ''} is missing"
    pairs = zip(asdict(before).items(), asdict(after).values(), strict=True)
    differing = (f"{name} {now!r}, at first {then!r}" for (name, then), now in pairs if now != then)
    return f"{before.goal}, {before.tried.split(':')[0]}: {', '.join(differing)}"
