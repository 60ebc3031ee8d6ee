"""What does each stage of a growth run know? A run that keeps its stages is examined at the end of each.

    python bench/2026-11-25-stage-by-stage/run.py FOLDER

The world and its examination are those of bench/2026-11-25-fictional-world: whatever a stage knows of it, it has read.
The page of the evaluation is FOLDER/runs/by-stage/report.html.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from espalier import files
from espalier.evaluate.intervals import binomial
from espalier.evaluate.items import read_outcomes
from espalier.evaluate.stages import models
from espalier.folder import ModelFolder

HERE = Path(__file__).parent
WORLD = ("languages=[en]", "facts=200", "wordings=18", "items=800", "two_hop=0.25")


def espalier(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "espalier", *arguments], check=True)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    os.environ |= {"OMP_NUM_THREADS": "1", "ESPALIER_HOME": str(Path("home").absolute())}
    if not Path("runs/by-stage/results.json").exists():
        espalier("synth", "world", *WORLD, "--name=world-0")
        espalier("run", str(HERE / "grown.yaml"))
        told = ("settings.items=runs/world-0/items.jsonl", "settings.local.threads=1")
        espalier("evaluate", "stages", "run=runs/grown", "method=items", *told, "--name=by-stage")
    found = {}
    for stage, model in models(Path("runs/grown")).items():
        outcomes = read_outcomes(Path("runs/by-stage") / stage / "samples.jsonl")
        cost = (ModelFolder.open(model).made or {})["cost"]
        found[stage] = {"tokens": cost["tokens"], "flops": cost["flops"]}
        for hops in ("1", "2"):
            scores = [outcome.scores["acc"] for outcome in outcomes if outcome.tags["hops"] == hops]
            sure = binomial(sum(scores), len(scores))
            found[stage][f"{hops} hop"] = [round(100 * share, 1) for share in (sure.value, sure.low, sure.high)]
    files.write_json(HERE / "result.json", found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/stage-by-stage"))
