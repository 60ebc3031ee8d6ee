"""Maximal-update parametrisation: hyper-parameters tuned on a narrow model hold on a wide one.

With w = hidden_size / base_width (head_dim fixed), for Adam (Yang et al., arXiv 2203.03466, Table 8; cofe-ai's
Mu-scaling):
  matrices (both dims grow)         std ~ 1/sqrt(fan_in)   rate / w   decay x w
  embedding, norms, biases          std ~ 1                rate
  read-out                          starts at zero         rate       logits x output multiplier / w
Muon's orthogonal update already has a width-free size, so its rate isn't divided. The logit factor is Granite's
`logits_scaling`: the model stays a standard folder. Elsewhere a spec can't carry it, and only the standard
parametrisation is offered; nor is muP for mixtures of experts, of whose routers the table says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from pydantic import Field

from espalier.errors import RecipeError
from espalier.model.growth import Shape
from espalier.recipe import Recipe
from espalier.spec import ModelSpec

Role = Literal["matrix", "vector"]


class Parametrization(Recipe):
    """How initial values and learning rates depend on the width.

    gain               of the matrices' initial values: their standard deviation times sqrt(fan_in)
    output_multiplier  of the logits at the base width, an inverse temperature of the soft-max
    """

    kind: Literal["mup", "standard"] = "mup"
    base_width: int = 128
    embedding_std: float = 1.0
    gain: float = 1.0
    output_multiplier: float = Field(default=1.0, gt=0)

    def carried_by(self, spec: ModelSpec) -> ModelSpec:
        """`spec` with the multipliers that this parametrisation needs."""
        if self.kind == "standard":
            return spec
        if spec.family != "granite":
            raise RecipeError(
                "parametrization.kind",
                found=f"'mup' with the {spec.family} family",
                expected="the granite family, whose config has the multipliers and no experts",
                mend="Set model.family=granite or parametrization.kind=standard.",
            )
        return spec.changed(logits_scaling=self.logits_scaling(spec))

    def width(self, spec: Shape) -> float:
        """The width multiplier w; 1 without muP."""
        return spec.hidden_size / self.base_width if self.kind == "mup" else 1.0

    def logits_scaling(self, spec: Shape) -> float:
        """What muP divides the logits by."""
        return self.width(spec) / self.output_multiplier

    def std_of(self, spec: Shape) -> Callable[[str, tuple[int, ...]], float]:
        """A function from a weight's name and shape to the standard deviation of its initial values."""
        depth = math.sqrt(2 * spec.num_hidden_layers)

        def standard(name: str, shape: tuple[int, ...]) -> float:
            return spec.initializer_range / (depth if adds_to_residual(name) else 1.0)

        def mup(name: str, shape: tuple[int, ...]) -> float:
            if role(name, shape) == "matrix":
                return self.gain / math.sqrt(shape[-1]) / (depth if adds_to_residual(name) else 1.0)
            if "embed" in name:
                # A tied embedding is the read-out too, which has to start small.
                return spec.initializer_range if spec.tie_word_embeddings else self.embedding_std
            return 0.0

        return mup if self.kind == "mup" else standard


def role(name: str, shape: tuple[int, ...]) -> Role:
    """Matrices inside the layers, those of experts stacked too, are 'matrix'; embeddings, read-out, norms and biases
    are 'vector'.
    """
    return "matrix" if len(shape) >= 2 and ".layers." in name else "vector"


def adds_to_residual(name: str) -> bool:
    """Whether a projection's output is added to the residual stream; stacked experts' names end in no 'weight'."""
    return name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
