"""Plans from a sum: what is offered follows from the law and the prices, and what comes out can be run."""

import json
from pathlib import Path

import pytest
import yaml

from espalier import propose, recipe
from espalier.budget import flops, hardware
from espalier.budget.scaling import Law
from espalier.errors import BudgetError, RecipeError
from espalier.ladder import LadderRecipe
from espalier.offers import ALONE, Candidate, PlanRecipe
from espalier.pipeline import PretrainRecipe
from espalier.run import PAGE, Run
from espalier.spec import ModelSpec
from espalier.train.probe import Speed

FAR = 1e9  # leave any range


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPALIER_HOME", str(tmp_path / "home"))


def told(**more) -> PlanRecipe:
    values = {"budget": {"usd": 1e4}, "hardware": "h100-80g", "model": {"head_dim": 128}, "furthest": FAR}
    return PlanRecipe.model_validate(values | more)


def planned(folder, **more):
    """(the recipe that comes out, the offers, what was said)"""
    lines: list[str] = []
    resolved = told(**more)
    with Run.start(folder, resolved, tell=lines.append) as run:
        path = propose.plan(resolved, run)
    offers = json.loads((folder / "results.json").read_text())["rows"]
    return recipe.load(PretrainRecipe, path, []), offers, "\n".join(lines)


def rows(offers, metric):
    return {row["task"]: row["value"] for row in offers if row["metric"] == metric}


def test_the_plan_is_the_best_of_what_is_offered_and_fits_the_budget(tmp_path):
    made, offers, said = planned(tmp_path / "plan")
    losses = rows(offers, "expected loss")
    assert min(losses, key=losses.get).startswith("planned")
    assert len(losses) >= 3
    assert max(rows(offers, "usd").values()) <= 1e4 * 0.9 * 1.0001
    assert made.budget.usd == 1e4
    assert sum(float(stage.duration.rstrip("%")) for stage in made.stages) == pytest.approx(100, abs=0.1)
    assert "$10,000" in said and "hoffmann-2022" in said


def test_a_larger_sum_buys_a_larger_model_and_a_lower_loss(tmp_path):
    sizes, losses = [], []
    for usd in (10, 1e3, 1e5):
        made, offers, _ = planned(tmp_path / f"{usd:g}", budget={"usd": usd})
        sizes.append(flops.parameters(made.specs()[-1]))
        losses.append(min(rows(offers, "expected loss").values()))
    assert sizes == sorted(set(sizes))
    assert losses == sorted(losses, reverse=True)


def test_a_size_beyond_the_best_one_is_grown_into(tmp_path):
    """As FLM-101B was: 101 billion parameters for a hundred thousand dollars."""
    flm = {"budget": {"usd": 1e5}, "hardware": "a800-80g", "devices": 192, "parameters": 1.01e11, "relearned": 0.1}
    made, offers, said = planned(tmp_path / "grown", **flm)
    specs = made.specs()
    assert flops.parameters(specs[-1]) == pytest.approx(1.01e11, rel=0.05)
    assert len(specs) > 1
    assert {spec.hidden_size for spec in specs} == {specs[-1].hidden_size}
    losses = rows(offers, "expected loss")
    grown, alone = (next(loss for name, loss in losses.items() if name.startswith(n)) for n in ("planned", ALONE))
    assert grown < alone - 0.05
    assert "grows at" in said
    without, _, said = planned(tmp_path / "alone", **(flm | {"relearned": 1}))
    assert len(without.stages) == 1 and "grows at" not in said


def test_the_shipped_recipe_is_flm_101bs(tmp_path):
    """Its sum, hardware and size: 21.5 days on 192 GPUs (arXiv 2309.03852, without the time that restarts took)."""
    path = Path(propose.__file__).parent / "recipes" / "budget" / "flm-101b.yaml"
    with Run.start(tmp_path / "flm", recipe.load(PlanRecipe, path, []), tell=lambda line: None) as run:
        made = recipe.load(PretrainRecipe, propose.plan(run.recipe, run), [])
    offers = json.loads((run.folder / "results.json").read_text())["rows"]
    days = max(rows(offers, "seconds").values()) / 86_400
    assert days == pytest.approx(21.54, rel=0.03)
    assert flops.parameters(made.specs()[-1]) == pytest.approx(101e9, rel=0.03)
    assert len(made.stages) > 1


def test_the_shipped_ladder_trains_what_a_law_wants():
    path = Path(propose.__file__).parent / "recipes" / "budget" / "ladder.yaml"
    trials = recipe.load(LadderRecipe, path, []).trials()
    assert len(trials) == 12
    assert len({flops.parameters(trial.recipe.specs()[-1]) for trial in trials}) == 4


def test_prices_follow_the_hardware_row(tmp_path):
    made, offers, _ = planned(tmp_path / "plan", budget={"hours": 10}, devices=8, utilization=0.5)
    row = hardware.named("h100-80g", home=tmp_path / "home")
    best = next(name for name in rows(offers, "flops") if name.startswith("planned"))
    seconds, usd, kwh, spent = (rows(offers, metric)[best] for metric in ("seconds", "usd", "kwh", "flops"))
    assert seconds == pytest.approx(0.9 * 36_000)
    assert spent == pytest.approx(seconds * 8 * row.peak_flops["bfloat16"] * 0.5)
    assert usd == pytest.approx(8 * row.usd_per_hour * seconds / 3600)
    assert kwh == pytest.approx(8 * row.watts / 1000 * seconds / 3600)
    assert made.budget.hours == 10


