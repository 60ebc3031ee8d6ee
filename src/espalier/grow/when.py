"""When: for how many tokens the small model is trained before it grows. Arithmetic only, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import Field

from espalier import units
from espalier.errors import RecipeError
from espalier.method import method
from espalier.recipe import Recipe
from espalier.run import Run

# The formula was fitted on 410M to 3B parameters; far below it asks for more tokens than there are.
FITTED = (410e6, 3e9)
LEAST_PARAMETERS = 1e8
# Below that size the optimum is shallow and early (our trials: 5 to 10% of the tokens); above it a guard.
MOST_SHARE = 0.1


@dataclass(frozen=True)
class Timing:
    """tokens: for the small model; basis: "fitted", "extrapolated" (outside the fit's sizes) or "share" (of tokens)."""

    tokens: float
    basis: str

    def share(self, tokens: float) -> float:
        """Of all tokens of the run."""
        return self.tokens / tokens


def stack_timing(parameters: float, tokens: float) -> Timing:
    """When G_stack grows: log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74 with C = 6 N D (arXiv 2405.15319).

    parameters  N, of the large model
    tokens      D, that it would be trained on conventionally

    Outside the range in which the formula means something (N >= 1e8), and never more than it, a tenth of D.
    """
    most = MOST_SHARE * tokens
    if parameters < LEAST_PARAMETERS:
        return Timing(most, "share")
    flops = 6 * parameters * tokens
    fitted = 10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74)
    if fitted > most:
        return Timing(most, "share")
    return Timing(fitted, "fitted" if FITTED[0] <= parameters <= FITTED[1] else "extrapolated")


class WhenRecipe(Recipe):
    """The model that is wanted, and the tokens that it would be trained on."""

    parameters: float = Field(gt=0)
    tokens: float = Field(gt=0)
    factor: int = Field(default=4, ge=2, description="how many times as deep as the small model")
    layers: int | None = Field(default=None, ge=1, description="of the large model, to say how many the small one has")


@method(paper="arXiv 2405.15319", costs="nothing: arithmetic")
def grow_when(recipe: WhenRecipe, run: Run) -> str:
    """Say for how many tokens to train the small model before it is stacked."""
    if recipe.layers is not None and recipe.layers < recipe.factor:
        raise RecipeError(
            "factor",
            found=f"{recipe.factor} with {recipe.layers} layers",
            expected="at most as many as there are layers",
            mend="Lower the factor.",
        )
    timing = stack_timing(recipe.parameters, recipe.tokens)
    basis = {
        "fitted": "by G_stack's formula, within the sizes that it was fitted on",
        "extrapolated": f"by G_stack's formula, outside the sizes that it was fitted on ({_range()})",
        "share": "a tenth of the tokens: G_stack's formula means nothing here; `espalier grow search` tries shares",
    }[timing.basis]
    small = "the small model" if recipe.layers is None else f"{recipe.layers // recipe.factor} layers"
    share = timing.share(recipe.tokens)
    run.tell(f"Train {small} for {units.count(timing.tokens)} tokens ({share:.1%} of all), then stack: {basis}.")
    return f"duration: {share:.1%}"


def _range() -> str:
    return " to ".join(units.count(size) for size in FITTED)
