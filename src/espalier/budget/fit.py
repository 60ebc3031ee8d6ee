"""Fit: the values of a loss law from training runs, how sure they are, and how well it predicts its largest model.

As in Hoffmann et al. (arXiv 2203.15556, appendix D.3) the error of log loss is minimised from many starts, over log E,
log A and log B, which keeps these positive; we take squares in the place of Huber's function.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from espalier import page, units
from espalier.budget.observations import About, Observation, read_runs, read_table
from espalier.budget.scaling import FORMS, Check, Form, Law, Span, Terms
from espalier.errors import DataError
from espalier.method import method
from espalier.page import Figure, LawLine, LawPoint, View
from espalier.recipe import Recipe, dump
from espalier.run import PAGE, Run

LAW = "law.json"
Resample = Literal["residuals", "points"]
Size = tuple[float, float]  # parameters and tokens of a run
# Which term an exponent belongs to.
TERM_OF = {"alpha": "A", "beta": "B"}
# The power of both terms together, and what falls by each exponent.
GAMMA = "gamma"
COLUMN_OF = {"alpha": "parameters", "beta": "tokens", GAMMA: "tokens"}
# Where the search begins: shares of E in the lowest loss, and exponents.
FLOORS, EXPONENTS = (0.3, 0.8), (0.1, 0.3, 0.8)
# Steeper laws aren't found in nature; where a search ends beyond, the points don't say where it bends.
STEEPEST = 10.0
# How a law is drawn: so many points, to so many times the largest model.
LINE_POINTS, BEYOND = 40, 4.0


@dataclass(frozen=True)
class _Problem:
    """Find v such that gamma · logsumexp over terms of (design · v + offset) is the log loss: T terms, O observations,
    V values.

    v holds log E, the logarithms of the other terms at the centre of the observations, and the exponents, in the order
    of `names`; so the logarithm of every term is linear in v. `centre` is the mean of log N and of log D, the offset
    what a term has whose exponent is 1. Gamma is 1 where it isn't among the names.
    """

    names: tuple[str, ...]
    centre: dict[str, float]
    design_TOV: np.ndarray
    offset_TO: np.ndarray
    log_loss_O: np.ndarray

    @classmethod
    def of(cls, observations: Sequence[Observation], form: Form) -> Self:
        names, n = FORMS[form], len(observations)
        logs = {
            exponent: np.log([getattr(one, column) for one in observations])
            for exponent, column in (("alpha", "parameters"), ("beta", "tokens"))
        }
        centre = {exponent: float(values.mean()) for exponent, values in logs.items()}
        levels = [name for name in names if name not in (*logs, GAMMA)]
        design_TOV, offset_TO = np.zeros((len(levels), n, len(names))), np.zeros((len(levels), n))
        for value, name in enumerate(names):
            if name in levels:
                design_TOV[levels.index(name), :, value] = 1.0
        for exponent, term in TERM_OF.items():
            falls = centre[exponent] - logs[exponent]
            if exponent in names:
                design_TOV[levels.index(term), :, names.index(exponent)] = falls
            elif term in levels:
                offset_TO[levels.index(term)] = falls
        return cls(names, centre, design_TOV, offset_TO, np.log([one.loss for one in observations]))

    def starts(self) -> set[tuple[float, ...]]:
        least, mean = np.exp(self.log_loss_O.min()), np.exp(self.log_loss_O.mean())
        starts = set()
        for share, alpha, beta in itertools.product(FLOORS, EXPONENTS, EXPONENTS):
            level = math.log((mean - share * least) / 2)
            guess = {"E": math.log(share * least), "A": level, "alpha": alpha, "B": level, "beta": beta}
            if GAMMA in self.names:  # what is under the power is as much steeper, and there is no floor
                level = self.log_loss_O.mean() / beta - math.log(2)
                guess |= {"A": level, "alpha": alpha / beta, "B": level, GAMMA: beta}
            starts.add(tuple(guess[name] for name in self.names))
        return starts

    def search(self, starts: Iterable[Sequence[float]]) -> Any:
        """The best of the searches from all starts, as scipy returns it."""
        from scipy.optimize import least_squares

        searches = (
            least_squares(self._error_O, np.array(start), self._slopes_OV, method="lm", xtol=1e-12, ftol=1e-12)
            for start in starts
        )
        return min(searches, key=lambda result: result.cost)

    def expected_O(self, guess_V: np.ndarray) -> np.ndarray:
        """Log loss by a guess."""
        return self._gamma(guess_V) * np.logaddexp.reduce(self._terms_TO(guess_V))

    def values(self, guess_V: np.ndarray) -> dict[str, float]:
        """A guess by the names of the law, at N and D as they are."""
        by_name = dict(zip(self.names, map(float, guess_V), strict=True))
        slopes = {term: by_name.get(exponent, 1.0) * self.centre[exponent] for exponent, term in TERM_OF.items()}
        return {
            name: value if name in COLUMN_OF else math.exp(value + slopes.get(name, 0.0))
            for name, value in by_name.items()
        }

    def exponents(self, guess_V: np.ndarray) -> dict[str, float]:
        return {name: float(value) for name, value in zip(self.names, guess_V, strict=True) if name in COLUMN_OF}

    def _gamma(self, guess_V: np.ndarray) -> float:
        return guess_V[self.names.index(GAMMA)] if GAMMA in self.names else 1.0

    def _terms_TO(self, guess_V: np.ndarray) -> np.ndarray:
        return self.design_TOV @ guess_V + self.offset_TO

    def _error_O(self, guess_V: np.ndarray) -> np.ndarray:
        return self.expected_O(guess_V) - self.log_loss_O

    def _slopes_OV(self, guess_V: np.ndarray) -> np.ndarray:
        """A term counts by its share of the loss."""
        terms_TO = self._terms_TO(guess_V)
        sum_O = np.logaddexp.reduce(terms_TO)
        slopes_OV = self._gamma(guess_V) * np.einsum("to,tov->ov", np.exp(terms_TO - sum_O), self.design_TOV)
        if GAMMA in self.names:
            slopes_OV[:, self.names.index(GAMMA)] = sum_O
        return slopes_OV


def fit(
    observations: Sequence[Observation],
    form: Form,
    *,
    about: About,
    resample: Resample = "residuals",
    draws: int = 400,
    seed: int = 0,
) -> Law:
    """The law of a form that fits best, with `draws` bootstrap fits around it.

    resample  "residuals" keeps each run's N and D and redraws how far it lies from the law, scaled up for the values
              that were fitted; "points" redraws the runs themselves
    Raises `DataError` when the runs can't tell the values, or the loss doesn't fall.
    """
    sizes = _sizes(observations)
    require_told(sizes, form)
    problem = _Problem.of(observations, form)
    best = problem.search(problem.starts())
    _require_falling(problem.exponents(best.x))
    random = np.random.default_rng(seed)
    return Law(
        form=form,
        values=problem.values(best.x),
        parameters=Span.of([one.parameters for one in observations]),
        tokens=Span.of([one.tokens for one in observations]),
        losses=Span.of([one.loss for one in observations]),
        about=about,
        noise=math.sqrt(2 * best.cost / (len(observations) - len(problem.names))),
        check=_checked(observations, form),
        observations=tuple(observations),
        draws=tuple(_draw(sizes, form, problem, best, resample, random) for _ in range(draws)),
    )


def _draw(
    sizes: Sequence[Size], form: Form, problem: _Problem, best: Any, resample: Resample, random: np.random.Generator
) -> tuple[float, ...]:
    """The values of one bootstrap fit; a sample that doesn't tell them is drawn again."""
    n, freedom = len(sizes), len(sizes) - len(problem.names)
    while True:
        chosen = random.integers(n, size=n)
        if resample == "residuals":
            # How large the noise is was estimated too: few runs leave it open, as in Student's t.
            scale = math.sqrt(n / random.chisquare(freedom))
            sample = replace(problem, log_loss_O=problem.expected_O(best.x) + scale * best.fun[chosen])
        elif _untold([sizes[at] for at in chosen], form):
            continue
        else:
            sample = replace(
                problem,
                design_TOV=problem.design_TOV[:, chosen],
                offset_TO=problem.offset_TO[:, chosen],
                log_loss_O=problem.log_loss_O[chosen],
            )
        found = sample.search([best.x])
        if max(map(abs, sample.exponents(found.x).values())) < STEEPEST:
            return tuple(sample.values(found.x).values())


