"""What the parts work on: a growth run of a second, a checkpoint of it, and a setting that says how much to try."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import yaml

from espalier import files, pipeline
from espalier.budget.hardware import Hardware, remember
from espalier.run import FINAL
from espalier.train import checkpoint, loop
from faults import calls

T = TypeVar("T")
WORDS = ("def", "return", "import", "class", "self", "value", "print", "list", "index", "name", "for", "while", "open")
NAME = "small"

# Durations in tokens, one thread: the same steps, bit for bit, after any interruption.
RECIPE: dict[str, Any] = {
    "name": NAME,
    "seed": 3,
    "data": {"held_out": 0.2, "vocab_size": 300, "sequence_length": 16},
    "model": {"head_dim": 16, "max_position_embeddings": 64},
    "stages": [
        {"num_hidden_layers": 1, "hidden_size": 32, "duration": "640 tokens"},
        {"num_hidden_layers": 2, "hidden_size": 32, "duration": "640 tokens", "depth": "stack"},
        {"num_hidden_layers": 3, "hidden_size": 48, "duration": "640 tokens", "depth": "identity"},
    ],
    "train": {
        "batch_tokens": 64,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "evaluations": 3,
        "eval_tokens": 128,
        "save_steps": 4,
        "torch_compile": "off",
        "bf16": "off",
        "threads": 1,
    },
    "samples": {"prompts": ["def "], "max_new_tokens": 1},
}


def silent(line: str) -> None:
    """What a run says to nobody."""


@dataclass(frozen=True)
class Small:
    """A place with a corpus, caches and the small recipe's undisturbed run."""

    place: Path

    @classmethod
    def make(cls, place: Path) -> Small:
        """Write the corpus, fill the caches and carry the recipe out once, in this process: it's warm afterwards."""
        home, corpus, words = place / "home", place / "corpus", random.Random(0)
        os.environ.update({"ESPALIER_HOME": str(home), "HF_HUB_OFFLINE": "1"})
        remember(MACHINE, home)
        corpus.mkdir(parents=True)
        for number in range(60):
            (corpus / f"text{number:02}.txt").write_text(" ".join(words.choices(WORDS, k=80)) + f" {number}\n")
        small = cls(place)
        small.carry_out(place / "calm")
        return small

    @property
    def run(self) -> Path:
        """The undisturbed run's folder."""
        return self.place / "calm" / NAME

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """The recipe on the corpus, with some of its parts changed."""
        data = {**RECIPE["data"], "sources": [str(self.place / "corpus")]}
        return {**RECIPE, "data": data, **changes}

    def carry_out(self, runs: Path, **changes: Any) -> int:
        """Carry out the recipe in `runs`, or go on with it; the exit code."""
        runs.mkdir(parents=True, exist_ok=True)
        path = runs / "recipe.yaml"
        if not path.exists():
            path.write_text(yaml.safe_dump(self.recipe(**changes)))
        # A run charges its time once a second; here after each step, so that its file calls don't hang on the clock.
        with mock.patch.dict(loop.Meter.__init__.__kwdefaults__, every_seconds=0.0):
            return pipeline.main(path, [], runs=runs, dry_run=False, tell=silent)


MACHINE = Hardware(
    name="a machine for trials",
    kind="cpu",
    count=2,
    peak_flops={"float32": 1e11, "bfloat16": 1e11},
    memory_bytes=2**33,
    memory_bandwidth=1e10,
    watts=20.0,
    usd_per_hour=0.1,
    kgco2e_per_kwh=0.4,
    sources={},
)


def ends_with(run: Path) -> list[str]:
    """Hashes of what a run ends with: the final weights, and the last checkpoint's weights and optimizer."""
    last = run / f"checkpoint-{checkpoint.list_steps(run)[0]}"
    weights = [files.sha256(run / FINAL / "model.safetensors")]
    return [*weights, last.name, *state_of(last)]


def state_of(folder: Path) -> list[str]:
    """Hashes of a checkpoint's weights, optimizer, random state and progress."""
    names = ("model.safetensors", *(f"trainer/{n}" for n in ("optimizer.safetensors", "random.safetensors")))
    return [*(files.sha256(folder / name) for name in names), (folder / "trainer" / "progress.json").read_text()]


def of_damage(lines: Iterable[str]) -> list[str]:
    """What of all that was said tells that something on the disk isn't as it was written."""
    return [line for line in lines if any(word in line for word in ("damaged", "isn't as", "can't be"))]


def fresh(source: Path, target: Path) -> Path:
    """`target` as a copy of `source`, whatever was there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
    return target


@dataclass(frozen=True)
class Setting:
    """How a part is carried out: where, with which seed, and how many of all trials."""

    place: Path
    small: Small
    seed: int = 1
    share: float = 1.0

    def dice(self, name: str) -> random.Random:
        """Chances that hang on the seed and the name alone."""
        return random.Random(f"{self.seed}:{name}")

    def some(self, trials: Sequence[T], *, share: float = 1.0) -> list[T]:
        """The share of the trials that is carried out, evenly spread, at least one."""
        count = min(len(trials), max(1, round(len(trials) * self.share * share)))
        return [trials[int((place + 0.5) * len(trials) / count)] for place in range(count)]

    def folder(self, name: str) -> Path:
        """An empty folder."""
        path = self.place / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def seen(self, end: calls.End) -> calls.End:
        """Keep a refusal for the part that looks at refusals."""
        if end.error and "kind" in end.error:
            with (self.place / "refusals.jsonl").open("a") as file:
                file.write(json.dumps(end.error) + "\n")
        return end


def save(
    place: Path, model: Any, moments: Any, progress: checkpoint.Progress, *, need_bytes: int = 0, keep: int = 2
) -> Path:
    """A checkpoint of a state in `place`, at once."""
    saver = checkpoint.Saver(place, tokenizer=None, keep=keep)
    saver.begin(model, moments, progress, need_bytes=need_bytes)
    return place / f"checkpoint-{progress.step}"
