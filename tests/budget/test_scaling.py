"""Scaling: a law and its inverses agree, the best size is the published formula's, and far is far."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.budget.observations import About
from espalier.budget.scaling import FORMS, Law, PredictRecipe, Span, Terms, predict
from espalier.errors import RecipeError
from espalier.report import Report
from espalier.run import RESULTS, Run

HOFFMANN = Law.load("hoffmann-2022")
sizes, lengths = st.floats(1e8, 1e10), st.floats(1e10, 4e11)


def law(form="size", low=1e5, high=1e7, **more) -> Law:
    values = {"E": 2.0, "A": 40.0, "alpha": 0.3, "B": 60.0, "beta": 0.25, "gamma": 0.3}
    return Law(
        form=form,
        values={name: values[name] for name in FORMS[form]},
        parameters=Span(low=low, high=high),
        tokens=Span(low=1e7, high=1e9),
        about=About(),
        **more,
    )


@given(sizes, lengths)
def test_the_inverses_lead_back(parameters, tokens):
    loss = HOFFMANN.predict(parameters, tokens).loss
    assert HOFFMANN.parameters_for(loss, tokens) == pytest.approx(parameters, rel=1e-6)
    assert HOFFMANN.tokens_for(loss, parameters) == pytest.approx(tokens, rel=1e-6)


@given(st.floats(1e5, 1e9), st.floats(1e6, 1e10), st.floats(1.01, 4))
def test_under_a_power_a_larger_size_gains_the_more_the_longer_it_is_trained(parameters, tokens, more):
    """And so it has the more to catch up with by tokens alone, up to what no tokens reach."""
    kaplan = Terms(A=8.8e13**0.8, alpha=0.8, B=5.4e13, gamma=0.095)
    loss = kaplan.loss(parameters, tokens)
    assert kaplan.parameters_for(loss, tokens) == pytest.approx(parameters, rel=1e-4)
    assert kaplan.tokens_for(loss, parameters) == pytest.approx(tokens, rel=1e-4)
    ratios = [kaplan.loss(more * parameters, d) / kaplan.loss(parameters, d) for d in (tokens, more * tokens)]
    assert ratios[1] < ratios[0] < 1
    assert kaplan.tokens_for(kaplan.loss(parameters, np.inf) * 0.999, parameters) == np.inf
    assert Terms(E=2.0, A=1.0, B=1.0, gamma=0.5).tokens_for(1.9, 10.0) == np.inf, "below the floor"


@given(sizes, lengths, st.floats(1.01, 4))
def test_more_of_either_is_better_and_never_below_the_floor(parameters, tokens, more):
    terms = HOFFMANN.terms
    loss = terms.loss(parameters, tokens)
    assert terms.E < terms.loss(more * parameters, tokens) < loss
    assert terms.E < terms.loss(parameters, more * tokens) < loss


@given(st.floats(1e18, 1e25))
def test_the_best_size_is_that_of_the_published_formula(flops):
    """Hoffmann et al., eq. 4: N = G (C/6)^a, G = (alpha A / beta B)^(1/(alpha + beta)), a = beta/(alpha + beta)."""
    t = HOFFMANN.terms
    together = t.alpha + t.beta
    expected = (t.alpha * t.A / (t.beta * t.B)) ** (1 / together) * (flops / 6) ** (t.beta / together)
    parameters, tokens = HOFFMANN.optimal(flops)
    assert parameters == pytest.approx(expected, rel=1e-3)
    assert 6 * parameters * tokens == pytest.approx(flops)


@given(st.floats(1e18, 1e23), st.floats(0.2, 5))
def test_no_other_size_is_better_whatever_a_token_costs(flops, factor):
    per_token = lambda parameters: 6 * parameters + 1e4 * math.sqrt(parameters)  # noqa: E731
    parameters, tokens = HOFFMANN.optimal(flops, per_token)
    assert per_token(parameters) * tokens == pytest.approx(flops)
    other = factor * parameters
    assert HOFFMANN.terms.loss(other, flops / per_token(other)) >= HOFFMANN.terms.loss(parameters, tokens) - 1e-12


@pytest.mark.parametrize(("parameters", "tokens"), [(1.7e11, 1e11), (1e9, 5.1e12), (6.9e6, 1e11), (1e9, 4.9e8)])
def test_far_outside_is_refused_unless_it_is_asked_for(parameters, tokens):
    with pytest.raises(RecipeError, match=r"outside.*furthest=11"):
        HOFFMANN.predict(parameters, tokens)
    assert 10 < HOFFMANN.predict(parameters, tokens, furthest=11).reach < 11


def test_what_is_found_backwards_may_not_lie_far_outside_either():
    floor = HOFFMANN.terms.loss(np.inf, 1e11)
    with pytest.raises(RecipeError, match="outside the fitted range"):
        HOFFMANN.parameters_for(floor + 1e-3, 1e11)
    with pytest.raises(RecipeError, match="outside the fitted range"):
        HOFFMANN.tokens_for(HOFFMANN.terms.loss(1e9, np.inf) + 1e-3, 1e9)


@given(sizes, lengths)
def test_inside_is_said_to_be_inside(parameters, tokens):
    found = HOFFMANN.predict(parameters, tokens)
    assert found.reach == 1 and "inside" in str(found) and found.interval is None
    assert "extrapolated by 2x" in str(HOFFMANN.predict(2 * 1.6e10, tokens))


def test_a_loss_that_no_run_reaches_is_refused_with_the_lowest():
    least = HOFFMANN.terms.loss(np.inf, 1e11)
    with pytest.raises(RecipeError, match=f"more than {least:.4f}"):
        HOFFMANN.parameters_for(least - 0.01, 1e11)
    with pytest.raises(RecipeError, match="more than"):
        HOFFMANN.tokens_for(1.7, 1e9)


def test_a_law_of_size_alone_takes_no_other_length_and_knows_no_best_size():
    small = law()
    assert small.predict(1e6).loss == small.predict(1e6, 1e8).loss == pytest.approx(2 + 40 * 1e6**-0.3)
    with pytest.raises(RecipeError, match="size_and_data"):
        small.predict(1e6, 2e9)
    for ask in (lambda: small.optimal(1e15), lambda: small.tokens_for(3.0, 1e6)):
        with pytest.raises(RecipeError, match="size alone"):
            ask()
    with pytest.raises(RecipeError, match="tokens"):
        law("size_and_data").predict(1e6)


@pytest.mark.parametrize("form", FORMS)
def test_a_law_reads_back_as_written(tmp_path, form):
    width = len(FORMS[form])
    made = law(form, noise=1e-3, draws=[[1e-7 * n + 0.1] * width for n in range(50)])
    made.save(tmp_path / "law.json")
    assert Law.load(str(tmp_path / "law.json")) == made


def test_values_that_are_not_the_form_s_are_refused(tmp_path):
    good = law()
    for change in ({"form": "size_and_data"}, {"draws": ((1.0,),)}):
        (tmp_path / "law.json").write_text(good.model_copy(update=change).model_dump_json())
        with pytest.raises(RecipeError, match="has the values"):
            Law.load(str(tmp_path / "law.json"))
    with pytest.raises(RecipeError, match="hoffmann-2022"):
        Law.load("kaplan")


def test_terms_of_draws_are_those_of_each():
    draws = [(2.0, 40.0, 0.3, 60.0, 0.25), (1.5, 30.0, 0.2, 50.0, 0.3)]
    together = Terms(*np.array(draws).T)
    for loss in (2.5, 3.5):
        expected = [float(Terms(*draw).parameters_for(loss, 1e8)) for draw in draws]
        assert together.parameters_for(loss, 1e8).tolist() == pytest.approx(expected)
    assert together.parameters_for(1.4, 1e8).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("asked", "parameters", "tokens"),
    [
        ({"parameters": 1e9, "tokens": 2e10}, 1e9, 2e10),
        ({"flops": 1e21}, *HOFFMANN.optimal(1e21)),
        ({"loss": 2.5, "tokens": 2e10}, HOFFMANN.parameters_for(2.5, 2e10), 2e10),
        ({"loss": 2.5, "parameters": 1e9}, 1e9, HOFFMANN.tokens_for(2.5, 1e9)),
    ],
)
def test_the_verb_completes_what_is_stated(tmp_path, asked, parameters, tokens):
    asking = PredictRecipe(law="hoffmann-2022", **asked)
    with Run.start(tmp_path / "run", asking, tell=lambda line: None) as run:
        found = predict(asking, run)
    report = Report.load(run.folder / RESULTS)
    assert report.value("run", "parameters") == pytest.approx(parameters)
    assert report.value("run", "tokens") == pytest.approx(tokens)
    assert found.loss == report.value("held-out", "loss") == HOFFMANN.predict(parameters, tokens).loss
    assert found.loss == pytest.approx(asked.get("loss", found.loss))


@pytest.mark.parametrize("asked", [{}, {"tokens": 1e9}, {"flops": 1e21, "loss": 2.0}, {"flops": 1e21, "tokens": 1e9}])
def test_what_can_not_be_completed_is_refused(tmp_path, asked):
    asking = PredictRecipe(law="hoffmann-2022", **asked)
    with Run.start(tmp_path / "run", asking) as run, pytest.raises(RecipeError, match="what is known"):
        predict(asking, run)
