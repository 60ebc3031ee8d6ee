"""Propose: from a sum of money, hours or energy to the growth run that spends it best, as a recipe with its reasons.

A law of the loss says what sizes come to, the hardware what they cost, and `budget/schedule.py` finds the cheapest way
through both. On this machine the sizes that matter are timed; elsewhere speeds follow from the hardware's peak.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import Field

from espalier import files, page, planner, units
from espalier.budget import flops, hardware, price, schedule
from espalier.budget.hardware import Hardware
from espalier.budget.plan import BudgetRecipe
from espalier.budget.scaling import FURTHEST, Law
from espalier.budget.schedule import Schedule, Size
from espalier.data.prepare import DataRecipe
from espalier.errors import BudgetError, RecipeError
from espalier.grow.progressive import TrainingRecipe
from espalier.ledger import Cap, Cost, Rates
from espalier.method import method
from espalier.page import Alternative, Figure, StageRow, View
from espalier.pipeline import PretrainRecipe
from espalier.recipe import dump
from espalier.report import Report
from espalier.run import PAGE, RESULTS, Run
from espalier.spec import ModelSpec
from espalier.story import shape

PLANNED = "planned.yaml"
ALONE = "that size from scratch"
HERE = "here"
# Widths to choose from, in heads. Layers follow from the width: published decoders have 32 to 128 channels a layer.
HEADS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512)
LEAST_ASPECT, MOST_ASPECT = 32, 128
# Shares of the final layers from which a model is stacked.
STARTS = (1 / 8, 1 / 4, 1 / 2)
# Sizes this far from the best one trained from scratch are looked at.
SMALLER, LARGER = 1 / 30, 6.0
# A stage that took less than this share of the budget would hardly be worth its evaluations and its compiling.
LEAST_STAGE = 0.02
# Sizes from scratch that are offered beside the plan.
OTHERS = 3
# Tokens of an update by FLOPs (DeepSeek LLM, arXiv 2401.02954: fitted on 1e17 to 2e19).
BATCH_FACTOR, BATCH_EXPONENT = 0.2920, 0.3271


class PlanRecipe(TrainingRecipe):
    """What is known beforehand. Training settings are handed on to the run; its stages and batch are what is planned.

    budget       usd, hours, kwh, flops or tokens; of several the first one reached binds
    hardware     "here", or a key of the catalogue, `devices` of it
    utilization  the share of the matmul peak that training reaches there; here it is measured
    law          a law's file, or a published one's name
    furthest     by which factor the range of the law may be left
    relearned    the share of its way that a model goes again after it has grown in depth: none by our record
                 (bench/2026-11-24-growth-compare, relearned.py); 1 leaves growth out
    parameters   of the final model, about; the best, if not stated
    """

    name: str = Field(default="planned", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    budget: BudgetRecipe = BudgetRecipe()
    data: DataRecipe = DataRecipe()
    hardware: str = HERE
    devices: int = Field(default=1, gt=0)
    utilization: float = Field(default=0.4, gt=0, le=1)
    law: str = "hoffmann-2022"
    furthest: float = Field(default=FURTHEST, ge=1)
    relearned: float = Field(default=0.0, ge=0, le=1)
    parameters: float | None = Field(default=None, gt=0)


@dataclass(frozen=True)
class Candidate:
    """A size that the model may have: its FLOPs and seconds a token, and the seconds of getting ready to train it."""

    spec: ModelSpec
    flops: float
    seconds: float
    ready: float = 0.0

    @property
    def parameters(self) -> int:
        return flops.parameters(self.spec)

    @property
    def full(self) -> bool:
        """Whether it is as deep as its width wants it, and so may be the final model."""
        return self.spec.num_hidden_layers == _depth(self.spec.hidden_size)


@dataclass(frozen=True)
class Prices:
    """What training costs, and how much of it may be spent: the cap less the reserve."""

    rates: Rates
    cap: Cap
    reserve: float

    @property
    def usable(self) -> float:
        """The share of the cap that training may take."""
        return 1 - self.reserve

    def of(self, candidate: Candidate, tokens: float) -> Cost:
        return self.rates.cost(tokens * candidate.seconds, tokens=tokens, flops=tokens * candidate.flops)

    def size(self, candidate: Candidate) -> Size:
        """A candidate in shares of the cap."""
        ready = self.cap.share_spent(self.rates.cost(candidate.ready))
        return Size(candidate.parameters, self.cap.share_spent(self.of(candidate, 1.0)), ready)


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

    def told(self) -> str:
        """The expected loss in words."""
        between = f" ({self.interval[0]:.3f} to {self.interval[1]:.3f})" if self.interval else ""
        return f"{self.loss:.3f}{between}"


@method(needs="a law of the loss for the data at hand", costs="seconds, and on this machine a few steps of some sizes")
def plan(recipe: PlanRecipe, run: Run) -> Path:
    """Plan the run that makes the best model of a sum of money, hours or energy, and write its recipe."""
    row = _row(recipe)
    prices = _prices(recipe, row)
    law = Law.load(recipe.law)
    candidates = _candidates(recipe, law, prices, row)
    offers = (
        _timed(recipe, law, candidates, prices, row)
        if recipe.hardware == HERE
        else _offers(recipe, law, candidates, prices)
    )
    best = offers[0]
    planned = _recipe(recipe, best, prices)
    _require_steps(best, planned)
    _require_inside(recipe, law, best)
    reasons = list(_reasons(recipe, law, row, prices, offers, planned))
    run.tell("\n".join(reasons))
    _tell(offers)
    text = "".join(f"# {reason}\n" for reason in reasons) + dump(planned)
    files.write_text(run.folder / PLANNED, text)
    _report(run.name, offers).save(run.folder / RESULTS)
    page.save(_view(run.name, recipe, row, law, prices, offers, reasons, text), run.folder / PAGE)
    return run.folder / PLANNED


def _row(recipe: PlanRecipe) -> Hardware:
    """The hardware that the plan is for."""
    row = hardware.named(recipe.hardware, home=files.home())
    return row if recipe.hardware == HERE else row.part(recipe.devices)


def _prices(recipe: PlanRecipe, row: Hardware) -> Prices:
    budget = recipe.budget
    if budget.cap() == Cap():
        raise RecipeError(
            "budget",
            found="no limit",
            expected="usd, hours, kwh, flops or tokens",
            mend="State one, as in budget.usd=5.",
        )
    rates = price.rates(
        row,
        pue=budget.pue,
        usd_per_hour=budget.usd_per_hour,
        watts=budget.watts,
        kgco2e_per_kwh=budget.kgco2e_per_kwh,
    )
    prices = Prices(rates, budget.cap(), budget.reserve)
    if not prices.cap.share_spent(rates.cost(1.0, flops=1.0, tokens=1.0)):
        raise BudgetError(
            "budget",
            found=f"a limit on what {row.name} takes none of",
            expected="a limit that training uses up",
            mend="Limit hours, flops or tokens, or state budget.usd_per_hour or budget.watts.",
        )
    return prices


def _candidates(recipe: PlanRecipe, law: Law, prices: Prices, row: Hardware) -> list[Candidate]:
    """Sizes around the one that would be best from scratch, and those from which they may be stacked."""
    speed = row.peak_flops[hardware.compute_dtype(row)] * _utilization(recipe)
    every = [_candidate(recipe, heads * recipe.model.head_dim, None, speed) for heads in HEADS]
    alone = [schedule.from_scratch(law.terms, [prices.size(one)], 0, prices.usable) for one in every]
    losses = [found.loss if found else math.inf for found in alone]
    around = recipe.parameters or every[int(np.argmin(losses))].parameters
    finals = [one for one in every if SMALLER * around <= one.parameters <= LARGER * around]
    if not finals:
        raise RecipeError(
            "parameters",
            found=units.count(around),
            expected=f"{units.count(every[0].parameters)} to {units.count(every[-1].parameters)}, "
            f"with heads of {recipe.model.head_dim}",
            mend="Ask for such a size, or change model.head_dim.",
        )
    starts = [
        _candidate(recipe, one.spec.hidden_size, layers, speed)
        for one in finals
        for layers in sorted({max(round(share * one.spec.num_hidden_layers), 1) for share in STARTS})
        if layers < one.spec.num_hidden_layers
    ]
    # Growth leads to later ones: by width, then by depth.
    return sorted(finals + starts, key=lambda one: (one.spec.hidden_size, one.spec.num_hidden_layers))


def _utilization(recipe: PlanRecipe) -> float:
    return hardware.USUAL_MFU if recipe.hardware == HERE else recipe.utilization


def _candidate(recipe: PlanRecipe, hidden: int, layers: int | None, speed: float) -> Candidate:
    sizes = recipe.model.model_dump(exclude_none=True) | {
        "vocab_size": recipe.model.vocab_size or recipe.data.vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": layers or _depth(hidden),
    }
    spec = recipe.parametrization.carried_by(ModelSpec.stated(sizes, where="model"))
    each = flops.training_flops(spec, recipe.data.sequence_length)
    return Candidate(spec, each, each / speed)


def _depth(hidden: int) -> int:
    """Layers of a final model of this width."""
    return max(round(hidden / min(max(hidden / LEAST_ASPECT, LEAST_ASPECT), MOST_ASPECT)), 2)


def _wanted(recipe: PlanRecipe, candidates: Sequence[Candidate]) -> list[bool]:
    """Which candidates may be the final model: any full depth, or the one nearest to what was asked for."""
    finals = [one.full for one in candidates]
    if recipe.parameters is None:
        return finals
    distances = [abs(math.log(one.parameters / recipe.parameters)) for one in candidates]
    nearest = min(distance for distance, final in zip(distances, finals, strict=True) if final)
    return [final and distance == nearest for distance, final in zip(distances, finals, strict=True)]


def _offers(recipe: PlanRecipe, law: Law, candidates: Sequence[Candidate], prices: Prices) -> list[Offer]:
    """The plan, then what else the budget would buy: its size from scratch, and the best three others."""
    terms, usable = law.terms, prices.usable
    sizes = [prices.size(candidate) for candidate in candidates]
    # Beginning a stage is taken to cost a little more than it does, or there would be stages of no account.
    dear = [
        replace(size, ready=size.ready + LEAST_STAGE, after=0.0 if wanted else math.inf)
        for size, wanted in zip(sizes, _wanted(recipe, candidates), strict=True)
    ]

    def relearned(before: int, after: int) -> float:
        one, other = candidates[before].spec, candidates[after].spec
        return recipe.relearned if one.hidden_size == other.hidden_size and recipe.relearned < 1 else math.inf

    def offer(name: str, found: Schedule) -> Offer:
        stages = tuple((candidates[stage.size], stage.tokens) for stage in found.stages)
        cost = sum((prices.of(*stage) for stage in stages), Cost())
        return Offer(name, found, stages, cost, _interval(law, sizes, found, relearned))

    found = schedule.cheapest(terms, dear, usable, relearned)
    path = [(stage.size, stage.tokens) for stage in found.stages] if found else []
    planned = schedule.spend(terms, sizes, path, usable, relearned) if path else None
    if planned is None:
        raise BudgetError(
            "budget",
            found="too little for a stage of any size",
            expected="enough to begin to train one",
            mend="Raise the budget, or ask for a smaller model.",
        )
    final = planned.stages[-1].size
    finals = [number for number, one in enumerate(candidates) if one.full]
    alone = {number: found for number in finals if (found := schedule.from_scratch(terms, sizes, number, usable))}
    others = sorted((number for number in alone if number != final), key=lambda number: alone[number].loss)[:OTHERS]
    offers = [offer("planned", planned)]
    if len(planned.stages) > 1 and final in alone:
        offers.append(offer(ALONE, alone[final]))
    return offers + [offer("from scratch", alone[number]) for number in others]


def _interval(
    law: Law, sizes: Sequence[Size], found: Schedule, relearned: schedule.Relearned
) -> tuple[float, float] | None:
    """Where 95% of such runs are expected to end; None for a law without draws."""
    if not law.draws:
        return None
    stages = [(stage.size, stage.tokens) for stage in found.stages]
    return law.spread(schedule.trajectory(law.drawn, sizes, stages, relearned).loss)


def _timed(recipe: PlanRecipe, law: Law, candidates: Sequence[Candidate], prices: Prices, row: Hardware) -> list[Offer]:
    """Offers of sizes that were all timed here; until one is, it is taken to be as fast as the nearest that was."""
    timed: dict[ModelSpec, Candidate] = {}
    while True:
        offers = _offers(recipe, law, candidates, prices)
        offered = {candidate.spec: candidate for offer in offers for candidate, _ in offer.stages}
        new = [candidate for spec, candidate in offered.items() if spec not in timed]
        if not new:
            return offers
        some = _recipe(recipe, offers[0], prices)
        step = some.rows * some.data.sequence_length
        here = planner.Machine(row, prices.rates)
        speeds = planner.speeds(some, here, [candidate.spec for candidate in new], offers[0].cost.seconds)
        timed |= {
            candidate.spec: replace(candidate, seconds=speed.seconds_per_token(step), ready=speed.ready)
            for candidate, speed in zip(new, speeds, strict=True)
        }
        candidates = [timed.get(candidate.spec) or _as_fast(candidate, timed.values()) for candidate in candidates]


def _as_fast(candidate: Candidate, timed: Iterable[Candidate]) -> Candidate:
    """A candidate at the FLOP/s of the timed one that is nearest to it in FLOPs a token."""
    nearest = min(timed, key=lambda one: abs(math.log(one.flops / candidate.flops)))
    return replace(candidate, seconds=candidate.flops * nearest.seconds / nearest.flops, ready=nearest.ready)


def _require_steps(best: Offer, planned: PretrainRecipe) -> None:
    """Refuse a budget of which a stage wouldn't get a single update."""
    step = planned.train.batch_tokens
    fewest = min(tokens for _, tokens in best.stages)
    if fewest < step:
        raise BudgetError(
            "budget",
            found=f"{fewest:,.3g} tokens of training in a stage of {best.path()}",
            expected=f"an update of {step:,} tokens at least",
            mend="Raise the budget.",
        )


