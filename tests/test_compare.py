"""Compare: every way under one budget at its best rate, the same figures however often it is asked, and the page."""

import json
import re

import pytest

from espalier import compare, records
from espalier.errors import RecipeError
from espalier.ledger import Ledger
from espalier.report import Report
from espalier.run import LEDGER, PAGE, RESULTS, Run

FLOPS = 6e8
STAGES = [{"num_hidden_layers": 1, "duration": "40%"}, {"num_hidden_layers": 3, "duration": "60%"}]
TRAIN = {
    "batch_tokens": 128,
    "per_device_train_batch_size": 8,
    "evaluations": 6,
    "eval_tokens": 256,
    "torch_compile": "off",
    "bf16": "off",
    "threads": 1,
}


def told(corpus) -> dict:
    return {
        "data": {"sources": [str(corpus)], "vocab_size": 300, "sequence_length": 16, "held_out": 0.1},
        "model": {"head_dim": 8, "hidden_size": 16, "max_position_embeddings": 32},
        "stages": STAGES,
        "optimizer": {"name": "adamw", "learning_rate": 0.01, "vector_learning_rate": 0.01},
        "train": TRAIN,
    }


@pytest.fixture(scope="module")
def recipe(corpus):
    return compare.CompareRecipe.model_validate(
        {
            "run": told(corpus),
            "flops": FLOPS,
            "share": 0.8,
            "rates": {"large": [1e-5, 0.01], "small": [0.01], "grown": [0.01, 1e30]},
            "seeds": [1, 2],
            "arms": {"stack": {"depth": "stack"}, "as it was": {"depth": "identity", "ramp": 0.5}},
        }
    )


@pytest.fixture(scope="module")
def compared(recipe, tmp_path_factory):
    """The folder of a comparison, and what was told."""
    lines: list[str] = []
    with Run.start(tmp_path_factory.mktemp("compare") / "ways", recipe, tell=lines.append) as run:
        compare.grow_compare(recipe, run)
    return run.folder, lines


def test_each_way_has_its_best_rate_and_every_seed(compared):
    folder, lines = compared
    report = Report.load(folder / RESULTS)
    rates = {row.task: row.note for row in report.rows if row.metric == "loss"}
    assert rates == dict.fromkeys(rates, "rate 0.01") and len(rates) == 4
    assert all(row.n == 2 and row.stderr > 0 for row in report.rows if row.metric == "loss")
    assert sum("its numbers diverged" in line for line in lines) == 2, "at a rate of 1e30"
    seeds = report.context["seeds"]
    assert all(one["flops"] <= FLOPS for one in seeds[compare.LARGE] + seeds[compare.SMALL])
    assert all(0.7 * FLOPS < one["flops"] <= 0.8 * FLOPS for one in seeds["stack"] + seeds["as it was"])
    assert all(abs(jump) < 1e-3 for one in seeds["as it was"] for jump in one["jumps"])
    assert all(len(one["jumps"]) == 1 for one in seeds["stack"])


def test_both_operators_begin_from_one_source(compared):
    folder, _ = compared
    curves = [
        [
            (line["step"], line["eval_loss"])
            for line in records.read_lines(path / "metrics.jsonl")
            if "eval_loss" in line
        ][:2]
        for path in ((folder / compare.TRIALS / f"{name}-rate0.01-seed1") for name in ("stack", "as-it-was"))
    ]
    assert curves[0] == curves[1]


def test_the_better_baseline_is_what_others_are_measured_by(compared):
    folder, _ = compared
    report = Report.load(folder / RESULTS)
    means = {name: report.value(name, "loss") for name in (compare.LARGE, compare.SMALL)}
    better = report.context["better baseline"]
    assert means[better] == min(means.values())
    assert report.value(better, "share of FLOPs") == pytest.approx(1.0)


def test_the_page_shows_every_way(compared):
    folder, _ = compared
    page = (folder / PAGE).read_text()
    for name in (compare.LARGE, compare.SMALL, "stack", "as it was"):
        assert len(re.findall(re.escape(name), page)) >= 2
    assert "Espalier comparison" in page


def test_what_is_finished_is_only_read(compared, recipe):
    folder, first = compared
    before = {path: path.stat().st_mtime_ns for path in (folder / compare.TRIALS).glob("*/metrics.jsonl")}
    lines: list[str] = []
    with Run.start(folder, recipe, tell=lines.append) as run:
        compare.grow_compare(recipe, run)
    assert lines == first
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_ways_side_by_side_come_to_the_same(compared, recipe, tmp_path):
    rates = recipe.rates.model_copy(update={"large": (0.01,), "grown": (0.01,)})
    change = {"workers": 2, "seeds": (1,), "rates": rates, "arms": {"stack": recipe.arms["stack"]}}
    two = recipe.model_copy(update=change)
    with Run.start(tmp_path / "two", two, tell=lambda line: None) as run:
        compare.grow_compare(two, run)
    alone, beside = (Report.load(folder / RESULTS).context["seeds"] for folder in (compared[0], run.folder))
    assert {name: seeds[0]["loss"] for name, seeds in beside.items()} == {
        name: alone[name][0]["loss"] for name in beside
    }


