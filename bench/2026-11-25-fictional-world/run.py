"""Is what a model gains on an invented world's examination knowledge of that world? All by Espalier's own commands.

    python bench/2026-11-25-fictional-world/run.py FOLDER

A world of 200 facts writes its book, in English, each fact in 18 wordings. A model is trained on it (book.yaml), once
for a single update and once for all of its tokens. Both are asked every one-hop item that the world has, in wordings
that the book hasn't, some two-hop items, and the items of four sister worlds, of which they have read nothing.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from espalier.budget import flops
from espalier.evaluate.intervals import paired_bootstrap
from espalier.evaluate.items import Item, read_items, read_outcomes
from espalier.folder import ModelFolder
from espalier.report import Report

HERE = Path(__file__).parent
WORLD = ("languages=[en]", "facts=200", "wordings=18")
EXAMINED, SISTERS = "items=800 two_hop=0.25", "items=600 two_hop=0"
SEEDS = range(1, 5)
MODELS = ("model=runs/untaught/final", "after=runs/learnt/final", "local.threads=1")


def espalier(*arguments: str) -> float:
    """Carry out a command; the seconds of CPU that it took."""
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "espalier", *arguments], check=True)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime


def gain(run: str, items: list[Item], kept: Callable[[Item], bool] = lambda item: True) -> dict[str, float]:
    """Both models' scores on the items that are kept, and the difference with its 95% interval, in points."""
    outcomes = {outcome.id: outcome for outcome in read_outcomes(Path("runs") / run / "samples.jsonl")}
    asked = [item for item in items if kept(item)]
    before = [100 * outcomes[item.id].scores["acc"] for item in asked]
    after = [100 * outcomes[replace(item, task=f"{item.task} (after)").id].scores["acc"] for item in asked]
    interval = paired_bootstrap(before, after)
    scores = {"before": sum(before) / len(before), "after": sum(after) / len(after)}
    return {"n": len(asked), **scores, "gain": interval.value, "low": interval.low, "high": interval.high}


def main() -> None:
    os.chdir(sys.argv[1])
    os.environ |= {"OMP_NUM_THREADS": "1", "ESPALIER_HOME": str(Path("home").absolute())}
    espalier("synth", "world", *WORLD, *EXAMINED.split(), "--name=world-0")
    for seed in SEEDS:
        espalier("synth", "world", *WORLD, *SISTERS.split(), f"seed={seed}", f"--name=world-{seed}")
    sisters = Path("sisters.jsonl")
    sisters.write_text("".join(Path(f"runs/world-{seed}/items.jsonl").read_text() for seed in SEEDS))

    one_update = ("name=untaught", "stages.0.duration=2048 tokens", "train.evaluations=1")
    seconds = {"untaught": espalier("run", str(HERE / "book.yaml"), *one_update)}
    begin = time.monotonic()
    seconds["learnt"] = espalier("run", str(HERE / "book.yaml"))
    wall = time.monotonic() - begin

    espalier("evaluate", "test_taking", "items=runs/world-0/items.jsonl", *MODELS, "--name=own")
    espalier("evaluate", "test_taking", f"items={sisters}", *MODELS, "--name=sisters")
    own, others = read_items(Path("runs/world-0/items.jsonl")), read_items(sisters)
    one_hop = {wording: f"one hop, {wording}" for wording in sorted({item.tags["wording"] for item in own})}
    found = {
        "one hop": gain("own", own, lambda item: item.tags["hops"] == "1"),
        **{
            name: gain(
                "own", own, lambda item, wording=wording: (item.tags["hops"], item.tags["wording"]) == ("1", wording)
            )
            for wording, name in one_hop.items()
        },
        "two hops": gain("own", own, lambda item: item.tags["hops"] == "2"),
        "sister worlds": gain("sisters", others),
    }
    cues = {
        row.metric: 100 * row.value for row in Report.load(Path("runs/own/results.json")).rows if "cue" in row.metric
    }
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__},
        "parameters": flops.parameters(ModelFolder.open("runs/learnt/final").spec),
        "training": {"cpu_seconds": seconds, "seconds": wall, "load_at_end": psutil.getloadavg()},
        "points": found,
        "cues": cues,
    }
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
