"""Density: the reference's own models have one, poorer ones less, and what can't be told is bounded, never clamped."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.budget.observations import About
from espalier.budget.scaling import Law, Span, Terms
from espalier.errors import DataError, RecipeError
from espalier.evaluate.density import DensityRecipe, ScoreCurve, density, evaluate_density
from espalier.recipe import parse
from espalier.report import Report
from espalier.run import RESULTS, Run

LAW, CURVE = Terms(A=12.0, alpha=0.12, B=30.0, beta=0.2), ScoreCurve(0.7, 2.5, 1.9, 0.25)
SIZES, RATIOS, TOKENS = np.geomspace(5e6, 8e8, 6), (10, 15, 20, 30, 40, 60), 1e10
curves = st.builds(ScoreCurve, st.floats(0.2, 0.7), st.floats(0.5, 10), st.floats(0.5, 4), st.floats(0.0, 0.3))


def references(noise: float = 0.002, seed: int = 0) -> list[dict]:
    """The paper's ladder: six sizes on six lengths, scores of those above chance."""
    random = np.random.default_rng(seed)
    rows = []
    for size in SIZES:
        for ratio in RATIOS:
            loss = LAW.loss(size, ratio * size) * math.exp(noise * random.standard_normal())
            score = CURVE.score(loss) + noise * random.standard_normal()
            rows.append({"parameters": size, "tokens": ratio * size, "loss": loss, "score": score})
    return [row if row["score"] > 0.3 else row | {"score": None} for row in rows]


@pytest.fixture
def measure(tmp_path):
    """The report on a model, by a reference file of these rows."""
    path = tmp_path / "reference.jsonl"

    def measure(rows=None, **told) -> Report:
        path.write_text("\n".join(json.dumps(row) for row in rows or references()))
        asked = {"reference": path, "benchmark": "toy", "reference_tokens": TOKENS, "draws": 40} | told
        recipe = DensityRecipe.model_validate(asked)
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        with Run.start(folder, recipe, tell=lambda line: None) as run:
            report = evaluate_density(recipe, run)
        assert Report.load(folder / RESULTS).rows == report.rows
        return report

    return measure


def score_of(size: float) -> float:
    return float(CURVE.score(LAW.loss(size, TOKENS)))


@pytest.mark.parametrize("size", [2e7, 1e8, 5e8])
def test_the_reference_s_own_models_have_a_density_of_one(measure, size):
    """Between 0.8 and 1.25, as the paper's method asks of a reference model that was held out."""
    for told in ({"score": score_of(size)}, {"loss": float(LAW.loss(size, TOKENS))}):
        found = measure(parameters=size, **told).context["density"]
        assert found["place"] == "inside"
        assert 0.8 < found["low"] < found["value"] < found["high"] < 1.25


def test_intervals_hold_one_as_often_as_they_say(measure):
    """Over 20 ladders, 95% would be 19."""
    held = 0
    for seed in range(20):
        found = measure(references(seed=seed), parameters=1e8, score=score_of(1e8)).context["density"]
        held += found["low"] < 1 < found["high"]
    assert held >= 16


def test_a_model_that_does_as_well_with_half_the_parameters_is_twice_as_dense(measure):
    one, two, four = (measure(parameters=1e8 / n, score=score_of(1e8)).value("toy", "density") for n in (1, 2, 4))
    assert (two, four) == (pytest.approx(2 * one), pytest.approx(4 * one))
    poorer = measure(parameters=1e8, score=score_of(4e7)).value("toy", "density")
    assert poorer == pytest.approx(0.4, rel=0.2)


def test_fewer_items_and_noisier_references_widen_the_interval(measure):
    def width(**told) -> float:
        found = measure(parameters=1e8, score=score_of(1e8), **told).context["density"]
        return math.log(found["high"] / found["low"])

    assert width() < width(items=2000) < width(items=200)
    assert width() < 0.5 * width(rows=references(noise=0.01))


