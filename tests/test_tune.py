"""Tune: the proxy is the model made narrow, the search hangs on its losses alone, and a stopped one ends alike."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier import recipe as recipes
from espalier import tune as tuning
from espalier.budget import flops
from espalier.errors import BudgetError, RecipeError
from espalier.ledger import Ledger
from espalier.page import Point
from espalier.pipeline import PretrainRecipe
from espalier.report import Report
from espalier.run import LEDGER, PAGE, RESULTS, Run
from espalier.trials import Figures
from espalier.tune import AXES, RATE, TRIALS, TUNED, VECTOR_RATE, Found, Tried, TuneRecipe, importances, tune

COUNT, TOKENS, OWN = 4, 640, 0.001
GAIN, MULTIPLIER = AXES[1:]
BASE = {
    "run": {
        "seed": 5,
        "budget": {"hours": 1},
        "data": {"vocab_size": 300, "sequence_length": 16, "held_out": 0.1},
        "model": {"head_dim": 8, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 32},
        "stages": [{"duration": "40%", "num_hidden_layers": 1}, {"duration": "60%"}],
        "optimizer": {"name": "adamw", "learning_rate": OWN, "vector_learning_rate": 3 * OWN},
        "train": {
            "batch_tokens": 128,
            "per_device_train_batch_size": 8,
            "evaluations": 1,
            "eval_tokens": 256,
            "torch_compile": "off",
            "bf16": "off",
            "threads": 1,
        },
    },
    "width": 16,
    "duration": f"{TOKENS} tokens",
    "trials": COUNT,
}


def told(*overrides: str) -> TuneRecipe:
    return recipes.parse(TuneRecipe, json.dumps(BASE), list(overrides), where="x")


@pytest.fixture(scope="module")
def recipe(corpus):
    """Its rate is far too low, so that others are better."""
    spans = {RATE: [OWN, 100 * OWN], GAIN: [0.5, 2], MULTIPLIER: [0.5, 2]}
    return told(f"run.data.sources=[{corpus}]", f"axes={json.dumps(spans)}")


@pytest.fixture(scope="module")
def searched(recipe, shared_home, tmp_path_factory):
    """The folder of a finished search, and what was told."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESPALIER_HOME", str(shared_home))
        with Run.start(tmp_path_factory.mktemp("tune") / "searched", recipe, tell=said.append) as run:
            tune(recipe, run)
    return run.folder, said


@pytest.fixture(autouse=True)
def home(shared_home, monkeypatch):
    monkeypatch.setenv("ESPALIER_HOME", str(shared_home))


def trials_of(folder):
    names = sorted(path.name for path in (folder / TRIALS).iterdir())
    return [recipes.load(PretrainRecipe, folder / TRIALS / name / "recipe.yaml") for name in names]


def values_of(trial):
    return {RATE: trial.optimizer.learning_rate, GAIN: trial.parametrization.gain} | {
        MULTIPLIER: trial.parametrization.output_multiplier
    }


def trained(folder) -> tuple[float, float]:
    spent = Ledger(folder / LEDGER).spent(kind="train")
    return spent.tokens, spent.flops


def test_a_trial_is_the_run_made_narrow_and_the_first_has_its_own_values(searched, recipe):
    folder, _ = searched
    [first, *others] = trials_of(folder)
    assert len(others) == COUNT - 1
    changed = {key for key, *_ in recipes.changes(recipe.run.model_dump(), first.model_dump())}
    assert {key.split(".")[0] for key in changed} == {"budget", "name", "samples", "stages"}
    [narrow], wide = first.specs(), recipe.run.specs()[-1]
    assert (narrow.hidden_size, narrow.num_hidden_layers, narrow.head_dim) == (16, 2, 8)
    assert narrow.logits_scaling == wide.logits_scaling / 2
    for other in others:
        assert other.optimizer.vector_learning_rate == pytest.approx(3 * other.optimizer.learning_rate)
        differing = {key for key, *_ in recipes.changes(first.model_dump(), other.model_dump())}
        assert differing == {*AXES, VECTOR_RATE, "name"}
        for axis, value in values_of(other).items():
            low, high = recipe.axes[axis]
            assert low <= value <= high


