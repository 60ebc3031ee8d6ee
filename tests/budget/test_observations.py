"""Observations: tables and run folders read as they were written, and what can't be compared refused."""

import json
import shutil

import pytest
import yaml

from espalier import records
from espalier.budget.observations import Observation, read_runs, read_table
from espalier.errors import DataError, RunError
from espalier.report import Report
from espalier.run import FINAL, RECIPE, RESULTS

ROWS = [
    Observation(parameters=1e5, tokens=2e6, loss=4.25),
    Observation(parameters=3e5, tokens=2e6, loss=3.5),
]


def written(path, rows):
    if path.suffix == ".csv":
        path.write_text("\n".join(["note,parameters,tokens,loss", *(",".join(map(str, row.values())) for row in rows)]))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


@pytest.mark.parametrize("name", ["runs.csv", "runs.jsonl"])
def test_rows_are_read_as_they_were_written_and_other_columns_passed_over(tmp_path, name):
    path = written(tmp_path / name, [{"note": "a", **row.model_dump()} for row in ROWS])
    assert read_table(path, Observation) == ROWS


@pytest.mark.parametrize("name", ["runs.csv", "runs.jsonl"])
@pytest.mark.parametrize("loss", [-1.0, 0.0, "much", "inf", ""])
def test_a_row_that_is_no_run_is_refused_with_its_line_and_column(tmp_path, name, loss):
    rows = [{"note": "a", **row.model_dump()} for row in ROWS]
    rows[1]["loss"] = loss
    line = 3 if name.endswith("csv") else 2
    with pytest.raises(DataError) as refused:
        read_table(written(tmp_path / name, rows), Observation)
    assert refused.value.where == f"{tmp_path / name}:{line}: loss"


@pytest.mark.parametrize("line", ["[1]", "{", "3"])
def test_a_line_that_is_no_object_is_refused(tmp_path, line):
    (tmp_path / "runs.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"runs\.jsonl:1"):
        read_table(tmp_path / "runs.jsonl", Observation)


def test_a_table_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_table(tmp_path / "none.csv", Observation)


@pytest.fixture
def runs(finished, tmp_path):
    """Two copies of a finished run."""
    for name in ("a", "b"):
        shutil.copytree(finished, tmp_path / "two" / name)
    return tmp_path / "two"


def test_a_run_is_its_last_size_all_its_tokens_and_its_held_out_loss(runs):
    observations, about = read_runs(runs)
    config = json.loads((runs / "a" / "plan.json").read_text())["plan"]["stages"]
    loss = Report.load(runs / "a" / RESULTS).value("held-out", "loss")
    assert observations == [Observation(parameters=config[-1]["parameters"], tokens=2560, loss=loss)] * 2
    assert about.data and about.tokenizer and about.source == "2 runs in two"


def test_runs_on_other_data_are_refused(runs):
    values = yaml.safe_load((runs / "b" / RECIPE).read_text())
    values["data"]["sequence_length"] = 32
    records.write_signed(runs / "b" / RECIPE, yaml.safe_dump(values))
    with pytest.raises(RunError, match="another data than a has"):
        read_runs(runs)


def test_runs_with_another_tokenizer_are_refused(runs):
    with (runs / "b" / FINAL / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(RunError, match="another tokenizer than a has"):
        read_runs(runs)


def test_a_run_that_is_not_finished_does_not_count(runs):
    (runs / "b" / RESULTS).unlink()
    assert len(read_runs(runs)[0]) == 1
    (runs / "a" / RESULTS).unlink()
    with pytest.raises(RunError, match="no finished run"):
        read_runs(runs)
