"""Does a run take as long as its plan says? Five shapes, planned from a few probed steps, then trained.

    python bench/2026-11-24-plan-time/run.py [FOLDER]

Each is told so many tokens as should take a minute here, so nothing is planned anew on the way. Run it on an idle
machine: what is compared is the clock.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

import espalier  # noqa: F401  (before torch)
from espalier import files, planner, records
from espalier.budget.plan import Plan
from espalier.ledger import Ledger
from espalier.pipeline import PretrainRecipe
from espalier.run import LEDGER, PLAN

HERE = Path(__file__).parent
SECONDS = 60.0
TOLD = {
    "data": {"sources": ["stdlib"], "held_out": 0.05, "vocab_size": 2048, "sequence_length": 256},
    "model": {"head_dim": 32},
    "train": {"batch_tokens": 4096, "evaluations": 4, "eval_tokens": 65536, "save_steps": 1000, "threads": 1},
}
# (width, layers) of each stage, each with as much of the time.
SHAPES = {
    "small": [(64, 2)],
    "medium": [(128, 4)],
    "shallow": [(192, 3)],
    "large": [(256, 8)],
    "grown": [(128, 2), (128, 4), (192, 4)],
}


def recipe(name: str) -> PretrainRecipe:
    stages = [{"hidden_size": width, "num_hidden_layers": layers, "duration": "100%"} for width, layers in SHAPES[name]]
    some = PretrainRecipe.model_validate(TOLD | {"name": name, "stages": stages})
    here = planner.machine(some)
    step = some.rows * some.data.sequence_length
    speeds = planner.speeds(some, here, some.specs(), SECONDS)
    for stage, speed in zip(stages, speeds, strict=True):
        stage["duration"] = f"{round(SECONDS / len(stages) / speed.seconds_per_token(step))} tokens"
    return PretrainRecipe.model_validate(TOLD | {"name": name, "stages": stages})


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name in SHAPES:
        told = recipe(name)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(told.model_dump(mode="json")))
        command = [sys.executable, "-m", "espalier", "run", str(path), f"--runs={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        kept, ledger = records.read(folder / name / PLAN, None), Ledger(folder / name / LEDGER)
        planned, trained = Plan.from_json(kept["plan"]).total.seconds, ledger.spent(kind="train").seconds
        rows[name] = {
            "parameters": Plan.from_json(kept["plan"]).stages[-1].parameters,
            "compile": kept["device"]["compile"],
            "compute": kept["device"]["compute"],
            "planned": planned,
            "trained": trained,
            "ratio": trained / planned,
            "everything": ledger.total.seconds,
        }
        print(f"{name:8} planned {planned:6.1f} s, trained {trained:6.1f} s, ratio {trained / planned:.3f}")
    files.write_json(HERE / "result.json", rows)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/plan-time"))
