"""Report: rows of (task, metric, value, stderr, n), the one form in which results are kept and compared."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from espalier import records
from espalier.errors import RunError


@dataclass(frozen=True)
class Row:
    """One result: `value` of `metric` on `task`, with its standard error over `n` items where there is one."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    n: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """How one row of a report differs from the same row of another; `z` is in standard errors."""

    task: str
    metric: str
    old: float
    new: float
    z: float | None

    @property
    def change(self) -> float:
        return self.new - self.old


@dataclass
class Report:
    """Results of one model or run, with what must be known to compare them."""

    subject: str
    rows: list[Row] = field(default_factory=list)
    context: dict[str, Any] = field(default_factory=dict)

    def add(self, task: str, metric: str, value: float, **more: Any) -> None:
        self.rows.append(Row(task, metric, value, **more))

    def value(self, task: str, metric: str) -> float:
        """The value of one row; KeyError when it isn't there."""
        for row in self.rows:
            if (row.task, row.metric) == (task, metric):
                return row.value
        raise KeyError(f"{self.subject} has no {metric} on {task}")

    def __str__(self) -> str:
        """A line for each row."""
        lines = [
            f"{row.task}  {row.metric}  {row.value:.4g}"
            + (f" ± {row.stderr:.2g}" if row.stderr else "")
            + (f"  ({row.note})" if row.note else "")
            for row in self.rows
        ]
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        records.write(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Report:
        """`RunError` for a file that holds something else."""
        try:
            values = records.parse(path.read_text(encoding="utf-8"), path.name)
            return cls(values["subject"], [Row(**row) for row in values["rows"]], values["context"])
        except (ValueError, KeyError, TypeError):
            raise RunError(
                str(path), found="no report", expected="rows of results", mend="Restore the file, or name another run."
            ) from None


def compare(old: Report, new: Report) -> list[Difference]:
    """The rows that both reports have, in the new one's order.

    Rows are compared as independent samples: z = change / sqrt(stderr_old^2 + stderr_new^2).
    """
    before = {(row.task, row.metric): row for row in old.rows}
    found = []
    for row in new.rows:
        base = before.get((row.task, row.metric))
        if base is None:
            continue
        spread = math.hypot(base.stderr, row.stderr) if base.stderr is not None and row.stderr is not None else 0.0
        z = (row.value - base.value) / spread if spread else None
        found.append(Difference(row.task, row.metric, base.value, row.value, z))
    return found
