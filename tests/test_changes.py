"""Changes on the way: every key has its verdict, what is safe changes no bit, what is accepted is on record."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import Field
from tests.keys import another, leaves
from tests.test_pipeline import killed, same_weights
from tests.test_recipe import CLASSES

from espalier import changes, recipe, records
from espalier.changes import Change
from espalier.errors import RunError
from espalier.folder import MADE
from espalier.offers import PlanRecipe
from espalier.pipeline import PretrainRecipe
from espalier.run import CHANGES, FINAL, METRICS, PAGE, RECIPE, Run
from espalier.untrusted import read_json

# What an unfinished run may be told anew; every other key of the main recipe makes another run.
ALLOWED = {
    "safe": "name samples.prompts samples.max_new_tokens expected.loss expected.low expected.high data.bad_rows "
    "data.bad_files train.logging_steps train.save_steps train.keep_checkpoints train.keep_every train.save train.keep",
    "planned": "budget.usd budget.hours budget.kwh budget.flops budget.tokens budget.usd_per_hour budget.watts "
    "budget.kgco2e_per_kwh budget.pue",
    "flag": "budget.reserve optimizer.learning_rate optimizer.vector_learning_rate optimizer.weight_decay "
    "optimizer.adam_beta1 optimizer.adam_beta2 optimizer.adam_epsilon optimizer.muon_momentum optimizer.max_grad_norm "
    "schedule.lr_scheduler_type schedule.at_growth schedule.warmup_ratio schedule.decay_ratio schedule.min_ratio "
    "schedule.rewarm_ratio train.per_device_train_batch_size train.evaluations train.eval_tokens train.on_spike "
    "train.spike_sigmas train.parallel.shard train.parallel.tensor",
}
VERDICTS = {key: verdict for verdict, keys in ALLOWED.items() for key in keys.split()}
LEAVES = dict(leaves(PretrainRecipe))


@pytest.fixture(scope="session")
def begun(recipe_file) -> PretrainRecipe:
    """The tiny recipe, with a section that is left out by default."""
    return recipe.load(PretrainRecipe, recipe_file, ["expected={loss: 2, low: 1, high: 3}"])


def test_the_keys_that_may_change_are_keys():
    assert set(VERDICTS) <= set(LEAVES)


@pytest.mark.parametrize("key", LEAVES)
def test_every_key_has_its_verdict(key, begun):
    now = recipe.parse(PretrainRecipe, recipe.dump(begun), [another(begun, key, LEAVES[key])], where=key)
    found = changes.between(begun.model_dump(mode="json"), now)
    verdict = VERDICTS.get(key, "refused")
    assert [(change.key.split(".0")[0], change.resume) for change in found] == [(key.split(".0")[0], verdict)]

    def allowed(accept: tuple[str, ...] = (), finished: bool = False) -> bool:
        try:
            changes.require_allowed(found, accept, where="run", finished=finished)
        except RunError as refused:
            assert key.split(".0")[0] in refused.found and verdict in refused.found
            return False
        return True

    assert allowed() == (verdict in ("safe", "planned"))
    assert allowed((key,)) == (verdict != "refused")
    assert allowed((key,), finished=True) == (verdict == "safe")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_what_is_stated_of_a_field_is_a_class_and_reaches_a_recipe_where_it_says_so(kind):
    for name, field in kind.model_fields.items():
        extra = field.json_schema_extra or {}
        assert extra.keys() <= {"resume"}
        assert extra.get("resume", "refused") in (*get_args(recipe.Resume), "by field")
        if extra.get("resume") == "by field":
            inner = recipe._models_in(field.annotation)
            assert len(inner) == 1 and any(
                inner_field.json_schema_extra for inner_field in inner[0].model_fields.values()
            )
            assert recipe.resume_class(kind, name) == "refused", "the section as a whole"


def test_what_states_no_class_makes_another_run():
    class Silent(recipe.Recipe):
        plain: int = 1
        length: int = Field(default=1, json_schema_extra={"unit": "m"})

    assert {recipe.resume_class(Silent, key) for key in ("plain", "length", "unknown")} == {"refused"}


def test_the_table_has_a_line_for_every_change_and_its_columns_stand():
    found = [Change("a", 1, None, "safe"), Change("stages.1.long", "x" * 99, "x" * 99 + "y", "refused")]
    lines = changes.table(found).splitlines()
    assert len(lines) == 3 and all(len(line) < 110 for line in lines)
    assert lines[2].split()[1] != lines[2].split()[2], "long values are told apart by their ends"
    starts = [[match.start() for match in re.finditer(r"(?<!\S)\S", line)] for line in lines]
    assert starts[0] == starts[1] == starts[2]


@pytest.fixture
def broken_off(espalier, recipe_file, logged_steps, tmp_path) -> Path:
    """The folder of a run that was killed after step 9; the last checkpoint is that of step 7."""
    run = tmp_path / "runs" / "tiny"
    command = espalier.start("run", recipe_file)
    command.until(lambda: logged_steps(run) >= 9)
    assert killed(command)
    return run


def test_safe_changes_all_at_once_leave_every_bit(espalier, recipe_file, begun, broken_off, finished):
    safe = [another(begun, key, LEAVES[key]) for key in ALLOWED["safe"].split()]
    renamed = broken_off.rename(broken_off.with_name("other"))
    done = espalier("run", recipe_file, *safe, "name=other")
    assert done.code == 0, done.err
    assert same_weights(renamed, finished)
    recorded = {line["key"].removesuffix(".0") for line in records.read_lines(renamed / CHANGES)}
    assert recorded == {"expected" if key.startswith("expected") else key for key in ALLOWED["safe"].split()}


def test_a_flagged_change_waits_for_consent_and_is_on_record(espalier, recipe_file, broken_off, finished):
    slower = ("run", recipe_file, "optimizer.learning_rate=0.01", "train.logging_steps=2")
    refused = espalier(*slower)
    assert refused.code == 5
    assert re.search(r"optimizer.learning_rate +0.02 +0.01 +flag\n +train.logging_steps +1 +2 +safe", refused.err)
    assert "--accept-changes optimizer.learning_rate to" in " ".join(refused.err.split())
    assert yaml.safe_load((broken_off / RECIPE).read_text())["optimizer"]["learning_rate"] == 0.02
    assert espalier(*slower, "seed=2", "--accept-changes", "optimizer.learning_rate,seed").code == 5

    done = espalier(*slower, "--accept-changes", "optimizer.learning_rate")
    assert done.code == 0, done.err
    step = int(re.search(r"Resumed at step (\d+)", done.out)[1])
    made = read_json(broken_off / FINAL / MADE)
    change = {"key": "optimizer.learning_rate", "saved": 0.02, "now": 0.01, "resume": "flag", "step": step}
    assert [line for line in made["changes"] if line.items() >= change.items()]
    assert made["recipe"]["optimizer"]["learning_rate"] == 0.01
    page = (broken_off / PAGE).read_text()
    assert (
        f"After step {step} optimizer.learning_rate was 0.01, before it 0.02." in page
        and "logging_steps was" not in page
    )
    rates = {line["step"]: line["learning_rate"] for line in records.read_lines(broken_off / METRICS) if "loss" in line}
    calm = {line["step"]: line["learning_rate"] for line in records.read_lines(finished / METRICS) if "loss" in line}
    assert all(rate == pytest.approx(calm[at] / (2 if at > step else 1)) for at, rate in rates.items())
    assert not same_weights(broken_off, finished)


def test_a_finished_run_is_kept_whatever_safe_change_it_is_told(espalier, recipe_file, copy_of_finished):
    before = {path: path.read_bytes() for path in copy_of_finished.rglob("*") if path.is_file()}
    done = espalier("run", recipe_file, "train.save_steps=9")
    assert done.code == 0 and "nothing to do" in done.out
    assert re.search(r"train.save_steps +7 +9 +safe", done.out)
    assert espalier("run", recipe_file, "budget.hours=9").code == 5
    assert {path: path.read_bytes() for path in before} == before


def test_methods_take_the_consent_that_they_ask_for(espalier, tmp_path):
    told = ["budget.usd=1000", "hardware=h100-80g"]
    Run.start(tmp_path / "runs" / "asked", recipe.parse(PlanRecipe, "", told, where="x"), tell=str).close()
    asked = ("plan", *told, "optimizer.weight_decay=0.1", "--name", "asked")
    assert "--accept-changes optimizer.weight_decay" in " ".join(espalier(*asked).err.split())
    done = espalier(*asked, "--accept-changes", "optimizer.weight_decay")
    assert done.code == 0, done.err
    later = espalier(*asked, "--accept-changes", "optimizer.weight_decay", "train.logging_steps=77")
    assert later.code == 0 and re.search(r"train.logging_steps +null +77 +safe", later.out)
    written = [path.read_text() for path in (tmp_path / "runs" / "asked").rglob("*.yaml")]
    assert len(written) > 1 and not any("logging_steps: 77" in text for text in written), "it was finished"
