"""Stages: growth paths to a target shape, as three papers took them. Arithmetic only, no torch.

What a path states are shares of the budget, so it fits any sum; it is a part of what `espalier run` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from pydantic import Field

from espalier.budget import flops
from espalier.errors import RecipeError
from espalier.grow.progressive import GrowthRecipe, ModelRecipe
from espalier.grow.when import stack_timing
from espalier.method import method
from espalier.run import Run
from espalier.spec import ModelSpec

Style = Literal["stack", "flm", "msg"]

# FLM-101B: parameters of each stage as a share of the last one's, its tokens, and its first learning rate.
FLM_SIZES = (16 / 101, 51 / 101, 1.0)
FLM_TOKENS = (245.37, 39.64, 26.54)
FLM_RATES = (1.0, 0.85, 0.5)
# MSG's BERT plans begin with a quarter of the layers and of the neurons, and two thirds of the channels and heads.
MSG_LAYERS, MSG_NEURONS, MSG_CHANNELS = 1 / 4, 1 / 4, 2 / 3


@dataclass(frozen=True)
class Leg:
    """One stage of a path: its shape, its part of the tokens (in any unit), and how it is grown into."""

    spec: ModelSpec
    tokens: float
    growth: dict[str, Any]


class StagesRecipe(ModelRecipe):
    """The shape that is wanted, and how to get there.

    stack  one stack of a shallow model: when, by the formula where it holds (G_stack, arXiv 2405.15319)
    flm    width and depth at once, twice, late: 79% of the tokens at 16% of the size (FLM-101B, arXiv 2309.03852)
    msg    one dimension at a time behind masks: neurons, layers, channels, heads, layers (MSG, arXiv 2305.02869)
    """

    style: Style = "stack"
    hidden_size: int | None = Field(default=512, gt=0)
    num_hidden_layers: int | None = Field(default=24, gt=0)
    vocab_size: int | None = Field(default=4096, gt=0)
    sequence_length: int = Field(default=256, gt=0)
    tokens: float = Field(default=1e9, gt=0, description="of the whole run; stack's formula wants to know")
    factor: int = Field(default=4, ge=2, description="how many times as deep stack makes the small model")


def stack_path(target: ModelSpec, recipe: StagesRecipe) -> list[Leg]:
    """A model of 1/factor of the layers, stacked once; its optimizer begins afresh."""
    small = target.changed(num_hidden_layers=max(target.num_hidden_layers // recipe.factor, 1))
    first = stack_timing(flops.parameters(target), recipe.tokens).tokens
    return [
        Leg(small, first, {}),
        Leg(target, recipe.tokens - first, {"depth": "stack", "optimizer_state": "fresh"}),
    ]


def flm_path(target: ModelSpec, recipe: StagesRecipe) -> list[Leg]:
    """Three sizes with FLM-101B's ratios of parameters, tokens and rates; the paper doesn't print the inner shapes, so
    layers and channels shrink alike.
    """
    legs = []
    for size, tokens, rate in zip(FLM_SIZES, FLM_TOKENS, FLM_RATES, strict=True):
        each = size ** (1 / 3)  # parameters go with layers times channels squared
        spec = _shrunk(target, layers=each, channels=each, neurons=each, heads=each)
        legs.append(Leg(spec, tokens, {"rate": rate, "depth": "identity", "width": "zero_pad"}))
    return legs


def msg_path(target: ModelSpec, recipe: StagesRecipe) -> list[Leg]:
    """Neurons, then half of the layers, channels, heads, and the other half; each as long as the others."""
    small = _shrunk(target, layers=MSG_LAYERS, channels=MSG_CHANNELS, neurons=MSG_NEURONS, heads=MSG_CHANNELS)
    middle = min(2 * small.num_hidden_layers, target.num_hidden_layers)
    heads = {key: getattr(target, key) for key in ("num_attention_heads", "num_key_value_heads")}
    changes: Sequence[dict[str, int]] = (
        {"intermediate_size": target.intermediate_size},
        {"num_hidden_layers": middle},
        {"hidden_size": target.hidden_size},
        heads,
        {"num_hidden_layers": target.num_hidden_layers},
    )
    specs = [small]
    for change in changes:
        specs.append(specs[-1].changed(**change))
    distinct = [spec for at, spec in enumerate(specs) if at == 0 or spec != specs[at - 1]]
    return [Leg(spec, 1.0, {"depth": "masked", "width": "masked"}) for spec in distinct]


# What all stages of a path share, besides the vocabulary.
SHARED = ("family", "head_dim", "max_position_embeddings", "tie_word_embeddings")

PATHS: dict[Style, Callable[[ModelSpec, StagesRecipe], list[Leg]]] = {
    "stack": stack_path,
    "flm": flm_path,
    "msg": msg_path,
}
# What the learning rate does at a growth, by the same papers.
SCHEDULES: dict[Style, dict[str, Any]] = {
    "stack": {"at_growth": "fresh"},
    "flm": {"at_growth": "segments", "min_ratio": 0.015},
    "msg": {"at_growth": "rewind", "lr_scheduler_type": "linear"},
}


@method(costs="nothing: arithmetic")
def grow_stages(recipe: StagesRecipe, run: Run) -> str:
    """Write the stages of a run to a stated shape, as G_stack, FLM-101B or MSG grew."""
    shared = {key: getattr(recipe, key) for key in ModelRecipe.model_fields if getattr(recipe, key) is not None}
    target = ModelSpec.stated(shared, where="the target")
    legs = PATHS[recipe.style](target, recipe)
    if len(legs) < 2:
        raise RecipeError(
            "num_hidden_layers",
            found=f"{target.num_hidden_layers}, with nothing to grow from",
            expected="a target that something smaller leads to",
            mend="State a larger shape, or train it from scratch.",
        )
    per_token = [flops.training_flops(leg.spec, recipe.sequence_length) for leg in legs]
    total = sum(leg.tokens * each for leg, each in zip(legs, per_token, strict=True))
    stages = [
        {**_sizes(leg.spec), "duration": f"{100 * leg.tokens * each / total:.4g}%", **(leg.growth if number else {})}
        for number, (leg, each) in enumerate(zip(legs, per_token, strict=True))
    ]
    model = {
        key: getattr(recipe, key) for key in ("family", "head_dim", "max_position_embeddings", "tie_word_embeddings")
    }
    part = {"model": model, "stages": stages, "schedule": SCHEDULES[recipe.style]}
    GrowthRecipe.model_validate(part).path(target.vocab_size)  # what can't be grown is refused here
    saved = sum(leg.tokens for leg in legs) * per_token[-1] / total
    run.tell(f"# the same tokens at the final size throughout would take {saved:.2f} times the FLOPs")
    return yaml.safe_dump(part, sort_keys=False, default_flow_style=None).rstrip()


def _shrunk(target: ModelSpec, *, layers: float, channels: float, neurons: float, heads: float) -> ModelSpec:
    """The target with these shares of its sizes, heads whole and in the same groups, nothing less than 1."""
    groups, each = target.num_key_value_heads, target.num_attention_heads // target.num_key_value_heads
    if each == 1:
        groups = max(round(groups * heads), 1)
    else:
        each = max(round(each * heads), 1)
    unit = target.hidden_size // target.num_attention_heads
    return target.changed(
        num_hidden_layers=max(round(target.num_hidden_layers * layers), 1),
        hidden_size=max(round(target.hidden_size * channels / unit), 1) * unit,
        intermediate_size=max(round(target.intermediate_size * neurons / 8), 1) * 8,
        num_attention_heads=groups * each,
        num_key_value_heads=groups,
    )


def _sizes(spec: ModelSpec) -> dict[str, int]:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {key: getattr(spec, key) for key in keys}