def _sizes(observations: Sequence[Observation]) -> list[Size]:
    return [(one.parameters, one.tokens) for one in observations]


def _untold(sizes: Sequence[Size], form: Form) -> str | None:
    """Why runs of these sizes can't tell the values of a form; None where they can."""
    names = FORMS[form]
    if len(sizes) <= len(names):
        return f"{len(sizes)} runs for {len(names)} values"
    least = 3 if "E" in names else 2  # a power over a floor has three values, without it two
    parameters, tokens = (set(values) for values in zip(*sizes, strict=True))
    for exponent, column, values in (("alpha", "parameters", parameters), ("beta", "tokens", tokens)):
        if TERM_OF[exponent] in names and len(values) < least:
            return f"{len(values)} different numbers of {column} where {least} are needed"
    if "B" not in names and len(set(sizes)) > len(parameters):
        return "runs of one size on different numbers of tokens, which the form doesn't know"
    if "B" in names and abs(np.corrcoef(np.log(sizes).T)[0, 1]) > 0.999:
        return "tokens that follow from the parameters"
    return None


def require_told(sizes: Sequence[Size], form: Form) -> None:
    """Refuse runs of such sizes, trained or only planned, that can't tell the values of a form."""
    if why := _untold(sizes, form):
        raise DataError(
            f"points for a law of form {form}",
            found=why,
            expected="more runs than values, of sizes (and lengths, where they count) that differ",
            mend="Add runs, or fit a form with fewer values: size takes three sizes and one length.",
        )


