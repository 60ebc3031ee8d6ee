"""The training loop: short, and with no algorithm in it.

What is learned (objective), how fast (rate), how long (steps), what is watched (moments) and what it may cost
(meter) are passed in. The state goes from step to step; a checkpoint is the state on disk.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from espalier import watch
from espalier.data.stream import Batch, Stream
from espalier.ledger import Cost
from espalier.run import Run
from espalier.spec import ModelSpec
from espalier.train.checkpoint import Progress
from espalier.train.device import Device
from espalier.train.guards import Broken, report
from espalier.train.optim import Optimizer
from espalier.train.parallel import ALONE, Pairs, Parallel, within

Objective = Callable[[PreTrainedModel, Tensor, Tensor, Tensor | None], Tensor]
Ending = Literal["done", "budget", "signal", "spike"]


@dataclass
class State:
    """What training changes: the model with its optimizer, and how far it is."""

    spec: ModelSpec
    model: PreTrainedModel
    optimizer: Optimizer
    progress: Progress


@dataclass(frozen=True)
class Segment:
    """What one stretch of training is told, some of it by the number of the step.

    rows, micro_rows  sequences of an update, and of one forward pass
    factor            of the learning rates
    level             of the masks that a growth has put on new slots, 1 where they are done with
    spike_sigmas      how far out a loss is a spike
    """

    until_step: int
    rows: int
    micro_rows: int
    flops_per_token: float
    factor: Callable[[int], float]
    level: Callable[[int], float] = lambda step: 1.0
    spike_sigmas: float = math.inf


@dataclass(frozen=True)
class Step:
    """What one update was: mean loss (nats a token), gradient norm before clipping, rate factor, seconds.

    broken  why no update was made of it, where none was
    """

    loss: float
    grad_norm: float
    factor: float
    tokens: int
    flops: float
    seconds: float
    broken: Broken | None = None


Moment = Callable[[State, Step], None]


def _never(state: State) -> bool:
    return False


# Steps by which the next one's cost is judged.
LATEST = 16


class Meter:
    """Puts steps into the run's ledger about once a second, and says whether one more fits the budget.

    `reserve` is kept back for what has to follow: the last evaluation and the export.
    """

    def __init__(self, run: Run, reserve: Cost, *, every_seconds: float = 1.0) -> None:
        self.run, self.reserve, self.every_seconds = run, reserve, every_seconds
        self._pending = Cost()
        self._latest = deque((Cost(), Cost()), maxlen=LATEST)

    def expect(self, step: Cost) -> None:
        """State what a step of the coming stage should cost, before the first is done."""
        self._latest.clear()
        self._latest.extend((step, step))

    def ended(self) -> Ending | None:
        """Why there is no further step, on all ranks alike: a signal to any of them, or a budget that the leader sees
        to be spent.
        """
        stopped, spent = self.run.world.largest(self.run.stop_signal or 0, not self.allows_another())
        self.run.stop_signal = stopped or self.run.stop_signal  # one that came meanwhile is heard at the next step
        return "signal" if stopped else "budget" if spent else None

    def allows_another(self) -> bool:
        """Whether a step as dear as the second dearest of the latest could be paid, the reserve untouched.

        The dearest may be one during which the machine slept.
        """
        second = Cost(*(sorted(amounts)[-2] for amounts in zip(*map(_amounts, self._latest), strict=True)))
        return self.run.affords(self._pending + second + self.reserve)

    def count(self, state: State, step: Step) -> None:
        """Note a step that was done."""
        self._pending = self._pending + Cost(tokens=step.tokens, flops=step.flops)
        self._latest.append(self.run.rates.cost(step.seconds, tokens=step.tokens, flops=step.flops))
        if self.run.uncharged_seconds >= self.every_seconds:
            self.flush(state)

    def flush(self, state: State) -> None:
        """Write what is pending, with all the time since the last entry."""
        progress, pending = state.progress, self._pending
        self.run.charge("train", tokens=pending.tokens, flops=pending.flops, stage=progress.stage, step=progress.step)
        self._pending = Cost()


def _amounts(cost: Cost) -> tuple[float, ...]:
    return tuple(vars(cost).values())


def train(
    state: State,
    stream: Stream,
    segment: Segment,
    objective: Objective,
    device: Device,
    meter: Meter,
    moments: Sequence[Moment] = (),
    parallel: Parallel = ALONE,
    ends_at: Callable[[State], bool] = _never,
) -> Ending:
    """Train until the segment's last step, the budget, a signal or a spike; the state is that of a finished step.

    ends_at  whether training ends at a spike: asked before any moment, so that no such state is saved

    `NumericsError` when one update after the other isn't finite.
    """
    try:
        while state.progress.step < segment.until_step:
            if ending := meter.ended():
                return ending
            step = update(state, stream, segment, objective, device, parallel)
            watch.beside(state.progress.step, "after the step")
            meter.count(state, step)
            if step.broken:
                report(meter.run, state.progress, step.broken)
            if state.progress.guards.sigmas > segment.spike_sigmas and ends_at(state):
                return "spike"
            for moment in moments:
                moment(state, step)
        return "done"
    finally:
        meter.flush(state)


def update(
    state: State, stream: Stream, segment: Segment, objective: Objective, device: Device, parallel: Parallel = ALONE
) -> Step:
    """One optimizer step; no weight changes if the loss or a gradient isn't finite."""
    begin = time.perf_counter()
    progress = state.progress
    start = progress.guards.next_samples(progress.samples, segment.rows)
    micro_rows = parallel.micro_rows(segment.rows, segment.micro_rows)
    rank, ranks = parallel.data_rank, parallel.data_ranks
    watch.at(progress.step + 1, "reading data", least=watch.DISK)
    batch = stream.batch(start, segment.rows, rank=rank, ranks=ranks, together=micro_rows)
    factor = segment.factor(progress.step)
    state.optimizer.set_factor(factor)
    state.optimizer.set_level(segment.level(progress.step))
    watch.at(progress.step + 1, "forward and backward")
    losses = backward(state.model, batch, micro_rows, objective, device, parallel)
    watch.at(progress.step + 1, "optimizer")
    loss, grad_norm, broken = sum(losses), float(state.optimizer.clip()), None
    if math.isfinite(loss) and math.isfinite(grad_norm):
        state.optimizer.step()
    else:
        rows = stream.order(start, segment.rows)
        broken = Broken(rows.tolist(), stream.take(rows), micro_rows, losses, state.optimizer.norms(), ranks)
        state.optimizer.discard()
    tokens = segment.rows * stream.sequence_length
    flops = tokens * segment.flops_per_token
    state.progress = replace(
        progress,
        step=progress.step + 1,
        samples=start + segment.rows,
        tokens=progress.tokens + tokens,
        flops=progress.flops + flops,
        guards=progress.guards.after(loss, finite=broken is None, limit=segment.spike_sigmas),
    )
    return Step(loss, grad_norm, factor, tokens, flops, time.perf_counter() - begin, broken)


def backward(
    model: PreTrainedModel,
    batch: Batch,
    micro_rows: int,
    objective: Objective,
    device: Device,
    parallel: Parallel = ALONE,
) -> list[float]:
    """Accumulate the gradients of the batch's mean loss, `micro_rows` sequences at a time; the share of each in it.

    batch  this rank's rows; the loss is the mean over all ranks' labels, and the shares are those of all
    """
    labelled = sum(int(row[0]) for row in parallel.gathered(int((batch.labels >= 0).sum())))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = Pairs(weights if device.accumulate == "pairs" else [])
    losses: list[Tensor] = []
    for begin in range(0, len(batch.input_ids), micro_rows):
        inputs = device.tensors(batch.rows(begin, begin + micro_rows))
        with device.autocast():
            loss = within(model, objective, *inputs) / labelled
        loss.backward()
        losses.append(loss.detach())
        gradients.add(last=begin + micro_rows >= len(batch.input_ids))
    rounds = zip(*parallel.gathered(*map(float, losses)), strict=True)
    return [loss for ranks in rounds for loss in ranks]
