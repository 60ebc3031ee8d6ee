"""Propose: from a sum of money, hours or energy to the growth run that spends it best, as a recipe with its reasons.

A law of the loss says what sizes come to, the hardware what they cost, and `budget/schedule.py` finds the cheapest way
through both. On this machine the sizes that matter are timed; elsewhere speeds follow from the hardware's peak.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from espalier import files, page, planner, units
from espalier.budget import flops, hardware, layouts, price, schedule, serving
from espalier.budget.hardware import Hardware
from espalier.budget.layouts import Cluster, Work
from espalier.budget.scaling import Law
from espalier.budget.schedule import Schedule, Size
from espalier.budget.sizes import HEADS, depth_of
from espalier.errors import BudgetError, RecipeError, ResourceError
from espalier.ledger import Cap, Cost
from espalier.method import method
from espalier.offers import (
    ALONE,
    HERE,
    Candidate,
    Offer,
    PlanRecipe,
    Prices,
    final_passes,
    next_step,
    reasons,
    report,
    tell,
    view,
)
from espalier.pipeline import PretrainRecipe
from espalier.recipe import dump
from espalier.run import PAGE, RESULTS, Run
from espalier.spec import ModelSpec

PLANNED = "planned.yaml"
# Shares of the final layers from which a model is stacked, and the fewest: one layer alone can't copy from what it has
# read, and no law of size holds for it (bench/2026-11-24-plan-ten-minutes).
STARTS = (1 / 8, 1 / 4, 1 / 2)
FEWEST_LAYERS = 2
# Sizes this far from the best one trained from scratch are looked at.
SMALLER, LARGER = 1 / 30, 6.0
# A stage that took less than this share of the budget would hardly be worth its evaluations and its compiling.
LEAST_STAGE = 0.02
# Sizes from scratch that are offered beside the plan.
OTHERS = 3
# Tokens of an update by FLOPs: the exponent of DeepSeek LLM (arXiv 2401.02954), half its factor. At 1.6e13 FLOPs, far
# below its range, 2,048 and 4,096 tokens came to 2.836 and 2.874, 8,192 to 3.003 (bench/2026-11-24-plan-ten-minutes).
BATCH_FACTOR, BATCH_EXPONENT = 0.1460, 0.3271


@method(needs="a law of the loss for the data at hand", costs="seconds, and on this machine a few steps of some sizes")
def plan(recipe: PlanRecipe, run: Run) -> Path:
    """Plan the run that makes the best model of a sum of money, hours or energy, and write its recipe."""
    device = hardware.named(recipe.hardware, home=files.home())
    row = device if recipe.hardware == HERE else device.part(recipe.devices)
    prices = _prices(recipe, row)
    law = Law.load(recipe.law)
    cluster = layouts.cluster(device, recipe.devices, recipe.links, recipe.products)
    candidates = _candidates(recipe, law, prices, cluster)
    offers = _offers(recipe, law, candidates, prices)
    if recipe.hardware == HERE:
        _require_inside(recipe, law, offers[0])  # by estimated speeds, before time is spent on measuring them
        offers = _timed(recipe, law, candidates, prices, row)
    best = offers[0]
    planned = _recipe(recipe, best, prices)
    _require_steps(best, planned)
    _require_inside(recipe, law, best)
    why = list(reasons(recipe, law, row, offers, planned.train.batch_tokens))
    run.tell("\n".join(why))
    tell(offers)
    run.tell(next_step(recipe, run.folder / PLANNED))
    text = "".join(f"# {reason}\n" for reason in why) + dump(planned)
    files.write_text(run.folder / PLANNED, text)
    report(run.name, offers).save(run.folder / RESULTS)
    shown = view(run.name, recipe, row, law, prices, offers, why, text)
    files.write_text(run.folder / PAGE, page.render(shown, "plan.html", roofline=final_passes(best, device)))
    return run.folder / PLANNED


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
    around = rates.cost(planner.START_SECONDS + planner.EXPORT_SECONDS) if recipe.hardware == HERE else Cost()
    prices = Prices(rates, budget.cap(), budget.reserve, around)
    if not prices.cap.share_spent(rates.cost(1.0, flops=1.0, tokens=1.0)):
        raise BudgetError(
            "budget",
            found=f"a limit on what {row.name} takes none of",
            expected="a limit that training uses up",
            mend="Limit hours, flops or tokens, or state budget.usd_per_hour or budget.watts.",
        )
    return prices


def _candidates(recipe: PlanRecipe, law: Law, prices: Prices, cluster: Cluster) -> list[Candidate]:
    """Sizes around the one that would be best from scratch, and those from which they may be stacked, that fit."""
    stated = [_spec(recipe, heads * recipe.model.head_dim) for heads in HEADS]
    _require_stated(recipe, stated)
    tasks = [(spec, _work(recipe, spec, prices, cluster)) for spec in stated]
    fitting = [one for spec, work in tasks if (one := _candidate(recipe, spec, cluster, work))]
    _require_room(recipe, tasks, fitting, cluster)
    every = _served(recipe, fitting) if recipe.serving else fitting
    alone = [schedule.from_scratch(law.terms, [prices.size(one)], 0, prices.usable) for one in every]
    losses = [found.loss if found else math.inf for found in alone]
    around = recipe.parameters or every[int(np.argmin(losses))].parameters
    finals = [one for one in every if SMALLER * around <= one.parameters <= LARGER * around]
    starts = [
        start
        for one in finals
        for layers in sorted({max(round(share * one.spec.num_hidden_layers), FEWEST_LAYERS) for share in STARTS})
        if layers < one.spec.num_hidden_layers
        if (start := _start(recipe, one, layers, prices, cluster))
    ]
    # Growth leads to later ones: by width, then by depth.
    return sorted(finals + starts, key=lambda one: (one.spec.hidden_size, one.spec.num_hidden_layers))


def _served(recipe: PlanRecipe, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that the serving devices hold, with what serving them takes; `ResourceError` if there are none."""
    assert recipe.serving
    row = hardware.named(recipe.serving.hardware, home=files.home())
    held: list[Candidate] = []
    for one in candidates:
        try:
            held.append(replace(one, serving=serving.served(one.spec, recipe.serving, row).cost))
        except ResourceError:
            if not held:  # the smallest comes first
                raise
    return held


