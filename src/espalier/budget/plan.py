"""Plan: what a growth run is going to do and cost, stage by stage, before anything is spent.

Durations are stated in tokens, FLOPs or a share of the budget and become steps here; the schedule, the loop and the
comparison of plan and fact all read the same steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from espalier.budget import flops
from espalier.errors import BudgetError
from espalier.ledger import RESOURCES, Cap, Cost, Rates
from espalier.recipe import Flagged, Planned, Recipe
from espalier.spec import ModelSpec

Unit = Literal["tokens", "flops", "share"]
Basis = Literal["measured", "estimated"]
_NUMBER = r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)"
_DURATION = re.compile(rf"\s*{_NUMBER}\s*(?:(%)|([kMGTPE]?)\s*(tokens|flops))\s*", re.IGNORECASE)
_PREFIX = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}


@dataclass(frozen=True)
class Duration:
    """How long a stage lasts: an amount of tokens, of FLOPs, or a share (0 to 1) of the budget."""

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Read '3M tokens', '2e12 flops' or '25%'; ValueError otherwise."""
        match = _DURATION.fullmatch(str(text))
        if not match:
            raise ValueError(f"{text!r} isn't a duration; write '3M tokens', '2T flops' or '25%' (of the budget)")
        number, percent, prefix, unit = match.groups()
        amount = float(number) / 100 if percent else float(number) * _PREFIX[prefix.upper()]
        if not 0 < amount < math.inf:
            raise ValueError(f"{text!r} is no time at all" if amount == 0 else f"{text!r} is a duration without end")
        if percent:
            return cls(amount, "share")
        return cls(amount, "tokens" if unit.lower() == "tokens" else "flops")


def _checked(text: str) -> str:
    Duration.parse(text)
    return text


DurationText = Annotated[str, BeforeValidator(str), AfterValidator(_checked)]


class BudgetRecipe(Recipe):
    """The most that the run may spend; what isn't stated isn't limited.

    reserve is the share kept back for evaluation, checkpoints and export. Prices override the hardware row's.
    """

    usd: Planned[float | None] = Field(default=None, gt=0)
    hours: Planned[float | None] = Field(default=None, gt=0)
    kwh: Planned[float | None] = Field(default=None, gt=0)
    flops: Planned[float | None] = Field(default=None, gt=0)
    tokens: Planned[float | None] = Field(default=None, gt=0)
    reserve: Flagged[float] = Field(default=0.1, ge=0, lt=1)
    usd_per_hour: Planned[float | None] = Field(default=None, ge=0)
    watts: Planned[float | None] = Field(default=None, ge=0)
    kgco2e_per_kwh: Planned[float | None] = Field(default=None, ge=0)
    pue: Planned[float] = Field(default=1.0, ge=1)

    def cap(self) -> Cap:
        stated = {"usd": self.usd, "kwh": self.kwh, "flops": self.flops, "tokens": self.tokens}
        if self.hours is not None:
            stated["seconds"] = self.hours * 3600
        return Cap(**{name: amount for name, amount in stated.items() if amount is not None})


@dataclass(frozen=True)
class StagePlan:
    """One stage: steps [first_step, first_step + steps) with `rows` sequences a step, and their price."""

    spec: ModelSpec
    first_step: int
    steps: int
    rows: int
    parameters: int
    flops_per_token: float
    cost: Cost

    @property
    def last_step(self) -> int:
        """The step count at which the stage is done."""
        return self.first_step + self.steps

    def left(self, step: int) -> int:
        """How many of its steps come after `step`."""
        return min(max(self.last_step - step, 0), self.steps)


