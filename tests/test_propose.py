"""Plans from a sum: what is offered follows from the law and the prices, and what comes out can be run."""

import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from espalier import ladder, planner, propose, recipe
from espalier.budget import fit, flops, hardware, layouts
from espalier.budget.hardware import Hardware
from espalier.budget.observations import About, text_digest
from espalier.budget.scaling import Law, Span
from espalier.budget.serving import ServingRecipe
from espalier.budget.serving import served as serve
from espalier.errors import BudgetError, RecipeError, ResourceError
from espalier.ladder import LadderRecipe
from espalier.offers import ALONE, PRODUCTS, Candidate, PlanRecipe
from espalier.pipeline import PretrainRecipe
from espalier.run import PAGE, RECIPE, Run
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
    fit.require_told([ladder._size(trial) for trial in trials], "size_with_data")
    assert len({flops.parameters(trial.recipe.specs()[-1]) for trial in trials}) == 5


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


@pytest.mark.parametrize(
    "more, word",
    [({}, "espalier launch slurm {} --hardware h100-80g"), ({"devices": 8}, "espalier launch slurm {} --hardware h100-80g --devices 8 --nodes 1")],
    ids=["one", "several"],
)
def test_what_carries_the_plan_out_is_told_last(tmp_path, more, word):
    *_, said = planned(tmp_path / "plan", **more)
    assert word.format(tmp_path / "plan" / "planned.yaml") in said


def test_the_page_shows_what_bounds_a_pass_of_the_final_model(tmp_path):
    planned(tmp_path / "plan", devices=8)
    text = (tmp_path / "plan" / PAGE).read_text()
    assert "What bounds a pass" in text and "drawRoofline" in text
    chart = json.loads(text.split('id="data">')[1].split("</script>")[0])["roofline"]
    (phase,) = chart["phases"]
    assert 0.7 < sum(mark["share"] for mark in phase["marks"]) <= 1.0
    assert {"q, k, v, o", "gate, up, down"} & {mark["name"] for mark in phase["marks"]}
    tensor = 2 if "2 tensor" in text else 1
    peak = hardware.named("h100-80g", home=tmp_path / "home").peak_flops["bfloat16"]
    assert chart["ridge"]["speed"] == pytest.approx(tensor * peak)


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


def test_the_law_is_asked_before_anything_is_timed_and_once_more_after(tmp_path, monkeypatch):
    row = hardware.named("vcpu", home=tmp_path / "home")
    monkeypatch.setattr(hardware, "named", lambda key, home: row)
    law = Law.load("hoffmann-2022")
    timed = []

    def speeds(recipe, here, specs, seconds):
        timed.extend(specs)
        return [Speed(1e-20 * flops.parameters(spec), 0.0, 0.0) for spec in specs]

    monkeypatch.setattr(propose.planner, "speeds", speeds)
    small = {"hardware": "here", "budget": {"hours": 1}, "model": {"head_dim": 32}, "furthest": 1}
    with pytest.raises(RecipeError, match="outside its range"):
        planned(tmp_path / "far", **small)
    assert not timed
    near = law.model_copy(update={"parameters": Span(low=1, high=1e9), "tokens": Span(low=1, high=1e11)})
    near.save(tmp_path / "near.json")
    with pytest.raises(RecipeError, match="outside its range"):
        planned(tmp_path / "faster", law=str(tmp_path / "near.json"), **small)
    assert timed, "the machine turned out to be so fast that the plan leaves the range"


def test_a_law_of_other_text_is_told(tmp_path):
    """The text that a law names is the recipe's data as a run folder keeps it."""
    _, _, said = planned(tmp_path / "other")
    assert "other text than this plan's (MassiveText, SentencePiece, 32,000 ids)" in said
    own = text_digest(recipe.stored(tmp_path / "other" / RECIPE)["data"])
    law = Law.load("hoffmann-2022")
    law.model_copy(update={"about": About(data=own, tokenizer="0123")}).save(tmp_path / "own.json")
    _, _, said = planned(tmp_path / "same", law=str(tmp_path / "own.json"))
    assert "other text" not in said
    data = {"data": {"sources": [str(tmp_path)], "max_bytes": "12MB", "held_out": 1e-7}}
    _, _, said = planned(tmp_path / "another", law=str(tmp_path / "own.json"), **data)
    assert f"other text than this plan's ({own}, 0123)" in said
    law.model_copy(update={"about": About()}).save(tmp_path / "unnamed.json")
    _, _, said = planned(tmp_path / "unnamed", law=str(tmp_path / "unnamed.json"))
    assert "other text than this plan's (it doesn't say which)" in said


