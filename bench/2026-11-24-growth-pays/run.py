"""Growth against both of its alternatives at equal data, class and tokenizer: three arms, each with its own tuned rate.

    python bench/2026-11-24-growth-pays/run.py [WORKERS]

Granite, hidden size 32, on the stdlib corpus (512 ids, rows of 64, 4,096 tokens an update), AdamW.
  large  12 layers from scratch on C = 3.4 TFLOP of training
  small   2 layers only, the same C
  grown   2 -> 3 -> 5 -> 8 -> 12 layers by stacking (partial stacks repeat the top layers), on 0.8 C and on 0.6 C
The rates of large and small are tuned on a grid with the first seed on 2.6 TFLOP; grown takes 0.014, untuned.
All runs are `espalier run` recipes; FLOPs are those of the ledger, all stages counted. Held-out loss: the same 65,536
tokens for every run.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
RUNS = Path(os.environ.get("BENCH_RUNS", "runs/bench-growth"))
BUDGET, TUNING_BUDGET, SEEDS = 3.4e12, 2.6e12, (1, 2, 3)
RATES = {"large": (0.007, 0.01, 0.014, 0.02), "small": (0.014, 0.02, 0.028, 0.04)}
GROWN_RATE = 0.014
PATH = {2: 0.144, 3: 0.144, 5: 0.192, 8: 0.24, 12: 0.28}


def recipe(arm: str, rate: float, seed: int, budget: float) -> dict:
    share = {"grown-0.8": 0.8, "grown-0.6": 0.6}.get(arm, 1.0)
    layers = {"large": {12: 1.0}, "small": {2: 1.0}}.get(arm, PATH)
    return {
        "name": f"{arm}-{rate:g}-{seed}-{budget:.1e}".replace("+", ""),
        "seed": seed,
        "data": {"sources": ["stdlib"], "held_out": 0.05, "vocab_size": 512, "sequence_length": 64},
        "model": {"head_dim": 16, "hidden_size": 32},
        "stages": [
            {"num_hidden_layers": depth, "duration": f"{part * share * budget:.6e} flops", "depth": "stack"}
            for depth, part in layers.items()
        ],
        "parametrization": {"base_width": 32},
        "optimizer": {"name": "adamw", "learning_rate": rate, "vector_learning_rate": rate},
        "schedule": {"warmup_ratio": 0.02, "decay_ratio": 0.5 if len(layers) == 1 else 0.4, "rewarm_ratio": 0.005},
        "train": {
            "batch_tokens": 4096,
            "per_device_train_batch_size": 64,
            "evaluations": 20,
            "eval_tokens": 65536,
            "save_steps": 10**6,
            "torch_compile": "on",
            "bf16": "off",
            "threads": 1,
        },
        "samples": {"prompts": ["import"], "max_new_tokens": 8},
    }


def work(jobs: list[str]) -> None:
    """Carry out jobs 'arm:rate:seed:budget' one after another."""
    import arms

    for job in jobs:
        arms.run(recipe(*parsed(job)), RUNS)


def parsed(job: str) -> tuple[str, float, int, float]:
    arm, rate, seed, budget = job.split(":")
    return arm, float(rate), int(seed), float(budget)


def carry_out(jobs: list[str], workers: int) -> dict[str, dict]:
    """Run the jobs on `workers` processes of one thread; figures by job."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    commands = [[sys.executable, __file__, "--work", *jobs[i::workers]] for i in range(workers) if jobs[i::workers]]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for command in commands]
    codes = [process.wait() for process in started]
    assert not any(codes), f"workers ended with {codes}"
    import arms

    return {job: arms.figures(RUNS / recipe(*parsed(job))["name"]) for job in jobs}


def main(workers: int) -> None:
    tuning = carry_out([f"{a}:{rate}:1:{TUNING_BUDGET}" for a, rates in RATES.items() for rate in rates], workers)
    best = {
        arm: min(rates, key=lambda rate: tuning[f"{arm}:{rate}:1:{TUNING_BUDGET}"]["loss"])
        for arm, rates in RATES.items()
    }
    rates = {**best, "grown-0.8": GROWN_RATE, "grown-0.6": GROWN_RATE}
    jobs = {(arm, seed): f"{arm}:{rate}:{seed}:{BUDGET}" for seed in SEEDS for arm, rate in rates.items()}
    done = carry_out(list(jobs.values()), workers)
    losses = {arm: [done[jobs[arm, seed]]["loss"] for seed in SEEDS] for arm in rates}
    target = min(("large", "small"), key=lambda arm: statistics.mean(losses[arm]))
    shares = {
        arm: [done[jobs[arm, seed]]["flops"] / done[jobs[target, seed]]["flops"] for seed in SEEDS] for arm in rates
    }
    crossing = [
        reached(done[jobs["grown-0.8", seed]]["curve"], losses[target][index]) for index, seed in enumerate(SEEDS)
    ]
    result = {
        "budget": BUDGET,
        "tuning": {job: figures["loss"] for job, figures in tuning.items()},
        "rates": rates,
        "losses": losses,
        "better_arm": target,
        "share_of_its_flops": shares,
        "flops_of_grown_at_its_loss": crossing,
        "runs": done,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
    }
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    for arm, values in losses.items():
        spent = f"{statistics.mean(shares[arm]):.2f} of the better arm's FLOPs"
        print(f"{arm:10} {statistics.mean(values):.4f}  {' '.join(f'{v:.4f}' for v in values)}  {spent}")
    at = " ".join(f"{flops / BUDGET:.2f}" if flops else "never" for flops in crossing)
    print(f"better arm: {target}; grown-0.8 had its final loss at these shares of C: {at}")


def reached(curve: list[list[float]], loss: float) -> float | None:
    """FLOPs at which a curve first was at or below a loss; None if it never was."""
    return next((flops for flops, value in curve if value <= loss), None)


if __name__ == "__main__":
    work(sys.argv[2:]) if sys.argv[1:2] == ["--work"] else main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
