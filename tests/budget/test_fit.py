"""Fit: exact without noise, 95% intervals that hold 95%, and no law where the runs don't tell one."""

import itertools
import json

import numpy as np
import pytest

from espalier import recipe
from espalier.budget import fit as budget_fits
from espalier.budget.fit import LAW, FitRecipe, budget_fit, fit, lines
from espalier.budget.observations import About, Observation
from espalier.budget.scaling import FORMS, Law, Terms
from espalier.errors import DataError, RecipeError
from espalier.run import PAGE, Run

TRUE = {
    "size": Terms(E=2.0, A=40.0, alpha=0.3),
    "size_and_data": Terms(E=1.7, A=400.0, alpha=0.34, B=410.0, beta=0.28),
    "size_and_data_to_zero": Terms(A=40.0, alpha=0.3, B=60.0, beta=0.25),
    # Kaplan et al. (arXiv 2001.08361), table 4, with alpha_N / alpha_D as alpha.
    "size_with_data": Terms(A=8.8e13 ** (0.076 / 0.095), alpha=0.076 / 0.095, B=5.4e13, gamma=0.095),
}
SIZES, LENGTHS = np.geomspace(1e6, 1e8, 5), {"size": [1e9]}
BEYOND = (3e8, 5e9)


def runs(form: str, noise: float = 0.0, seed: int = 0) -> list[Observation]:
    random = np.random.default_rng(seed)
    return [
        Observation(
            parameters=size,
            tokens=length,
            loss=TRUE[form].loss(size, length) * np.exp(noise * random.standard_normal()),
        )
        for size, length, _ in itertools.product(SIZES, LENGTHS.get(form, np.geomspace(1e8, 3e9, 4)), range(2))
    ]


def fitted(form: str, noise: float = 0.0, seed: int = 0, **more) -> Law:
    return fit(runs(form, noise, seed), form, about=About(), **{"draws": 50, **more})


@pytest.mark.parametrize("form", FORMS)
def test_without_noise_the_law_is_found_exactly(form):
    law = fitted(form)
    for name, value in law.values.items():
        assert value == pytest.approx(getattr(TRUE[form], name), rel=1e-4)
    assert law.noise < 1e-6
    assert law.check.error < 1e-6 < law.check.baseline
    assert (law.check.parameters, law.check.fitted_up_to) == (SIZES[-1], SIZES[-2])
    found = law.predict(*BEYOND) if form != "size" else law.predict(BEYOND[0])
    assert found.loss == pytest.approx(TRUE[form].loss(*BEYOND), rel=1e-5) and found.reach > 1


@pytest.mark.parametrize("form", FORMS)
def test_intervals_hold_as_often_as_they_say(form):
    """Over 50 laws, 95% would be 47 or 48."""
    noise, times = 0.003, 50
    random = np.random.default_rng(1)
    names = FORMS[form]
    at = (BEYOND[0], None) if form == "size" else BEYOND
    held = dict.fromkeys(("new run", *names), 0)
    widths = []
    for seed in range(times):
        law = fitted(form, noise, seed + 100)
        low, high = law.predict(*at).interval
        new = TRUE[form].loss(*BEYOND) * np.exp(noise * random.standard_normal())
        held["new run"] += low <= new <= high
        widths.append((high - low) / new)
        for name in names:
            low, high = law.interval(name)
            held[name] += low <= getattr(TRUE[form], name) <= high
    assert all(count >= 43 for count in held.values()), held
    assert 3.5 * noise < np.median(widths) < 20 * noise, "no narrower than a run's own noise, and not without end"


@pytest.mark.parametrize("resample", ["residuals", "points"])
def test_more_noise_is_a_wider_interval_around_the_law(resample):
    spans = []
    for noise in (0.001, 0.01):
        law = fitted("size_and_data_to_zero", noise, resample=resample)
        low, high = law.interval("alpha")
        assert low < law.values["alpha"] < high
        assert law.noise == pytest.approx(noise, rel=0.25)
        spans.append(high - low)
    assert spans[1] > 4 * spans[0]


def test_redrawn_runs_tell_the_values_too(monkeypatch):
    """A sample of two sizes would fit any exponent."""
    searched = []
    search = budget_fits._Problem.search
    monkeypatch.setattr(
        budget_fits._Problem, "search", lambda self, starts: searched.append(self) or search(self, starts)
    )
    four = [one for one in runs("size", 0.002) if one.parameters < 5e7][::2]
    fit(four, "size", about=About(), resample="points", draws=40)
    assert len(four) == 4 and len(searched) == 1 + 40
    assert all(len(np.unique(problem.design_TOV[1, :, 2])) >= 3 for problem in searched)


