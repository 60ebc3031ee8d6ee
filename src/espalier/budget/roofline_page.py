"""What a roofline says of one query, as figures and as a page for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from espalier import page, units
from espalier.budget.price import rates
from espalier.budget.roofline import Phase, Roofline, Row
from espalier.ledger import Cost
from espalier.page import Figure, View

MILLION = 1e6
NAMED_SHARE = 0.02  # of a phase's time, from which on a mark has its name beside it
HUES = {"prefill": "hue-0", "decode": "hue-1"}


@dataclass(frozen=True)
class Estimate:
    """A batch of queries on a roofline: prompts of `prompt` tokens, `generated` (two or more) tokens after each."""

    name: str
    roofline: Roofline
    prompt: int
    generated: int

    @property
    def context(self) -> int:
        """Tokens that a step in the middle of decoding attends to."""
        return self.prompt + self.generated // 2

    @cached_property
    def phases(self) -> dict[str, Phase]:
        """The prompt, a step in the middle of decoding, and, for comparison, a training step on the same rows."""
        return {
            "prefill": self.roofline.prefill(self.prompt),
            "decode": self.roofline.decode(self.context),
            "training": self.roofline.training(self.prompt),
        }

    @cached_property
    def seconds(self) -> float:
        """Of the whole batch, from its first token read to its last written."""
        return self.roofline.generation(self.prompt, self.generated)

    @property
    def step_seconds(self) -> float:
        """A decoding step, averaged over all that are done."""
        return (self.seconds - self.phases["prefill"].seconds) / (self.generated - 1)

    @property
    def tokens_per_second(self) -> float:
        """Tokens written a second while decoding, all rows together."""
        return self.roofline.setting.batch / self.step_seconds

    @property
    def million(self) -> dict[str, Cost]:
        """What a million tokens cost: those read, and those written."""
        a_second = rates(self.roofline.hardware).cost(1.0)
        read = self.phases["prefill"].seconds / (self.roofline.setting.batch * self.prompt)
        return {"read": a_second * (MILLION * read), "written": a_second * (MILLION / self.tokens_per_second)}

    @property
    def memory(self) -> dict[str, float]:
        return self.roofline.memory(self.prompt, self.generated)

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.roofline.hardware.memory_bytes

    def figures(self) -> dict[str, Any]:
        """Everything as JSON: seconds, bytes, FLOPs, USD, kWh."""
        return {
            "model": self.name,
            "hardware": asdict(self.roofline.hardware),
            "setting": asdict(self.roofline.setting),
            "prompt": self.prompt,
            "generated": self.generated,
            "seconds": self.seconds,
            "prefill_seconds": self.phases["prefill"].seconds,
            "decode_step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "ridge": self.roofline.ridge,
            "turning_batch": self.roofline.turning_batch(),
            "memory": self.memory,
            "fits": self.fits,
            "million_tokens": {name: asdict(cost) for name, cost in self.million.items()},
            "phases": {name: [_record(row) for row in phase.rows] for name, phase in self.phases.items()},
        }

    def titles(self) -> dict[str, str]:
        """What each phase is."""
        batch = self.roofline.setting.batch
        return {
            "prefill": f"Prefill: {batch} × {self.prompt:,} tokens",
            "decode": f"A decoding step: {batch} × 1 token, at a context of {self.context:,}",
            "training": f"A training step: {batch} × {self.prompt:,} tokens",
        }


def written(phase: Phase) -> list[dict[str, str]]:
    """The operators as texts for people, and their total."""
    total = {
        "name": "total",
        "flops": units.si(phase.flops, "FLOP"),
        "bytes": units.si(phase.bytes, "B"),
        "intensity": _intensity(phase),
        "time": units.duration(phase.seconds),
        "share": "100%",
        "bound": phase.bound,
    }
    return [*(_texts(row, phase) for row in phase.rows), total]


def summary(estimate: Estimate) -> list[str]:
    """What the batch of queries costs, a line a figure."""
    million = estimate.million
    needed, available = (
        units.si(amount, "B") for amount in (sum(estimate.memory.values()), estimate.roofline.hardware.memory_bytes)
    )
    costs = (
        f"{units.money(cost.usd)} and {units.amount(cost.kwh, 'kwh')} a million tokens {name}"
        for name, cost in million.items()
    )
    first, all_in = units.duration(estimate.phases["prefill"].seconds), units.duration(estimate.seconds)
    return [
        f"{first} to the first token, then {units.significant(estimate.tokens_per_second)} tokens/s; {all_in} in all",
        f"{needed} of {available}: {_fitting(estimate)}",
        "; ".join(costs),
        _turning(estimate),
    ]


def render(estimate: Estimate, made_at: str) -> str:
    """The page as HTML; equal estimates give equal text."""
    titles = estimate.titles()
    phases = [
        {"name": titles[name], "lead": _lead(phase), "rows": written(phase)} for name, phase in estimate.phases.items()
    ]
    view = _view(estimate, made_at)
    return page.template("budget/roofline.html").render(view=view, charts={"roofline": _chart(estimate)}, phases=phases)


def _view(estimate: Estimate, made_at: str) -> View:
    roofline, million = estimate.roofline, estimate.million
    needed, available = sum(estimate.memory.values()), roofline.hardware.memory_bytes
    setting = roofline.setting
    split = ", ".join(f"{name} {units.si(amount, 'B')}" for name, amount in estimate.memory.items())
    headline = [
        Figure("Tokens a second", units.significant(estimate.tokens_per_second), f"written, batch {setting.batch}"),
        Figure(
            "First token",
            units.duration(estimate.phases["prefill"].seconds),
            f"after {estimate.prompt:,} read; {units.duration(estimate.seconds)} with {estimate.generated:,} written",
        ),
        Figure(
            "A million tokens",
            units.money(million["written"].usd),
            f"written, {units.amount(million['written'].kwh, 'kwh')}; {units.money(million['read'].usd)} read",
        ),
        Figure("Memory", units.si(needed, "B"), f"of {units.si(available, 'B')}: {_fitting(estimate)}"),
    ]
    return View(
        title=f"{estimate.name} on {roofline.hardware.name}",
        subtitle=f"At least how long each operator takes, and what keeps it from being faster. {_turning(estimate)}",
        made_at=made_at,
        headline=headline,
        notes=[f"Memory: {split}.", *_limits(roofline)],
        machine={
            "Peak": f"{units.si(roofline.hardware.peak_flops[setting.peak], 'FLOP/s')} ({setting.peak})",
            "Memory bandwidth": units.si(roofline.hardware.memory_bandwidth, "B/s"),
            "Devices": str(setting.devices),
            "Bits": f"weights {setting.weight_bits}, activations {setting.activation_bits}, cache {setting.cache_bits}",
            "Sources": "; ".join(sorted(set(roofline.hardware.sources.values()))),
        },
    )


def _fitting(estimate: Estimate) -> str:
    return "it fits" if estimate.fits else "it does not fit"


def _turning(estimate: Estimate) -> str:
    batch = estimate.roofline.turning_batch()
    if batch is None:
        return "Decoding is never bound by computing, however large the batch."
    return f"Products with weights are bound by computing from batch {batch:,} on when decoding."


def _limits(roofline: Roofline) -> list[str]:
    """What the reader should know of how this was estimated."""
    overhead = roofline.hardware.kernel_seconds
    return [
        "No kernel reaches its roof: compare these figures with one another rather than with a clock.",
        f"An operator takes at least {units.duration(overhead)}, as measured."
        if overhead
        else "Nobody measured the overhead of this hardware's kernels, so small models look faster than they are.",
        "Scores that a causal mask hides are counted, as in the training FLOPs.",
    ]


def _lead(phase: Phase) -> str:
    return f"{units.duration(phase.seconds)}, most of it bound by {phase.bound}."


def _chart(estimate: Estimate) -> dict[str, Any]:
    titles = estimate.titles()
    return chart(estimate.roofline, [(titles[name], name, estimate.phases[name]) for name in HUES])


def chart(roofline: Roofline, phases: Sequence[tuple[str, str, Phase]]) -> dict[str, Any]:
    """What the script needs: axes with written ticks, the roof's corners, and marks for the products of each phase.

    phases  (title, name, phase), two at most
    """
    hardware, ridge = roofline.hardware, roofline.ridge
    peak = hardware.peak_flops[roofline.setting.peak]
    drawn: list[dict[str, Any]] = [
        {"name": title, "hue": hue, "marks": _marks(name, phase)}
        for hue, (title, name, phase) in zip(HUES.values(), phases, strict=False)
    ]
    every = [mark for one in drawn for mark in one["marks"]]
    low = min(ridge, *(mark["intensity"] for mark in every)) / 2
    high = max(ridge, *(mark["intensity"] for mark in every)) * 4
    slowest = min(low * hardware.memory_bandwidth, *(mark["speed"] for mark in every))
    return {
        "x": page.log_axis(low, high, ""),
        "y": page.log_axis(slowest / 5, 1.5 * peak, "flops"),
        "roof": [[low, low * hardware.memory_bandwidth], [ridge, peak], [high, peak]],
        "ridge": {"at": ridge, "speed": peak, "text": f"ridge {units.significant(ridge)}"},
        "phases": drawn,
    }


def _marks(name: str, phase: Phase) -> list[dict[str, Any]]:
    """The products of a phase, those that would cover one another in one mark, from left to right."""
    places: dict[tuple[str, str], list[Row]] = {}
    for row in phase.rows:
        if row.flops:
            place = units.significant(row.intensity, 2), units.significant(_speed(row), 2)
            places.setdefault(place, []).append(row)
    return sorted((_mark(name, Phase(tuple(rows)), phase) for rows in places.values()), key=_left)


def _left(mark: dict[str, Any]) -> float:
    return mark["intensity"]


def _mark(name: str, here: Phase, phase: Phase) -> dict[str, Any]:
    names, share = ", ".join(row.name for row in here.rows), here.seconds / phase.seconds
    told = [
        f"{names} ({name})",
        f"{units.si(here.flops, 'FLOP')}, {units.si(here.bytes, 'B')}",
        f"{_intensity(here)} FLOPs a byte",
        f"{units.duration(here.seconds)}, {share:.1%} of the phase",
        f"bound by {here.bound}",
    ]
    at = {"intensity": here.flops / here.bytes, "speed": _speed(here)}
    return {**at, "name": names if share > NAMED_SHARE else "", "share": share, "told": told}


def _texts(row: Row, phase: Phase) -> dict[str, str]:
    return {
        "name": row.name,
        "flops": units.si(row.flops, "FLOP") if row.flops else "–",
        "bytes": units.si(row.bytes, "B") if row.bytes else "–",
        "intensity": _intensity(row),
        "time": units.duration(row.seconds),
        "share": f"{row.seconds / phase.seconds:.1%}",
        "bound": row.bound,
    }


def _intensity(work: Row | Phase) -> str:
    return units.significant(work.flops / work.bytes) if work.flops else "–"


def _speed(work: Row | Phase) -> float:
    """FLOP/s, overhead included."""
    return work.flops / work.seconds


def _record(row: Row) -> dict[str, Any]:
    return {**asdict(row), "bytes": row.bytes, "intensity": row.intensity, "seconds": row.seconds, "bound": row.bound}
