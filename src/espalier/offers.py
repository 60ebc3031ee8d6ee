"""Offers: what `espalier plan` is asked, what a sum would buy, and how that is told: by lines, a table and a page."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from espalier import units
from espalier.budget import flops, schedule
from espalier.budget.hardware import USUAL_MFU, Hardware
from espalier.budget.layouts import Arrangement
from espalier.budget.observations import text_digest
from espalier.budget.parallel import Links
from espalier.budget.plan import BudgetRecipe
from espalier.budget.roofline import Phase, Roofline, Setting
from espalier.budget.roofline_page import chart
from espalier.budget.scaling import FURTHEST, Law
from espalier.budget.schedule import Schedule, Size
from espalier.budget.serving import ServingRecipe
from espalier.budget.sizes import depth_of
from espalier.data.prepare import DataRecipe
from espalier.grow.progressive import TrainingRecipe
from espalier.ledger import Cap, Cost, Rates
from espalier.page import Alternative, Figure, StageRow, View
from espalier.recipe import ByField
from espalier.report import Report
from espalier.spec import ModelSpec
from espalier.story import shape

ALONE = "that size from scratch"
HERE = "here"
# Of the peak, by products alone. FLM-101B's published speeds come to 0.50 to 0.56 once what was sent is taken off
# (tests/budget/test_parallel.py), with kernels and overlap that few have.
PRODUCTS = 0.4


class PlanRecipe(TrainingRecipe):
    """What is known beforehand. Training settings are handed on to the run; its stages and batch are what is planned.

    budget       usd, hours, kwh, flops or tokens; of several the first one reached binds
    hardware     "here", or a key of the catalogue, `devices` of it
    utilization  the share of the matmul peak that training reaches there in all, where it is known. If it isn't stated,
                 products are taken to reach PRODUCTS of it, and what devices send each other comes on top; here both
                 are measured
    links        how fast devices send; if not stated, the row's link and layouts.BETWEEN_NODES
    law          a law's file, or a published one's name
    furthest     by which factor the range of the law may be left
    relearned    the share of its way that a model goes again after it has grown in depth: a fifth by our record
                 (bench/2026-11-24-plan-ten-minutes); 1 leaves growth out
    parameters   of the final model, about; the best, if not stated
    serving      the traffic that the budget is to pay for as well, once the model is trained
    """

    name: str = Field(default="planned", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    budget: ByField[BudgetRecipe] = BudgetRecipe()
    data: ByField[DataRecipe] = DataRecipe()
    hardware: str = HERE
    devices: int = Field(default=1, gt=0)
    utilization: float | None = Field(default=None, gt=0, le=1)
    links: Links | None = None
    law: str = "hoffmann-2022"
    furthest: float = Field(default=FURTHEST, ge=1)
    relearned: float = Field(default=0.2, ge=0, le=1)
    parameters: float | None = Field(default=None, gt=0)
    serving: ServingRecipe | None = None

    @model_validator(mode="after")
    def _serving_is_paid_for(self) -> Self:
        if self.serving and not (self.budget.usd or self.budget.kwh):
            raise ValueError("serving takes money and energy: state budget.usd or budget.kwh")
        return self

    @model_validator(mode="after")
    def _one_machine_here(self) -> Self:
        if self.hardware == HERE and self.devices > 1:
            raise ValueError(f"devices={self.devices} of the machine at hand; name a row of the catalogue as hardware")
        return self

    @property
    def products(self) -> float:
        """The share of the peak that products are taken to reach before any is timed."""
        return self.utilization or (USUAL_MFU if self.hardware == HERE else PRODUCTS)


@dataclass(frozen=True)
class Candidate:
    """A size that the model may have: its FLOPs and seconds a token, and the seconds of getting ready to train it.

    arranged  how it is trained in the memory that there is
    serving   what answering the stated traffic with it takes; None without any
    """

    spec: ModelSpec
    flops: float
    seconds: float
    arranged: Arrangement
    ready: float = 0.0
    serving: Cost | None = None

    @property
    def parameters(self) -> int:
        return flops.parameters(self.spec)

    @property
    def full(self) -> bool:
        """Whether it is as deep as its width wants it, and so may be the final model."""
        return self.spec.num_hidden_layers == depth_of(self.spec.hidden_size)


@dataclass(frozen=True)
class Prices:
    """What training costs, and how much of it may be spent: the cap less what starting and exporting take, and less
    the reserve.
    """

    rates: Rates
    cap: Cap
    reserve: float
    around: Cost

    @property
    def usable(self) -> float:
        """The share of the cap that training may take."""
        return (1 - self.cap.share_spent(self.around)) * (1 - self.reserve)

    def of(self, candidate: Candidate, tokens: float) -> Cost:
        return self.rates.cost(tokens * candidate.seconds, tokens=tokens, flops=tokens * candidate.flops)

    def tokens(self, flops: float, seconds: float) -> float:
        """Tokens that the budget pays for, at so many FLOPs and seconds each."""
        return self.usable / self.cap.share_spent(self.rates.cost(seconds, tokens=1.0, flops=flops))

    def size(self, candidate: Candidate) -> Size:
        """A candidate in shares of the cap; serving it is paid for before anything is kept back for training."""
        ready = self.cap.share_spent(self.rates.cost(candidate.ready))
        after = self.cap.share_spent(_paid(candidate.serving)) * (1 - self.reserve) if candidate.serving else 0.0
        return Size(candidate.parameters, self.cap.share_spent(self.of(candidate, 1.0)), ready, after)


def _paid(cost: Cost) -> Cost:
    """Money and energy: served tokens, FLOPs and seconds don't count against limits on training."""
    return Cost(usd=cost.usd, kwh=cost.kwh, kgco2e=cost.kgco2e)