def test_the_tuned_recipe_is_the_run_with_the_values_of_the_lowest_loss(searched, recipe):
    folder, said = searched
    report, tuned = Report.load(folder / RESULTS), recipes.load(PretrainRecipe, folder / TUNED)
    losses = {row.task: row.value for row in report.rows if row.task.startswith("trial")}
    assert len(losses) == COUNT
    best = min(losses, key=losses.__getitem__)
    assert values_of(tuned) == values_of(trials_of(folder)[int(best[-3:])]) == report.context["best"]
    assert report.value("best values", "gain") == losses["trial-000"] - losses[best] > 0
    differing = {key for key, *_ in recipes.changes(recipe.run.model_dump(), tuned.model_dump())}
    assert differing == {*AXES, VECTOR_RATE, "name", "samples"}
    pasted = said[-1].splitlines()[-1].removeprefix("as settings: ").split()
    again = recipes.parse(PretrainRecipe, recipes.dump(tuned), pasted, where="x")
    assert values_of(again) == pytest.approx(values_of(tuned), rel=1e-3)
    assert again.optimizer.vector_learning_rate == pytest.approx(tuned.optimizer.vector_learning_rate, rel=1e-3)


def test_what_is_finished_is_only_read_and_not_charged_again(searched, recipe):
    folder, first = searched
    assert trained(folder)[0] == COUNT * TOKENS
    before = {path: path.stat().st_mtime_ns for path in (folder / TRIALS).glob("*/metrics.jsonl")}
    charged = trained(folder)
    said: list[str] = []
    with Run.start(folder, recipe, tell=said.append) as run:
        tune(recipe, run)
    assert said == first
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == COUNT
    assert trained(folder) == charged


@pytest.mark.parametrize("done", [1, 3])
def test_a_search_that_was_stopped_ends_as_one_that_was_not(searched, recipe, done, tmp_path, monkeypatch):
    folder, said = searched
    carry_out, calls = tuning.carry_out, []

    def stopping(*arguments, **more):
        if len(calls) == done:
            raise KeyboardInterrupt
        calls.append(arguments)
        return carry_out(*arguments, **more)

    monkeypatch.setattr(tuning, "carry_out", stopping)
    with Run.start(tmp_path / "searched", recipe, tell=lambda line: None) as run, pytest.raises(KeyboardInterrupt):
        tune(recipe, run)
    assert len(list((run.folder / TRIALS).iterdir())) == done and not (run.folder / TUNED).exists()
    monkeypatch.setattr(tuning, "carry_out", carry_out)
    again: list[str] = []
    with Run.start(run.folder, recipe, tell=again.append) as run:
        tune(recipe, run)
    assert again == said
    assert trained(run.folder) == trained(folder)
    for name in (TUNED, RESULTS):
        assert (run.folder / name).read_text() == (folder / name).read_text()


def test_numbers_that_diverge_are_the_worst_result_and_are_charged(recipe, tmp_path):
    wild = recipe.model_copy(update={"axes": {RATE: (OWN, 1e38)}})
    with Run.start(tmp_path / "wild", wild, tell=lambda line: None) as run:
        tune(wild, run)
    report = Report.load(run.folder / RESULTS)
    assert report.context["diverged"]
    assert report.context["best"][RATE] < 1e36
    assert "diverged" in (run.folder / PAGE).read_text()
    each = [Ledger(path).spent(kind="train").flops for path in (run.folder / TRIALS).glob(f"*/{LEDGER}")]
    assert len(each) == COUNT and trained(run.folder)[1] == sum(each)


def test_own_values_that_diverge_leave_the_gain_unknown(recipe, tmp_path):
    optimizer = {"name": "adamw", "learning_rate": 1e37}
    values = {"run": recipe.run.model_dump() | {"optimizer": optimizer}, "axes": {RATE: (1e-5, 1e38)}}
    wild = TuneRecipe.model_validate(recipe.model_dump() | values)
    with Run.start(tmp_path / "wild", wild, tell=lambda line: None) as run:
        tune(wild, run)
    report = Report.load(run.folder / RESULTS)
    assert "trial-000" in report.context["diverged"] and report.context["best"][RATE] < 1e36
    assert not [row for row in report.rows if row.metric == "gain" or row.task == "own values"]
    assert "own diverged" in (run.folder / PAGE).read_text()


def test_a_search_in_which_all_diverge_is_refused(recipe, tmp_path):
    run_values = recipe.run.model_dump() | {"optimizer": {"name": "adamw", "learning_rate": 1e37}}
    wild = TuneRecipe.model_validate(
        recipe.model_dump() | {"run": run_values, "axes": {RATE: (1e36, 1e38)}, "trials": 2}
    )
    with (
        Run.start(tmp_path / "wild", wild, tell=lambda line: None) as run,
        pytest.raises(RecipeError, match="diverged in every trial"),
    ):
        tune(wild, run)
    assert not (run.folder / TUNED).exists()


