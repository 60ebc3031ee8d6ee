"""Kill a growth run at random moments, take it up again until it is done: nothing lost, the same bits at the end.

    python bench/2026-11-24-resume/run.py [KILLS] [SEED]

A warm parent forks a child for each attempt; the child carries out the recipe (three stages, two growths, a checkpoint
every 5 steps) and is killed with SIGKILL after a random time. When KILLS kills are used up, the run is left to finish.
Its final weights and its last checkpoint's optimizer must equal those of a run that was never disturbed, byte for byte,
and each attempt must begin at the newest checkpoint that was there when the one before it died.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import espalier  # isort: skip  # noqa: E402, F401  (before torch)
import torch  # noqa: E402
import yaml  # noqa: E402

from espalier import files, pipeline  # noqa: E402

RECIPE = {
    "name": "run",
    "seed": 3,
    "data": {"sources": ["stdlib"], "max_bytes": "2MB", "held_out": 0.1, "vocab_size": 512, "sequence_length": 64},
    "model": {"head_dim": 16},
    "stages": [
        {"num_hidden_layers": 1, "hidden_size": 32, "duration": "40k tokens"},
        {"num_hidden_layers": 2, "hidden_size": 32, "duration": "40k tokens", "depth": "stack"},
        {"num_hidden_layers": 3, "hidden_size": 64, "duration": "40k tokens", "depth": "identity"},
    ],
    "train": {
        "batch_tokens": 1024,
        "save_steps": 5,
        "logging_steps": 1,
        "evaluations": 6,
        "eval_tokens": 4096,
        "torch_compile": "off",
        "bf16": "off",
        "threads": 1,
    },
    "samples": {"prompts": ["import"], "max_new_tokens": 4},
}


def attempt(runs: Path, log: Path, kill_after: float | None, *, from_first_step: bool = False) -> bool:
    """One child; True when it ended by itself, False when it was killed `kill_after` seconds after it began to work,
    or after its first new step."""
    metrics = runs / "run" / "metrics.jsonl"
    child = os.fork()
    if child == 0:
        with log.open("a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            tell = lambda line: print(line, flush=True)  # noqa: E731
            code = pipeline.main(runs / "run.yaml", [], runs=runs, dry_run=False, tell=tell)
        os._exit(code)
    begin, size = time.monotonic(), metrics.stat().st_size if metrics.exists() else 0
    while kill_after is not None:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        now = metrics.stat().st_size if metrics.exists() else 0
        if from_first_step and now <= size:
            begin, size = time.monotonic(), min(size, now)  # resuming cuts the file back first
        elif time.monotonic() - begin >= kill_after:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.002)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)


def state_of(run: Path) -> dict[str, str]:
    """Hashes of what a run ends with."""
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return {
        "weights": files.sha256(run / "final" / "model.safetensors"),
        "checkpoint": newest.name,
        "checkpoint weights": files.sha256(newest / "model.safetensors"),
        "optimizer": files.sha256(newest / "trainer" / "optimizer.safetensors"),
    }


def newest_step(run: Path) -> int:
    """The step of the newest whole checkpoint, 0 without one."""
    whole = [p for p in run.glob("checkpoint-*") if files.damage(p) is None]
    return max((int(p.name.split("-")[1]) for p in whole), default=0)


def main(kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    root = Path("runs/bench-resume")
    shutil.rmtree(root, ignore_errors=True)
    for name in ("calm", "killed"):
        (root / name).mkdir(parents=True)
        (root / name / "run.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    attempt(root / "calm", root / "calm.log", None)  # fills the caches too
    shutil.rmtree(root / "calm" / "run")
    began = time.monotonic()
    assert attempt(root / "calm", root / "calm.log", None)
    calm_seconds = time.monotonic() - began
    chance, done, moments, steps, lost = random.Random(seed), 0, [], [], 0
    run, log = root / "killed" / "run", root / "killed.log"
    while done < kills:
        # Three in four while it trains, saves or grows; one in four while it starts.
        training = chance.random() < 0.75
        moment = chance.uniform(0.0, calm_seconds * (0.15 if training else 0.1))
        if attempt(root / "killed", log, moment, from_first_step=training):
            shutil.rmtree(run)  # it came through before the kill: start over, so that every kill hits a live run
            log.unlink()
            continue
        done += 1
        moments.append([round(moment, 3), "training" if training else "start"])
        steps.append(newest_step(run))
        with log.open("a") as out:
            out.write(f"KILLED with checkpoint {steps[-1]}\n")
    assert attempt(root / "killed", log, None)
    for killed_at, after in re.findall(r"KILLED with checkpoint (\d+)\n(.*?)(?=KILLED|\Z)", log.read_text(), re.DOTALL):
        resumed = re.search(r"Resumed at step (\d+)", after)
        lost += bool(resumed) and int(resumed[1]) < int(killed_at)
    calm, killed = state_of(root / "calm" / "run"), state_of(run)
    result = {
        "kills": done,
        "seed": seed,
        "seconds_of_a_calm_run": calm_seconds,
        "kill_moments": moments,
        "checkpoint_when_killed": steps,
        "committed_steps_lost": lost,
        "identical": calm == killed,
        "hashes": calm,
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }
    (HERE / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{done} kills, {lost} committed steps lost, final state identical: {calm == killed}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, int(sys.argv[2]) if len(sys.argv) > 2 else 7)