@pytest.mark.parametrize(("score", "place"), [(0.99, "above"), (0.1, "below"), (0.9495, "above"), (0.2505, "below")])
def test_outside_the_range_there_is_a_bound_and_no_number(measure, score, place):
    report = measure(parameters=1e8, score=score)
    found = report.context["density"]
    bound = {"above": SIZES[-1] * 10 / 1e8, "below": SIZES[0] / 10 / 1e8}[place]
    assert found == {"place": place, "value": pytest.approx(bound), "low": None, "high": None, "reach": 10}
    assert report.rows[0].note == {"above": "a lower bound", "below": "an upper bound"}[place]


LADDER = Law(
    form="size_and_data_to_zero",
    values={"A": 12.0, "alpha": 0.12, "B": 30.0, "beta": 0.2},
    parameters=Span(low=1e6, high=1e8),
    tokens=Span(low=1e9, high=1e9),
    about=About(),
)


@given(st.floats(1e3, 1e12) | st.just(math.inf) | st.just(0.0), st.floats(1, 20))
def test_bounds_are_where_the_range_ends(size, furthest):
    found = density(size, np.full(40, size), LADDER, 1e7, furthest)
    inside = 1e6 / furthest <= size <= 1e8 * furthest
    assert (found.place == "inside") == inside
    if inside:
        assert found.value == found.low == found.high == size / 1e7
        assert found.reach == pytest.approx(max(size / 1e8, 1e6 / size, 1)) and ("by" in str(found)) == (
            found.reach > 1
        )
    elif found.place == "above":
        assert size / 1e7 > found.value and f"> {found.value:.3g}" in str(found)
    else:
        assert size / 1e7 < found.value and f"< {found.value:.3g}" in str(found)


def test_an_end_of_the_interval_that_is_outside_is_left_open():
    drawn = np.array([1e7] * 30 + [math.inf] * 5 + [0.0] * 5)
    found = density(1e7, drawn, LADDER, 1e7)
    assert (found.value, found.low, found.high) == (1.0, None, None)
    assert "from out of range to out of range" in str(found)


@given(curves, st.floats(0.02, 0.98))
def test_a_curve_leads_back_from_its_score(curve, share):
    score = curve.floor + share * curve.height
    assert curve.score(curve.loss(score)) == pytest.approx(score)
    assert curve.loss(curve.floor) == math.inf and curve.loss(curve.floor + 1.01 * curve.height) == -math.inf


@given(curves)
@settings(max_examples=20)
def test_a_curve_is_found_again(curve):
    losses = curve.middle + np.linspace(-4, 4, 24) / curve.steepness
    found = ScoreCurve.fitted(losses, curve.score(losses))
    assert found.score(losses) == pytest.approx(curve.score(losses), abs=1e-4)


def test_everything_that_a_density_is_relative_to_is_kept(measure):
    context = measure(parameters=1e8, loss=2.5, counted="active", tokenizer="ours").context
    assert context["benchmark"] == "toy" and context["reference_tokens"] == TOKENS
    assert context["counted"] == "active" and context["tokenizer"] == "ours"
    assert context["reference_range"]["parameters"] == {"low": SIZES[0], "high": SIZES[-1]}
    assert context["law"]["form"] == "size_and_data_to_zero" and context["score_curve"] is None


def test_too_few_scores_are_refused_and_do_not_matter_for_a_loss(measure):
    rows = [row | {"score": row["score"] if n > 31 else None} for n, row in enumerate(references())]
    with pytest.raises(DataError, match="4 rows with one"):
        measure(rows, parameters=1e8, score=0.5)
    assert measure(rows, parameters=1e8, loss=2.4).rows


def test_a_number_of_tokens_far_from_the_reference_s_is_refused(measure):
    with pytest.raises(RecipeError, match="reference_tokens"):
        measure(parameters=1e8, loss=2.5, reference_tokens=1e12)
    assert measure(parameters=1e8, loss=2.5, reference_tokens=1e12, furthest=30).rows


@pytest.mark.parametrize("told", [[], ["score=0.5", "loss=2.0"], ["loss=2.0", "form=size"]])
def test_one_measure_is_wanted_and_a_form_with_data(told):
    stated = ["reference=a", "benchmark=b", "parameters=1e8", "reference_tokens=1e9"]
    with pytest.raises(RecipeError, match=r"state one of score|form size"):
        parse(DensityRecipe, "", stated + told, where="x")
