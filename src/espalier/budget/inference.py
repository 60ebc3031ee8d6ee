"""What queries cost: a runtime profile fitted to a few measurements, or the ideal of a hardware row.

A query of p prompt tokens and o generated ones takes

    T(p, o) = F(p) + β·(o - 1)

seconds: F(p), a table, reads the prompt and yields the first token, each further token takes β. Where the cache matters
(long contexts, small models) a token takes β + δ·c with c = p + o/2 the average context; both fits are kept, each with
its R², and whoever prices says which. Idealized and denoised runtimes: Narayanan et al., arXiv 2305.02440. All times
are seconds.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy
from pydantic import TypeAdapter, ValidationError

from espalier import files
from espalier.budget.hardware import Hardware
from espalier.budget.roofline import Roofline, Setting
from espalier.errors import DataError, ResourceError, RunError
from espalier.spec import ModelSpec

PROFILE = "runtime_profile.json"
COLUMNS = ("prompt_tokens", "completion_tokens")  # of a workload, as APIs name them in `usage`

# How repeated measurements become one: the minimum is free of what others did to the machine ("denoised").
Statistic = Literal["minimum", "median", "mean"]
SUMMARIES: dict[Statistic, Callable[[Sequence[float]], float]] = {
    "minimum": min,
    "median": statistics.median,
    "mean": statistics.fmean,
}
Slope = Literal["token", "context"]


@dataclass(frozen=True)
class Query:
    """Tokens of a prompt, and of what is generated after it (at least one)."""

    prompt: int
    generated: int


@dataclass(frozen=True)
class Cell:
    """A query's time, measured one or more times."""

    query: Query
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """Seconds of a generated token, and what each token of its context adds; how much of the variance they explain."""

    per_token: float
    per_context: float
    r2: float


@dataclass(frozen=True)
class Fit:
    """F by prompt length, ascending, and the two ways to price the tokens after the first."""

    first: tuple[tuple[int, float], ...]
    token: Line
    context: Line

    def seconds(self, query: Query, slope: Slope = "token") -> float:
        """What a query takes."""
        line: Line = getattr(self, slope)
        each = line.per_token + line.per_context * _context(query)
        return self.first_token(query.prompt) + _steps(query) * each

    def first_token(self, prompt: int) -> float:
        """F, linear between the lengths that were measured and beyond the last; below the first it is the first's."""
        lengths = [length for length, _ in self.first]
        prompt = max(prompt, lengths[0])
        if len(self.first) == 1:
            return self.first[0][1]
        right = min(bisect(lengths, prompt), len(lengths) - 1)
        (low, before), (high, after) = self.first[right - 1], self.first[right]
        return before + (after - before) * (prompt - low) / (high - low)

    def covers(self, query: Query) -> bool:
        """Whether the prompt's length lies between those that were measured: all else is extrapolated."""
        return self.first[0][0] <= query.prompt <= self.first[-1][0]


@dataclass(frozen=True)
class RuntimeProfile:
    """A model's times on some hardware, and what was fitted to them, by statistic; batch size 1.

    hardware   the row of the machine that it ran on, for money and energy
    versions   of the stack, by package
    """

    model: str
    spec: ModelSpec
    hardware: Hardware
    versions: dict[str, str]
    cells: tuple[Cell, ...]
    fits: dict[Statistic, Fit]

    @classmethod
    def of(
        cls, model: str, spec: ModelSpec, hardware: Hardware, versions: dict[str, str], cells: Sequence[Cell]
    ) -> RuntimeProfile:
        """The profile of what was measured, fitted by every statistic."""
        return cls(model, spec, hardware, versions, tuple(cells), {name: fit(cells, name) for name in SUMMARIES})

    def save(self, path: Path) -> None:
        files.write_json(path, TypeAdapter(RuntimeProfile).dump_python(self, mode="json"))

    @classmethod
    def load(cls, path: Path) -> RuntimeProfile:
        """A saved profile; `RunError` when it can't be read."""
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise RunError(
                str(path),
                found=f"what can't be read ({str(error).splitlines()[0]})",
                expected=f"a {PROFILE}",
                mend="Make one with `espalier budget profile model=FOLDER`.",
            ) from None


