"""A growth run stage by stage: the same evaluation of the model as each stage left it, against what it had cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from espalier import method as methods
from espalier import units
from espalier.errors import RecipeError, RunError
from espalier.evaluate import page
from espalier.evaluate.evaluation import Evaluation
from espalier.folder import ModelFolder
from espalier.ledger import Cost, Entry
from espalier.method import method
from espalier.recipe import Recipe, parse
from espalier.report import Report
from espalier.run import FINAL, RESULTS, STAGE, Run


class StageByStageRecipe(Recipe):
    """run: a growth run's folder; method: of `espalier evaluate`; settings: what it is told, besides the model."""

    run: Path
    method: str = "loss"
    settings: dict[str, Any] = Field(default_factory=dict)


@method(needs="a growth run with train.keep=stages", costs="the evaluation, once a stage")
def evaluate_stages(recipe: StageByStageRecipe, run: Run) -> Path:
    """Evaluate a growth run's model as each stage left it, and show what its growth has brought."""
    card = methods.find(f"evaluate.{recipe.method}")
    kind = card.recipe()
    if "model" not in kind.model_fields:
        raise RecipeError(
            "method", found=recipe.method, expected="a method that is told a model", mend="Choose loss, for one."
        )
    evaluations, spent = {}, {}
    for number, (name, model) in enumerate(models(recipe.run).items()):
        told = yaml.safe_dump({**recipe.settings, "model": str(model)})
        resolved = parse(kind, told, [], where=f"settings of {name}")
        with Run.start(run.folder / name, resolved, tell=run.tell) as stage:
            if stage.state["status"] != "finished":
                run.tell(f"{name}: {model}")
                card.load()(resolved, stage)
                stage.finish("finished")
                cost = stage.ledger.total
                run.price(stage.rates)
                billed = max(cost.usd - stage.rates.cost(cost.seconds).usd, 0.0)
                run.charge("evaluate", flops=cost.flops, usd=billed, stage=number)
            elif run.ledger.spent(kind="evaluate", stage=number) == Cost():  # a kill came before it was entered
                run.ledger.add(Entry("evaluate", stage.ledger.total, stage=number))
        evaluations[name] = Evaluation.read(run.folder / name)
        spent[name] = Cost(**(ModelFolder(model).made or {})["cost"])
    report = Report(str(recipe.run), context={"stages": {name: vars(cost) for name, cost in spent.items()}})
    for name, each in evaluations.items():
        report.rows += [replace(row, task=f"{name}: {row.task}") for row in each.report.rows]
    report.save(run.folder / RESULTS)
    for name, each in evaluations.items():
        run.tell(f"{name}, {units.amount(spent[name].flops, 'flops')}: {_score(each)}")
    html = page.render(run.folder, evaluations, f"{recipe.run.name} as it grew", spent=spent)
    return page.write(run.folder, html)


def models(run: Path) -> dict[str, Path]:
    """The model folders of a growth run by the names of their stages, the final one last.

    `RunError` where fewer than two were kept.
    """
    numbers = sorted(int(path.name.removeprefix(STAGE)) for path in run.glob(f"{STAGE}*") if path.is_dir())
    found = {f"{STAGE}{number}": run / f"{STAGE}{number}" for number in numbers}
    if (run / FINAL).is_dir():
        found[f"{STAGE}{len(found) + 1}"] = run / FINAL
    if len(found) < 2:
        raise RunError(
            str(run),
            found="no model but the last" if found else "no model folder",
            expected=f"models in {STAGE}1 and so on, as each stage left them",
            mend="Run the recipe with train.keep=stages under another name.",
        )
    return found


def _score(each: Evaluation) -> str:
    """The overall score, or the first figure where there is none."""
    if each.overall:
        score, chance = each.overall
        return f"{score:.1%}, chance {chance:.1%}"
    row = each.report.rows[0]
    return f"{row.metric} {row.value:.4f}"