def test_a_fit_is_the_same_each_time_and_its_draws_follow_the_seed():
    one, again, other = (fitted("size", 0.01, draws=45, seed=3) for _ in range(3))
    assert one == again == other
    shifted = fit(runs("size", 0.01, 3), "size", about=About(), draws=45, seed=9)
    assert shifted.values == one.values and shifted.draws != one.draws


@pytest.mark.parametrize(
    ("form", "keep", "found"),
    [
        ("size", lambda one: one.parameters < 2e6, "2 runs for 3 values"),
        ("size", lambda one: one.parameters < 4e6, "2 different numbers of parameters"),
        ("size_and_data", lambda one: one.tokens < 4e8, "2 different numbers of tokens"),
        ("size_and_data", lambda one: one.parameters < 4e6, "2 different numbers of parameters"),
        ("size_and_data_to_zero", lambda one: one.tokens < 2e8, "1 different numbers of tokens"),
    ],
)
def test_runs_that_do_not_tell_the_values_are_refused(form, keep, found):
    with pytest.raises(DataError, match=found):
        fit([one for one in runs(form) if keep(one)], form, about=About())


def test_tokens_that_follow_from_the_parameters_tell_nothing_of_their_own():
    observations = [Observation(parameters=n, tokens=20 * n, loss=2 + 30 * n**-0.3) for n in np.geomspace(1e5, 1e7, 8)]
    with pytest.raises(DataError, match="follow from the parameters"):
        fit(observations, "size_and_data", about=About())
    assert fit(observations, "size", about=About(), draws=40).values["alpha"] == pytest.approx(0.3, rel=1e-3)


def test_a_law_of_size_alone_is_not_fitted_on_runs_of_several_lengths():
    with pytest.raises(DataError, match="different numbers of tokens"):
        fit(runs("size_and_data"), "size", about=About())


def test_a_loss_that_rises_with_size_is_no_law():
    rising = [one.model_copy(update={"loss": 10 / one.loss}) for one in runs("size", 0.001)]
    with pytest.raises(DataError, match="alpha"):
        fit(rising, "size", about=About())


def test_without_enough_smaller_models_there_is_no_check():
    three = [one for one in runs("size") if one.parameters < 2e7]
    assert fit(three, "size", about=About(), draws=40).check is None


def test_the_check_leaves_the_largest_model_out():
    """What is fitted on the rest doesn't depend on the losses that it is asked to predict."""
    observations = runs("size")
    worse = [
        one.model_copy(update={"loss": 1.1 * one.loss}) if one.parameters == SIZES[-1] else one for one in observations
    ]
    assert fit(worse, "size", about=About(), draws=40).check.error == pytest.approx(1 - 1 / 1.1, rel=1e-4)


def carried_out(tmp_path, **told):
    asked = FitRecipe(draws=40, **told)
    said: list[str] = []
    with Run.start(tmp_path / "run", asked, tell=said.append) as run:
        budget_fit(asked, run)
    return run.folder, said


@pytest.mark.parametrize("form", FORMS)
def test_the_verb_writes_the_law_its_table_and_its_page(tmp_path, form):
    rows = [one.model_dump_json() for one in runs(form, 0.002)]
    (tmp_path / "runs.jsonl").write_text("\n".join(rows))
    folder, told = carried_out(tmp_path, points=tmp_path / "runs.jsonl", form=form, data="a text")
    law = Law.load(str(folder / LAW))
    assert law.about.data == "a text" and len(law.observations) == len(rows)
    assert [line.split()[0] for line in told[: len(law.values)]] == list(FORMS[form])
    assert f"within {law.check.error:.2%}" in told[-1]
    html = (folder / PAGE).read_text()
    drawn = json.loads(html.partition('id="data">')[2].partition("</script>")[0])["law"]["lines"]
    assert sum(len(line["runs"]) for line in drawn) == len(rows)
    assert "Loss against size" in html


def test_a_line_is_drawn_for_each_length_or_ratio():
    grid = fitted("size_and_data_to_zero")
    assert len(lines(grid)) == 4
    ratios = [
        Observation(parameters=n, tokens=k * n, loss=TRUE["size_and_data"].loss(n, k * n))
        for n in SIZES
        for k in (10, 40)
    ]
    law = fit(ratios, "size_and_data", about=About(), draws=40)
    assert [line.name for line in lines(law)] == ["10 tokens a parameter", "40 tokens a parameter"]
    for line in lines(law):
        for point in line.points:
            assert point.interval[0] <= point.loss * (1 + 1e-6) and point.loss <= point.interval[1] * (1 + 1e-6)


@pytest.mark.parametrize("told", [[], ["points=a.csv", "runs=b"]])
def test_one_source_is_wanted(told):
    with pytest.raises(RecipeError, match="one of points"):
        recipe.parse(FitRecipe, "", told, where="x")
