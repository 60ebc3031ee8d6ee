"""Density: how large a model of a reference family would have to be to do as well, over how large this one is.

The densing law, arXiv 2412.04315. Two curves are fitted on reference models: loss from parameters and tokens, and
score from loss. Inverted they give the reference's parameters for a score, or for a loss, at a stated number of tokens.
A density says nothing without the reference, the benchmark and that number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from espalier import units
from espalier.budget.fit import LAW, fit
from espalier.budget.observations import About, Observation, Positive, read_table
from espalier.budget.scaling import FURTHEST, INTERVAL, Form, Law
from espalier.errors import DataError, RecipeError
from espalier.method import method
from espalier.recipe import Recipe
from espalier.report import Report
from espalier.run import RESULTS, Run

Share = Annotated[float, Field(ge=0, le=1)]
Place = Literal["inside", "above", "below"]
# Where the search for the score curve begins: its steepness times the span of the losses.
STEEPNESS = (2.0, 5.0, 10.0, 20.0)


class Reference(Observation):
    """A model of the reference family; no score where it does no better than chance."""

    score: Share | None = None


@dataclass(frozen=True)
class ScoreCurve:
    """score = floor + height / (1 + exp(steepness · (loss - middle))): it falls as the loss rises.

    The paper's S(L) = c / (1 + exp(-gamma (L - l))) + d, with c the height, -gamma the steepness, l the middle and
    d the floor, about what chance gives.
    """

    height: float
    steepness: float
    middle: float
    floor: float

    def score(self, loss: Any) -> Any:
        return self.floor + self.height / (1 + np.exp(self.steepness * (loss - self.middle)))

    def loss(self, score: float) -> float:
        """The loss with a score; infinite at the floor and below, minus infinity at the ceiling and above."""
        share = (score - self.floor) / self.height
        if not 0 < share < 1:
            return math.inf if share <= 0 else -math.inf
        return self.middle + math.log(1 / share - 1) / self.steepness

    @classmethod
    def fitted(cls, losses: np.ndarray, scores: np.ndarray, starts: Sequence[ScoreCurve] = ()) -> ScoreCurve:
        """The curve of least squared error, with scores between 0 and 1; from many starts unless some are given."""
        from scipy.optimize import least_squares

        def error(guess: np.ndarray) -> np.ndarray:
            return cls(*guess).score(losses) - scores

        span, least = float(np.ptp(losses)), min(float(scores.min()), 0.98)
        height = max(float(np.ptp(scores)), 0.01)
        from_here = starts or [
            cls(height, steep / span, middle, least)
            for steep in STEEPNESS
            for middle in np.quantile(losses, (0.2, 0.5))
        ]
        bounds = ([1e-3, 1e-3 / span, losses.min() - span, 0.0], [1.0, 100 / span, losses.max() + span, 1.0])
        found = [
            least_squares(error, np.clip(list(asdict(start).values()), *bounds), bounds=bounds, x_scale="jac")
            for start in from_here
        ]
        return cls(*map(float, min(found, key=lambda result: result.cost).x))


@dataclass(frozen=True)
class Density:
    """A density, or on which side of the reference's range it lies.

    place      "inside", or "above" or "below" what the reference can tell
    value      the density inside; outside the bound that it is above or below
    low, high  95% interval inside the range; None where that side can't be told
    reach      by which factor the reference is extrapolated to that size; 1 among its models
    """

    place: Place
    value: float
    low: float | None = None
    high: float | None = None
    reach: float = 1.0

    def __str__(self) -> str:
        if self.place != "inside":
            return f"{self.place} range: density {'>' if self.place == 'above' else '<'} {self.value:.3g}"
        ends = [f"{end:.3g}" if end is not None else "out of range" for end in (self.low, self.high)]
        extrapolated = f" (the reference extrapolated by {self.reach:.3g}x)" if self.reach > 1 else ""
        return f"density {self.value:.3g}, 95% from {ends[0]} to {ends[1]}{extrapolated}"


def density(size: float, drawn: np.ndarray, law: Law, parameters: float, furthest: float = FURTHEST) -> Density:
    """From the reference's size for a model, as fitted and by draws, to the density.

    A size further than a factor `furthest` outside the reference's is only known to lie outside.
    """
    least, most = law.parameters.low / furthest, law.parameters.high * furthest
    if size > most:
        return Density("above", most / parameters, reach=furthest)
    if size < least:
        return Density("below", least / parameters, reach=furthest)
    # Sizes may be infinite, which can't be averaged: quantiles are members.
    low, high = map(float, np.quantile(drawn, INTERVAL, method="nearest"))
    return Density(
        "inside",
        size / parameters,
        low / parameters if low >= least else None,
        high / parameters if high <= most else None,
        law.parameters.reach(size),
    )


class DensityRecipe(Recipe):
    """The model by its parameters and either its score or its loss, and what it is measured by.

    reference         CSV or JSONL: parameters, tokens, loss, and score where it is above chance; loss is of the
                      benchmark's answers, given the questions
    reference_tokens  that the reference model of the same score is trained on
    counted           which of the model's parameters are counted; the active ones of a mixture of experts are fewer
    items             of the benchmark; a score's own error comes from their number
    tokenizer         of the reference, in words; a loss can only be compared under the same one
    furthest          by which factor the reference's size may lie outside its range
    """

    reference: Path
    benchmark: str
    parameters: Positive
    reference_tokens: Positive
    counted: Literal["total", "active", "nonzero"] = "total"
    score: Share | None = None
    items: int | None = Field(default=None, ge=1)
    loss: Positive | None = None
    tokenizer: str = ""
    form: Form = "size_and_data_to_zero"
    furthest: float = Field(default=FURTHEST, ge=1)
    draws: int = Field(default=200, ge=40)
    seed: int = 0

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if (self.score is None) == (self.loss is None):
            raise ValueError("state one of score=... and loss=...")
        if self.form == "size":
            raise ValueError("form size knows nothing of reference_tokens; take one with data")
        return self


@method(paper="arXiv 2412.04315", needs="a reference ladder with scores", costs="seconds")
def evaluate_density(recipe: DensityRecipe, run: Run) -> Report:
    """Say how large a reference model would have to be to do as well, over the model's own size."""
    references = read_table(recipe.reference, Reference)
    about = About(data=recipe.benchmark, tokenizer=recipe.tokenizer, source=str(recipe.reference))
    law = fit(references, recipe.form, about=about, draws=recipe.draws, seed=recipe.seed)
    _require_known_tokens(recipe, law)
    curve, losses = _losses(references, recipe)
    fitted = float(law.terms.parameters_for(losses[0], recipe.reference_tokens))
    drawn = law.drawn.parameters_for(losses[1:], recipe.reference_tokens)
    found = density(fitted, drawn, law, recipe.parameters, recipe.furthest)
    report = _report(recipe, law, curve, found)
    report.save(run.folder / RESULTS)
    law.save(run.folder / LAW)
    run.tell(
        f"{found}\nrelative to {recipe.reference} on {recipe.benchmark}, trained on "
        f"{units.count(recipe.reference_tokens)} tokens; {recipe.counted} parameters counted"
    )
    return report


