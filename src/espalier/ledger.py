"""Ledger: what a run has cost so far, line by line, and how much of its cap is left.

One sealed JSON line per entry, appended and never rewritten. Work that a crash made in vain stays in: it was paid for.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from espalier import files, records

RESOURCES = ("tokens", "flops", "seconds", "usd", "kwh", "kgco2e")


@dataclass(frozen=True)
class Cost:
    """An amount of each resource; `seconds` are device-seconds."""

    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    usd: float = 0.0
    kwh: float = 0.0
    kgco2e: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in RESOURCES))

    def __mul__(self, factor: float) -> Cost:
        return Cost(*(getattr(self, name) * factor for name in RESOURCES))


@dataclass(frozen=True)
class Rates:
    """What a second on the device costs. Budget makes them from a hardware row and a price list.

    `measured` names the figures of an `Entry` that come from a meter; all others are estimates.
    """

    usd_per_hour: float = 0.0
    watts: float = 0.0
    kgco2e_per_kwh: float = 0.0
    measured: tuple[str, ...] = ("seconds",)

    def cost(self, seconds: float, *, flops: float = 0.0, tokens: float = 0.0) -> Cost:
        """The cost of `seconds` of work that did `flops` on `tokens`."""
        kwh = self.watts / 1000 * seconds / 3600
        return Cost(
            tokens=tokens,
            flops=flops,
            seconds=seconds,
            usd=self.usd_per_hour * seconds / 3600,
            kwh=kwh,
            kgco2e=kwh * self.kgco2e_per_kwh,
        )


@dataclass(frozen=True)
class Cap:
    """The most that a run may spend of each resource; infinite where the user stated none."""

    tokens: float = math.inf
    flops: float = math.inf
    seconds: float = math.inf
    usd: float = math.inf
    kwh: float = math.inf
    kgco2e: float = math.inf

    def stated(self) -> dict[str, float]:
        """The limits that there are."""
        return {name: limit for name, limit in asdict(self).items() if limit < math.inf}

    def exceeded_by(self, cost: Cost) -> str | None:
        """The first resource of which `cost` is more than the cap, or None."""
        return next((name for name in RESOURCES if getattr(cost, name) > getattr(self, name)), None)

    def share_spent(self, cost: Cost) -> float:
        """The largest share of any capped resource that `cost` takes; 0 without a cap, infinite of a cap of 0."""
        return max(_share(getattr(cost, name), getattr(self, name)) for name in RESOURCES)


@dataclass(frozen=True)
class Entry:
    """One line: what was done, in which stage, what it took, and which figures were measured."""

    kind: str
    cost: Cost
    stage: int | None = None
    step: int | None = None
    measured: tuple[str, ...] = ("seconds",)
    time: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values.pop("cost"), **values}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Entry:
        cost = Cost(**{name: values[name] for name in RESOURCES})
        values = {**values, "measured": tuple(values["measured"])}
        return cls(cost=cost, **{f.name: values[f.name] for f in fields(cls) if f.name in values})


class Ledger:
    """The entries of one run, on disk at `path` and summed in memory."""

    def __init__(self, path: Path, cap: Cap | None = None) -> None:
        self.path, self.cap = path, cap or Cap()
        self.entries = list(read(path))
        self.total = sum((entry.cost for entry in self.entries), Cost())

    def add(self, entry: Entry) -> None:
        """Append an entry; it is on the disk when this returns. ValueError for an amount that is no number."""
        if not all(map(math.isfinite, vars(entry.cost).values())):
            raise ValueError(f"{entry.cost} isn't finite")
        begun = not self.path.exists()
        records.append(self.path, entry.to_json())
        files.sync(self.path)
        if begun:
            files.sync(self.path.parent)
        self.entries.append(entry)
        self.total = self.total + entry.cost

    def allows(self, cost: Cost) -> bool:
        """Whether `cost` more stays within the cap."""
        return self.cap.exceeded_by(self.total + cost) is None

    def spent(self, **where: Any) -> Cost:
        """The sum over entries whose fields equal `where`, as in spent(kind='train', stage=1)."""
        chosen = (e for e in self.entries if all(getattr(e, key) == value for key, value in where.items()))
        return sum((entry.cost for entry in chosen), Cost())


def read(path: Path) -> list[Entry]:
    """The entries of a ledger file; a last line that a crash cut short is left out."""
    return [Entry.from_json(line) for line in records.read_lines(path)]


def _share(amount: float, cap: float) -> float:
    if not amount:
        return 0.0
    return amount / cap if cap else math.inf