@dataclass(frozen=True)
class Plan:
    """All stages, their sum, and what the same tokens would cost at the final size from the start.

    `basis` says where the seconds come from: 'measured' steps of these very models, or 'estimated' peaks.
    """

    stages: tuple[StagePlan, ...]
    total: Cost
    from_scratch: Cost
    basis: Basis

    @property
    def steps(self) -> int:
        return self.stages[-1].last_step

    def left(self, step: int) -> Cost:
        """What the steps after `step` should cost."""
        return sum((stage.cost * (stage.left(step) / stage.steps) for stage in self.stages), Cost())

    def stretched(self, factor: float, step: int) -> Plan:
        """The plan with `factor` times the steps that are left after `step`; a stage not begun keeps one at least."""
        stages: list[StagePlan] = []
        for stage in self.stages:
            left = stage.left(step)
            fewest = 1 if left == stage.steps else 0
            steps = stage.steps - left + max(math.floor(left * factor), fewest)
            first_step = stages[-1].last_step if stages else 0
            stages.append(replace(stage, first_step=first_step, steps=steps, cost=stage.cost * (steps / stage.steps)))
        total = sum((stage.cost for stage in stages), Cost())
        return replace(
            self,
            stages=tuple(stages),
            total=total,
            from_scratch=self.from_scratch * (total.tokens / self.total.tokens),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "basis": self.basis,
            "total": asdict(self.total),
            "from_scratch": asdict(self.from_scratch),
            "stages": [{**asdict(stage), "spec": stage.spec.model_dump()} for stage in self.stages],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        stages = tuple(
            StagePlan(**{**stage, "spec": ModelSpec(**stage["spec"]), "cost": Cost(**stage["cost"])})
            for stage in values["stages"]
        )
        return cls(stages, Cost(**values["total"]), Cost(**values["from_scratch"]), values["basis"])


def plan(
    stages: Sequence[tuple[ModelSpec, Duration]],
    *,
    rows: int,
    sequence_length: int,
    seconds_per_token: Sequence[float],
    basis: Basis,
    rates: Rates,
    cap: Cap,
    spent: Cost | None = None,
    reserve: float = 0.1,
    recompute: flops.Recompute = "none",
) -> Plan:
    """Turn durations into steps of `rows` sequences, and price them, with what the backward pass computes again.

    spent is what is gone already (data preparation, probes); shares are of what is left, less the reserve.
    BudgetError when a stage isn't worth one step or the whole doesn't fit the cap.
    """
    left = _left(cap, spent or Cost(), reserve)
    planned: list[StagePlan] = []
    first_step = 0
    for number, ((spec, duration), speed) in enumerate(zip(stages, seconds_per_token, strict=True), start=1):
        flops_per_token = flops.training_flops(spec, sequence_length, recompute)
        tokens = _tokens(duration, flops_per_token, speed, left, rates, number)
        step_tokens = rows * sequence_length
        steps = round(tokens / step_tokens) if duration.unit == "tokens" else math.floor(tokens / step_tokens)
        if steps < 1:
            raise BudgetError(
                f"stage {number}",
                found=f"{tokens:,.0f} tokens",
                expected=f"at least one step of {step_tokens:,} tokens",
                mend="Raise the budget or the stage's duration, or lower train.batch_tokens or the model's size.",
            )
        done = steps * step_tokens
        cost = rates.cost(done * speed, tokens=done, flops=done * flops_per_token)
        planned.append(StagePlan(spec, first_step, steps, rows, flops.parameters(spec), flops_per_token, cost))
        first_step += steps
    total = sum((stage.cost for stage in planned), Cost())
    if basis == "measured":  # an estimate is no ground for a refusal
        _require_fit(total, left, cap)
    last = planned[-1]
    scratch = rates.cost(
        total.tokens * seconds_per_token[-1], tokens=total.tokens, flops=total.tokens * last.flops_per_token
    )
    return Plan(tuple(planned), total, scratch, basis)


def _left(cap: Cap, spent: Cost, reserve: float) -> Cap:
    return Cap(**{name: (getattr(cap, name) - getattr(spent, name)) * (1 - reserve) for name in RESOURCES})


def _tokens(
    duration: Duration, flops_per_token: float, seconds_per_token: float, left: Cap, rates: Rates, number: int
) -> float:
    if duration.unit == "tokens":
        return duration.amount
    if duration.unit == "flops":
        return duration.amount / flops_per_token
    one = rates.cost(seconds_per_token, tokens=1.0, flops=flops_per_token)
    affordable = [getattr(left, name) / getattr(one, name) for name in RESOURCES if getattr(one, name) > 0]
    tokens = duration.amount * min(affordable, default=math.inf)
    if math.isinf(tokens):
        raise BudgetError(
            f"stage {number}: duration",
            found="a share of a budget that has no limit",
            expected="a budget of usd, hours, kwh, flops or tokens",
            mend="Set budget.flops=..., budget.hours=... or another limit, or state the duration in tokens.",
        )
    return max(tokens, 0.0)


def _require_fit(total: Cost, left: Cap, cap: Cap) -> None:
    name = left.exceeded_by(total * 0.999)  # shares that add up to 100% fit, whatever the rounding
    if name:
        raise BudgetError(
            f"budget.{'hours' if name == 'seconds' else name}",
            found=f"stages that take {getattr(total, name):.4g} {name}",
            expected=f"at most {getattr(left, name):.4g} of the cap of {getattr(cap, name):.4g}, after the reserve",
            mend="Raise the budget, or shorten the stages.",
        )
