"""What training is told: optimizer, schedule, batches and intervals. Light: nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from espalier.recipe import Flagged, Recipe, Safe


class OptimizerRecipe(Recipe):
    """Rates are the peaks at the parametrisation's base width.

    learning_rate         of the matrices inside the layers
    vector_learning_rate  of embedding, read-out, norms and biases (always AdamW)
    """

    name: Literal["muon", "adamw"] = "muon"
    learning_rate: Flagged[float] = Field(default=0.02, gt=0)
    vector_learning_rate: Flagged[float] = Field(default=0.004, gt=0)
    weight_decay: Flagged[float] = Field(default=0.0, ge=0)
    adam_beta1: Flagged[float] = Field(default=0.9, ge=0, lt=1)
    adam_beta2: Flagged[float] = Field(default=0.95, ge=0, lt=1)
    adam_epsilon: Flagged[float] = Field(default=1e-10, gt=0)
    muon_momentum: Flagged[float] = Field(default=0.95, ge=0, lt=1)
    max_grad_norm: Flagged[float] = Field(default=1.0, gt=0)


@dataclass(frozen=True)
class Stretch:
    """Where a growth stage lies in its run, and its rates there.

    begin, end   shares of the run's FLOPs
    rate         the stage's factor on the peak rate; `next_rate` the following stage's, None in the last
    """

    begin: float = 0.0
    end: float = 1.0
    rate: float = 1.0
    next_rate: float | None = None


class ScheduleRecipe(Recipe):
    """Shape of the learning rate over a run. All ratios are shares of the run's FLOPs: in a growth run a late step
    costs many times an early one, and what is planned is the budget.

    wsd     warm-up, stable, then linear decay over the last `decay_ratio`
    cosine  warm-up, then half a cosine
    linear  warm-up, then a line
    Each ends at `min_ratio`.

    After a growth (`at_growth`):
    inherit   the one curve goes on, and the rate comes back to it over `rewarm_ratio`
    rewind    the curve begins again at its peak, over what is left, after `rewarm_ratio` (MSG, arXiv 2305.02869)
    fresh     the curve begins again with its warm-up, over what is left (G_stack, arXiv 2405.15319)
    segments  each stage goes by half a cosine from its own `rate` to the next stage's, the last to `min_ratio`,
              whatever the shape (FLM-101B, arXiv 2309.03852)
    """

    lr_scheduler_type: Literal["wsd", "cosine", "linear"] = "wsd"
    at_growth: Literal["inherit", "rewind", "fresh", "segments"] = "inherit"
    warmup_ratio: float = Field(default=0.02, ge=0, lt=1)
    decay_ratio: float = Field(default=0.4, ge=0, le=1)
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    rewarm_ratio: float = Field(default=0.005, ge=0, lt=1)

    @property
    def falls_from(self) -> float:
        """The share of the FLOPs after which the rate is falling; the middle of curves that fall from the start."""
        return 1 - self.decay_ratio if self.lr_scheduler_type == "wsd" else 0.5

    def factor(self, done: float, stage: Stretch = Stretch()) -> float:
        """The factor on the peak rate when a share `done` (0 to 1) of the FLOPs is spent, inside `stage`."""
        since, left = done - stage.begin, 1 - stage.begin
        again = since / left if left else 1.0
        warm = _ramp(done, self.warmup_ratio) * (_ramp(since, self.rewarm_ratio) if stage.begin else 1.0)
        match self.at_growth:
            case "inherit":
                return stage.rate * self._shape(done) * warm
            case "rewind":
                return stage.rate * self._shape(again) * warm
            case "fresh":
                return stage.rate * self._shape(again) * _ramp(again, self.warmup_ratio)
            case "segments":
                until = self.min_ratio if stage.next_rate is None else stage.next_rate
                gone = min(max(since / (stage.end - stage.begin), 0.0), 1.0)
                return (until + (stage.rate - until) * _half_cosine(gone)) * warm

    def _shape(self, done: float) -> float:
        begin = 1 - self.decay_ratio if self.lr_scheduler_type == "wsd" else self.warmup_ratio
        gone = min(max((done - begin) / (1 - begin), 0.0), 1.0) if begin < 1 else 0.0
        left = _half_cosine(gone) if self.lr_scheduler_type == "cosine" else 1 - gone
        return self.min_ratio + (1 - self.min_ratio) * left


class ParallelRecipe(Recipe):
    """How the ranks that torchrun starts share a model: as copies, each divided among `shard` ranks, whose products are
    divided among `tensor` ranks.

    shard   ranks that hold one copy together; all that there are, if not stated
    tensor  ranks that divide every product; a divisor of those on a machine
    """

    shard: int | None = Field(default=None, gt=0)
    tensor: int = Field(default=1, gt=0)


class TrainRecipe(Recipe):
    """Batches, and how often things happen.

    batch_tokens                 tokens of one update
    per_device_train_batch_size  sequences of one forward pass; an update accumulates as many as it needs
    evaluations                  how often the held-out loss is taken over the whole run
    eval_tokens                  held-out text of each; if not stated, as much as half the budget's reserve pays for
    logging_steps                if not stated, 300 lines for the whole run
    keep_checkpoints             how many of the newest stay
    keep_every                   of the others, those whose step is a multiple of this stay too
    save                         "at once", or "beside" the training, from a copy; "auto" is beside it on GPUs, whose
                                 states have room in the host's memory
    keep                         "newest" checkpoints alone, or the model at the end of each of the "stages" too
    torch_compile                "auto" compiles when the run is long enough to repay it
    bf16                         "auto" uses bfloat16 matmuls where they were measured to be faster
    fp8                          "on" makes the layers' products in float8, on GPUs that have it; needs espalier[fp8]
    recompute                    "layers" keeps only the layers' inputs and computes the rest again in the backward
                                 pass (gradient checkpointing): less memory, some 30% more FLOPs
    on_spike                     what follows a loss far above the latest ones: "rewind" goes back to a checkpoint
                                 before it and passes over the batches that led to it
    spike_sigmas                 how far, in robust standard deviations
    """

    batch_tokens: int = Field(default=8192, gt=0)
    per_device_train_batch_size: Flagged[int] = Field(default=8, gt=0)
    logging_steps: Safe[int | None] = Field(default=None, gt=0)
    evaluations: Flagged[int] = Field(default=20, gt=0)
    eval_tokens: Flagged[int | None] = Field(default=None, gt=0)
    save_steps: Safe[int] = Field(default=100, gt=0)
    keep_checkpoints: Safe[int] = Field(default=2, gt=0)
    keep_every: Safe[int | None] = Field(default=None, gt=0)
    save: Safe[Literal["auto", "at once", "beside"]] = "auto"
    keep: Safe[Literal["newest", "stages"]] = "newest"
    torch_compile: Literal["auto", "on", "off"] = "auto"
    bf16: Literal["auto", "on", "off"] = "auto"
    fp8: Literal["on", "off"] = "off"
    recompute: Literal["none", "layers"] = "none"
    parallel: Flagged[ParallelRecipe] = ParallelRecipe()
    on_spike: Flagged[Literal["tell", "rewind", "off"]] = "tell"
    spike_sigmas: Flagged[float] = Field(default=7.0, gt=0)
    threads: int | None = Field(default=None, gt=0, description="CPU threads; the cores that are free, if not stated")


def _half_cosine(gone: float) -> float:
    return (1 + math.cos(math.pi * gone)) / 2


def _ramp(done: float, length: float) -> float:
    return min(1.0, done / length) if length else 1.0
