"""`budget lifecycle`: figures that add up, a page that is whole, and refusals that say what would help."""

import json
import re

import pytest
from pydantic import ValidationError

from espalier import units
from espalier.budget.lifecycle import LifecycleRecipe, lifecycle
from espalier.budget.lifecycle_page import SHOWN
from espalier.budget.scaling import Law
from espalier.errors import BudgetError, ModelError, RecipeError, ResourceError
from espalier.ledger import RESOURCES
from espalier.report import Report
from espalier.run import PAGE, RESULTS, Run

LAW = Law.load("hoffmann-2022")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPALIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def told(queries=1e6, serving=None, **more) -> LifecycleRecipe:
    values = {"hardware": "h100-80g"} | ({} if "budget" in more else {"loss": 2.2}) | more
    serving = {"queries_per_day": queries, "hardware": "h100-80g", "output_tokens": 16} | (serving or {})
    return LifecycleRecipe.model_validate(values | {"serving": serving})


@pytest.fixture
def carry_out(tmp_path):
    """Carry the verb out; its report, its page and what was said."""

    def carry_out(recipe, name="run"):
        lines: list[str] = []
        with Run.start(tmp_path / name, recipe, tell=lines.append) as run:
            assert lifecycle(recipe, run) == run.folder / PAGE
            return Report.load(run.folder / RESULTS), (run.folder / PAGE).read_text(), "\n".join(lines)

    return carry_out


@pytest.mark.parametrize("aim", [{"loss": 2.2}, {"budget": 20_000}, {"budget": 1e22, "resource": "flops"}])
def test_training_and_serving_add_up_and_the_chosen_size_is_the_cheapest(carry_out, aim):
    report, _, said = carry_out(told(**aim))
    resource, sizes = aim.get("resource", "usd"), {row.task for row in report.rows}
    for size in sizes:
        for name in RESOURCES:
            parts = [report.value(size, f"{phase} {name}") for phase in ("training", "serving", "total")]
            assert parts[0] + parts[1] == pytest.approx(parts[2])
        loss = LAW.terms.loss(report.value(size, "parameters"), report.value(size, "training tokens"))
        assert loss == pytest.approx(report.context["loss"])
    total = {size: report.value(size, f"total {resource}") for size in sizes}
    chosen, alone = report.context["chosen"], report.context["without_serving"]
    assert min(total, key=total.get) == chosen
    assert report.value(chosen, "loss on the chosen size's total") == pytest.approx(report.context["loss"])
    assert report.context["saved"] == pytest.approx(total[alone] - total[chosen])
    assert total[chosen] == pytest.approx(aim.get("budget", total[chosen]))
    assert chosen in said and alone in said and "All costs are estimates" in said


def test_training_is_priced_by_the_row_and_its_utilization(carry_out):
    report, _, _ = carry_out(told(utilization=0.5))
    seconds, spent, usd = (report.value("32 layers × 2048", f"training {name}") for name in ("seconds", "flops", "usd"))
    assert seconds == pytest.approx(spent / 989e12 / 0.5)
    assert usd == pytest.approx(seconds / 3600 * 2.50)


def test_the_break_even_is_said_and_lies_between_both_choices(carry_out):
    report, _, said = carry_out(told())
    even = report.context["break_even_queries_per_day"]
    assert report.context["chosen"] != report.context["without_serving"]
    assert re.search(r"costs less than .* from .* queries a day on", said)
    pair = report.context["chosen"], report.context["without_serving"]
    for name, queries in (("beyond", 1.05 * even), ("below", 0.95 * even)):
        found, _, _ = carry_out(told(queries=queries), name)
        smaller, larger = (found.value(size, "total usd") for size in pair)
        assert (smaller < larger) == (name == "beyond")


def test_without_queries_the_same_size_is_chosen_either_way(carry_out):
    report, _, said = carry_out(told(queries=0))
    assert report.context["chosen"] == report.context["without_serving"] and report.context["saved"] == 0
    assert "the same size would be chosen" in said


def test_whole_devices_cost_as_much_at_any_little_traffic(carry_out):
    costs = [
        carry_out(told(queries=queries, serving={"charged": "whole"}), f"{queries:g}")[0].value(
            "32 layers × 2048", "serving usd"
        )
        for queries in (1, 1000)
    ]
    assert costs[0] == costs[1] == pytest.approx(365.25 * 24 * 2.50)


@pytest.mark.parametrize(("queries", "busy"), [(0, "0 devices"), (1, "&lt;0.01 devices"), (1e7, r"\d[\d.]* devices")])
def test_devices_that_are_hardly_busy_are_told_as_such(carry_out, queries, busy):
    _, text, _ = carry_out(told(queries=queries))
    assert re.search(rf">{busy} busy on average<", text)


