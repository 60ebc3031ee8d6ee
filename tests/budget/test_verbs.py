"""`budget roofline` and `budget queries`: figures, page and refusals."""

import json
import re
from dataclasses import replace

import pytest

from espalier.budget import hardware, verbs
from espalier.budget.inference import Cell, Query, RuntimeProfile
from espalier.errors import ModelError, RecipeError, ResourceError
from espalier.report import Report
from espalier.run import PAGE, RESULTS, Run
from espalier.spec import ModelSpec

SPEC = ModelSpec(family="llama", vocab_size=1000, hidden_size=128, num_hidden_layers=4, head_dim=32)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPALIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "<b>&" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SPEC.to_config()))
    return path


@pytest.fixture
def carry_out(tmp_path):
    """Carry a verb out; what it returned, and the run's folder."""

    def carry_out(verb, recipe):
        with Run.start(tmp_path / "run", recipe, tell=told.append) as run:
            return verb(recipe, run), run.folder

    told = carry_out.told = []
    return carry_out


def test_the_figures_of_a_roofline_fit_together(config, carry_out, capsys):
    recipe = verbs.RooflineRecipe(model=config, hardware="a100-80g", prompt=100, generated=51, batch=4)
    page, folder = carry_out(verbs.roofline, recipe)
    found = json.loads((folder / verbs.FIGURES).read_text())
    assert page == folder / PAGE
    step = found["decode_step_seconds"]
    assert found["seconds"] == pytest.approx(found["prefill_seconds"] + 50 * step)
    assert found["tokens_per_second"] == pytest.approx(4 / step)
    million = found["million_tokens"]
    assert million["written"]["usd"] == pytest.approx(1e6 / 4 * step / 3600 * 1.50)
    assert million["written"]["kwh"] == pytest.approx(1e6 / 4 * step / 3600 * 0.4)
    assert million["read"]["usd"] == pytest.approx(1e6 / 400 * found["prefill_seconds"] / 3600 * 1.50)
    middle = sum(row["seconds"] for row in found["phases"]["decode"])
    assert middle == pytest.approx(step, rel=0.02)
    shown = capsys.readouterr().out
    assert "it fits" in shown and "bound by" in shown
    for name in ("attention", "lm_head", "optimizer", "total"):
        assert name in shown


def test_a_folder_and_its_config_are_the_same_model(config):
    recipes = [verbs.RooflineRecipe(model=path, hardware="gpu") for path in (config, config.parent)]
    assert verbs.estimated(recipes[0]) == verbs.estimated(recipes[1])


def test_several_devices_are_priced_together_and_hold_more(config):
    one, four = (
        verbs.estimated(verbs.RooflineRecipe(model=config, hardware="h100-80g", devices=n)).figures() for n in (1, 4)
    )
    assert four["hardware"]["usd_per_hour"] == 4 * one["hardware"]["usd_per_hour"]
    assert four["hardware"]["memory_bytes"] == 4 * one["hardware"]["memory_bytes"]
    assert "all_reduce" in {row["name"] for row in four["phases"]["decode"]}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_page_is_whole_and_loads_nothing(config, carry_out, attention):
    recipe = verbs.RooflineRecipe(model=config, hardware="rtx-4090", attention=attention)
    page, _ = carry_out(verbs.roofline, recipe)
    text = page.read_text()
    assert "<b>&" not in text and "&lt;b&gt;&amp;" in text
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org)", text)
    assert "drawRoofline" in text and "drawLoss" not in text, "only the drawings that the page shows"
    chart = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])["roofline"]
    products = {"q", "k", "v", "o", "gate", "up", "down", "lm_head"}
    products |= {"attention"} if attention == "sdpa" else {"scores", "values"}
    for phase in chart["phases"]:
        named = {name for mark in phase["marks"] for name in mark["told"][0].split(" (")[0].split(", ")}
        assert named == products
    for name in ("Prefill", "A decoding step", "A training step", "lm_head"):
        assert name in text


