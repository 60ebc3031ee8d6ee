"""Ten minutes of one core: the run that `espalier plan` proposes beside three sizes that one might choose by hand.

    python bench/2026-11-24-plan-ten-minutes/run.py [FOLDER [WAY ...]]

Every way may train for as many tokens as the idle machine does in ten minutes of one core, less start, export and
reserve: what other programs take from the machine while the runs go doesn't change what they come to. Two run side
by side. A finished run is only read.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

import espalier  # noqa: F401  (before torch)
from espalier import files, offers, planner, propose
from espalier.budget import flops, hardware, layouts
from espalier.budget.scaling import Law
from espalier.ledger import Ledger
from espalier.pipeline import PretrainRecipe
from espalier.recipe import load
from espalier.report import Report
from espalier.run import LEDGER, RESULTS, Run
from espalier.trials import TRIALS, Trial, carry_out

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)
# Widths by powers of two, as deep as is usual for them.
BY_HAND = {"small": (64, 2), "medium": (128, 4), "large": (256, 8)}


def trial(told: dict, name: str, stages: list[dict], seed: int) -> Trial:
    values = told | {"name": f"{name}-seed{seed}", "seed": seed, "stages": stages, "budget": {"reserve": 0.1}}
    recipe = PretrainRecipe.model_validate(values | {"samples": {"prompts": ["\n"], "max_new_tokens": 1}})
    return Trial(recipe.optimizer.learning_rate, seed, recipe)


def by_hand(told: dict, recipe: offers.PlanRecipe, shape: tuple[int, int]) -> list[dict]:
    """The one stage of a size from scratch, as long as ten minutes are."""
    stage = {"hidden_size": shape[0], "num_hidden_layers": shape[1], "duration": "100%"}
    some = PretrainRecipe.model_validate(
        told | {"name": "speed", "stages": [stage], "budget": recipe.budget.model_dump()}
    )
    here = planner.machine(some)
    [speed] = planner.speeds(some, here, some.specs(), recipe.budget.hours * 3600)
    seconds = (recipe.budget.hours * 3600 - planner.START_SECONDS - planner.EXPORT_SECONDS) * (
        1 - recipe.budget.reserve
    )
    tokens = seconds / speed.seconds_per_token(some.rows * some.data.sequence_length)
    return [stage | {"duration": f"{round(tokens)} tokens"}]


def planned(recipe: offers.PlanRecipe) -> tuple[list[dict], dict]:
    """The plan on this machine: its offers, and its stages in tokens with its batch."""
    row, law = hardware.named(recipe.hardware, home=files.home()), Law.load(recipe.law)
    prices = propose._prices(recipe, row)
    cluster = layouts.cluster(row, recipe.devices, recipe.links, recipe.products)
    candidates = propose._candidates(recipe, law, prices, cluster)
    found = propose._timed(recipe, law, candidates, prices, row)
    made = propose._recipe(recipe, found[0], prices)
    stages = [
        stage.model_dump(include={"hidden_size", "num_hidden_layers"}) | {"duration": f"{round(tokens)} tokens"}
        for stage, (_, tokens) in zip(made.stages, found[0].stages, strict=True)
    ]
    told = [
        {"name": o.name, "path": o.path(), "loss": o.loss, "interval": o.interval, "cost": asdict(o.cost)}
        for o in found
    ]
    return told, {"stages": stages, "batch_tokens": made.train.batch_tokens}


def way(name: str, told: dict, recipe: offers.PlanRecipe, folder: Path) -> dict:
    """A way's stages, found once: another look at the clock would be another length."""
    kept = folder / f"{name}.json"
    if not kept.exists():
        if name == "planned":
            found, made = planned(recipe)
            files.write_json(kept, made | {"offers": found})
        else:
            files.write_json(kept, {"stages": by_hand(told, recipe, BY_HAND[name])})
    return json.loads(kept.read_text())


def main(folder: Path, names: list[str]) -> None:
    recipe = load(offers.PlanRecipe, HERE / "plan.yaml")
    told = {
        key: value
        for key, value in yaml.safe_load((HERE / "plan.yaml").read_text()).items()
        if key not in ("law", "budget")
    }
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {name: way(name, told, recipe, folder) for name in names}
    trials = []
    for seed in SEEDS:
        for name in names:
            batch = {key: value for key, value in chosen[name].items() if key == "batch_tokens"}
            trials.append(trial(told | {"train": told["train"] | batch}, name, chosen[name]["stages"], seed))
    carry_out(trials, Run(folder, recipe), workers=2, tell=print)
    law, results = Law.load(recipe.law), {}
    for one in trials:
        name = one.recipe.name.rpartition("-")[0]
        at = folder / TRIALS / one.recipe.name
        trained = Ledger(at / LEDGER).spent(kind="train")
        spec = one.recipe.specs()[-1]
        here = results.setdefault(
            name,
            {
                "stages": [stage.model_dump(exclude_unset=True) for stage in one.recipe.stages],
                "parameters": flops.parameters(spec),
                "tokens": trained.tokens,
                "flops": trained.flops,
                "losses": [],
                "train_seconds_beside_another": [],
            },
        )
        if name != "planned":
            here["law"] = float(law.terms.loss(here["parameters"], here["tokens"]))
        here["losses"].append(Report.load(at / RESULTS).value("held-out", "loss"))
        here["train_seconds_beside_another"].append(trained.seconds)
    if "planned" in names:
        results["planned"]["law"] = chosen["planned"]["offers"][0]["loss"]
        files.write_json(HERE / "result.json", {"offers": chosen["planned"]["offers"], "ways": results})
    for name, here in results.items():
        mean = sum(here["losses"]) / len(here["losses"])
        print(
            f"{name:8} {here['parameters']:>10,} {here['tokens']:>12,.0f} {mean:.3f} by the law {here['law']:.3f}",
            here["losses"],
        )


if __name__ == "__main__":
    folder, *names = sys.argv[1:] or ["runs/ten-minutes"]
    main(Path(folder), names or ["planned", *BY_HAND])