def test_what_fits_no_device_is_not_offered_and_what_is_offered_can_be_run(tmp_path):
    """A sum for large models on one GPU: settings by which they fit are the recipe's."""
    told = {"budget": {"usd": 1e5}, "hardware": "a100-40g", "data": {"sequence_length": 2048}}
    made, offers, said = planned(tmp_path / "one", **told)
    row = hardware.named("a100-40g", home=tmp_path / "home")
    held = rows(offers, "bytes a device")
    assert max(held.values()) <= row.memory_bytes < 1.5 * max(held.values())
    planner.require_memory(made, row)
    assert made.train.recompute == "layers" and "recomputing" in said
    larger, _, _ = planned(tmp_path / "many", **(told | {"devices": 64}))
    assert flops.parameters(larger.specs()[-1]) > 2 * flops.parameters(made.specs()[-1])


def test_a_size_that_fits_nowhere_is_refused_with_what_it_would_take(tmp_path):
    wanted = {"parameters": 1.3e10, "budget": {"usd": 1e5}}
    with pytest.raises(RecipeError) as refused:
        planned(tmp_path / "one", **wanted)
    error = refused.value
    assert error.where == "parameters" and "recomputing" in error.found and "80 GB" in error.expected
    devices = int(error.mend.removeprefix("Set devices=").rstrip("."))
    made, _, _ = planned(tmp_path / "many", devices=devices, **wanted)
    assert flops.parameters(made.specs()[-1]) == pytest.approx(1.3e10, rel=0.1)
    with pytest.raises(RecipeError, match="devices with more memory"):
        planned(tmp_path / "cpu", hardware="vcpu", **wanted)
    with pytest.raises(RecipeError, match="devices: found 1024 for updates"):
        planned(tmp_path / "crowd", devices=1024, budget={"usd": 1e-3}, parameters=2e6)
    with pytest.raises(RecipeError, match="no link"):
        planned(tmp_path / "alone", hardware="vcpu", devices=2)
    tiny = Hardware("tiny", "cuda", 1, {"float32": 1e12, "bfloat16": 1e12}, 10**6, 1e9, 1.0, 1.0, 0.5, {})
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched, pytest.raises(RecipeError, match="hardware: found a model of"):
        patched.setattr(hardware, "named", lambda key, home: tiny)
        planned(tmp_path / "tiny")


def test_every_stage_tells_its_layout(tmp_path, capsys):
    flm = {"budget": {"usd": 1e5}, "hardware": "a800-80g", "devices": 192, "parameters": 1.01e11}
    made, offers, said = planned(tmp_path / "plan", **flm)
    assert len(made.stages) > 1
    page, table = (tmp_path / "plan" / PAGE).read_text(), capsys.readouterr().out
    name = next(name for name in rows(offers, "flops") if name.startswith("planned"))
    length = made.data.sequence_length
    for number in range(1, len(made.stages) + 1):
        at = f"{name}, stage {number}"
        data, tensor, pipeline = (int(rows(offers, f"{axis} ranks")[at]) for axis in ("data", "tensor", "pipeline"))
        assert data * tensor * pipeline == 192
        assert f"{data}×{tensor}×{pipeline}" in table
        words = next(row["note"] for row in offers if row["task"] == at and row["metric"] == "data ranks")
        assert f"Stage {number} is laid out as {words}: " in said and f">{words}</td>" in page
        assert rows(offers, "micro-batch")[at] == made.train.per_device_train_batch_size
        assert made.train.batch_tokens % (data * made.train.per_device_train_batch_size * length) == 0
    assert ">Layout</th>" in page and "products take" in said