def fit(cells: Sequence[Cell], statistic: Statistic) -> Fit:
    """Least squares as in the paper: F(p) is the time T(p, 1); what is beyond it is fitted over all cells at once.

    A prompt length of which no T(p, 1) was measured takes F from its neighbours. No intercept, since at o = 1 there
    is nothing left to explain.
    """
    times = {cell.query: SUMMARIES[statistic](cell.seconds) for cell in cells}
    first = tuple(sorted((query.prompt, seconds) for query, seconds in times.items() if query.generated == 1))
    further = [query for query in times if query.generated > 1]
    if not first or len({(_steps(query), _context(query)) for query in further}) < 2:
        raise RunError(
            "runtime profile",
            found=f"{len(first)} times of one token, {len(further)} of more",
            expected="at least one of one token and two of more",
            mend="Measure more lengths, or give it more seconds.",
        )
    nothing = Line(0.0, 0.0, 0.0)
    reading = Fit(first, nothing, nothing)
    beyond = numpy.array([times[query] - reading.first_token(query.prompt) for query in further])
    steps = numpy.array([float(_steps(query)) for query in further])
    contexts = numpy.array([_context(query) for query in further])
    return Fit(first, _line(beyond, steps), _line(beyond, steps, steps * contexts))


def ideal_setting(spec: ModelSpec, device: Hardware, queries: Sequence[Query], setting: Setting) -> Setting:
    """The setting on as few devices as hold the weights and the longest query's cache."""
    longest = max(queries, key=lambda query: query.prompt + query.generated)
    needed = sum(Roofline(spec, device, setting).memory(longest.prompt, longest.generated).values())
    devices = math.ceil(needed / device.memory_bytes)
    if devices > 1 and not device.link_bandwidth:
        raise ResourceError(
            device.name,
            found=f"{device.memory_bytes / 1e9:,.1f} GB, and no link to another device",
            expected=f"{needed / 1e9:,.1f} GB for the weights and the longest query",
            mend="Choose other hardware, or fewer bits a weight.",
        )
    return replace(setting, devices=devices)


def ideal_seconds(spec: ModelSpec, device: Hardware, queries: Sequence[Query], setting: Setting) -> float:
    """Seconds of the queries one after another on ideal hardware: `setting.devices` of the kind of `device`."""
    roofline = Roofline(spec, device.part(setting.devices), setting)
    return sum(n * roofline.generation(query.prompt, query.generated) for query, n in Counter(queries).items())


def read_queries(path: Path) -> list[Query]:
    """The token counts of a workload: CSV with a header, or JSON lines, with `prompt_tokens`, `completion_tokens`."""
    queries = [_query(row, f"{path}:{line}") for line, row in _rows(path)]
    if not queries:
        raise DataError(str(path), found="no queries", expected="a query a line", mend="Name another file.")
    return queries


def _steps(query: Query) -> int:
    """Passes after the one that reads the prompt."""
    return query.generated - 1


def _context(query: Query) -> float:
    """How many tokens these passes attend to on average: p + 1 in the first, p + o - 1 in the last."""
    return query.prompt + query.generated / 2


def _line(seconds: Any, *columns: Any) -> Line:
    slopes, *_ = numpy.linalg.lstsq(numpy.stack(columns, axis=1), seconds, rcond=None)
    left = seconds - numpy.stack(columns, axis=1) @ slopes
    variance = ((seconds - seconds.mean()) ** 2).sum()
    per_token, per_context = [*map(float, slopes), 0.0][:2]
    return Line(per_token, per_context, float(1 - (left**2).sum() / variance))


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, values) of a CSV file, or of one of JSON lines."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                yield from enumerate(csv.DictReader(file), start=2)
            else:
                yield from ((number, json.loads(line)) for number, line in enumerate(file, start=1))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            str(path), found=f"what can't be read ({error})", expected="CSV or JSON lines", mend="Mend the file."
        ) from None


def _query(row: Any, where: str) -> Query:
    try:
        prompt, generated = (int(row[column]) for column in COLUMNS)
        if prompt >= 1 and generated >= 1:
            return Query(prompt, generated)
    except (KeyError, TypeError, ValueError):
        pass
    raise DataError(
        where,
        found=repr(row)[:80],
        expected=f"positive numbers as {' and '.join(COLUMNS)}",
        mend='Write one query a line, such as {"prompt_tokens": 120, "completion_tokens": 40}.',
    )
