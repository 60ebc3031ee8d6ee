"""Stage by stage: the same evaluation of what each stage left, against what the model had cost by then."""

import json
import shutil

import pytest
import yaml

from espalier import records
from espalier.errors import RecipeError, RunError
from espalier.evaluate.stages import StageByStageRecipe, evaluate_stages, models
from espalier.ledger import Ledger
from espalier.report import Report
from espalier.run import FINAL, LEDGER, PAGE, RESULTS, STATE, Run

NAMES = ["stage-1", "stage-2", "stage-3"]


@pytest.fixture(scope="module")
def grown(espalier_in, recipe_file, tmp_path_factory):
    """A growth run of three stages whose models were kept."""
    folder = tmp_path_factory.mktemp("grown")
    told = yaml.safe_load(recipe_file.read_text())
    third = {"num_hidden_layers": 3, "hidden_size": 48, "duration": "640 tokens", "depth": "identity"}
    told |= {"stages": [*told["stages"], third], "train": {**told["train"], "keep": "stages"}}
    (folder / "grown.yaml").write_text(yaml.safe_dump(told))
    done = espalier_in(folder)("run", folder / "grown.yaml")
    assert done.code == 0, done.err
    return folder / "runs" / "tiny"


@pytest.fixture
def settings(corpus):
    return {
        "data": {"sources": [str(corpus)], "held_out": 0.2, "sequence_length": 16},
        "eval_tokens": 256,
        "per_device_eval_batch_size": 4,
    }


def test_each_stage_is_evaluated_and_shown_against_what_it_had_cost(grown, settings, espalier, tmp_path):
    told = {"run": str(grown), "method": "loss", "settings": settings}
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(told))
    done = espalier("evaluate", "stages", "--recipe=stages.yaml", "--name=followed")
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "followed"
    report = Report.load(folder / RESULTS)
    own = Report.load(grown / RESULTS).value("held-out", "loss")
    assert report.value("stage-3: held-out", "loss") == pytest.approx(own, rel=1e-6), "the last one is the final model"
    losses = [report.value(f"{name}: held-out", "loss") for name in NAMES]
    assert len(set(losses)) == 3
    for name in NAMES:
        assert Report.load(folder / name / RESULTS).value("held-out", "loss") in losses
        assert (folder / name / PAGE).exists()
    tokens = [report.context["stages"][name]["tokens"] for name in NAMES]
    assert tokens == [1280, 2560, 3200]
    flops = [report.context["stages"][name]["flops"] for name in NAMES]
    assert flops == sorted(flops) and flops[0] > 0
    page = (folder / PAGE).read_text()
    charts = json.loads(page.split('id="data">')[1].split("</script>")[0])
    [line] = charts["growth"]["lines"]
    assert [point["value"] for point in line["points"]] == losses
    assert [point["tokens"] for point in line["points"]] == tokens
    before = {name: (folder / name / RESULTS).stat().st_mtime_ns for name in NAMES}
    again = espalier("evaluate", "stages", "--recipe=stages.yaml", "--name=followed")
    assert again.code == 0, again.err
    assert before == {name: (folder / name / RESULTS).stat().st_mtime_ns for name in NAMES}, "what is finished is read"
    ledger = folder / LEDGER
    whole = ledger.read_bytes()
    ledger.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    records.write(folder / STATE, {"status": "running", "time": 0.0})
    assert espalier("evaluate", "stages", "--recipe=stages.yaml", "--name=followed").code == 0
    spent, own = (Ledger(at).spent(kind="evaluate") for at in (ledger, folder / NAMES[2] / LEDGER))
    assert Ledger(ledger).spent(kind="evaluate", stage=2).flops == own.flops > 0, "what a kill kept from being entered"
    assert spent.flops == sum(Ledger(folder / name / LEDGER).total.flops for name in NAMES)


def evaluate(tmp_path, run, **told):
    recipe = StageByStageRecipe(run=run, **told)
    with Run.start(tmp_path / "followed", recipe, tell=lambda line: None) as opened:
        return evaluate_stages(recipe, opened)


def test_a_run_that_kept_none_is_refused(finished, tmp_path):
    with pytest.raises(RunError, match=r"no model but the last.*train\.keep=stages"):
        evaluate(tmp_path, finished)
    with pytest.raises(RunError, match="no model folder"):
        models(tmp_path)


def test_a_run_that_ended_early_has_the_stages_that_it_came_to(grown, tmp_path):
    copy = shutil.copytree(grown, tmp_path / "copy")
    assert list(models(copy)) == NAMES and models(copy)["stage-3"] == copy / FINAL
    shutil.rmtree(copy / FINAL)
    assert list(models(copy)) == NAMES[:2]


@pytest.mark.parametrize("method", ["density", "lss"])
def test_a_method_that_asks_no_model_is_refused(grown, tmp_path, method):
    with pytest.raises(RecipeError):
        evaluate(tmp_path, grown, method=method)


def test_what_the_method_is_told_is_checked_by_its_own_recipe(grown, tmp_path):
    with pytest.raises(RecipeError, match=r"settings of stage-1.*eval_tokns"):
        evaluate(tmp_path, grown, settings={"eval_tokns": 3})