@dataclass(frozen=True)
class Offer:
    """A way to spend the budget: the stages' sizes and tokens, their cost, and the loss that the law expects."""

    name: str
    schedule: Schedule
    stages: tuple[tuple[Candidate, float], ...]
    cost: Cost
    interval: tuple[float, float] | None

    @property
    def loss(self) -> float:
        return self.schedule.loss

    @property
    def final(self) -> ModelSpec:
        return self.stages[-1][0].spec

    def path(self) -> str:
        """The shapes in order, in a few words: a plan grows in depth alone."""
        layers = " → ".join(str(candidate.spec.num_hidden_layers) for candidate, _ in self.stages)
        return f"{layers} layers × {self.final.hidden_size}"

    def layout(self) -> str:
        """How the stages are laid out, in a few words."""
        return " → ".join(candidate.arranged.short for candidate, _ in self.stages)

    def told(self) -> str:
        """The expected loss in words."""
        between = f" ({self.interval[0]:.3f} to {self.interval[1]:.3f})" if self.interval else ""
        return f"{self.loss:.3f}{between}"


def reasons(recipe: PlanRecipe, law: Law, row: Hardware, offers: Sequence[Offer], batch_tokens: int) -> Iterator[str]:
    """Why the plan is as it is, a sentence a line."""
    best = offers[0]
    machine = f"{row.name} x {recipe.devices}" if recipe.devices > 1 else row.name
    time, money = units.duration(best.cost.seconds), units.money(best.cost.usd)
    yield (
        f"{_budget(recipe)} on {machine} (speeds {_speeds(recipe)}) buys {time} of training for {money}; "
        f"{recipe.budget.reserve:.0%} is kept back for evaluation and export."
    )
    reach = law.reach(best.stages[-1][0].parameters, best.cost.tokens)
    inside = "inside its range" if reach == 1 else f"{reach:.3g} x outside its range"
    yield f"By the law {recipe.law} the run is {inside}; it expects a loss of {best.told()}."
    if law.about.data != text_digest(recipe.data.model_dump(mode="json")):
        text = ", ".join(filter(None, (law.about.data, law.about.tokenizer))) or "it doesn't say which"
        yield f"That law is of other text than this plan's ({text}): losses here may differ from what it expects."
    if recipe.serving and (serving := best.stages[-1][0].serving):
        yield (
            f"Serving it for {recipe.serving.months:g} months, {units.count(recipe.serving.queries_per_day)} queries a "
            f"day on {recipe.serving.hardware}, is estimated at {units.money(serving.usd)} and "
            f"{units.si(serving.kwh * 1000, 'Wh')}, which the run's budget is less by."
        )
    if len(best.stages) > 1:
        points, after = schedule.growth_points(best.schedule), best.stages[1:]
        steps = ", ".join(
            f"at {units.count(tokens)} tokens to {candidate.spec.num_hidden_layers} layers"
            for tokens, (candidate, _) in zip(points, after, strict=True)
        )
        yield f"It begins with {shape(best.stages[0][0].spec)} and grows {steps}."
        if offers[1].name == ALONE:
            behind = offers[1].loss - best.loss
            yield f"That size from scratch on the same budget comes to {offers[1].told()}, {behind:.3f} behind."
    else:
        yield f"It trains {shape(best.stages[0][0].spec)} from scratch: growing into it would gain less than it costs."
    others = [offer for offer in offers if offer.name == "from scratch"]
    if others:
        yield f"The next best size from scratch, {shape(others[0].final)}, comes to {others[0].told()}."
    yield from _layouts(best, modelled=recipe.devices > 1 and recipe.utilization is None)
    yield (
        f"Updates of {units.count(batch_tokens)} tokens suit {units.si(best.cost.flops, 'FLOP')} "
        "(arXiv 2401.02954, at half its factor)."
    )


