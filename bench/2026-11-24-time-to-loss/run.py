"""Wall-clock to the held-out loss that a tuned AdamW run under transformers' Trainer ends at.

    python bench/2026-11-24-time-to-loss/run.py

Both get the same corpus, tokenizer, final model (Granite, 5.5M parameters) and one thread. Trainer runs at its
defaults (fp32, batch of 8 rows, linear decay) with 5% warm-up for SECONDS, its rate tuned on a grid with the first
seed. Espalier runs the recipe `recipes/pretrain/small.yaml` under a cap of SHARE of that time, in which everything
counts: imports, probes, compiling, evaluation, export. Both final models are then evaluated by the same function on
the same held-out rows, in fp32. Two processes work at a time, each on one of the machine's two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUNS = Path(os.environ.get("BENCH_RUNS", "runs/bench-time-to-loss"))
SECONDS, SHARE = 240.0, 0.3
RATES, SEEDS = (5e-4, 1e-3, 2e-3), (1, 2, 3)
VOCABULARY, LENGTH, HELD_OUT_ROWS = 4096, 256, 256
SMALL = ROOT / "recipes" / "pretrain" / "small.yaml"


def streams(seed: int):
    from espalier import files
    from espalier.data import pack, tokenizer
    from espalier.data.prepare import DataRecipe, prepare
    from espalier.data.stream import Stream

    recipe = DataRecipe(sources=["stdlib"], held_out=0.05, vocab_size=VOCABULARY, sequence_length=LENGTH)
    dataset = prepare(recipe, home=files.home(), tell=print)
    words = tokenizer.choose(None, dataset, VOCABULARY, home=files.home(), tell=print)
    return [
        Stream(
            pack.tokenize(dataset, split, words, home=files.home(), tell=print),
            sequence_length=LENGTH,
            seed=seed,
            attend="row",
            eos_id=0,
        )
        for split in ("train", "validation")
    ], tokenizer.byte_lengths(tokenizer.load(words))


def trainer(rate: float, seed: int, out: Path) -> None:
    """Trainer for SECONDS of wall-clock; its steps are set from its own speed over the first 20."""
    import espalier  # isort: skip  # noqa: F401  (before torch)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from espalier.spec import ModelSpec

    torch.set_num_threads(1)
    (train, _), _ = streams(seed)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return train.rows

        def __getitem__(self, index):
            ids = torch.from_numpy(train.tokens.read(index * LENGTH, LENGTH).astype("int64"))
            return {"input_ids": ids, "labels": ids}

    def model(seed: int):
        torch.manual_seed(seed)
        shape = ModelSpec(
            vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, intermediate_size=768, head_dim=64
        )
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.to_config()), dtype=torch.float32)

    def arguments(steps: int) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(out / "trainer"),
            per_device_train_batch_size=8,
            learning_rate=rate,
            warmup_steps=steps // 20,
            max_steps=steps,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )

    class Clock(TrainerCallback):
        def __init__(self):
            self.times = []

        def on_step_end(self, args, state, control, **_):
            self.times.append(time.monotonic())

    clock = Clock()
    Trainer(model=model(0), args=arguments(20), train_dataset=Rows(), callbacks=[clock]).train()
    per_step = (clock.times[-1] - clock.times[4]) / (len(clock.times) - 5)
    trained = model(seed)
    began = time.monotonic()
    Trainer(model=trained, args=arguments(int(SECONDS / per_step)), train_dataset=Rows()).train()
    wall = time.monotonic() - began
    trained.save_pretrained(out / "model")
    finish(out, {"wall": wall, "steps": int(SECONDS / per_step)})


def product(seed: int, hours: float, out: Path) -> None:
    """`espalier run` in a process of its own, timed from outside."""
    command = [sys.executable, "-m", "espalier", "run", str(SMALL), f"seed={seed}", f"name=seed-{seed}"]
    command += [f"budget.hours={hours}", "train.threads=1", "--runs", str(out)]
    began = time.monotonic()
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    wall = time.monotonic() - began
    (out / "model").symlink_to((out / f"seed-{seed}" / "final").resolve())
    finish(out, {"wall": wall, "exit_code": code})


def finish(out: Path, values: dict) -> None:
    """Evaluate out/model on the held-out rows and write the result."""
    from espalier.folder import ModelFolder
    from espalier.model import build
    from espalier.train.device import Device
    from espalier.train.objectives import NextToken
    from espalier.train.validate import validate

    (_, held_out), lengths = streams(0)
    loaded = build.load(ModelFolder(out / "model"))
    found = validate(loaded, held_out, lengths, NextToken(), Device(threads=1), rows=HELD_OUT_ROWS, micro_rows=8)
    (out / "result.json").write_text(json.dumps({**values, "loss": found.loss, "bpb": found.bpb}))


def start(name: str, *arguments: object) -> subprocess.Popen:
    out = RUNS / name
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments), str(out)], env=environment)


def by_twos(jobs: list[tuple]) -> dict[str, dict]:
    """Run the jobs two at a time, those that have no result yet; the results by name."""
    waiting, running = [job for job in jobs if not (RUNS / job[0] / "result.json").exists()], []
    while waiting or running:
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < 2:
            running.append(start(*waiting.pop(0)))
        time.sleep(0.5)
    return {name: json.loads((RUNS / name / "result.json").read_text()) for name, *_ in jobs}


def main() -> None:
    load = os.getloadavg()
    tuning = by_twos([(f"trainer-{rate:g}-1", "trainer", rate, 1) for rate in RATES])
    best = min(RATES, key=lambda rate: tuning[f"trainer-{rate:g}-1"]["loss"])
    rest = by_twos([(f"trainer-{best:g}-{seed}", "trainer", best, seed) for seed in SEEDS[1:]])
    baseline = {seed: {**tuning, **rest}[f"trainer-{best:g}-{seed}"] for seed in SEEDS}
    hours = SHARE * min(row["wall"] for row in baseline.values()) / 3600
    ours = by_twos([(f"espalier-{seed}", "product", seed, hours) for seed in SEEDS])
    result = {
        "tuning": tuning,
        "best_rate": best,
        "trainer": baseline,
        "espalier": {seed: ours[f"espalier-{seed}"] for seed in SEEDS},
        "load": [load, os.getloadavg()],
    }
    (HERE / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    for seed in SEEDS:
        a, b = baseline[seed], result["espalier"][seed]
        print(
            f"seed {seed}: Trainer {a['loss']:.3f} in {a['wall']:.0f} s; "
            f"Espalier {b['loss']:.3f} in {b['wall']:.0f} s ({b['wall'] / a['wall']:.2f} of it)"
        )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["trainer", rate, seed, out]:
            trainer(float(rate), int(seed), Path(out))
        case ["product", seed, hours, out]:
            product(int(seed), float(hours), Path(out))
        case _:
            main()
