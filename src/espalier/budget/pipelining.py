"""Pipelining: how long an update takes where stages differ, by a formula and by following the schedule.

The schedule is 1F1B (Narayanan et al., arXiv 2104.04473): stage s of p first takes p-1-s micro-batches forward, then
one forward and one backward in turn, then what is left backward. A stage does one thing at a time and sends while it
goes on; a link carries any number of messages at once. All times are seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage's seconds for one micro-batch forward and backward, and for what it sends.

    onward  a micro-batch to the next stage, or its gradient back; of the last stage 0
    tail    what its data ranks send each other after its last backward pass
    """

    forward: float
    backward: float
    onward: float
    tail: float

    @property
    def busy(self) -> float:
        """Of one micro-batch in both directions."""
        return self.forward + self.backward


def estimated(stages: Sequence[Stage], micro_batches: int, tied: float = 0.0) -> float:
    """An update by formula: one micro-batch goes down and up the pipe, the others follow at the slowest pace.

    With `tied`, first and last stage add up the gradients of the matrix that both have, in as many seconds.
    """
    there_and_back = sum(stage.busy + 2 * stage.onward for stage in stages)
    ends = [there_and_back + (micro_batches - 1) * pace(stages)]
    for stage in stages[:-1]:  # the last gradient comes to the first stage last
        ends.append(ends[-1] - stage.backward - stage.onward)
    return _finished(stages, ends, tied)


def pace(stages: Sequence[Stage]) -> float:
    """Seconds from one micro-batch to the next once the pipe is full.

    That of the slowest stage, or of neighbours that wait for each other: among k stages in a row a micro-batch and
    the gradient that lets the first of them go on go round once while k micro-batches pass.
    """
    slowest = 0.0
    for first in range(len(stages)):
        around = 0.0
        for count, stage in enumerate(stages[first:], start=1):
            around += stage.busy
            slowest = max(slowest, around / count)
            around += 2 * stage.onward
    return slowest


def simulated(stages: Sequence[Stage], micro_batches: int, tied: float = 0.0) -> float:
    """An update followed pass by pass: each begins when its stage is free and what it needs has come."""
    last = len(stages) - 1
    waiting = [deque(_turns(last - number, micro_batches)) for number in range(len(stages))]
    free = [0.0] * len(stages)
    done: dict[tuple[str, int, int], float] = {}  # (direction, stage, micro-batch): when
    while any(waiting):
        for number, stage in enumerate(stages):
            while waiting[number]:
                direction, batch = waiting[number][0]
                needed = _needed(direction, number, batch, last)
                if needed is not None and needed not in done:
                    break
                waiting[number].popleft()
                begin = max(free[number], done[needed] + _way(stages, number, needed) if needed else 0.0)
                free[number] = begin + (stage.forward if direction == "forward" else stage.backward)
                done[direction, number, batch] = free[number]
    return _finished(stages, free, tied)


def _turns(ahead: int, micro_batches: int) -> list[tuple[str, int]]:
    """What a stage with `ahead` stages after it does, in order."""
    ahead = min(ahead, micro_batches)
    turns = [("forward", batch) for batch in range(ahead)]
    for batch in range(micro_batches - ahead):
        turns += [("forward", ahead + batch), ("backward", batch)]
    return turns + [("backward", batch) for batch in range(micro_batches - ahead, micro_batches)]


def _needed(direction: str, stage: int, batch: int, last: int) -> tuple[str, int, int] | None:
    """The pass whose result this one takes; a first forward pass takes none."""
    if direction == "forward":
        return ("forward", stage - 1, batch) if stage else None
    return ("backward", stage + 1, batch) if stage < last else ("forward", stage, batch)


def _way(stages: Sequence[Stage], stage: int, needed: tuple[str, int, int]) -> float:
    """Seconds that a result is under way to the stage."""
    sender = needed[1]
    return 0.0 if sender == stage else stages[min(sender, stage)].onward


def _finished(stages: Sequence[Stage], ends: Sequence[float], tied: float) -> float:
    """When all stages have added up their gradients, given when each ends its passes."""
    added = [end + stage.tail for stage, end in zip(stages, ends, strict=True)]
    if tied:
        both = max(ends[0], ends[-1]) + tied
        added += [both + stages[0].tail, both + stages[-1].tail]
    return max(added)
