"""Scaling: loss as a function of parameters N and tokens D, and what follows from it. Arithmetic only.

    loss = E + (A N^-alpha + B D^-beta)^gamma        nats a token

E is what is left at any size, A and B what too few parameters and too few tokens cost. Where gamma is 1 the two costs
add up; below 1 a larger size gains the more, the longer it is trained. Which of the values there are is a law's form.
`fit.py` finds them; laws/ holds published ones, and that of the default corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from espalier import files, recipe, units
from espalier.budget.observations import About, Observation, Positive
from espalier.errors import RecipeError
from espalier.method import method
from espalier.recipe import Recipe
from espalier.report import Report
from espalier.run import RESULTS, Run

Form = Literal["size", "size_and_data", "size_and_data_to_zero", "size_with_data"]
FORMS: dict[Form, tuple[str, ...]] = {
    "size": ("E", "A", "alpha"),  # mu-Scaling, written there a N^b + c: arXiv 2304.06875
    "size_and_data": ("E", "A", "alpha", "B", "beta"),  # Hoffmann et al.: arXiv 2203.15556
    "size_and_data_to_zero": ("A", "alpha", "B", "beta"),  # the densing law: arXiv 2412.04315
    "size_with_data": ("A", "alpha", "B", "gamma"),  # Kaplan et al.: arXiv 2001.08361, equation 1.5
}
SHIPPED = Path(__file__).with_name("laws")
# A prediction further outside the fitted range than this factor is refused unless more is asked for.
FURTHEST = 10.0
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Terms:
    """The values of a law, each a number or an array with one for each draw; a term that is left out is zero, an
    exponent 1.
    """

    E: Any = 0.0
    A: Any = 0.0
    alpha: Any = 1.0
    B: Any = 0.0
    beta: Any = 1.0
    gamma: Any = 1.0

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Nats a token."""
        return self.E + (self.A * parameters**-self.alpha + self.B * tokens**-self.beta) ** self.gamma

    def parameters_for(self, loss: Any, tokens: Any) -> Any:
        """How many parameters give a loss; infinite where none do."""
        return _size_of(self.A, self.alpha, self._costs(loss) - self.B * tokens**-self.beta)

    def tokens_for(self, loss: Any, parameters: Any) -> Any:
        """How many tokens give a loss; infinite where none do."""
        return _size_of(self.B, self.beta, self._costs(loss) - self.A * parameters**-self.alpha)

    def _costs(self, loss: Any) -> Any:
        """What too few parameters and tokens cost together, before gamma; 0 where the loss is below E."""
        return np.maximum(loss - self.E, 0.0) ** (1 / self.gamma)


def _size_of(factor: Any, exponent: Any, term: Any) -> Any:
    """x with factor · x^-exponent = term; infinite where the term isn't positive."""
    with np.errstate(divide="ignore", over="ignore"):  # a draw may be so steep or so flat that no number holds it
        return np.nan_to_num((factor / np.where(term > 0, term, np.nan)) ** (1 / exponent), nan=np.inf, posinf=np.inf)


class Span(Recipe):
    """From the lowest to the highest value that a law was fitted on."""

    low: Positive
    high: Positive

    @classmethod
    def of(cls, values: list[float]) -> Span:
        return cls(low=min(values), high=max(values))

    def reach(self, value: float) -> float:
        """By which factor a value lies outside; 1 inside."""
        return max(value / self.high, self.low / value, 1.0)


class Check(Recipe):
    """How well the same law, fitted without its largest model, predicts that model.

    error     of the prediction, relative, a mean where that model was trained several times
    baseline  the same for the loss of the largest model that was left, trained on the nearest number of tokens
    """

    parameters: float
    fitted_up_to: float
    error: float
    baseline: float


@dataclass(frozen=True)
class Prediction:
    """A loss, where 95% of such runs are expected (None without draws), and by which factor it is extrapolated."""

    loss: float
    interval: tuple[float, float] | None
    reach: float

    def __str__(self) -> str:
        between = f", 95% between {self.interval[0]:.4f} and {self.interval[1]:.4f}" if self.interval else ""
        where = "inside the fitted range" if self.reach == 1 else f"extrapolated by {self.reach:.3g}x"
        return f"loss {self.loss:.4f}{between} ({where})"