def _speeds(recipe: PlanRecipe) -> str:
    """How they are known."""
    if recipe.hardware == HERE:
        return "measured"
    if recipe.utilization or recipe.devices == 1:
        return f"estimated at {recipe.products:.0%} of its peak"
    return f"estimated: products at {recipe.products:.0%} of the peak, and what devices send"


def _layouts(best: Offer, *, modelled: bool) -> Iterator[str]:
    """How each stage is laid out and what it holds, and, if sending is `modelled`, what that leaves for products."""
    for number, (candidate, _) in enumerate(best.stages, start=1):
        one = candidate.arranged
        busy = f"; products take {one.busy:.0%} of the time" if modelled else ""
        memory = f"{units.si(one.bytes, 'B')} of a device's {units.si(one.room, 'B')}{busy}"
        yield f"Stage {number} is laid out as {one}: {memory}."


def _budget(recipe: PlanRecipe) -> str:
    budget = recipe.budget
    stated = {"kWh": budget.kwh, "tokens": budget.tokens}
    words = [units.money(budget.usd)] if budget.usd else []
    words += [units.duration(budget.hours * 3600)] if budget.hours else []
    words += [f"{amount:g} {unit}" for unit, amount in stated.items() if amount]
    return " and ".join(words + ([units.si(budget.flops, "FLOP")] if budget.flops else []))


def tell(offers: Sequence[Offer]) -> None:
    """The offers on the terminal."""
    from rich.console import Console
    from rich.table import Table

    columns = ("", "shape", "layout", "size", "tokens", "FLOPs", "time", "money", "loss")
    table = Table(*columns, box=None, pad_edge=False)
    table.columns[columns.index("money")].no_wrap = True
    for offer in offers:
        table.add_row(
            offer.name,
            offer.path(),
            offer.layout(),
            units.count(offer.stages[-1][0].parameters),
            units.count(offer.cost.tokens),
            units.si(offer.cost.flops, "FLOP"),
            units.duration(offer.cost.seconds),
            units.money(offer.cost.usd),
            offer.told(),
        )
    Console().print(table)


def next_step(recipe: PlanRecipe, planned: Path) -> str:
    """What carries the plan out."""
    if recipe.hardware == HERE:
        return f"Carry it out with: espalier run {planned}"
    launch = f"Carry it out with: espalier launch slurm {planned} --hardware {recipe.hardware}"
    if recipe.devices == 1:
        return f"{launch} (or skypilot)"
    per_node = recipe.links.per_node if recipe.links else Links.model_fields["per_node"].default
    nodes = math.ceil(recipe.devices / per_node)
    return (
        f"{launch} --devices {recipe.devices // nodes} --nodes {nodes} (or skypilot)\n"
        "Training shards the model fully over all devices, or as train.parallel says; it has no pipelines, so where "
        "the layouts above have stages it takes another time than theirs."
    )


def report(name: str, offers: Sequence[Offer]) -> Report:
    """What each offer costs and comes to, to be computed with."""
    report = Report(name)
    for offer in offers:
        at = f"{offer.name}, {shape(offer.final)}"
        report.add(at, "expected loss", offer.loss, note="nats a token, by the law")
        for resource in ("tokens", "flops", "seconds", "usd", "kwh", "kgco2e"):
            report.add(at, resource, getattr(offer.cost, resource), note="estimated")
        if serving := offer.stages[-1][0].serving:
            for resource in ("usd", "kwh", "kgco2e"):
                report.add(at, f"serving {resource}", getattr(serving, resource), note="estimated")
        for number, (candidate, _) in enumerate(offer.stages, start=1):
            _add_layout(report, f"{at}, stage {number}", candidate.arranged)
    return report


