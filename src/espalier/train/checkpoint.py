"""Checkpoints: one folder, one step, whole or absent.

    checkpoint-N/                  a plain Hugging Face model folder
    checkpoint-N/trainer/          optimizer.safetensors, random.safetensors, progress.json
    checkpoint-N/manifest.json     hashes of all of it, written last

Weights, optimizer, data cursor, random state and growth state are one unit with one step number. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from espalier import files
from espalier.errors import RunError
from espalier.folder import ModelFolder
from espalier.model import build
from espalier.train.optim import State

TRAINER = "trainer"
SEPARATOR = "::"  # between a parameter's name and its quantity; neither contains it


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps, samples drawn from the stream, tokens, model FLOPs, growth stage."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    stage: int = 0


def save(
    run_folder: Path,
    model: PreTrainedModel,
    optimizer_state: State,
    progress: Progress,
    *,
    tokenizer: Path | None,
    need_bytes: int,
    keep: int,
) -> Path:
    """Write checkpoint-N for N = progress.step, then delete all but the newest `keep`.

    Those of later steps go too: a run that saves an earlier step resumed there because they were damaged.
    """
    path = run_folder / f"checkpoint-{progress.step}"
    with files.whole_folder(path, need_bytes=need_bytes) as folder:
        build.save(model, folder, tokenizer)
        (folder / TRAINER).mkdir()
        flat = {
            f"{name}{SEPARATOR}{key}": value.contiguous()
            for name, quantities in optimizer_state.items()
            for key, value in quantities.items()
        }
        save_file(flat, folder / TRAINER / "optimizer.safetensors")
        save_file({"torch": torch.get_rng_state()}, folder / TRAINER / "random.safetensors")
        files.write_json(folder / TRAINER / "progress.json", asdict(progress))
    steps = list_steps(run_folder)
    kept = [step for step in steps if step <= progress.step][:keep]
    with files.disk_errors(run_folder):
        for step in set(steps).difference(kept):
            shutil.rmtree(run_folder / f"checkpoint-{step}")
    return path


def list_steps(run_folder: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, newest first."""
    names = [path.name.removeprefix("checkpoint-") for path in run_folder.glob("checkpoint-*")]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def newest(run_folder: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that matches its manifest; says which ones it passed over.

    None when there is none at all; `RunError` when there are some and every one is damaged.
    """
    passed_over: list[str] = []
    for step in list_steps(run_folder):
        path = run_folder / f"checkpoint-{step}"
        damage = files.damage(path)
        if damage is None:
            if passed_over:
                tell(f"Ignored {'; '.join(passed_over)}. Using {path.name}.")
            return path
        passed_over.append(damage)
    if passed_over:
        raise RunError(
            str(run_folder),
            found=f"no checkpoint that is whole ({'; '.join(passed_over)})",
            expected="at least one",
            mend="Delete the damaged checkpoints to start again, or restore one.",
        )
    return None


def load(path: Path) -> tuple[PreTrainedModel, State, Progress]:
    """Model, optimizer state and progress of a checkpoint; sets torch's random state."""
    model = build.load(ModelFolder(path))
    state: State = {}
    for flat_name, value in load_file(path / TRAINER / "optimizer.safetensors").items():
        name, _, key = flat_name.partition(SEPARATOR)
        state.setdefault(name, {})[key] = value
    torch.set_rng_state(load_file(path / TRAINER / "random.safetensors")["torch"])
    progress = Progress(**json.loads((path / TRAINER / "progress.json").read_text()))
    return model, state, progress
