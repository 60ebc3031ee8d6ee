"""The main job from end to end: what it leaves behind, and that no interruption changes a bit of it."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from espalier import files, records
from espalier.data import origin
from espalier.folder import MADE, WEIGHTS, ModelFolder
from espalier.ledger import Ledger
from espalier.report import Report
from espalier.run import FINAL, LEDGER, METRICS, PAGE, PLAN, RECIPE, RESULTS, STATE
from espalier.train.checkpoint import list_steps
from espalier.untrusted import read_json


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / FINAL / WEIGHTS)


def same_weights(run: Path, other: Path) -> bool:
    one, two = weights(run), weights(other)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def writes_text(folder: Path) -> bool:
    """Whether a model folder opens with nothing but transformers, and generates."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("def ", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return written.shape[1] == inputs.input_ids.shape[1] + 3 and bool(tokenizer.decode(written[0]))


def test_a_run_leaves_everything_that_was_promised(recipe_file, shared_home, tmp_path, monkeypatch, finished):
    """In a process of its own, from the start to the interpreter's end."""
    monkeypatch.setenv("ESPALIER_HOME", str(shared_home))
    began = time.time()
    command = [sys.executable, "-m", "espalier", "run", str(recipe_file), f"--runs={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    run = tmp_path / "tiny"
    present = {entry.name for entry in run.iterdir()}
    assert {RECIPE, PLAN, LEDGER, METRICS, STATE, RESULTS, PAGE, FINAL} <= present
    assert not any(name.startswith(files.PARTIAL) for name in present)
    assert str(run / FINAL) in done.stdout and str(run / PAGE) in done.stdout
    assert records.read(run / STATE, None)["status"] == "finished"
    assert same_weights(run, finished), "another process of the same recipe makes the same model"

    took, charged = records.read(run / STATE, None)["time"] - began, Ledger(run / LEDGER).total.seconds
    assert charged == pytest.approx(took, rel=0.05, abs=1.0)  # the system knows a process's start to a second


def test_the_final_folder_is_one_that_others_can_use(finished):
    final = ModelFolder.open(finished / FINAL)
    assert writes_text(final.path)
    assert final.tokenizer_fingerprint() == files.sha256(final.path / "tokenizer.json")
    assert final.spec.num_hidden_layers == 2 and final.spec.hidden_size == 48
    assert files.damage(final.path) is None


def test_what_is_exported_has_a_checkpoint_so_that_a_kill_beside_the_export_changes_nothing(finished):
    last = Report.load(finished / RESULTS).context["step"]
    assert last % 7 and list_steps(finished)[0] == last
    weights = (finished / f"checkpoint-{last}" / WEIGHTS).read_bytes()
    assert weights == (finished / FINAL / WEIGHTS).read_bytes()


def test_made_json_says_how_and_at_what_cost(finished):
    made = read_json(finished / FINAL / MADE)
    assert (made["method"], made["seed"], made["run"], made["parents"]) == ("pretrain", 1, "tiny", [])
    assert made["recipe"] == yaml.safe_load((finished / RECIPE).read_text())
    assert [stage["hidden_size"] for stage in made["stages"]] == [32, 48]
    assert made["versions"]["torch"] == torch.__version__
    assert 0 < made["cost"]["seconds"] <= Ledger(finished / LEDGER).total.seconds
    assert made["cost"]["tokens"] == 2560


def test_the_card_has_front_matter_with_the_results(finished):
    card = (finished / FINAL / "README.md").read_text()
    front, text = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    values = yaml.safe_load(front)
    assert values["library_name"] == "transformers" and values["pipeline_tag"] == "text-generation"
    (entry,) = values["model-index"]
    results = Report.load(finished / RESULTS)
    metrics = {m["type"]: m["value"] for result in entry["results"] for m in result["metrics"]}
    assert metrics == {row.metric: row.value for row in results.rows}
    assert values["co2_eq_emissions"]["emissions"] > 0
    assert f"{results.value('held-out', 'loss'):.4f}" in text


@pytest.mark.parametrize("end", ["low", "high"])
def test_an_expected_interval_has_two_ends(espalier, recipe_file, end):
    refused = espalier("run", recipe_file, f"expected={{loss: 2, {end}: 2}}")
    assert refused.code == 2 and "only one of low and high" in refused.err
    assert espalier("run", recipe_file, "expected={loss: 2, low: 1, high: 3}", "--dry-run").code == 0


def test_results_metrics_ledger_and_plan_agree(finished):
    results, plan = Report.load(finished / RESULTS), records.read(finished / PLAN, None)
    lines = list(records.read_lines(finished / METRICS))
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert results.value("held-out", "loss") == evaluated[-1]
    assert results.context["samples"][0][0] == "def "
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert evaluated[-1] < 0.5 * lines[0]["loss"], "the model has learned something"
    ledger = Ledger(finished / LEDGER)
    trained = ledger.spent(kind="train")
    assert trained.tokens == plan["plan"]["total"]["tokens"] == 2560
    assert trained.flops == pytest.approx(plan["plan"]["total"]["flops"])
    assert {"start", "plan", "data", "train", "evaluate", "grow", "checkpoint", "export"} == {
        entry.kind for entry in ledger.entries
    }
    assert len(list_steps(finished)) == 2


def test_a_finished_run_is_not_done_again(espalier, copy_of_finished, recipe_file):
    before = {path: path.read_bytes() for path in copy_of_finished.rglob("*") if path.is_file()}
    done = espalier("run", recipe_file)
    assert done.code == 0 and "nothing to do" in done.out
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    "number, code, step", [(signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 24)], ids=["ctrl-c", "terminate"]
)
def test_a_signal_saves_and_the_next_run_ends_with_the_same_bits(
    espalier, recipe_file, finished, logged_steps, number, code, step, tmp_path
):
    run = tmp_path / "runs" / "tiny"
    command = espalier.start("run", recipe_file)
    command.until(lambda: logged_steps(run) >= step)
    command.send(number)
    stopped = command.wait()
    assert stopped.code == code, stopped.err
    assert number.name in stopped.out and "Run it again to go on." in stopped.out
    assert records.read(run / STATE, None)["status"] == "stopped"
    newest = list_steps(run)[0]
    assert step <= newest <= logged_steps(run) < 40
    assert writes_text(run / f"checkpoint-{newest}")

    resumed = espalier("run", recipe_file)
    assert resumed.code == 0, resumed.err
    assert f"Resumed at step {newest} " in resumed.out
    assert same_weights(run, finished)
    lines = [line["step"] for line in records.read_lines(run / METRICS) if "loss" in line]
    assert lines == list(range(1, 41))
    assert Ledger(run / LEDGER).spent(kind="train").tokens == 2560