def _require_falling(exponents: dict[str, float]) -> None:
    for name, value in exponents.items():
        if not _falls(value):
            raise DataError(
                f"points: {COLUMN_OF[name]}",
                found=f"{name} = {value:.3g}: the loss doesn't fall with them as a law does",
                expected=f"an exponent between 0 and {STEEPEST:g}",
                mend="Check the losses, and that each size has a rate that suits it; add runs that differ more.",
            )


def _falls(exponent: float) -> bool:
    return 0 < exponent < STEEPEST


def _checked(observations: Sequence[Observation], form: Form) -> Check | None:
    """How well the runs of all smaller models predict the largest; None where these can't tell a law."""
    largest = max(one.parameters for one in observations)
    rest = [one for one in observations if one.parameters < largest]
    if _untold(_sizes(rest), form):
        return None
    problem = _Problem.of(rest, form)
    found = problem.search(problem.starts()).x
    if not all(map(_falls, problem.exponents(found).values())):
        return None
    terms = Terms(**problem.values(found))
    next_largest = max(one.parameters for one in rest)
    measured, before = (_by_tokens(observations, size) for size in (largest, next_largest))
    predicted = {tokens: terms.loss(largest, tokens) for tokens in measured}
    nearest = {tokens: before[min(before, key=lambda other: abs(math.log(other / tokens)))] for tokens in measured}
    return Check(
        parameters=largest,
        fitted_up_to=next_largest,
        error=_mean_error(predicted, measured),
        baseline=_mean_error(nearest, measured),
    )


def _by_tokens(observations: Sequence[Observation], parameters: float) -> dict[float, float]:
    """The mean loss of the runs of one size, by their tokens."""
    runs = _grouped([one for one in observations if one.parameters == parameters], lambda one: one.tokens)
    return {tokens: float(np.mean([one.loss for one in same])) for tokens, same in runs.items()}


def _mean_error(expected: dict[float, float], measured: dict[float, float]) -> float:
    return float(np.mean([abs(expected[tokens] / loss - 1) for tokens, loss in measured.items()]))


class FitRecipe(Recipe):
    """Either a table of runs (CSV or JSONL: parameters, tokens, loss) or a folder of run folders.

    data, tokenizer  of a table's losses, in words; run folders say it themselves
    resample         what the bootstrap redraws
    """

    points: Path | None = None
    runs: Path | None = None
    data: str = ""
    tokenizer: str = ""
    form: Form = "size_and_data"
    resample: Resample = "residuals"
    draws: int = Field(default=400, ge=40)
    seed: int = 0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.points is None) == (self.runs is None):
            raise ValueError("state one of points=FILE and runs=FOLDER")
        return self

    def observations(self) -> tuple[list[Observation], About]:
        if self.runs is not None:
            return read_runs(self.runs)
        assert self.points is not None
        about = About(data=self.data, tokenizer=self.tokenizer, source=str(self.points))
        return read_table(self.points, Observation), about