def _require_inside(recipe: PlanRecipe, law: Law, best: Offer) -> None:
    """Refuse a plan that the law knows nothing of."""
    reach = law.reach(best.stages[-1][0].parameters, best.cost.tokens)
    if reach > recipe.furthest:
        raise RecipeError(
            f"law {recipe.law}",
            found=f"a plan of {best.path()} on {units.count(best.cost.tokens)} tokens, {reach:.3g}x outside its range",
            expected=f"at most {recipe.furthest:g}x outside",
            mend="Train small models on your text and give their law, with `espalier budget ladder --recipe "
            f"recipes/budget/ladder.yaml` and law=runs/NAME/law.json, or set furthest={math.ceil(reach)}.",
        )


def _recipe(recipe: PlanRecipe, best: Offer, prices: Prices) -> PretrainRecipe:
    """The recipe of an offer: shares of the budget, so that a machine that is faster or slower keeps to it."""
    shares = schedule.shares(best.schedule)
    stages = [
        {
            "hidden_size": candidate.spec.hidden_size,
            "num_hidden_layers": candidate.spec.num_hidden_layers,
            "duration": f"{100 * share:.4g}%",
        }
        for (candidate, _), share in zip(best.stages, shares, strict=True)
    ]
    kept = recipe.model_dump(
        exclude={"hardware", "devices", "utilization", "law", "furthest", "relearned", "parameters"}
    )
    batch = _batch_tokens(best.cost.flops, recipe.data.sequence_length)
    train = kept["train"] | {
        "batch_tokens": batch,
        "per_device_train_batch_size": min(
            recipe.train.per_device_train_batch_size, batch // recipe.data.sequence_length
        ),
    }
    return PretrainRecipe.model_validate(kept | {"stages": stages, "train": train})