def killed(command) -> bool:
    command.send(signal.SIGKILL)
    return command.wait().code == -signal.SIGKILL


def test_killed_at_random_moments_a_run_ends_with_the_same_bits(
    espalier, recipe_file, finished, tmp_path, logged_steps
):
    run, moment = tmp_path / "runs" / "tiny", random.Random(7)
    for _ in range(3):
        command = espalier.start("run", recipe_file)
        step = logged_steps(run) + moment.randrange(8)
        command.until(lambda step=step: logged_steps(run) >= step)
        time.sleep(moment.uniform(0, 0.03))
        assert killed(command)
    done = espalier("run", recipe_file)
    assert done.code == 0, done.err
    assert same_weights(run, finished)
    assert not list(run.glob(f"{files.PARTIAL}*"))
    assert Ledger(run / LEDGER).spent(kind="train").tokens >= 2560, "work done in vain stays in the ledger"


@pytest.mark.parametrize("sign", [RECIPE, PLAN, f"{files.PARTIAL}checkpoint-*", "checkpoint-7", f"*{FINAL}*", FINAL])
def test_killed_while_something_is_written_a_run_ends_with_the_same_bits(
    espalier, recipe_file, finished, tmp_path, sign
):
    run = tmp_path / "runs" / "tiny"
    command = espalier.start("run", recipe_file)
    command.until(lambda: run.exists() and any(run.glob(sign)))
    assert killed(command)
    done = espalier("run", recipe_file)
    assert done.code == 0, done.err
    assert same_weights(run, finished)
    assert not list(run.glob(f"{files.PARTIAL}*"))


def test_killed_before_its_recipe_was_written_a_run_begins_again(espalier, recipe_file, tmp_path):
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / ".lock").touch()
    (run / f"{files.PARTIAL}{RECIPE}-1").write_text("na")
    done = espalier("run", recipe_file, "stages.0.duration=64 tokens", "stages.1.duration=64 tokens")
    assert done.code == 0, done.err


