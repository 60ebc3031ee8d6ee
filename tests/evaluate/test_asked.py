"""A file of items is asked as it stands, a score a task."""

from __future__ import annotations

import pytest

from espalier.errors import BudgetError, DataError
from espalier.evaluate import ask as asking
from espalier.evaluate.asked import ItemsRecipe, evaluate_items
from espalier.evaluate.items import SAMPLES, Item, read_outcomes, write_items
from espalier.ledger import Ledger
from espalier.report import Report
from espalier.run import FINAL, LEDGER, RESULTS


def test_each_task_of_a_file_has_its_score(scripted, make_run, monkeypatch, tmp_path):
    sums = [Item("sums", f"{a} + {a} =", f"{2 * a}") for a in range(10)]
    choices = [Item("choices", f"{a}:", " yes" if a % 2 else " no", (" yes", " no")) for a in range(10)]
    write_items(tmp_path / "items.jsonl", [each for pair in zip(sums, choices, strict=True) for each in pair])
    engine = scripted(lambda prompt: str(2 * int(prompt.split()[0])), lambda prompt, option: float(option == " no"))
    monkeypatch.setattr(asking, "open_engine", lambda recipe, run: engine)
    run = make_run()
    evaluate_items(ItemsRecipe(model="m", url="http://nowhere", items=tmp_path / "items.jsonl"), run)
    report = Report.load(run.folder / RESULTS)
    assert report.value("sums", "exact_match") == 1.0 and report.value("choices", "acc") == 0.5
    assert len(read_outcomes(run.folder / SAMPLES)) == 20


def test_a_model_folder_is_asked_once_the_budget_allows_it(espalier, finished, tmp_path):
    write_items(tmp_path / "items.jsonl", [Item("names", f"def {a}", "a", ("a", "b")) for a in "xyz"])
    told = ("evaluate", "items", f"model={finished / FINAL}", "items=items.jsonl", "local.threads=1", "--name=asked")
    poor = espalier(*told, "budget.flops=10")
    assert poor.code == BudgetError.exit_code and "budget: flops" in poor.err
    enough = espalier(*told, "budget.flops=1e15")
    assert enough.code == 0, enough.err
    run = tmp_path / "runs" / "asked"
    assert Report.load(run / RESULTS).rows[0].n == 3
    assert 0 < Ledger(run / LEDGER).spent(kind="evaluate").flops < 1e9
    assert espalier(*told, "budget.flops=1e15").code == 0, "and asks nothing again"
    assert len(read_outcomes(run / SAMPLES)) == 3


def test_a_file_without_items_is_refused(make_run, tmp_path):
    (tmp_path / "items.jsonl").write_text("\n")
    with pytest.raises(DataError) as refused:
        evaluate_items(ItemsRecipe(model="m", items=tmp_path / "items.jsonl"), make_run())
    assert refused.value.found == "no item"