def _add_layout(report: Report, at: str, one: Arrangement) -> None:
    for axis in ("data", "tensor", "pipeline"):
        report.add(at, f"{axis} ranks", getattr(one.layout, axis), note=str(one))
    report.add(at, "micro-batch", one.update.micro_rows, note="rows")
    report.add(at, "bytes a device", one.bytes, note=f"estimated; it has {units.si(one.room, 'B')}")


def view(
    name: str,
    recipe: PlanRecipe,
    row: Hardware,
    law: Law,
    prices: Prices,
    offers: Sequence[Offer],
    reasons: list[str],
    text: str,
) -> View:
    """The page of a plan."""
    best = offers[0]
    interval = f"95% between {best.interval[0]:.3f} and {best.interval[1]:.3f}" if best.interval else "nats a token"
    return View(
        title=name,
        subtitle=f"{_budget(recipe)} on {row.name}",
        made_at=time.strftime("%Y-%m-%d %H:%M"),
        kind="plan",
        headline=[
            Figure("Expected loss", f"{best.loss:.3f}", interval),
            Figure("Final model", units.count(best.stages[-1][0].parameters), shape(best.final)),
            Figure("Training", units.duration(best.cost.seconds), units.money(best.cost.usd)),
            Figure("Tokens", units.count(best.cost.tokens), units.si(best.cost.flops, "FLOP")),
        ],
        alternatives=[
            _alternative(f"planned: {best.path()}", best.cost, f"on this budget, to {best.told()}"),
            *_to_the_same_loss(law, prices, offers),
        ],
        stages=[
            StageRow(
                f"Stage {number}",
                shape(candidate.spec),
                candidate.parameters,
                tokens,
                tokens * candidate.flops,
                tokens * candidate.seconds,
                stage.loss,
                str(candidate.arranged),
            )
            for number, ((candidate, tokens), stage) in enumerate(
                zip(best.stages, best.schedule.stages, strict=True), start=1
            )
        ],
        recipe=text,
        machine={key: f"{value} ({row.sources.get(key, 'stated')})" for key, value in _figures(row).items()},
        notes=reasons,
    )


def final_passes(offer: Offer, device: Hardware) -> dict[str, Any]:
    """The chart of the final model's passes over a micro-batch, beneath the roofline of the devices that share it."""
    arranged = offer.stages[-1][0].arranged
    setting = Setting(batch=arranged.update.micro_rows, devices=arranged.layout.tensor)
    roofline = Roofline(offer.final, device.part(arranged.layout.tensor), setting)
    step = roofline.training(arranged.update.sequence_length)
    passes = Phase(tuple(row for row in step.rows if row.name != "optimizer"))  # many passes make an update
    return chart(roofline, [("Forward and backward", "training", passes)])


def _to_the_same_loss(law: Law, prices: Prices, offers: Sequence[Offer]) -> Iterator[Alternative]:
    """What the plan's loss would cost with each size from scratch, where it can get there."""
    best, *others = offers
    for offer in others:
        candidate = offer.stages[-1][0]
        tokens = float(law.terms.tokens_for(best.loss, candidate.parameters))
        if tokens < math.inf:
            note = f"to the plan's loss; on this budget it comes to {offer.told()}"
            yield _alternative(f"{offer.name}: {offer.path()}", prices.of(candidate, tokens), note)


def _alternative(name: str, cost: Cost, note: str) -> Alternative:
    return Alternative(name, cost.tokens, cost.flops, cost.seconds, cost.usd, cost.kwh, note)


def _figures(row: Hardware) -> dict[str, str]:
    return {
        "peak_flops": units.si(row.peak_flops["bfloat16"], "FLOP/s"),
        "watts": f"{row.watts:g} W",
        "usd_per_hour": units.money(row.usd_per_hour),
        "kgco2e_per_kwh": f"{row.kgco2e_per_kwh:g} kg/kWh",
    }