class Law(Recipe):
    """A law of loss with the range that it was fitted on, and how sure its values are.

    values        by the names of the form
    draws         values of as many bootstrap fits, in the form's order; empty for a law without data
    noise         standard deviation of the logarithm of a run's loss around the law
    observations  what it was fitted on
    """

    form: Form
    values: dict[str, float]
    parameters: Span
    tokens: Span
    losses: Span | None = None
    about: About
    noise: float = Field(default=0.0, ge=0)
    check: Check | None = None
    observations: tuple[Observation, ...] = ()
    draws: tuple[tuple[float, ...], ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        names = FORMS[self.form]
        if set(self.values) != set(names) or any(len(draw) != len(names) for draw in self.draws):
            raise ValueError(f"a law of form {self.form} has the values {', '.join(names)}")
        return self

    @classmethod
    def load(cls, name: str) -> Law:
        """A law by the path of its file, or a published one by its name."""
        path = next((path for path in (SHIPPED / f"{name}.yaml", Path(name)) if path.is_file()), None)
        if path is None:
            raise RecipeError(
                "law",
                found=repr(name),
                expected=f"a law's file, or one of {', '.join(sorted(path.stem for path in SHIPPED.glob('*.yaml')))}",
                mend="Fit one with `espalier budget fit`.",
            )
        return recipe.load(cls, path)

    def save(self, path: Path) -> None:
        files.write_json(path, self.model_dump(mode="json"))

    @property
    def terms(self) -> Terms:
        return Terms(**self.values)

    @property
    def drawn(self) -> Terms:
        """The values of all draws, as arrays."""
        return Terms(**dict(zip(FORMS[self.form], np.array(self.draws).T, strict=True)))

    def interval(self, name: str) -> tuple[float, float] | None:
        """Where a value lies with 95%; None without draws."""
        return _interval(getattr(self.drawn, name)) if self.draws else None

    def reach(self, parameters: float, tokens: float) -> float:
        """By which factor a run lies outside the fitted range; 1 inside."""
        return max(self.parameters.reach(parameters), self.tokens.reach(tokens))

    def predict(self, parameters: float, tokens: float | None = None, *, furthest: float = FURTHEST) -> Prediction:
        """The loss of a run. A law of size alone holds for runs as long as those it was fitted on.

        Raises `RecipeError` further than a factor `furthest` outside the fitted range.
        """
        tokens = self._tokens(tokens)
        reach = self.reach(parameters, tokens)
        self._require_near(reach, furthest)
        loss = float(self.terms.loss(parameters, tokens))
        return Prediction(loss, self._interval_of_loss(parameters, tokens), reach)

    def parameters_for(self, loss: float, tokens: float | None = None, *, furthest: float = FURTHEST) -> float:
        """The parameters with which training on `tokens` comes to a loss."""
        tokens = self._tokens(tokens)
        found = float(self.terms.parameters_for(loss, tokens))
        self._require_reachable(found, loss, float(self.terms.loss(np.inf, tokens)))
        self._require_near(self.reach(found, tokens), furthest)
        return found

    def tokens_for(self, loss: float, parameters: float, *, furthest: float = FURTHEST) -> float:
        """The tokens on which a model of so many parameters comes to a loss."""
        self.require_data_term()
        found = float(self.terms.tokens_for(loss, parameters))
        self._require_reachable(found, loss, float(self.terms.loss(parameters, np.inf)))
        self._require_near(self.reach(parameters, found), furthest)
        return found

    def optimal(
        self, flops: float, per_token: Callable[[float], float] = lambda parameters: 6 * parameters
    ) -> tuple[float, float]:
        """(parameters, tokens) of the lowest loss that `flops` of training can buy.

        `per_token` gives the FLOPs of training on a token, for a number of parameters; it must rise with them.
        """
        from scipy.optimize import minimize_scalar

        self.require_data_term()
        bought = lambda parameters: flops / per_token(parameters)  # noqa: E731
        least, most = np.log([1.0, flops])  # from one parameter to so many that no token can be afforded
        loss = lambda size: self.terms.loss(np.exp(size), bought(np.exp(size)))  # noqa: E731
        best = float(np.exp(minimize_scalar(loss, bounds=(least, most), method="bounded", options={"xatol": 1e-9}).x))
        return best, bought(best)

    def _interval_of_loss(self, parameters: float, tokens: float) -> tuple[float, float] | None:
        """The draws' losses, each with a run's own noise."""
        return self.spread(self.drawn.loss(parameters, tokens)) if self.draws else None

    def spread(self, losses: np.ndarray) -> tuple[float, float]:
        """Where 95% of runs end whose losses are these by each of the draws: a run's own noise is added."""
        freedom = len(self.observations) - len(self.values)
        noise = self.noise * np.random.default_rng(0).standard_t(freedom, len(self.draws))
        return _interval(losses * np.exp(noise))

    def _tokens(self, stated: float | None) -> float:
        if self.form != "size" and stated is None:
            raise RecipeError(
                "tokens", found="nothing", expected="a number: this law depends on it", mend="State tokens=..."
            )
        if self.form == "size" and stated is not None and self.tokens.reach(stated) > 1:
            raise RecipeError(
                "tokens",
                found=units.count(stated),
                expected=f"{_range(self.tokens)}, as in the runs that this law of size alone was fitted on",
                mend="Leave tokens out, or fit a law of form size_and_data.",
            )
        return self.tokens.high if stated is None else stated

    def require_data_term(self) -> None:
        """Refuse a law of size alone where tokens are asked for."""
        if self.form == "size":
            raise RecipeError(
                "law",
                found="a law of size alone",
                expected="one in which tokens count",
                mend="Fit a law of form size_and_data.",
            )

    def _require_near(self, reach: float, furthest: float) -> None:
        if reach > furthest:
            raise RecipeError(
                "parameters and tokens",
                found=f"a run {reach:.3g}x outside the fitted range",
                expected=f"at most {furthest:g}x outside {_range(self.parameters)} parameters "
                f"and {_range(self.tokens)} tokens",
                mend=f"Fit the law on larger runs, or ask for it all the same with furthest={np.ceil(reach):g}.",
            )

    def _require_reachable(self, found: float, loss: float, least: float) -> None:
        if found == np.inf:
            raise RecipeError(
                "loss",
                found=f"{loss:g}",
                expected=f"more than {least:.4f}, the lowest that this law knows there",
                mend="Ask for a higher loss, or give the run more of what is held fixed.",
            )


def _interval(values: Any) -> tuple[float, float]:
    low, high = np.quantile(values, INTERVAL)
    return float(low), float(high)


def _range(span: Span) -> str:
    if span.low == span.high:
        return units.count(span.low)
    return f"{units.count(span.low)} to {units.count(span.high)}"


class PredictRecipe(Recipe):
    """law: a file that `fit` wrote, or hoffmann-2022. What isn't stated of a run is found from the rest.

    parameters, tokens  the run's loss
    flops               the best parameters and tokens for so much training, at 6 FLOPs a parameter and token
    loss and tokens     the parameters that it takes; with parameters in the place of tokens, the tokens
    furthest            the factor by which a prediction may lie outside the fitted range
    """

    law: str
    parameters: Positive | None = None
    tokens: Positive | None = None
    flops: Positive | None = None
    loss: Positive | None = None
    furthest: float = Field(default=FURTHEST, ge=1)


@method(paper="arXiv 2203.15556", needs="a law", costs="nothing: arithmetic")
def predict(recipe: PredictRecipe, run: Run) -> Prediction:
    """Predict a run's loss by a law, or the size and tokens for a loss or a number of FLOPs."""
    law = Law.load(recipe.law)
    parameters, tokens = _completed(law, recipe)
    prediction = law.predict(parameters, tokens, furthest=recipe.furthest)
    report = Report(recipe.law, context={"about": law.about.model_dump(), "reach": prediction.reach})
    report.add("run", "parameters", parameters)
    if tokens is not None:
        report.add("run", "tokens", tokens)
    report.add("held-out", "loss", prediction.loss, note="nats a token, predicted")
    report.context["interval"] = prediction.interval
    report.save(run.folder / RESULTS)
    length = "" if tokens is None else f" on {units.count(tokens)} tokens"
    run.tell(f"{units.count(parameters)} parameters{length}, by {law.about.source}:")
    return prediction


def _completed(law: Law, recipe: PredictRecipe) -> tuple[float, float | None]:
    """The (parameters, tokens) that a recipe asks about."""
    match (recipe.parameters, recipe.tokens, recipe.flops, recipe.loss):
        case (float() as parameters, tokens, None, None):
            return parameters, tokens
        case (None, None, float() as flops, None):
            return law.optimal(flops)
        case (None, tokens, None, float() as loss):
            return law.parameters_for(loss, tokens, furthest=recipe.furthest), tokens
        case (float() as parameters, None, None, float() as loss):
            return parameters, law.tokens_for(loss, parameters, furthest=recipe.furthest)
    raise RecipeError(
        "parameters, tokens, flops, loss",
        found=", ".join(key for key in ("parameters", "tokens", "flops", "loss") if getattr(recipe, key)) or "none",
        expected="parameters and tokens; flops alone; or a loss with one of parameters and tokens",
        mend="State what is known and leave out what is asked.",
    )