def _spec(recipe: PlanRecipe, hidden: int) -> ModelSpec:
    sizes = recipe.model.model_dump(exclude_none=True) | {
        "vocab_size": recipe.model.vocab_size or recipe.data.vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": depth_of(hidden),
    }
    return recipe.parametrization.carried_by(ModelSpec.stated(sizes, where="model"))


def _work(recipe: PlanRecipe, spec: ModelSpec, prices: Prices, cluster: Cluster) -> Work:
    """The update that suits the budget, if it all goes into this size."""
    length, train = recipe.data.sequence_length, recipe.train
    each = flops.training_flops(spec, length)
    batch = _batch_tokens(each * prices.tokens(each, each / cluster.speed), length, cluster.count)
    return Work(
        rows=batch // length,
        sequence_length=length,
        optimizer=recipe.optimizer.name,
        micro_rows=range(1, train.per_device_train_batch_size + 1),
        recompute=("layers",) if train.recompute == "layers" else ("none", "layers"),
    )


def _candidate(recipe: PlanRecipe, spec: ModelSpec, cluster: Cluster, work: Work) -> Candidate | None:
    """A size in its best arrangement; None if it fits in none."""
    arranged = layouts.best(spec, cluster, work)
    if arranged is None:
        return None
    each = flops.training_flops(spec, work.sequence_length, arranged.update.recompute)
    # A utilization that was stated is one of everything, what devices send included.
    return Candidate(spec, each, each / cluster.speed if recipe.utilization else arranged.seconds_per_token, arranged)


def _start(recipe: PlanRecipe, final: Candidate, layers: int, prices: Prices, cluster: Cluster) -> Candidate | None:
    """A size that grows into a final one, with its micro-batch and recomputation: a run has one of each."""
    work = _work(recipe, final.spec, prices, cluster).like(final.arranged)
    return _candidate(recipe, final.spec.changed(num_hidden_layers=layers), cluster, work)


def _require_stated(recipe: PlanRecipe, stated: Sequence[ModelSpec]) -> None:
    """Refuse a size that is far from all that may be chosen."""
    sizes, wanted = [flops.parameters(spec) for spec in stated], recipe.parameters
    if wanted and not any(SMALLER * wanted <= size <= LARGER * wanted for size in sizes):
        raise RecipeError(
            "parameters",
            found=units.count(wanted),
            expected=f"{units.count(sizes[0])} to {units.count(sizes[-1])}, with heads of {recipe.model.head_dim}",
            mend="Ask for such a size, or change model.head_dim.",
        )


def _require_room(
    recipe: PlanRecipe, tasks: Sequence[tuple[ModelSpec, Work]], every: Sequence[Candidate], cluster: Cluster
) -> None:
    """Refuse what fits in no layout: the size that is asked for, or else even the smallest."""
    wanted = recipe.parameters or flops.parameters(tasks[0][0])
    spec, work = min(tasks, key=lambda task: _distance(flops.parameters(task[0]), wanted))
    if any(recipe.parameters is None or one.spec == spec for one in every):
        return
    least = layouts.smallest(spec, cluster, work)
    if least is None:
        raise RecipeError(
            "devices",
            found=f"{cluster.count} for updates of {work.rows} rows, which suit the budget",
            expected="as many as can share so few evenly",
            mend="Lower devices, raise the budget, or ask for a larger model.",
        )
    devices = layouts.devices_for(spec, cluster, work)
    raise RecipeError(
        "parameters" if recipe.parameters else "hardware",
        found=f"a model of {units.count(flops.parameters(spec))} parameters, of which each of {cluster.count} devices "
        f"holds {units.si(least.bytes, 'B')} at the least ({least})",
        expected=f"at most {units.si(least.room, 'B')}, what {cluster.device.name} has",
        mend=f"Set devices={devices}." if devices else "Choose a smaller model, or devices with more memory.",
    )