def _batch_tokens(training_flops: float, sequence_length: int) -> int:
    """Tokens of an update that suit so many FLOPs, as a power of two of rows."""
    tokens = BATCH_FACTOR * training_flops**BATCH_EXPONENT
    return sequence_length * 2 ** max(round(math.log2(tokens / sequence_length)), 0)


def _reasons(
    recipe: PlanRecipe, law: Law, row: Hardware, prices: Prices, offers: Sequence[Offer], planned: PretrainRecipe
) -> Iterator[str]:
    """Why the plan is as it is, a sentence a line."""
    best = offers[0]
    speeds = "measured" if recipe.hardware == HERE else f"estimated at {recipe.utilization:.0%} of its peak"
    machine = f"{row.name} x {recipe.devices}" if recipe.devices > 1 else row.name
    yield (
        f"{_budget(recipe)} on {machine} (speeds {speeds}) buys {units.duration(best.cost.seconds)} of training for "
        f"{units.money(best.cost.usd)}; {recipe.budget.reserve:.0%} is kept back for evaluation and export."
    )
    reach = law.reach(best.stages[-1][0].parameters, best.cost.tokens)
    inside = "inside its range" if reach == 1 else f"{reach:.3g} x outside its range"
    yield f"By the law {recipe.law} the run is {inside}; it expects a loss of {best.told()}."
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
    yield (
        f"Updates of {units.count(planned.train.batch_tokens)} tokens suit {units.si(best.cost.flops, 'FLOP')} "
        "(arXiv 2401.02954)."
    )