def test_what_devices_send_takes_time_unless_it_is_in_the_utilization_that_is_stated(tmp_path):
    many = {"budget": {"hours": 100}, "hardware": "a800-80g", "devices": 64}
    links = {"links": {"within": 2e10, "between": 1e9}}
    row = hardware.named("a800-80g", home=tmp_path / "home")

    def reached(name, **more):
        _, offers, _ = planned(tmp_path / name, **(many | more))
        best = next(name for name in rows(offers, "flops") if name.startswith("planned"))
        return rows(offers, "flops")[best] / rows(offers, "seconds")[best] / (64 * row.peak_flops["bfloat16"])

    stated, slow = reached("stated", utilization=PRODUCTS, **links), reached("slow", **links)
    assert stated == pytest.approx(PRODUCTS)
    assert slow < 0.8 * reached("fast") < 0.8 * PRODUCTS
    assert reached("alone", devices=1) == pytest.approx(PRODUCTS / 64)


@given(st.integers(1, 5000), st.floats(1e12, 1e26))
def test_devices_share_an_update_s_rows_evenly(devices, work):
    tokens = propose._batch_tokens(work, 1024, devices)
    suits = propose.BATCH_FACTOR * work**propose.BATCH_EXPONENT
    odd = devices // math.gcd(devices, 2**20)
    assert tokens % (1024 * odd) == 0
    assert math.log2(tokens // (1024 * odd)).is_integer()
    assert 0.7 < tokens / suits < 1.5 or tokens == 1024 * odd


def test_a_size_that_was_not_timed_is_as_fast_as_the_nearest_that_was():
    def candidate(layers, seconds):
        spec = ModelSpec(vocab_size=512, hidden_size=64, head_dim=32, num_hidden_layers=layers)
        alone = layouts.cluster(hardware.named("vcpu", home=Path("none")), 1, None, 0.3)
        arranged = layouts.best(spec, alone, layouts.Work(8, 64, "muon", (1,), ("none",)))
        return Candidate(spec, float(flops.training_flops(spec, 64)), seconds, arranged, ready=layers)

    one, other = candidate(2, 1e-5), candidate(16, 1e-3)
    for layers, nearest in ((1, one), (4, one), (12, other), (32, other)):
        found = propose._as_fast(candidate(layers, 1.0), [one, other])
        assert found.flops / found.seconds == pytest.approx(nearest.flops / nearest.seconds)
        assert found.ready == nearest.ready


SERVING = {"queries_per_day": 1e5, "hardware": "h100-80g"}


def test_serving_is_paid_for_by_the_budget_and_makes_the_model_smaller(tmp_path):
    sizes, losses = [], []
    for queries in (0.0, 3e5, 1e6):
        folder, serving = tmp_path / f"{queries:g}", SERVING | {"queries_per_day": queries}
        made, offers, said = planned(folder, serving=serving)
        best = next(name for name in rows(offers, "usd") if name.startswith("planned"))
        trained, served = (rows(offers, metric)[best] for metric in ("usd", "serving usd"))
        assert made.budget.usd == pytest.approx(1e4 - served)
        assert trained == pytest.approx(0.9 * made.budget.usd)
        spec, asked = made.specs()[-1], ServingRecipe.model_validate(serving)
        assert served == pytest.approx(serve(spec, asked, hardware.named("h100-80g", home=tmp_path)).cost.usd)
        assert "12 months" in said
        sizes.append(flops.parameters(spec))
        losses.append(rows(offers, "expected loss")[best])
    assert sizes[0] > sizes[1] > sizes[2]
    assert losses == sorted(losses)
    without, *_ = planned(tmp_path / "without")
    assert without.specs() == planned(tmp_path / "none", serving=SERVING | {"queries_per_day": 0})[0].specs()


def test_traffic_that_the_budget_does_not_pay_for_or_no_device_holds_is_refused(tmp_path):
    with pytest.raises(BudgetError, match="too little"):
        planned(tmp_path / "traffic", serving=SERVING | {"queries_per_day": 1e9})
    with pytest.raises(ResourceError, match="serving on 1 "):
        planned(tmp_path / "room", serving=SERVING | {"batch": 10**9})
    with pytest.raises(ValueError, match="money and energy"):
        told(budget={"flops": 1e20}, serving=SERVING)


def test_a_plan_does_not_grow_when_the_rate_has_fallen(tmp_path):
    for ratio in (0.2, 0.5):
        flm = {"budget": {"usd": 1e5}, "hardware": "a800-80g", "devices": 192, "parameters": 1.01e11}
        made, *_ = planned(tmp_path / f"{ratio}", **flm, schedule={"decay_ratio": ratio})
        assert len(made.stages) > 1
        assert float(made.stages[-1].duration.rstrip("%")) >= 100 * ratio - 0.01
