"""Life-cycle: which size to train when months of serving are to be paid for too.

Method: Sardana et al., arXiv 2401.00448. The paper counts FLOPs, or dollars at a utilization of each phase; here
serving is priced by the roofline, so that decoding pays for the bytes that it moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from espalier import files, units
from espalier.budget import flops, hardware, lifecycle_page, price
from espalier.budget.hardware import USUAL_MFU, Hardware
from espalier.budget.observations import Positive
from espalier.budget.scaling import FURTHEST, Law, Prediction
from espalier.budget.serving import ServingRecipe, served
from espalier.budget.sizes import HEADS, depth_of
from espalier.budget.ways import Candidate, Resource, Way, Ways, lowest_loss, ways_to
from espalier.errors import BudgetError, RecipeError, ResourceError
from espalier.ledger import RESOURCES, Cost
from espalier.method import method
from espalier.recipe import Recipe, dump
from espalier.report import Report
from espalier.run import PAGE, RESULTS, Run
from espalier.spec import ModelSpec


class LifecycleRecipe(Recipe):
    """What the model has to be, what trains it, and what it then answers; one of loss and budget is stated.

    loss             that is wanted, in nats a token, or
    budget           that pays for training and serving; the lowest loss that it buys is then wanted
    resource         what the budget is stated in, and as little as possible of which is to be spent
    serving          the traffic, and the devices that answer it
    law              a law's file, or a published one's name
    furthest         by which factor the range of the law may be left
    hardware         a key of the catalogue, a generic GPU if not stated, or "here"; `devices` of it train
    utilization      the share of the matmul peak that training reaches
    vocab_size       of every size; 32,000, as in the published law
    head_dim         channels of a head, of which each width is a multiple; 128, as in most published models
    sequence_length  tokens of a row in training
    """

    loss: Positive | None = None
    budget: Positive | None = None
    resource: Resource = "usd"
    serving: ServingRecipe
    law: str = "hoffmann-2022"
    furthest: float = Field(default=FURTHEST, ge=1)
    hardware: str = "gpu"
    devices: int = Field(default=1, ge=1)
    utilization: float = Field(default=USUAL_MFU, gt=0, le=1)
    vocab_size: int = Field(default=32_000, gt=0)
    head_dim: int = Field(default=128, gt=0)
    sequence_length: int = Field(default=2048, gt=0)

    @model_validator(mode="after")
    def _one_aim(self) -> Self:
        if (self.loss is None) == (self.budget is None):
            raise ValueError("state one of loss=NATS and budget=AMOUNT")
        return self


@method(paper="arXiv 2401.00448", needs="a law of the loss, and the traffic to expect", costs="nothing: arithmetic")
def lifecycle(recipe: LifecycleRecipe, run: Run) -> Path:
    """Choose the size for which training and months of serving together cost the least."""
    law = Law.load(recipe.law)
    law.require_data_term()
    candidates = _candidates(recipe)
    ways = _ways(recipe, law, candidates)
    expected = law.predict(ways.chosen.candidate.parameters, ways.chosen.tokens, furthest=recipe.furthest)
    reasons = [*_reasons(recipe, ways, expected), *_limits(recipe, candidates)]
    run.tell("\n".join(reasons))
    same = _losses_on_the_same(law, ways)
    lifecycle_page.tell(ways, same)
    _report(run.name, recipe, ways, same).save(run.folder / RESULTS)
    page = lifecycle_page.render(run.name, ways, same, reasons, devices=recipe.devices, recipe=dump(recipe))
    files.write_text(run.folder / PAGE, page)
    return run.folder / PAGE


def _candidates(recipe: LifecycleRecipe) -> list[Candidate]:
    """The sizes that the serving devices hold, the smallest first."""
    trains, serves = (
        hardware.named(key, home=files.home()).part(1) for key in (recipe.hardware, recipe.serving.hardware)
    )
    _require_used(recipe.resource, trains)
    candidates: list[Candidate] = []
    for spec in _specs(recipe):
        try:
            candidates.append(Candidate(spec, _token(spec, recipe, trains), served(spec, recipe.serving, serves)))
        except ResourceError:  # nor do they hold any that comes after
            if not candidates:
                raise
            break
    return candidates


def _specs(recipe: LifecycleRecipe) -> Iterator[ModelSpec]:
    sizes = recipe.model_dump(include={"vocab_size", "head_dim"})
    for hidden in (heads * recipe.head_dim for heads in HEADS):
        shape = {"hidden_size": hidden, "num_hidden_layers": depth_of(hidden)}
        yield ModelSpec.stated(sizes | shape, where="head_dim")


def _token(spec: ModelSpec, recipe: LifecycleRecipe, trains: Hardware) -> Cost:
    """Training on one: `seconds` are device-seconds, however many devices share them."""
    each = flops.training_flops(spec, recipe.sequence_length)
    speed = trains.peak_flops[hardware.compute_dtype(trains)] * recipe.utilization
    return price.rates(trains).cost(each / speed, flops=each, tokens=1.0)


def _require_used(resource: Resource, trains: Hardware) -> None:
    """Refuse to count what training takes none of."""
    if not getattr(price.rates(trains).cost(1.0, flops=1.0), resource):
        raise RecipeError(
            "resource",
            found=f"{resource}, of which {trains.name} takes none",
            expected="one that training uses up",
            mend=f"Choose another, or state what {trains.name} takes in {files.home() / hardware.OWN}.",
        )


def _ways(recipe: LifecycleRecipe, law: Law, candidates: Sequence[Candidate]) -> Ways:
    """The ways to the loss that is wanted, or to the lowest that the budget buys."""
    loss = recipe.loss
    if loss is None:
        assert recipe.budget is not None, "a recipe states one of the two"
        loss = lowest_loss(law.terms, candidates, recipe.budget, recipe.resource)
        if loss is None:
            least = getattr(candidates[0].served.cost, recipe.resource)
            raise BudgetError(
                "budget",
                found=units.amount(recipe.budget, recipe.resource),
                expected=f"more than the {units.amount(least, recipe.resource)} that serving the smallest size takes",
                mend="Raise it, or serve fewer queries, or choose other serving.hardware.",
            )
    ways = ways_to(law.terms, candidates, loss)
    if not ways:
        lowest = min(float(law.terms.loss(candidate.parameters, float("inf"))) for candidate in candidates)
        raise RecipeError(
            "loss",
            found=f"{loss:g}",
            expected=f"more than {lowest:.4f}, to which the largest size comes that the serving devices hold",
            mend="Ask for a higher loss, or serve on more or larger devices.",
        )
    return Ways(loss, recipe.resource, ways)


def _losses_on_the_same(law: Law, ways: Ways) -> list[float | None]:
    """What each size comes to on what the chosen one costs in all; None where serving it takes all of that."""
    budget = ways.of(ways.chosen.cost)
    return [way.candidate.loss_on(law.terms, budget, ways.resource) for way in ways.all]


def _reasons(recipe: LifecycleRecipe, ways: Ways, expected: Prediction) -> Iterator[str]:
    """What was chosen and why, a sentence a line."""
    chosen, alone = ways.chosen, ways.alone
    traffic = recipe.serving
    yield (
        f"{units.count(traffic.queries_per_day)} queries a day for {traffic.months:g} months, each of "
        f"{traffic.prompt_tokens:,} tokens read and {traffic.output_tokens:,} written, on {traffic.hardware}: "
        f"{units.count(traffic.queries)} queries."
    )
    yield f"By the law {recipe.law}: {expected}."
    yield f"The cheapest way there is {_told(ways, chosen)}."
    if chosen is alone:
        yield "Without serving the same size would be chosen."
    else:
        yield f"Without serving the cheapest would be {_told(ways, alone)}."
        saved, share = units.amount(ways.saved, ways.resource), ways.saved / ways.of(alone.cost)
        yield f"So the choice saves {saved}, {share:.1%}."
    if ways.rival and (queries := ways.break_even(traffic.days)):
        yield (
            f"{ways.rival.candidate.shape} costs less than {alone.candidate.shape} from {units.count(queries)} queries "
            "a day on, by the device-seconds that they use."
        )


def _told(ways: Ways, way: Way) -> str:
    """A way in words."""
    training, serving, total = (
        units.amount(ways.of(cost), ways.resource) for cost in (way.training, way.serving, way.cost)
    )
    return (
        f"{way.candidate.shape} ({units.count(way.candidate.parameters)} parameters) on {units.count(way.tokens)} "
        f"tokens: {training} of training and {serving} of serving, {total} in all"
    )


def _limits(recipe: LifecycleRecipe, candidates: Sequence[Candidate]) -> Iterator[str]:
    """What the figures rest on."""
    charged = {
        "used": "Serving is charged by the device-seconds that it uses",
        "whole": "Serving is charged by whole devices all the time, at their rated power",
    }[recipe.serving.charged]
    yield f"{charged}; the traffic is a mean, and its peaks need more devices or wait. All costs are estimates."
    yield "Whether the training devices hold a size isn't looked at."
    if len(candidates) < len(HEADS):
        yield (
            f"Sizes beyond {units.count(candidates[-1].parameters)} parameters are left out, since "
            f"{recipe.serving.devices} × {recipe.serving.hardware} don't hold them (serving.devices)."
        )


def _report(name: str, recipe: LifecycleRecipe, ways: Ways, same: Sequence[float | None]) -> Report:
    """Every way by every resource, to be computed with."""
    report = Report(
        name,
        context={
            "loss": ways.loss,
            "resource": ways.resource,
            "chosen": ways.chosen.candidate.shape,
            "without_serving": ways.alone.candidate.shape,
            "saved": ways.saved,
            "break_even_queries_per_day": ways.break_even(recipe.serving.days),
        },
    )
    for way, loss in zip(ways.all, same, strict=True):
        at = way.candidate.shape
        report.add(at, "parameters", way.candidate.parameters)
        report.add(at, "devices busy", way.candidate.served.busy, note="serving, on average")
        for phase, cost in (("training", way.training), ("serving", way.serving), ("total", way.cost)):
            for resource in RESOURCES:
                report.add(at, f"{phase} {resource}", getattr(cost, resource), note="estimated")
        if loss is not None:
            report.add(at, "loss on the chosen size's total", loss, note="nats a token, by the law")
    return report