def test_every_mark_lies_beneath_the_roof_and_in_the_frame(config, home):
    home.mkdir()
    (home / "hardware.yaml").write_text("hardware: {gpu: {kernel_seconds: 5e-6}}")
    for key in ("gpu", "h100-80g", "vcpu"):
        estimate = verbs.estimated(verbs.RooflineRecipe(model=config, hardware=key))
        chart = verbs.roofline_page._chart(estimate)
        (_, (ridge, peak), _) = chart["roof"]
        assert chart["ridge"]["at"] == ridge
        for mark in (mark for phase in chart["phases"] for mark in phase["marks"]):
            roof = min(peak, mark["intensity"] * peak / ridge)
            assert mark["speed"] <= roof * 1.0001
            assert (mark["speed"] < 0.9 * roof) == (key == "gpu"), "overhead takes its share"
            assert chart["x"]["low"] < mark["intensity"] < chart["x"]["high"]
            assert chart["y"]["low"] < mark["speed"] < chart["y"]["high"]


def test_what_does_not_fit_is_said(config):
    estimate = verbs.estimated(verbs.RooflineRecipe(model=config, hardware="vcpu"))
    small = replace(estimate.roofline.hardware, memory_bytes=1000)
    tight = replace(estimate, roofline=replace(estimate.roofline, hardware=small))
    assert estimate.fits and not tight.fits
    assert "it does not fit" in verbs.roofline_page.render(tight, "today")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"hardware": "h1000"}, RecipeError, "h100-80g"),
        ({"hardware": "vcpu", "devices": 2}, RecipeError, "no link"),
        ({"model": "nowhere"}, ModelError, "nowhere"),
    ],
)
def test_what_can_not_be_estimated_is_refused(config, change, error, text):
    with pytest.raises(error, match=text):
        verbs.estimated(verbs.RooflineRecipe(**{"model": config, "hardware": "gpu"} | change))


@pytest.fixture
def profile(tmp_path, home):
    row = hardware.catalogue(home)["gpu"]
    cells = [Cell(Query(p, o), (p + 2.0 * o + 0.1 * p * o, 100.0)) for p in (1, 10) for o in (1, 2, 8)]
    RuntimeProfile.of("tiny", SPEC, row, {}, cells).save(tmp_path / "profile.json")
    (tmp_path / "asked.csv").write_text("prompt_tokens,completion_tokens\n1,3\n10,8\n")
    return {"profile": tmp_path / "profile.json", "tokens": tmp_path / "asked.csv"}


@pytest.mark.parametrize("slope", ["token", "context"])
def test_a_workload_costs_what_its_queries_do(profile, carry_out, slope):
    report, folder = carry_out(verbs.queries, verbs.QueriesRecipe(**profile, slope=slope))
    fits = RuntimeProfile.load(profile["profile"]).fits
    assert Report.load(folder / RESULTS).rows == report.rows
    for statistic, fit in fits.items():
        seconds = fit.seconds(Query(1, 3), slope) + fit.seconds(Query(10, 8), slope)
        task = f"{statistic} on generic GPU"
        assert report.value(task, "seconds") == pytest.approx(seconds)
        assert report.value(task, "usd") == pytest.approx(seconds / 3600 * 0.80)
        assert report.value(task, "kwh") == pytest.approx(seconds / 3600 * 0.3)
    assert carry_out.told == []


def test_a_prompt_beyond_the_measured_ones_is_flagged_and_the_ideal_stands_beside(profile, carry_out):
    profile["tokens"].write_text("prompt_tokens,completion_tokens\n1,3\n11,8\n")
    report, _ = carry_out(verbs.queries, verbs.QueriesRecipe(**profile, hardware="l4"))
    assert "1 of 2 prompts" in carry_out.told[0]
    ideal = [verbs.RooflineRecipe(model=".", prompt=p, generated=o) for p, o in ((1, 3), (11, 8))]
    line = verbs.Roofline(SPEC, hardware.named("l4", home=profile["profile"].parent), verbs.Setting())
    seconds = sum(line.generation(recipe.prompt, recipe.generated) for recipe in ideal)
    assert report.value("ideal on 1 × NVIDIA L4", "seconds") == pytest.approx(seconds)


def test_an_ideal_that_no_single_machine_holds_is_refused(profile, carry_out, home):
    home.mkdir()
    (home / "hardware.yaml").write_text("hardware: {vcpu: {memory_bytes: 1000}}")
    with pytest.raises(ResourceError, match="no link"):
        carry_out(verbs.queries, verbs.QueriesRecipe(**profile, hardware="vcpu"))
