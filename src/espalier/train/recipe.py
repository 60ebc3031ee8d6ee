"""What training is told: optimizer, schedule, batches and intervals. Light: nothing here imports torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from espalier.recipe import Recipe


class OptimizerRecipe(Recipe):
    """Rates are the peaks at the parametrisation's base width.

    learning_rate         of the matrices inside the layers
    vector_learning_rate  of embedding, read-out, norms and biases (always AdamW)
    """

    name: Literal["muon", "adamw"] = "muon"
    learning_rate: float = Field(default=0.02, gt=0)
    vector_learning_rate: float = Field(default=0.004, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-10, gt=0)
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)


class ScheduleRecipe(Recipe):
    """Shape of the learning rate over a run. All ratios are shares of the run's FLOPs: in a growth run a late step
    costs many times an early one, and what is planned is the budget.

    wsd     warm-up, stable, then linear decay over the last `decay_ratio`
    cosine  warm-up, then half a cosine
    linear  warm-up, then a line
    Each ends at `min_ratio`. After a growth the rate comes back over `rewarm_ratio`.
    """

    lr_scheduler_type: Literal["wsd", "cosine", "linear"] = "wsd"
    warmup_ratio: float = Field(default=0.02, ge=0, lt=1)
    decay_ratio: float = Field(default=0.4, ge=0, le=1)
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    rewarm_ratio: float = Field(default=0.005, ge=0, lt=1)

    def factor(self, done: float, since_growth: float | None = None) -> float:
        """The factor on the peak rate when a share `done` (0 to 1) of the FLOPs is spent.

        since_growth: the share spent since the last growth; None before the first.
        """
        factor = self._shape(done) * _ramp(done, self.warmup_ratio)
        return factor if since_growth is None else factor * _ramp(since_growth, self.rewarm_ratio)

    def _shape(self, done: float) -> float:
        begin = 1 - self.decay_ratio if self.lr_scheduler_type == "wsd" else self.warmup_ratio
        gone = min(max((done - begin) / (1 - begin), 0.0), 1.0) if begin < 1 else 0.0
        left = (1 + math.cos(math.pi * gone)) / 2 if self.lr_scheduler_type == "cosine" else 1 - gone
        return self.min_ratio + (1 - self.min_ratio) * left


class TrainRecipe(Recipe):
    """Batches, and how often things happen.

    batch_tokens                 tokens of one update
    per_device_train_batch_size  sequences of one forward pass; an update accumulates as many as it needs
    evaluations                  how often the held-out loss is taken over the whole run
    eval_tokens                  held-out text of each; if not stated, as much as half the budget's reserve pays for
    logging_steps                if not stated, 300 lines for the whole run
    torch_compile                "auto" compiles when the run is long enough to repay it
    bf16                         "auto" uses bfloat16 matmuls where they were measured to be faster
    """

    batch_tokens: int = Field(default=8192, gt=0)
    per_device_train_batch_size: int = Field(default=8, gt=0)
    logging_steps: int | None = Field(default=None, gt=0)
    evaluations: int = Field(default=20, gt=0)
    eval_tokens: int | None = Field(default=None, gt=0)
    save_steps: int = Field(default=100, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    torch_compile: Literal["auto", "on", "off"] = "auto"
    bf16: Literal["auto", "on", "off"] = "auto"
    threads: int | None = Field(default=None, gt=0, description="CPU threads; the cores that are free, if not stated")


def _ramp(done: float, length: float) -> float:
    return min(1.0, done / length) if length else 1.0