def _losses(references: Sequence[Reference], recipe: DensityRecipe) -> tuple[ScoreCurve | None, np.ndarray]:
    """The model's loss, as stated or as a score curve gives it, and one for each draw of the law.

    A draw of the latter has the curve of redrawn residuals, and the score of as many redrawn items.
    """
    if recipe.score is None:
        return None, np.full(1 + recipe.draws, recipe.loss)
    scored = [(one.loss, one.score) for one in references if one.score is not None]
    _require_scores(scored, recipe)
    losses, scores = np.array(scored).T
    curve = ScoreCurve.fitted(losses, scores)
    freedom = len(scores) - 4
    random = np.random.default_rng(recipe.seed)
    residuals = scores - curve.score(losses)
    found = [curve.loss(recipe.score)]
    for _ in range(recipe.draws):
        scale = math.sqrt(len(scores) / random.chisquare(freedom))
        redrawn = curve.score(losses) + scale * random.choice(residuals, len(scores))
        score = random.binomial(recipe.items, recipe.score) / recipe.items if recipe.items else recipe.score
        found.append(ScoreCurve.fitted(losses, redrawn, [curve]).loss(score))
    return curve, np.array(found)


def _require_scores(scored: Sequence[tuple[float, float | None]], recipe: DensityRecipe) -> None:
    if len(scored) < 5 or len({loss for loss, _ in scored}) < 5:
        raise DataError(
            f"{recipe.reference}: score",
            found=f"{len(scored)} rows with one",
            expected="five at least, of different losses: the curve has four values",
            mend="Add reference models above chance, or give the model's loss in the place of its score.",
        )


def _require_known_tokens(recipe: DensityRecipe, law: Law) -> None:
    if law.tokens.reach(recipe.reference_tokens) > recipe.furthest:
        raise RecipeError(
            "reference_tokens",
            found=units.count(recipe.reference_tokens),
            expected=f"at most {recipe.furthest:g}x outside {units.count(law.tokens.low)} to "
            f"{units.count(law.tokens.high)}, which the reference was trained on",
            mend="Choose a number nearer to the reference's, or raise furthest.",
        )


def _report(recipe: DensityRecipe, law: Law, curve: ScoreCurve | None, found: Density) -> Report:
    context = {
        "reference": str(recipe.reference),
        "benchmark": recipe.benchmark,
        "reference_tokens": recipe.reference_tokens,
        "reference_range": {"parameters": law.parameters.model_dump(), "tokens": law.tokens.model_dump()},
        "tokenizer": recipe.tokenizer,
        "counted": recipe.counted,
        "parameters": recipe.parameters,
        "law": {"form": law.form, **law.values},
        "score_curve": curve and asdict(curve),
        "density": asdict(found),
    }
    report = Report(f"{units.count(recipe.parameters)} {recipe.counted} parameters", context=context)
    side = {"inside": "", "above": "a lower bound", "below": "an upper bound"}[found.place]
    report.add(recipe.benchmark, "density", found.value, note=side)
    report.add(recipe.benchmark, "reference parameters", found.value * recipe.parameters, note=side)
    return report