def bowl(values: dict[str, float]) -> float:
    """A loss with its lowest point, 3, at twice the own rate and half the own gain; rates beyond diverge."""
    away = math.log2(values[RATE] / (2 * OWN)) ** 2 + 0.25 * math.log2(values[GAIN] / 0.5) ** 2
    return math.inf if values[RATE] > 6 * OWN else 3 + away


def search(recipe: TuneRecipe, folder) -> Found:
    """A search whose trials aren't trained: their losses are those of the bowl."""

    def carried(trials, run, *, workers, tell, first):
        assert len(trials) <= workers
        losses = [bowl(values_of(trial.recipe)) for trial in trials]
        points = [Point(1, 1, None, 1, 1, loss) for loss in losses]
        return [None if point.loss == math.inf else Figures(point.loss, 1, 1, [point], []) for point in points]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "carry_out", carried)
        with Run.start(folder, recipe, tell=lambda line: None) as run:
            return Found(recipe, tuning._search(recipe, recipe.count(), run))


@pytest.fixture(scope="module")
def bowled(tmp_path_factory):
    return search(told("trials=30"), tmp_path_factory.mktemp("tune") / "bowl")


def test_the_search_comes_near_the_lowest_point(bowled):
    assert len(bowled.tried) == 30
    assert bowled.best.loss < 3.2 < bowled.own.loss == bowl(bowled.recipe.own)
    assert {one.loss for one in bowled.tried if one.values[RATE] > 6 * OWN} == {math.inf}
    random, later = ([one.loss for one in part] for part in (bowled.tried[1:11], bowled.tried[20:]))
    assert sorted(later)[5] < sorted(random)[5], "it goes where it was good"


def test_a_shorter_search_is_the_beginning_of_a_longer_one_and_seeds_differ(bowled, tmp_path):
    assert search(told("trials=14"), tmp_path / "short").tried == bowled.tried[:14]
    other = search(told("trials=2", "seed=2"), tmp_path / "other").tried
    assert other[0] == bowled.tried[0] and other[1] != bowled.tried[1]


def test_trials_side_by_side_are_asked_for_together(tmp_path):
    one, two = (search(told("trials=14", "workers=3"), tmp_path / name).tried for name in ("one", "two"))
    assert one == two and [tried.name for tried in one] == [f"trial-{number:03}" for number in range(14)]


@pytest.fixture(scope="module")
def plain():
    return told()


@given(st.integers(2, 100), st.floats(0.1, 50))
@settings(max_examples=25)
def test_the_flops_suffice_for_every_trial(plain, trials, affordable):
    each = plain.trial_flops()
    recipe = plain.model_copy(update={"trials": trials, "flops": affordable * each})
    if affordable < 2:
        with pytest.raises(BudgetError, match="two trials"):
            recipe.count()
    else:
        assert recipe.count() == min(trials, int(recipe.flops / each))
        assert recipe.count() * each <= recipe.flops


def test_a_trial_takes_what_its_recipe_says():
    [spec] = told().trial(0, told().own).recipe.specs()
    assert told().trial_flops() == TOKENS * flops.training_flops(spec, 16)
    assert told("duration=2e9 flops").trial_flops() == 2e9


numbers = st.floats(0.01, 100)


@given(st.lists(st.tuples(numbers, numbers), min_size=12, max_size=40, unique_by=(lambda p: p[0], lambda p: p[1])))
def test_only_the_order_of_the_losses_matters_and_shares_add_up(points):
    tried = [Tried("", {"a": a, "b": b}, a) for a, b in points]
    shares = importances(tried)
    assert sum(shares.values()) == pytest.approx(1)
    diverged = [Tried("", one.values, one.loss if one.loss < max(points)[0] else math.inf) for one in tried]
    assert importances(diverged) == shares


def test_importance_is_that_of_the_axis_on_which_the_loss_hangs(bowled):
    shares = bowled.importances
    assert shares[RATE] > shares[GAIN] > shares[MULTIPLIER]
    assert importances(bowled.tried[:7]) == {}, "as many unknowns as trials"


@pytest.mark.parametrize(
    ("best", "edges"),
    [((0.02, 1.0), []), ((0.0101, 1.0), [RATE]), ((0.02, 7.9), [GAIN]), ((0.99, 0.126), [RATE, GAIN])],
)
def test_a_best_value_at_an_end_of_its_span_is_told(best, edges):
    recipe = told(f"axes={{{RATE}: [0.01, 1], {GAIN}: [0.125, 8]}}", "run.optimizer.learning_rate=0.01")
    found = Found(
        recipe, [Tried("own", recipe.own, 2.0), Tried("best", dict(zip((RATE, GAIN), best, strict=True)), 1.0)]
    )
    assert found.edges() == edges
    assert [note for note in found.notes() if "search beyond" in note] == [
        f"{axis} is best at an end of its span: search beyond it." for axis in edges
    ]


