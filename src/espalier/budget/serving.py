"""Serving: what a model takes to answer so many queries a day for so many months. Estimated, never measured.

Queries are answered in batches, at a share of the speed that the roofline allows: prompts are read at once, then every
step of decoding reads all weights and the cache, which is why a small batch costs almost as much as a large one.
What is charged is the mean traffic. Peaks need more devices, or queries that wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from espalier.budget import flops, price
from espalier.budget.hardware import Hardware
from espalier.budget.roofline import Roofline, Setting
from espalier.errors import ResourceError
from espalier.ledger import Cost
from espalier.recipe import Recipe
from espalier.spec import ModelSpec
from espalier.units import DAY, si

DAYS_A_MONTH = 365.25 / 12
# The time that devices answer in, as clouds that bill by the second and shared machines charge it; or as many whole
# devices all the time, as they are rented.
Charged = Literal["used", "whole"]


class ServingRecipe(Recipe):
    """The queries, and the devices that answer them.

    months           12: what traffic is in more than a year, nobody knows
    queries_per_day  the mean; 0 is a model that nobody asks
    prompt_tokens    of a mean query; 512, and 128 of its answer, as `espalier budget roofline` takes it
    hardware         a key of the catalogue, a generic GPU if not stated, or "here"
    devices          that each copy of the model is divided among; 1: no traffic between them to pay for
    batch            queries that a copy answers side by side; 8: the weights are read once for all of them
    utilization      of the roofline's speed; 0.4: decoding took 2.4 times as long (bench/2026-11-24-inference-profile)
    weight_bits      of a stored weight; 16, as trained
    charged          "used", a device's seconds of work; or "whole", all seconds of as many whole devices as it takes
    """

    months: float = Field(default=12.0, gt=0, allow_inf_nan=False)
    queries_per_day: float = Field(ge=0, allow_inf_nan=False)
    prompt_tokens: int = Field(default=512, ge=1)
    output_tokens: int = Field(default=128, ge=1)
    hardware: str = "gpu"
    devices: int = Field(default=1, ge=1)
    batch: int = Field(default=8, ge=1)
    utilization: float = Field(default=0.4, gt=0, le=1)
    weight_bits: int = Field(default=16, ge=1, le=32)
    charged: Charged = "used"

    @property
    def days(self) -> float:
        return self.months * DAYS_A_MONTH

    @property
    def queries(self) -> float:
        """In all."""
        return self.days * self.queries_per_day


@dataclass(frozen=True)
class Served:
    """What serving takes.

    query  the cost of one query, by the device-seconds that answering it takes
    busy   devices at work on average; not a whole number
    cost   of all queries, by what is charged; `seconds` are device-seconds, `tokens` those read and written
    """

    query: Cost
    busy: float
    cost: Cost


def served(spec: ModelSpec, recipe: ServingRecipe, row: Hardware) -> Served:
    """What serving a model on devices of the kind of `row` takes; `ResourceError` where they don't hold it."""
    setting = Setting(batch=recipe.batch, weight_bits=recipe.weight_bits, devices=recipe.devices)
    copy = Roofline(spec, row.part(recipe.devices), setting)
    _require_fit(copy, recipe, row)
    seconds = copy.generation(recipe.prompt_tokens, recipe.output_tokens) / recipe.batch / recipe.utilization
    one = price.rates(row.part(1))
    query = one.cost(
        seconds * recipe.devices,
        flops=_flops(spec, recipe.prompt_tokens, recipe.output_tokens),
        tokens=recipe.prompt_tokens + recipe.output_tokens,
    )
    busy = query.seconds * recipe.queries_per_day / DAY
    charged = busy if recipe.charged == "used" else math.ceil(busy / recipe.devices) * recipe.devices
    cost = one.cost(
        charged * recipe.days * DAY, flops=query.flops * recipe.queries, tokens=query.tokens * recipe.queries
    )
    return Served(query, busy, cost)


def _flops(spec: ModelSpec, prompt: int, output: int) -> float:
    """Of a query: the first token of its answer comes with the prompt."""
    contexts = range(prompt + 1, prompt + output)
    return flops.prefill_flops(spec, prompt) + sum(flops.decode_flops(spec, context) for context in contexts)


def _require_fit(copy: Roofline, recipe: ServingRecipe, row: Hardware) -> None:
    """Refuse a model that the devices of one copy don't hold with a batch, or devices that can't be linked."""
    if recipe.devices > 1 and not row.link_bandwidth:
        raise ResourceError(
            "serving.devices",
            found=f"{recipe.devices} of {row.name}, of which no link to another is known",
            expected="1",
            mend="Choose other hardware.",
        )
    needed = sum(copy.memory(recipe.prompt_tokens, recipe.output_tokens).values())
    if needed > copy.hardware.memory_bytes:
        raise ResourceError(
            f"serving on {recipe.devices} × {row.name}",
            found=f"{si(copy.hardware.memory_bytes, 'B')}",
            expected=f"{si(needed, 'B')} for {si(flops.parameters(copy.spec), 'parameters')} and a batch of "
            f"{recipe.batch}",
            mend="Set serving.devices higher, serving.batch or serving.weight_bits lower, or choose other "
            "serving.hardware.",
        )