def test_sizes_that_the_devices_do_not_hold_are_left_out_and_it_is_said(carry_out):
    report, _, said = carry_out(told(serving={"hardware": "t4"}))
    sizes = [row.value for row in report.rows if row.metric == "parameters"]
    assert 16e9 / 2 / 3 < max(sizes) < 16e9 / 2, "two bytes a parameter; the next size is no three times as large"
    assert "are left out" in said and "t4" in said
    more, _, _ = carry_out(told(serving={"hardware": "t4", "devices": 8}), "more")
    assert max(row.value for row in more.rows if row.metric == "parameters") > 3 * max(sizes)


@pytest.mark.parametrize(
    ("resource", "title", "unit"),
    [("usd", "Money", r"\$"), ("kwh", "Energy", "Wh"), ("kgco2e", "Carbon", "gCO₂e"), ("flops", "Compute", "FLOP")],
)
def test_the_page_is_whole_and_loads_nothing(carry_out, resource, title, unit):
    report, text, _ = carry_out(told(queries=5e6, resource=resource, devices=64))
    seconds = report.value(report.context["chosen"], "training seconds")
    assert units.duration(seconds / 64) in text, "how long 64 devices take"
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org)", text)
    assert "drawLifecycle" in text and "drawLoss" not in text, "only the drawing that the page shows"
    chart = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])["lifecycle"]
    totals = [sum(part["amount"] for part in bar["parts"]) for bar in chart["bars"]]
    marks = {mark: bar["told"][0] for bar in chart["bars"] for mark in bar["mark"].split(", ") if mark}
    assert marks == {"chosen": report.context["chosen"], "without serving": report.context["without_serving"]}
    for bar, total in zip(chart["bars"], totals, strict=True):
        assert total == pytest.approx(report.value(bar["told"][0], f"total {resource}"))
        assert total <= chart["y"]["high"]
        assert total <= SHOWN * min(totals) or "without serving" in bar["mark"]
        assert all(re.search(unit, line) for line in bar["told"][1:])
    assert chart["title"] == title and len(totals) >= 3
    for name in ("32 × 2048", "chosen", "Whether the training devices"):
        assert name in text


def test_the_size_without_serving_is_shown_however_dear_it_is(carry_out):
    report, text, _ = carry_out(told(queries=1e9, loss=2.4, furthest=1e9))
    chosen, alone = (report.value(report.context[key], "total usd") for key in ("chosen", "without_serving"))
    assert alone > SHOWN * chosen
    assert "without serving</td>" in text and '"mark":"without serving"' in text


def saved_law(path, **more) -> str:
    Law.model_validate(LAW.model_dump() | more).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("change", "error", "texts"),
    [
        ({"budget": 1.0}, BudgetError, ["$1.00", "serving the smallest size", "Raise it"]),
        ({"budget": 1e-3, "queries": 0}, RecipeError, ["outside the fitted range", "furthest="]),
        ({"loss": 1.7}, RecipeError, ["1.7", "more than 1.8", "higher loss", "larger devices"]),
        ({"loss": 5.0}, RecipeError, ["outside the fitted range", "furthest="]),
        ({"hardware": "h1000"}, RecipeError, ["h100-80g"]),
        ({"serving": {"hardware": "a1000-80g"}}, RecipeError, ["a100-80g"]),
        ({"serving": {"hardware": "vcpu", "prompt_tokens": 10**7}}, ResourceError, ["vCPU", "serving.batch"]),
        ({"serving": {"hardware": "vcpu", "devices": 2}}, ResourceError, ["no link"]),
        ({"law": "chinchilla"}, RecipeError, ["hoffmann-2022", "budget fit"]),
        ({"head_dim": 3}, ModelError, ["head_dim"]),
    ],
)
def test_what_can_not_be_chosen_is_refused(carry_out, change, error, texts):
    with pytest.raises(error) as refused:
        carry_out(told(**change))
    for text in texts:
        assert text in str(refused.value)


def test_a_law_of_size_alone_says_nothing_of_tokens(carry_out, tmp_path):
    name = saved_law(tmp_path / "law.json", form="size", values={"E": 1.69, "A": 406.4, "alpha": 0.34})
    with pytest.raises(RecipeError, match="size alone"):
        carry_out(told(law=name))


def test_what_training_takes_none_of_is_no_measure(carry_out, home):
    home.mkdir()
    (home / "hardware.yaml").write_text("hardware: {h100-80g: {usd_per_hour: 0}}")
    with pytest.raises(RecipeError, match="usd, of which NVIDIA H100"):
        carry_out(told())
    assert carry_out(told(resource="kwh"), "energy")


def test_one_aim_is_stated():
    for aims in ({"loss": None}, {"loss": 2.2, "budget": 1e4}):
        with pytest.raises(ValidationError, match="one of loss=NATS and budget=AMOUNT"):
            told(**aims)