def test_the_tighter_of_two_limits_binds(tmp_path):
    loose, _, _ = planned(tmp_path / "loose", budget={"usd": 1e9, "flops": 1e20})
    tight, offers, _ = planned(tmp_path / "tight", budget={"flops": 1e20})
    assert loose.stages == tight.stages
    assert max(rows(offers, "flops").values()) <= 0.9 * 1e20 * 1.0001


def test_the_batch_grows_with_the_run(tmp_path):
    small, large = (planned(tmp_path / f"{usd:g}", budget={"usd": usd})[0] for usd in (10, 1e5))
    assert small.train.batch_tokens < large.train.batch_tokens
    assert small.train.batch_tokens % small.data.sequence_length == 0


def test_reasons_stand_above_the_recipe_and_on_the_page(tmp_path):
    folder = tmp_path / "plan"
    _, _, said = planned(folder)
    text = (folder / propose.PLANNED).read_text()
    comments = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")]
    assert comments == said.splitlines()[: len(comments)] and len(comments) >= 4
    assert yaml.safe_load(text)["name"] == "planned"
    page = (folder / PAGE).read_text()
    assert "Expected loss" in page and "from scratch" in page
    assert "Espalier plan" in page
    assert page.count("to the plan&#39;s loss; on this budget it comes to") >= 2, "sizes from scratch that get there"


def test_an_interval_follows_from_the_laws_draws(tmp_path):
    law = Law.load("hoffmann-2022")
    draws = [[1.69 + shift, 406.4, 0.34, 410.7, 0.28] for shift in (-0.1, 0.0, 0.1)]
    seen = [{"parameters": 1e9, "tokens": 2e10, "loss": 2.5}] * 9
    some = law.model_dump() | {"draws": draws, "observations": seen}
    names = list(some["values"])
    assert names == ["E", "A", "alpha", "B", "beta"]
    Law.model_validate(some).save(tmp_path / "law.json")
    _, offers, said = planned(tmp_path / "plan", law=str(tmp_path / "law.json"))
    loss = min(rows(offers, "expected loss").values())
    low, high = (float(part) for part in said.split("a loss of ")[1].split("(")[1].split(")")[0].split(" to "))
    assert loss - 0.1 <= low < loss < high <= loss + 0.1


def test_what_can_not_be_planned_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="no limit"):
        planned(tmp_path / "none", budget={})
    with pytest.raises(RecipeError, match="h100"):
        planned(tmp_path / "gpu", hardware="h100x")
    with pytest.raises(RecipeError, match=r"range.*budget ladder"):
        planned(tmp_path / "far", budget={"usd": 1e-4}, furthest=10)
    with pytest.raises(BudgetError):
        planned(tmp_path / "step", budget={"tokens": 1e-3})
    with pytest.raises(BudgetError, match="takes none of"):
        planned(tmp_path / "free", budget={"usd": 5, "usd_per_hour": 0})
    for far in (1, 1e16):
        with pytest.raises(RecipeError, match="parameters"):
            planned(tmp_path / f"{far:g}", parameters=far)
    with pytest.raises(ValueError, match="devices=2"):
        told(hardware="here", devices=2)
    with pytest.raises(RecipeError, match="law"):
        planned(tmp_path / "law", law="nothing")


def test_on_this_machine_the_sizes_in_question_are_timed(tmp_path, monkeypatch):
    """The speeds are those of the probe, and only of sizes that were offered."""
    row = hardware.named("vcpu", home=tmp_path / "home")
    monkeypatch.setattr(hardware, "named", lambda key, home: row)
    timed = []

    def speeds(recipe, here, specs, seconds):
        timed.extend(specs)
        return [Speed(1e-3 * flops.parameters(spec) / 1e6, 0.0, 1.0) for spec in specs]

    monkeypatch.setattr(propose.planner, "speeds", speeds)
    made, offers, said = planned(tmp_path / "plan", hardware="here", budget={"hours": 1}, model={"head_dim": 32})
    assert "measured" in said
    assert {spec.hidden_size for spec in made.specs()} <= {spec.hidden_size for spec in timed}
    best = next(name for name in rows(offers, "seconds") if name.startswith("planned"))
    spent = rows(offers, "seconds")[best]
    assert spent <= 0.9 * 3600
    assert len(timed) <= 12


def test_a_size_that_was_not_timed_is_as_fast_as_the_nearest_that_was():
    def candidate(layers, seconds):
        spec = ModelSpec(vocab_size=512, hidden_size=64, head_dim=32, num_hidden_layers=layers)
        return Candidate(spec, float(flops.training_flops(spec, 64)), seconds, ready=layers)

    one, other = candidate(2, 1e-5), candidate(16, 1e-3)
    for layers, nearest in ((1, one), (4, one), (12, other), (32, other)):
        found = propose._as_fast(candidate(layers, 1.0), [one, other])
        assert found.flops / found.seconds == pytest.approx(nearest.flops / nearest.seconds)
        assert found.ready == nearest.ready
