"""Tokens per CPU-second of one thread: Espalier's loop, transformers' Trainer and hand-written loops, in turn.

    python bench/2026-11-24-throughput/run.py 5M 20M

Every candidate is a process of its own that builds the model (the same Granite class and sizes), warms up, and waits;
the controller lets them work in turn, the order reversed each round. Ratios are taken round by round against Trainer's
defaults. Process CPU time leaves out what other programs on the machine take. The matmul peak is measured in the same
rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SIZES = {
    "5M": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768},
    "20M": {"hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1280},
}
VOCABULARY, LENGTH, ROWS = 4096, 256, 8
STEPS = {"5M": 3, "20M": 1}
ROUNDS = 7
ARMS = {
    "trainer-default": "Trainer, defaults (fp32)",
    "trainer-best": "Trainer, bf16 + torch_compile",
    "hand-written": "hand-written loop, bf16 autocast, torch.compile(model), fused AdamW",
    "espalier-adamw": "Espalier's loop, AdamW",
    "espalier-muon": "Espalier's loop, Muon, an update every 8,192 tokens",
    "matmul-peak": "bf16 matmul 2048^3",
}


def rows_of_text():
    """The tokens of the stdlib corpus as rows (N, LENGTH + 1)."""
    import numpy as np

    from espalier import files
    from espalier.data import pack, tokenizer
    from espalier.data.prepare import DataRecipe, prepare

    quiet = lambda line: None  # noqa: E731
    dataset = prepare(DataRecipe(), home=files.home(), tell=quiet)
    words = tokenizer.choose(None, dataset, VOCABULARY, home=files.home(), tell=quiet)
    tokens = pack.tokenize(dataset, "train", words, home=files.home(), tell=quiet)
    count = (len(tokens) - 1) // LENGTH
    return np.stack([tokens.read(i * LENGTH, LENGTH + 1) for i in range(count)]).astype("int64")


def spec(size: str):
    from espalier.spec import ModelSpec

    return ModelSpec(vocab_size=VOCABULARY, head_dim=64, **SIZES[size])


def hf_model(size: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec(size).to_config()), dtype=torch.float32)


def trainer(size: str, best: bool):
    """Steps of Trainer: its callback hands control back between them."""
    import tempfile

    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    data = rows_of_text()

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(data)

        def __getitem__(self, index):
            ids = torch.from_numpy(data[index][:-1])
            return {"input_ids": ids, "labels": ids}

    class Wait(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            stepped()

    stepped = steps_between_commands(size)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=ROWS,
        max_steps=1_000_000,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **({"bf16": True, "torch_compile": True} if best else {}),
    )
    Trainer(model=hf_model(size), args=arguments, train_dataset=Rows(), callbacks=[Wait()]).train()


def hand_written(size: str):
    import torch

    data = rows_of_text()
    model = torch.compile(hf_model(size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    stepped, at = steps_between_commands(size), 0
    while True:
        ids = torch.from_numpy(data[at : at + ROWS, :-1])
        at = (at + ROWS) % (len(data) - ROWS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        stepped()


def product(size: str, optimizer: str):
    """The product's own pieces, as grow_run puts them together."""
    from espalier import files
    from espalier.data import pack, tokenizer
    from espalier.data.prepare import DataRecipe, prepare
    from espalier.data.stream import Stream
    from espalier.model import build
    from espalier.model.mup import Parametrization
    from espalier.train.checkpoint import Progress
    from espalier.train.device import Device
    from espalier.train.loop import Segment, State, update
    from espalier.train.objectives import NextToken, chunk_loss
    from espalier.train.optim import Optimizer
    from espalier.train.recipe import OptimizerRecipe

    quiet = lambda line: None  # noqa: E731
    dataset = prepare(DataRecipe(), home=files.home(), tell=quiet)
    words = tokenizer.choose(None, dataset, VOCABULARY, home=files.home(), tell=quiet)
    tokens = pack.tokenize(dataset, "train", words, home=files.home(), tell=quiet)
    stream = Stream(tokens, sequence_length=LENGTH, seed=1, attend="row", eos_id=0)
    parametrization, shape = Parametrization(base_width=SIZES[size]["hidden_size"]), spec(size)
    device = Device(threads=1, compute="bfloat16", compile="layers", attention="causal_halves")
    device.prepare()
    model = build.build(shape, parametrization, seed=0)
    device.place(model)
    recipe = OptimizerRecipe(name=optimizer)
    state = State(shape, model, Optimizer(model, shape, recipe, parametrization), Progress())
    # Muon's update costs arithmetic of its own: it is made every 8,192 tokens, as the product does.
    rows = ROWS if optimizer == "adamw" else 8192 // LENGTH
    segment = Segment(10**9, rows, ROWS, 1.0, lambda step: 0.1)
    objective = NextToken(device.compiled(chunk_loss))
    stepped = steps_between_commands(size)
    while True:
        update(state, stream, segment, objective, device)
        stepped(rows // ROWS)


def matmul_peak(size: str):
    import torch

    left, right = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    stepped = steps_between_commands(size)
    while True:
        left @ right
        stepped()


def steps_between_commands(size: str):
    """A function to call after each step (or n micro-batches): answers a command once its steps are done."""
    state = {"left": 6, "done": 0, "cpu": time.process_time()}

    def stepped(micro_batches: int = 1) -> None:
        state["left"] -= micro_batches
        state["done"] += micro_batches
        if state["left"] > 0:
            return
        print(
            json.dumps({"steps": state["done"], "cpu": time.process_time() - state["cpu"], "rss": peak()}), flush=True
        )
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        state.update(left=int(line), done=0, cpu=time.process_time())

    return stepped


def peak() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(arm: str, size: str) -> None:
    import espalier  # isort: skip  # noqa: F401  (sets OpenMP's waiting before torch loads, for every arm)
    import torch

    torch.set_num_threads(1)
    {
        "trainer-default": lambda: trainer(size, best=False),
        "trainer-best": lambda: trainer(size, best=True),
        "hand-written": lambda: hand_written(size),
        "espalier-adamw": lambda: product(size, "adamw"),
        "espalier-muon": lambda: product(size, "muon"),
        "matmul-peak": lambda: matmul_peak(size),
    }[arm]()


def control(size: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    workers = {}
    for arm in ARMS:  # one after another, so that they don't compile against each other
        workers[arm] = subprocess.Popen(
            [sys.executable, __file__, "--work", arm, size],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        answer(workers[arm])
    speeds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    rss = {}
    for round_ in range(ROUNDS):
        order = list(ARMS) if round_ % 2 == 0 else list(ARMS)[::-1]
        for arm in order:
            steps = {"matmul-peak": 20, "espalier-muon": 4}.get(arm, STEPS[size])
            workers[arm].stdin.write(f"{steps}\n")
            workers[arm].stdin.flush()
            result = answer(workers[arm])
            unit = 2 * 2048**3 if arm == "matmul-peak" else ROWS * LENGTH
            speeds[arm].append(result["steps"] * unit / result["cpu"])
            rss[arm] = result["rss"]
    for worker in workers.values():
        worker.kill()
    return summary(size, speeds, rss)


def answer(worker: subprocess.Popen) -> dict:
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"a worker ended: {worker.args}")


def summary(size: str, speeds: dict, rss: dict) -> dict:
    from espalier.budget import flops

    per_token = flops.training_flops(spec(size), LENGTH)
    peak_flops = statistics.median(speeds["matmul-peak"])
    rows = {}
    for arm in ARMS:
        if arm == "matmul-peak":
            continue
        row = {"tokens_per_cpu_second": statistics.median(speeds[arm]), "rss_mb": rss[arm]}
        row["share_of_peak"] = row["tokens_per_cpu_second"] * per_token / peak_flops
        for base in ("trainer-default", "trainer-best", "hand-written"):
            ratios = [a / b for a, b in zip(speeds[arm], speeds[base], strict=True)]
            row[f"vs_{base}"] = [statistics.median(ratios), min(ratios), max(ratios)]
        rows[arm] = row
    return {"size": size, "rounds": ROUNDS, "flops_per_token": per_token, "bf16_peak": peak_flops, "arms": rows}


def main(sizes: list[str]) -> None:
    for size in sizes:
        began = os.getloadavg()
        result = {**control(size), "load_before": began, "load_after": os.getloadavg()}
        (HERE / f"result-{size}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"{size}: bf16 peak {result['bf16_peak'] / 1e9:.0f} GFLOP/s, load {began[0]:.1f}")
        for arm, row in result["arms"].items():
            ratio = " ".join(
                f"{key[3:]} {row[key][0]:.2f} [{row[key][1]:.2f}-{row[key][2]:.2f}]" for key in row if key[:3] == "vs_"
            )
            speed = f"{row['tokens_per_cpu_second']:7.0f} tok/CPU-s {row['share_of_peak']:.0%} of peak"
            print(f"{ARMS[arm]:70} {speed}  {ratio}")


if __name__ == "__main__":
    work(*sys.argv[2:]) if sys.argv[1:2] == ["--work"] else main(sys.argv[1:] or list(SIZES))