def _distance(parameters: float, wanted: float) -> float:
    return abs(math.log(parameters / wanted))


def _wanted(recipe: PlanRecipe, candidates: Sequence[Candidate]) -> list[bool]:
    """Which candidates may be the final model: any full depth, or the one nearest to what was asked for."""
    finals = [one.full for one in candidates]
    if recipe.parameters is None:
        return finals
    distances = [_distance(one.parameters, recipe.parameters) for one in candidates]
    nearest = min(distance for distance, final in zip(distances, finals, strict=True) if final)
    return [final and distance == nearest for distance, final in zip(distances, finals, strict=True)]


def _offers(recipe: PlanRecipe, law: Law, candidates: Sequence[Candidate], prices: Prices) -> list[Offer]:
    """The plan, then what else the budget would buy: its size from scratch, and the best three others."""
    terms, usable = law.terms, prices.usable
    sizes = [prices.size(candidate) for candidate in candidates]
    # Beginning a stage is taken to cost a little more than it does, or there would be stages of no account.
    dear = [
        replace(size, ready=size.ready + LEAST_STAGE, after=size.after if wanted else math.inf)
        for size, wanted in zip(sizes, _wanted(recipe, candidates), strict=True)
    ]

    def relearned(before: int, after: int) -> float:
        one, other = candidates[before].spec, candidates[after].spec
        return recipe.relearned if one.hidden_size == other.hidden_size and recipe.relearned < 1 else math.inf

    def offer(name: str, found: Schedule) -> Offer:
        stages = tuple((candidates[stage.size], stage.tokens) for stage in found.stages)
        cost = sum((prices.of(*stage) for stage in stages), Cost())
        return Offer(name, found, stages, cost, _interval(law, sizes, found, relearned))

    # What is added when the rate has fallen hardly learns, and no law knows of that.
    found = schedule.cheapest(terms, dear, usable, relearned, last=1 - recipe.schedule.falls_from)
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
        offers, before = _offers(recipe, law, candidates, prices), len(timed)
        for offer in offers:
            timed |= _timings(recipe, offer, prices, row, timed)
        if len(timed) == before:
            return offers
        candidates = [timed.get(candidate.spec) or _as_fast(candidate, timed.values()) for candidate in candidates]


def _timings(
    recipe: PlanRecipe, offer: Offer, prices: Prices, row: Hardware, timed: Mapping[ModelSpec, Candidate]
) -> dict[ModelSpec, Candidate]:
    """The sizes of an offer that aren't timed yet, timed as its recipe would train them."""
    new = [candidate for candidate, _ in offer.stages if candidate.spec not in timed]
    if not new:
        return {}
    some = _recipe(recipe, offer, prices)
    step = some.rows * some.data.sequence_length
    here = planner.Machine(row, prices.rates)
    speeds = planner.speeds(some, here, [candidate.spec for candidate in new], offer.cost.seconds)
    return {
        candidate.spec: replace(candidate, seconds=speed.seconds_per_token(step), ready=speed.ready)
        for candidate, speed in zip(new, speeds, strict=True)
    }


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
        exclude={"hardware", "devices", "utilization", "links", "law", "furthest", "relearned", "parameters", "serving"}
    )
    update, length = best.stages[-1][0].arranged.update, recipe.data.sequence_length
    # Several devices are laid out for the rows of their update; on one they follow from what it was found to afford.
    rows = update.rows if recipe.devices > 1 else _batch_tokens(best.cost.flops, length, 1) // length
    train = kept["train"] | {
        "batch_tokens": rows * length,
        "per_device_train_batch_size": min(update.micro_rows, rows),
        "recompute": update.recompute,
    }
    if served := best.stages[-1][0].serving:
        paid = {key: kept["budget"][key] - getattr(served, key) for key in ("usd", "kwh") if kept["budget"][key]}
        kept["budget"] |= paid
    low, high = best.interval or (None, None)
    expected = {"loss": best.loss, "low": low, "high": high}
    return PretrainRecipe.model_validate(kept | {"stages": stages, "train": train, "expected": expected})


def _batch_tokens(training_flops: float, sequence_length: int, devices: int) -> int:
    """Tokens of an update that suit so many FLOPs: a power of two of rows, or such a multiple of the devices' odd part.

    So layouts with any number of data ranks that is a divisor of the devices share the rows evenly.
    """
    odd = devices // (devices & -devices)
    tokens = BATCH_FACTOR * training_flops**BATCH_EXPONENT
    return sequence_length * odd * 2 ** max(round(math.log2(tokens / (sequence_length * odd))), 0)
