"""Ladder: every size and length is trained once, the law is that of the runs, and a stopped ladder goes on."""

import pytest

from espalier.budget.fit import LAW, fit
from espalier.budget.observations import read_runs
from espalier.budget.scaling import Law
from espalier.errors import DataError, RecipeError
from espalier.ladder import TRIALS, LadderRecipe, _flops, ladder, tokens_of
from espalier.ledger import Ledger
from espalier.recipe import parse
from espalier.report import Report
from espalier.run import LEDGER, PAGE, RESULTS, Run

WIDTHS, STEP = (16, 24, 32, 48), 128


@pytest.fixture(scope="module")
def recipe(corpus):
    run = {
        "data": {"sources": [str(corpus)], "vocab_size": 300, "sequence_length": 16, "held_out": 0.1},
        "model": {"head_dim": 8, "num_hidden_layers": 1, "max_position_embeddings": 32},
        "stages": [{"duration": "100%"}],
        "optimizer": {"name": "adamw", "learning_rate": 0.01, "vector_learning_rate": 0.01},
        "train": {
            "batch_tokens": STEP,
            "per_device_train_batch_size": 8,
            "evaluations": 1,
            "eval_tokens": 256,
            "torch_compile": "off",
            "bf16": "off",
            "threads": 1,
        },
    }
    sizes = [{"hidden_size": width} for width in WIDTHS]
    return LadderRecipe.model_validate(
        {"run": run, "sizes": sizes, "tokens": ["5000 tokens"], "seeds": [1], "form": "size"}
    )


@pytest.fixture(scope="module")
def climbed(recipe, shared_home, tmp_path_factory):
    """The folder of a finished ladder, and what was told."""
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESPALIER_HOME", str(shared_home))
        with Run.start(tmp_path_factory.mktemp("ladder") / "climbed", recipe, tell=told.append) as run:
            ladder(recipe, run)
    return run.folder, told


def test_every_size_is_trained_on_the_length_in_whole_steps(climbed):
    folder, _ = climbed
    observations, _ = read_runs(folder / TRIALS)
    assert len({one.parameters for one in observations}) == len(observations) == len(WIDTHS)
    assert {one.tokens for one in observations} == {round(5000 / STEP) * STEP}


def test_the_law_is_that_of_the_runs(climbed, recipe):
    folder, _ = climbed
    law = Law.load(str(folder / LAW))
    observations, about = read_runs(folder / TRIALS)
    again = fit(observations, "size", about=about)
    assert law.values == again.values and law.draws == again.draws
    assert (law.about.data, law.about.tokenizer, law.about.source) == (
        about.data,
        about.tokenizer,
        "the ladder climbed",
    )


def test_what_was_measured_is_in_report_ledger_and_page(climbed):
    folder, told = climbed
    law, report = Law.load(str(folder / LAW)), Report.load(folder / RESULTS)
    assert [row.value for row in report.rows if row.metric == "loss"] == [one.loss for one in law.observations]
    assert Ledger(folder / LEDGER).spent(kind="train").tokens == len(WIDTHS) * law.tokens.high
    assert "Loss against size" in (folder / PAGE).read_text()
    assert told[0].startswith("4 runs, ")


def test_what_is_finished_is_only_read(climbed, recipe):
    folder, first = climbed
    before = {path: path.stat().st_mtime_ns for path in (folder / TRIALS).glob("*/metrics.jsonl")}
    assert len(before) == len(WIDTHS)
    told: list[str] = []
    with Run.start(folder, recipe, tell=told.append) as run:
        ladder(recipe, run)
    assert told == first
    assert run.ledger.spent(kind="train").tokens == len(WIDTHS) * round(5000 / STEP) * STEP, "charged once"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_ladder_that_could_not_tell_its_law_is_refused_before_it_trains(recipe, tmp_path):
    for change, found in (
        ({"form": "size_and_data"}, "4 runs for 5 values"),
        ({"form": "size_and_data", "seeds": (1, 2)}, "1 different numbers of tokens"),
        ({"form": "size_and_data", "tokens": ("20x",), "seeds": (1, 2)}, "follow from the parameters"),
    ):
        told = recipe.model_copy(update=change)
        with (
            Run.start(tmp_path / found.replace(" ", "-"), told, tell=lambda line: None) as run,
            pytest.raises(DataError, match=found),
        ):
            ladder(told, run)
        assert not (run.folder / TRIALS).exists()


def test_runs_beyond_the_most_flops_are_left_out(recipe):
    both = recipe.model_copy(update={"tokens": ("5000 tokens", "10x")})
    every = [_flops(trial) for trial in both.trials()]
    most = sorted(every)[5]
    some = [_flops(trial) for trial in both.model_copy(update={"flops": most}).trials()]
    assert some == [spent for spent in every if spent <= most] and len(some) == 6
    assert not recipe.model_copy(update={"flops": 1.0}).trials()


@pytest.mark.parametrize(("length", "tokens"), [("3M tokens", 3e6), ("20x", 2e4), ("2.5x", 2500)])
def test_a_length_is_stated_or_follows_from_the_parameters(length, tokens):
    assert tokens_of(length, 1000) == tokens


@pytest.mark.parametrize("told", ["tokens=[25%]", "tokens=[2e9 flops]", "tokens=[x]", "tokens=[0x]"])
def test_what_is_no_length_is_refused(told):
    with pytest.raises(RecipeError, match="tokens"):
        parse(LadderRecipe, "run: {stages: [{duration: 100%}]}\nsizes: [{}, {}, {}]", [told], where="x")


def test_a_ladder_does_not_grow():
    text = "run: {stages: [{duration: 50%}, {duration: 50%}]}\nsizes: [{}, {}, {}]\ntokens: [20x]"
    with pytest.raises(RecipeError, match="don't grow"):
        parse(LadderRecipe, text, [], where="x")
