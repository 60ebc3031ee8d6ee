"""Pace: whether a run keeps to its plan, and a plan for the rest where it doesn't.

A plan's seconds come from a few steps that were timed beforehand. On a machine that turns out slower, or with less time
or dearer hours than when it was planned, a run would be cut off before its last growth and its decay. So every
twentieth of the way what is left is compared with what it should take, and stretched or shortened to fit.
Tokens and FLOPs are counted exactly, so runs that only they limit always keep to their plan, bit for bit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from espalier.budget.plan import Duration, Plan
from espalier.ledger import RESOURCES, Cap, Cost
from espalier.run import Run

if TYPE_CHECKING:
    from espalier.train.checkpoint import Progress
    from espalier.train.loop import State, Step

# The share of a plan's FLOPs after which its pace is looked at, and by how much it may differ.
STRETCH, DRIFT = 0.05, 0.05
# Fewer steps don't tell a pace.
FEWEST = 10


class Pace:
    """The plan of a run as it stands.

    durations  of the stages, as stated; what is stated in tokens or FLOPs may be shortened, not stretched
    share      of what is left of the budget that is kept back, for evaluations and checkpoints on the way
    growth     what evaluating a growth takes
    end        what has to follow the training
    keep       called with a plan that takes the place of the one before
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        durations: Sequence[Duration],
        *,
        share: float,
        growth: Cost,
        end: Cost,
        keep: Callable[[Plan], None],
    ) -> None:
        self.run, self.plan, self.durations = run, plan, durations
        self.share, self.growth, self.end, self.keep = share, growth, end, keep
        self._paces: list[float] = []

    def __call__(self, state: State, step: Step) -> None:
        """Note what a step took of the seconds planned for it."""
        stage = self.plan.stages[state.progress.stage]
        self._paces.append(step.seconds * stage.steps / stage.cost.seconds)

    def next_look(self, progress: Progress) -> int:
        """The step of the stage at which to look next."""
        stage = self.plan.stages[progress.stage]
        steps = round(STRETCH * self.plan.total.flops / (stage.cost.flops / stage.steps))
        return min(progress.step + max(steps, FEWEST), stage.last_step)

    def look(self, progress: Progress) -> None:
        """Compare the steps since the last look with the plan, and change it if what is left doesn't fit.

        Of ten steps the slowest doesn't count, which may have compiled: time in which a machine did something else is
        gone, and says nothing of the rest.
        """
        if len(self._paces) < FEWEST:
            return
        kept = sorted(self._paces)[: math.floor(0.9 * len(self._paces))]
        self._paces = []
        self.adapt(progress, statistics.mean(kept))

    def adapt(self, progress: Progress, seconds: float, *, changed: bool = False) -> None:
        """Change the plan for what is left if training takes `seconds` for each that was planned and it doesn't fit.

        changed  whether the budget or its prices were, so that what is counted has to be looked at, too
        """
        # The leader's clock and ledger decide for all ranks.
        factor = self.run.world.told(self._factor(progress, seconds, changed) if self.run.world.leads else None)
        if factor is None:
            return
        self.plan = self.plan.stretched(factor, progress.step)
        self.keep(self.plan)
        self._tell(progress, seconds, factor)

    def _factor(self, progress: Progress, seconds: float, changed: bool) -> float | None:
        """By how much what is left is to be stretched, None if it fits."""
        left = self.plan.left(progress.step)
        if not left.flops:
            return None
        need = self.run.rates.cost(left.seconds * seconds, tokens=left.tokens, flops=left.flops)
        affordable = self._affordable(len(self.plan.stages) - 1 - progress.stage)
        share = affordable.share_spent(need)
        counted = affordable.share_spent(Cost(tokens=need.tokens, flops=need.flops))
        if not share or (share == counted and not changed):
            return None
        factor = 1 / share
        if abs(factor - 1) <= DRIFT or (factor > 1 and not self._may_be_stretched(progress)):
            return None
        return factor

    def _affordable(self, growths: int) -> Cap:
        """What the rest of the training may take, with `growths` to come."""
        cap, spent = self.run.ledger.cap, self.run.ledger.total
        kept = self.end + self.growth * growths

        def affordable(name: str) -> float:
            rest = getattr(cap, name) - getattr(spent, name)
            return max(min(rest * (1 - self.share), rest - getattr(kept, name)), 0.0)

        return Cap(**{name: affordable(name) for name in RESOURCES})

    def _may_be_stretched(self, progress: Progress) -> bool:
        """Shares may, until the last twentieth: what was kept back isn't for training, nor a rate that has fallen."""
        early = self.plan.left(progress.step).flops >= STRETCH * self.plan.total.flops
        return early and all(duration.unit == "share" for duration in self.durations[progress.stage :])

    def _tell(self, progress: Progress, seconds: float, factor: float) -> None:
        steps = self.plan.steps
        self.run.log_metrics(
            step=progress.step, stage=progress.stage, planned_anew=factor, pace=seconds, planned_steps=steps
        )
        self.run.tell(
            f"Planned anew at step {progress.step}, for what is left of the budget: {steps} steps in all, "
            f"{factor:.2f} x of what was to come."
        )