@method(paper="arXiv 2203.15556", needs="runs of several sizes", costs="seconds")
def budget_fit(recipe: FitRecipe, run: Run) -> Path:
    """Fit a loss law on training runs, with intervals, and check it on the largest model."""
    observations, about = recipe.observations()
    law = fit(observations, recipe.form, about=about, resample=recipe.resample, draws=recipe.draws, seed=recipe.seed)
    law.save(run.folder / LAW)
    tell(law, run)
    page.save(view(law, run, recipe), run.folder / PAGE)
    return run.folder / LAW


def tell(law: Law, run: Run) -> None:
    """A law's values with their intervals, and its check, on the terminal."""
    for name, value in law.values.items():
        run.tell(f"{name:>5}  {value:<10.4g}{_between(law, name)}")
    run.tell(f"fitted on {len(law.observations)} runs; a run lies {law.noise:.2%} from the law (standard deviation)")
    for line in _notes(law):
        run.tell(line)


def _between(law: Law, name: str) -> str:
    interval = law.interval(name)
    return f"  95% between {interval[0]:.4g} and {interval[1]:.4g}" if interval else ""


def _notes(law: Law) -> list[str]:
    if law.check is None:
        return ["No check on the largest model: without it there are too few runs."]
    check = law.check
    return [
        f"Fitted up to {units.count(check.fitted_up_to)} parameters, it predicts the loss at "
        f"{units.count(check.parameters)} within {check.error:.2%}; "
        f"the loss of the largest fitted model is {check.baseline:.2%} off."
    ]


def view(law: Law, run: Run, recipe: Recipe) -> View:
    """A law as a page: measured losses, and the line through them with its interval."""
    headline = [Figure(name, f"{value:.4g}", _between(law, name).strip()) for name, value in law.values.items()]
    return View(
        title=run.name,
        subtitle=f"loss law of form {law.form}, by {law.about.source}",
        made_at=time.strftime("%Y-%m-%d %H:%M"),
        kind="loss law",
        headline=headline,
        law=lines(law),
        recipe=dump(recipe),
        notes=_notes(law),
    )


def lines(law: Law) -> list[LawLine]:
    """A line for each number of tokens, or of tokens a parameter, whichever are fewer.

    A law of size alone is one line. Lines go from the smallest model to somewhat beyond the largest.
    """
    sizes: list[float] = np.geomspace(law.parameters.low, BEYOND * law.parameters.high, LINE_POINTS).tolist()
    if law.form == "size":
        return [_line(law, "law", law.observations, [(size, None) for size in sizes])]
    by_tokens = _grouped(law.observations, lambda one: one.tokens)
    by_ratio = _grouped(law.observations, lambda one: float(f"{one.tokens / one.parameters:.2g}"))
    if len(by_tokens) <= len(by_ratio):
        return [
            _line(law, f"{units.count(tokens)} tokens", runs, [(size, tokens) for size in sizes])
            for tokens, runs in by_tokens.items()
        ]
    return [
        _line(law, f"{ratio:g} tokens a parameter", runs, [(size, ratio * size) for size in sizes])
        for ratio, runs in by_ratio.items()
    ]


def _grouped(
    observations: Sequence[Observation], key: Callable[[Observation], float]
) -> dict[float, list[Observation]]:
    return {value: list(runs) for value, runs in itertools.groupby(sorted(observations, key=key), key)}


def _line(law: Law, name: str, runs: Sequence[Observation], along: Sequence[tuple[float, float | None]]) -> LawLine:
    found = [(size, law.predict(size, tokens, furthest=np.inf)) for size, tokens in along]
    points = [LawPoint(size, prediction.loss, prediction.interval) for size, prediction in found]
    return LawLine(name, points, [LawPoint(one.parameters, one.loss) for one in runs])