def test_a_budget_that_ends_first_leaves_a_usable_model(espalier, recipe_file, finished, tmp_path):
    training = records.read(finished / PLAN, None)["plan"]["total"]["flops"]
    cap = 1.01 * training  # the training alone would fit, the evaluations don't
    command = ("run", recipe_file, f"budget.flops={cap}", "budget.reserve=0")
    done = espalier(*command)
    assert done.code == 10, done.err
    run = tmp_path / "runs" / "tiny"
    state = records.read(run / STATE, None)
    assert (state["status"], state["reason"]) == ("finished", "the budget was spent")
    assert state["time"] == pytest.approx(time.time(), abs=600)
    assert set(state["seals"]) == {RECIPE, PLAN, LEDGER, METRICS, RESULTS, origin.RECORD}
    assert Ledger(run / LEDGER).total.flops <= cap
    assert 0 < Report.load(run / RESULTS).context["step"] < 40
    assert writes_text(run / FINAL)
    assert "nothing to do" in espalier(*command).out


SHARES = ("stages.0.duration=40%", "stages.1.duration=60%", "train.logging_steps=20", "train.save_steps=100000")


def replanned(run: Path) -> list[dict]:
    return [line for line in records.read_lines(run / METRICS) if "planned_anew" in line]


def test_an_hour_that_passed_unused_is_planned_for(espalier, recipe_file, tmp_path, logged_steps):
    """The process is stopped for a while, as when a laptop is closed."""
    run, seconds = tmp_path / "runs" / "tiny", 24.0
    command = espalier.start("run", recipe_file, *SHARES, f"budget.hours={seconds / 3600}")
    command.until(lambda: logged_steps(run) >= 20)
    command.send(signal.SIGSTOP)
    time.sleep(5)
    command.send(signal.SIGCONT)
    done = command.wait()
    least = min(line["planned_anew"] for line in replanned(run))
    assert "Planned anew" in done.out and f"{least:.2f} x" in done.out
    kept = records.read(run / PLAN, None)
    assert kept["plan"]["total"]["tokens"] != kept["first"]["total"]["tokens"]
    assert Ledger(run / LEDGER).total.seconds < seconds
    assert ModelFolder.open(run / FINAL).spec.hidden_size == 48, "it has grown"
    assert "what was left of the plan became" in (run / PAGE).read_text()


def test_a_stopped_run_goes_on_with_another_budget(espalier, recipe_file, tmp_path, logged_steps):
    run = tmp_path / "runs" / "tiny"
    told = ("run", recipe_file, *SHARES)
    command = espalier.start(*told, "budget.hours=0.02")
    command.until(lambda: logged_steps(run) >= 60)
    command.send(signal.SIGTERM)
    assert command.wait().code == 143
    less = (Ledger(run / LEDGER).total.seconds + 16) / 3600
    done = espalier(*told, f"budget.hours={less}")
    assert re.search(rf"budget.hours +0.02 +{str(less)[:6]}\d* +planned", done.out)
    assert min(line["planned_anew"] for line in replanned(run)) < 0.9
    assert Ledger(run / LEDGER).total.seconds < less * 3600
    assert ModelFolder.open(run / FINAL).spec.hidden_size == 48
    assert yaml.safe_load((run / RECIPE).read_text())["budget"]["hours"] == less
    again = espalier(*told, "budget.hours=0.01")
    assert again.code == 5 and "budget.hours" in again.err, "a finished run isn't another one's"


def test_two_processes_do_not_share_a_run(espalier, recipe_file, tmp_path):
    run = tmp_path / "runs" / "tiny"
    first = espalier.start("run", recipe_file)
    first.until(lambda: (run / RECIPE).exists())
    second = espalier("run", recipe_file)
    assert second.code == 5 and "another process" in second.err
    assert first.wait().code == 0


def test_the_plan_is_settled_once_and_kept_by_whoever_goes_on(espalier, recipe_file, tmp_path):
    run = tmp_path / "runs" / "tiny"
    command = espalier.start("run", recipe_file)
    command.until(lambda: (run / PLAN).exists())
    assert killed(command)
    plan = (run / PLAN).read_bytes()
    assert espalier("run", recipe_file).code == 0
    assert (run / PLAN).read_bytes() == plan
    assert json.loads(plan)["device"]["compute"] == "float32"
