"""Optimizers with state by parameter name: AdamW for everything, or Muon for the matrices and AdamW for the rest.

Names, not positions, tie state to weights: so a growth can map it and a checkpoint can store it as safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from espalier.model.mup import Parametrization, role
from espalier.spec import ModelSpec
from espalier.train.recipe import OptimizerRecipe

State = dict[str, dict[str, Tensor]]


class Optimizer:
    """The optimizer of one model: one or two of torch's, stepped together."""

    def __init__(self, model: nn.Module, spec: ModelSpec, recipe: OptimizerRecipe, parametrization: Parametrization):
        self.recipe = recipe
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        self.names: dict[Tensor, str] = {weight: name for name, weight in named}
        matrices = [weight for name, weight in named if role(name, tuple(weight.shape)) == "matrix"]
        vectors = [weight for name, weight in named if role(name, tuple(weight.shape)) == "vector"]
        width = parametrization.width(spec)
        adam: dict[str, Any] = {
            "betas": (recipe.adam_beta1, recipe.adam_beta2),
            "eps": recipe.adam_epsilon,
            "fused": True,
        }
        vector_group = {"params": vectors, "lr": recipe.vector_learning_rate, "weight_decay": 0.0}
        if recipe.name == "muon":
            self.parts: list[torch.optim.Optimizer] = [
                torch.optim.Muon(
                    matrices,
                    lr=recipe.learning_rate,
                    weight_decay=recipe.weight_decay,
                    momentum=recipe.muon_momentum,
                ),
                torch.optim.AdamW([vector_group], **adam),
            ]
        else:
            matrix_group = {
                "params": matrices,
                "lr": recipe.learning_rate / width,
                "weight_decay": recipe.weight_decay * width,
            }
            self.parts = [torch.optim.AdamW([matrix_group, vector_group], **adam)]
        for group in self._groups():
            group["peak"] = group["lr"]

    def set_factor(self, factor: float) -> None:
        """Set every group's rate to `factor` times its peak."""
        for group in self._groups():
            group["lr"] = group["peak"] * factor

    def clip(self) -> Tensor:
        """Scale the gradients down to `max_grad_norm` together; their norm before (a scalar)."""
        return nn.utils.clip_grad_norm_(self.names, self.recipe.max_grad_norm)

    def step(self) -> None:
        """Update the weights and drop the gradients."""
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> State:
        """{parameter: {quantity: tensor}}, the live tensors; empty before the first step."""
        return {
            self.names[weight]: {key: value for key, value in quantities.items() if isinstance(value, Tensor)}
            for part in self.parts
            for weight, quantities in part.state.items()
        }

    def load_state(self, state: State) -> None:
        """Take over the state of an optimizer of the same kind for the same parameters."""
        for part in self.parts:
            for group in part.param_groups:
                for weight in group["params"]:
                    part.state[weight] = {
                        key: value.clone() for key, value in state.get(self.names[weight], {}).items()
                    }

    def _groups(self) -> Iterator[dict]:
        for part in self.parts:
            yield from part.param_groups