def test_spans_that_are_not_stated_lie_around_the_own_values():
    for axis, (low, high) in told().axes.items():
        assert (low * 8, high / 8) == pytest.approx((told().own[axis],) * 2)
    assert tuple(told("run.optimizer.learning_rate=0.5").axes) == AXES
    assert told("run.optimizer.learning_rate=0.5").axes[RATE] == (0.0625, 4.0)


def test_any_number_of_the_run_can_be_an_axis_and_then_the_vectors_rate_is_free():
    axes = {
        VECTOR_RATE: [0.001, 0.1],
        RATE: [0.001, 0.1],
        "schedule.decay_ratio": [0.1, 1.0],
        "stages.0.rate": [0.5, 2],
    }
    recipe = told(f"axes={json.dumps(axes)}")
    changed = recipe.told({RATE: 0.05, "schedule.decay_ratio": 0.9, "stages.0.rate": 0.5})
    assert (changed.optimizer.learning_rate, changed.optimizer.vector_learning_rate) == (0.05, 3 * OWN)
    assert (changed.schedule.decay_ratio, changed.stages[0].rate) == (0.9, 0.5)
    assert recipe.told(recipe.own) == recipe.run


@pytest.mark.parametrize(
    ("sizes", "width", "expected"),
    [
        ({"hidden_size": 128, "num_key_value_heads": 4}, 64, {"num_attention_heads": 8, "num_key_value_heads": 2}),
        ({"hidden_size": 128, "num_key_value_heads": 1}, 32, {"num_attention_heads": 4, "num_key_value_heads": 1}),
        ({"hidden_size": 128, "num_key_value_heads": 4}, 16, {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ({"hidden_size": 128, "intermediate_size": 512}, 32, {"intermediate_size": 128, "num_hidden_layers": 2}),
        ({"hidden_size": 128, "num_attention_heads": 4}, 96, {"num_attention_heads": 3, "num_key_value_heads": 3}),
    ],
)
def test_a_proxy_keeps_the_ratios(sizes, width, expected):
    recipe = told(f"width={width}", *(f"run.model.{key}={value}" for key, value in sizes.items()))
    shape = recipe.shape().model_dump()
    assert shape["hidden_size"] == width and {key: shape[key] for key in expected} == expected
    assert recipe.trial(0, recipe.own).recipe.specs()


@pytest.mark.parametrize("width", [12, 40, 64])
def test_a_width_without_whole_heads_or_beyond_the_model_is_refused(width):
    with pytest.raises(RecipeError, match="a multiple of 8, for whole heads, up to the model's own 32"):
        told(f"width={width}").count() and told(f"width={width}").shape()


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("run.parametrization.kind=standard", "only under it do values hold"),
        ("duration=10%", "no budget to take a share of"),
        ("axes={optimizer.raet: [0.1, 1]}", "Did you mean 'rate'|unknown key 'raet'"),
        ("axes={optimizer.learning_rate: [0.1, 1]}", r"without the run's own value 0\.001"),
        ("axes={optimizer.learning_rate: [1, 0.0001]}", "isn't a span"),
        ("axes={optimizer.learning_rate: [0, 1]}", "greater than 0"),
        ("axes={train.batch_tokens: [64, 256]}", "may have a fraction"),
        ("axes={train.eval_tokens: [64, 1024]}", "may have a fraction"),
        ("axes={}", "at least 1"),
    ],
)
def test_what_cannot_be_searched_is_refused(override, found):
    with pytest.raises(RecipeError, match=found):
        told(override)


def test_the_page_has_a_chart_for_each_axis_with_every_trial(searched):
    folder, _ = searched
    html = (folder / PAGE).read_text()
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert [axis["name"] for axis in data["axes"]] == list(AXES)
    for number, axis in enumerate(data["axes"]):
        assert f'id="axis-{number}"' in html
        assert [mark["own"] for mark in axis["marks"]] == [True] + [False] * (COUNT - 1)
        [best] = [mark for mark in axis["marks"] if mark["best"]]
        assert best["y"] == min(mark["y"] for mark in axis["marks"])
        assert all(axis["y"]["low"] <= mark["y"] <= axis["y"]["high"] for mark in axis["marks"])
        assert all(axis["x"]["low"] <= mark["x"] <= axis["x"]["high"] for mark in axis["marks"])
