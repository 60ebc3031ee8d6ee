"""The held-out loss of a folder is the run's own, and a tokenizer that doesn't fit is refused."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from espalier import files
from espalier.evaluate.items import SAMPLES, read_outcomes
from espalier.folder import ModelFolder
from espalier.ledger import Ledger
from espalier.report import Report
from espalier.run import FINAL, LEDGER, RESULTS


@pytest.fixture
def evaluate(espalier, corpus, tmp_path):
    """Evaluate a folder on what the tiny recipe holds out; how it ended, and the run's folder."""

    def evaluate(model: Path, *more: str):
        data = (f"data.sources=[{corpus}]", "data.held_out=0.2", "data.sequence_length=16")
        batch = ("eval_tokens=256", "per_device_eval_batch_size=4")
        done = espalier("evaluate", "loss", f"model={model}", *data, *batch, *more, "--name=checked")
        return done, tmp_path / "runs" / "checked"

    return evaluate


def test_the_loss_of_a_folder_is_the_loss_that_its_run_found(evaluate, finished):
    done, run = evaluate(finished / FINAL)
    assert done.code == 0, done.err
    found, own = Report.load(run / RESULTS), Report.load(finished / RESULTS)
    assert [(row.metric, row.n) for row in found.rows] == [(row.metric, row.n) for row in own.rows]
    for mine, theirs in zip(found.rows, own.rows, strict=True):
        assert mine.value == pytest.approx(theirs.value, rel=1e-6)
        assert mine.stderr == (None if theirs.stderr is None else pytest.approx(theirs.stderr, rel=1e-4))
    assert found.context["model"] == ModelFolder.open(finished / FINAL).fingerprint()
    assert f"loss {found.value('held-out', 'loss'):.4f} ± " in done.out
    spent = Ledger(run / LEDGER).spent(kind="evaluate")
    assert spent.flops > 0 and spent.tokens == 0


def test_more_text_than_is_held_out_means_all_of_it(evaluate, finished):
    done, run = evaluate(finished / FINAL, "eval_tokens=1000000")
    assert done.code == 0, done.err
    assert Report.load(run / RESULTS).rows[0].n > 1000


def test_a_user_s_rows_are_taken_and_models_compared_batch_by_batch_on_them(espalier, finished, tmp_path, corpus):
    rows = [json.dumps({"text": path.read_text()}) for path in sorted(corpus.iterdir())]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    last = max(finished.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    first = min(finished.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    told = ("data.sources=[rows.jsonl]", "data.held_out=0.3", "data.sequence_length=16", "eval_tokens=2000")
    for name, model in (("first", first), ("last", last)):
        done = espalier("evaluate", "loss", f"model={model}", *told, "per_device_eval_batch_size=4", f"--name={name}")
        assert done.code == 0, done.err
        outcomes = read_outcomes(tmp_path / "runs" / name / SAMPLES)
        report = Report.load(tmp_path / "runs" / name / RESULTS)
        for metric in ("loss", "bpb"):
            mean = sum(outcome.scores[metric] for outcome in outcomes) / len(outcomes)
            assert mean == pytest.approx(report.value("held-out", metric), rel=1e-9)
    done = espalier("evaluate", "compare", "runs/first", "runs/last", "--name=compared")
    assert done.code == 0, done.err
    [loss, bpb] = json.loads((tmp_path / "runs" / "compared" / RESULTS).read_text())["context"]["differences"]
    assert (loss["metric"], bpb["metric"]) == ("loss", "bpb") and loss["n"] == bpb["n"] == len(outcomes) > 20
    assert loss["low"] < loss["after"] - loss["before"] < loss["high"]


@pytest.fixture
def bare(finished, tmp_path) -> Path:
    """The model as a plain Hugging Face folder: no manifest, no made.json."""
    folder = Path(shutil.copytree(finished / FINAL, tmp_path / "bare"))
    for name in (files.MANIFEST, "made.json", "README.md"):
        (folder / name).unlink()
    return folder


def test_a_plain_folder_is_evaluated_as_well(evaluate, bare, finished):
    done, run = evaluate(bare)
    assert done.code == 0, done.err
    assert Report.load(run / RESULTS).value("held-out", "loss") == pytest.approx(
        Report.load(finished / RESULTS).value("held-out", "loss"), rel=1e-6
    )


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(evaluate, bare):
    tokenizer = Tokenizer.from_file(str(bare / "tokenizer.json"))
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save(str(bare / "tokenizer.json"))
    done, _ = evaluate(bare)
    assert done.code == 4
    assert "a tokenizer of 302 ids and an embedding of 300 rows" in done.err


def test_another_tokenizer_of_the_same_size_in_a_folder_of_ours_is_refused(evaluate, finished, tmp_path):
    folder = Path(shutil.copytree(finished / FINAL, tmp_path / "swapped"))
    text = (folder / "tokenizer.json").read_text()
    swapped = text.replace('"a": ', '"?": ').replace('"b": ', '"a": ').replace('"?": ', '"b": ')
    assert swapped != text and Tokenizer.from_str(swapped)
    (folder / "tokenizer.json").write_text(swapped)
    done, _ = evaluate(folder)
    assert done.code == 4 and "tokenizer.json: sha256 differs" in done.err


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_folder_without_a_tokenizer_is_refused(evaluate, bare, name):
    (bare / name).unlink()
    done, _ = evaluate(bare)
    assert done.code == 3 and name in done.err


def test_a_folder_that_asks_to_run_code_is_refused(evaluate, bare):
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    done, _ = evaluate(bare)
    assert done.code == 4 and "auto_map" in done.err
