"""A budget on which nothing was tuned: the run that `espalier plan` proposes for 20 TFLOP beside three sizes by hand.

    espalier plan --recipe bench/2026-11-25-plan-untuned/plan.yaml --name untuned
    python bench/2026-11-25-plan-untuned/run.py runs/untuned/planned.yaml [FOLDER [WAY ...]]

Every way has the FLOPs that the plan trains on, so the machine's speed and what else it does change nothing. Two run
side by side. A finished run is only read; the ways that are named are trained, all if none is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

import espalier  # noqa: F401  (before torch)
from espalier import files
from espalier.budget import flops
from espalier.budget.plan import Duration
from espalier.budget.scaling import Law
from espalier.ledger import Ledger
from espalier.pipeline import PretrainRecipe
from espalier.recipe import load
from espalier.report import Report
from espalier.run import LEDGER, RESULTS, Run
from espalier.trials import TRIALS, Trial, carry_out

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)
# The sizes of the ten-minute record, written down before this budget was thought of.
BY_HAND = {"small": (64, 2), "medium": (128, 4), "large": (256, 8)}


def ways(planned: PretrainRecipe, told: dict) -> dict[str, PretrainRecipe]:
    """The plan, and each size from scratch with the defaults for all that isn't the size, on the same FLOPs.

    The budget's reserve isn't trained on by anyone; evaluations aren't counted, since their text is pinned.
    """
    assert planned.budget.flops
    spent = planned.budget.flops * (1 - planned.budget.reserve)
    stages = [
        stage.model_dump() | {"duration": f"{Duration.parse(stage.duration).amount * spent:.6e} flops"}
        for stage in planned.stages
    ]
    found = {"planned": PretrainRecipe.model_validate(planned.model_dump() | {"stages": stages, "budget": {}})}
    for name, (width, layers) in BY_HAND.items():
        stage = {"hidden_size": width, "num_hidden_layers": layers, "duration": f"{spent:.6e} flops"}
        found[name] = PretrainRecipe.model_validate(told | {"name": name, "stages": [stage]})
    return found


def main(plan: Path, folder: Path, names: list[str]) -> None:
    planned = load(PretrainRecipe, plan)
    told = yaml.safe_load((HERE / "plan.yaml").read_text())
    told = {key: told[key] for key in ("data", "model", "train")}
    law = Law.load(yaml.safe_load((HERE / "plan.yaml").read_text())["law"])
    trials, found = [], ways(planned, told)
    for seed in SEEDS:
        for name in names or found:
            recipe = found[name]
            values = recipe.model_dump() | {"name": f"{name}-seed{seed}", "seed": seed}
            one = PretrainRecipe.model_validate(values | {"samples": {"prompts": ["\n"], "max_new_tokens": 1}})
            trials.append(Trial(one.optimizer.learning_rate, seed, one))
    carry_out(trials, Run(folder, planned), workers=2, tell=print)
    results = {}
    for name, recipe in found.items():
        spec = recipe.specs()[-1]
        at = [one for seed in SEEDS if ((one := folder / TRIALS / f"{name}-seed{seed}") / RESULTS).exists()]
        if not at:
            continue
        trained = Ledger(at[0] / LEDGER).spent(kind="train")
        results[name] = {
            "stages": [stage.model_dump(exclude_unset=True) for stage in recipe.stages],
            "batch_tokens": recipe.rows * recipe.data.sequence_length,
            "parameters": flops.parameters(spec),
            "tokens": trained.tokens,
            "flops": trained.flops,
            "law": float(law.terms.loss(flops.parameters(spec), trained.tokens)),
            "losses": [Report.load(one / RESULTS).value("held-out", "loss") for one in at],
        }
        print(name, results[name]["law"], results[name]["losses"])
    files.write_json(HERE / "result.json", results)


if __name__ == "__main__":
    plan, folder, *names = [*sys.argv[1:], "runs/untuned-ways"] if len(sys.argv) == 2 else sys.argv[1:]
    main(Path(plan), Path(folder), names)