def test_after_a_signal_nothing_more_is_begun_and_the_next_call_goes_on(recipe, tmp_path, monkeypatch):
    from espalier import errors, trials

    original, begun = trials.pretrain, []

    def pretrain(recipe, run):
        begun.append(recipe.name)
        return original(recipe, run) if len(begun) != 2 else errors.EXIT_TERMINATED

    monkeypatch.setattr(trials, "pretrain", pretrain)
    rates = recipe.rates.model_copy(update={"large": (0.01,), "grown": (0.01,)})
    short = recipe.model_copy(update={"seeds": (1,), "rates": rates, "arms": {"stack": recipe.arms["stack"]}})
    with Run.start(tmp_path / "run", short, tell=lambda line: None) as run, pytest.raises(KeyboardInterrupt):
        compare.grow_compare(short, run)
    assert len(begun) == 2 and not (run.folder / RESULTS).exists()
    with Run.start(tmp_path / "run", short, tell=lambda line: None) as run:
        compare.grow_compare(short, run)
    spent = [Ledger(path).spent(kind="train") for path in (run.folder / compare.TRIALS).glob(f"*/{LEDGER}")]
    assert len(spent) == 3
    assert Ledger(run.folder / LEDGER).spent(kind="train").flops == pytest.approx(sum(one.flops for one in spent))
    assert len(begun) == 4 and len(set(begun)) == 3, "the finished one is only read, the stopped one taken up"


def test_without_arms_every_operator_that_can_take_the_path_is_one(recipe):
    ways = recipe.model_copy(update={"arms": {}}).ways()
    names = [way.name for way in ways if way.kind == "arm"]
    assert names == ["masked", "learned", "stack", "identity"], "others come to the same, or can't"
    one, other = recipe.run.stages
    wider = recipe.run.model_copy(update={"stages": (one, other.model_copy(update={"hidden_size": 32}))})
    both = [way.name for way in recipe.model_copy(update={"arms": {}, "run": wider}).ways() if way.kind == "arm"]
    assert set(both) == {"masked", "learned", "stack", "identity", "fpi", "fpi_shares", "aki"}, (
        "zero_pad is stack's own"
    )


@pytest.mark.parametrize("setting", [{"optimizer_state": "frsh"}, {"fit": 1.5}, {"ramp": 0}, {"rate": -1}])
def test_an_arm_is_refused_what_a_stage_is_refused(recipe, setting):
    values = recipe.model_dump() | {"arms": {"odd": setting}}
    with pytest.raises(ValueError, match=next(iter(setting))):
        compare.CompareRecipe.model_validate(values)


def longer(recipe, **changes):
    """The recipe with a path of three stages."""
    path = [{"num_hidden_layers": layers, "duration": share} for layers, share in ((1, "20%"), (2, "30%"), (3, "50%"))]
    run = type(recipe.run).model_validate(recipe.run.model_dump() | {"stages": path})
    return recipe.model_copy(update={"run": run} | changes)


def test_a_size_between_is_a_baseline_that_growth_has_to_beat_too(recipe):
    several = longer(recipe, between=(2,), rates=recipe.rates.model_copy(update={"between": (0.02,)}))
    baselines = {way.name: way for way in several.ways() if way.kind == "baseline"}
    assert list(baselines) == [compare.LARGE, compare.SMALL, "stage 2 only"]
    middle = baselines["stage 2 only"]
    assert [stage.num_hidden_layers for stage in middle.stages] == [2]
    assert middle.flops == several.flops
    assert several.tried(middle) == (0.02,)
    untold = longer(recipe, between=(2,))
    assert untold.tried(middle) == untold.rates.large


@pytest.mark.parametrize("stage", [0, 1, 3, 4])
def test_the_ends_of_the_path_are_not_between(recipe, stage):
    with pytest.raises(RecipeError, match="between"):
        longer(recipe, between=(stage,)).ways()


def test_rates_at_which_all_diverge_are_refused(recipe, tmp_path):
    rates = recipe.rates.model_copy(update={"large": (1e30,)})
    bad = recipe.model_copy(update={"rates": rates, "arms": {"stack": recipe.arms["stack"]}, "seeds": (1,)})
    refused = pytest.raises(RecipeError, match="large from scratch didn't diverge")
    with Run.start(tmp_path / "run", bad, tell=lambda line: None) as run, refused:
        compare.grow_compare(bad, run)


def test_a_search_finds_the_share_with_the_lowest_loss(corpus, tmp_path):
    values = {"run": told(corpus), "flops": FLOPS, "shares": [0.2, 0.5, 0.8]}
    recipe = compare.SearchRecipe.model_validate(values)
    lines: list[str] = []
    with Run.start(tmp_path / "run", recipe, tell=lines.append) as run:
        found = compare.grow_search(recipe, run)
    rows = {row.task: row.value for row in Report.load(run.folder / RESULTS).rows}
    best = min(rows, key=rows.get)
    share = float(best.split()[-1])
    assert found == f"durations: {100 * share:g}%, {100 * (1 - share):g}%"
    assert any("edge" in line for line in lines) == (share in (0.2, 0.8))
    assert json.loads((run.folder / RESULTS).read_text())["context"]["flops"] == FLOPS