def _budget(recipe: PlanRecipe) -> str:
    budget = recipe.budget
    stated = {"hours": budget.hours, "kWh": budget.kwh, "tokens": budget.tokens}
    words = [units.money(budget.usd)] if budget.usd else []
    words += [f"{amount:g} {unit}" for unit, amount in stated.items() if amount]
    return " and ".join(words + ([units.si(budget.flops, "FLOP")] if budget.flops else []))


def _tell(offers: Sequence[Offer]) -> None:
    """The offers on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "shape", "parameters", "tokens", "FLOPs", "time", "money", "loss", box=None, pad_edge=False)
    for offer in offers:
        table.add_row(
            offer.name,
            offer.path(),
            units.count(offer.stages[-1][0].parameters),
            units.count(offer.cost.tokens),
            units.si(offer.cost.flops, "FLOP"),
            units.duration(offer.cost.seconds),
            units.money(offer.cost.usd),
            offer.told(),
        )
    Console().print(table)


def _report(name: str, offers: Sequence[Offer]) -> Report:
    report = Report(name)
    for offer in offers:
        at = f"{offer.name}, {shape(offer.final)}"
        report.add(at, "expected loss", offer.loss, note="nats a token, by the law")
        for resource in ("tokens", "flops", "seconds", "usd", "kwh", "kgco2e"):
            report.add(at, resource, getattr(offer.cost, resource), note="estimated")
    return report


def _view(
    name: str,
    recipe: PlanRecipe,
    row: Hardware,
    law: Law,
    prices: Prices,
    offers: Sequence[Offer],
    reasons: list[str],
    text: str,
) -> View:
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
            )
            for number, ((candidate, tokens), stage) in enumerate(
                zip(best.stages, best.schedule.stages, strict=True), start=1
            )
        ],
        recipe=text,
        machine={key: f"{value} ({row.sources.get(key, 'stated')})" for key, value in _figures(row).items()},
        notes=reasons,
    )


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
