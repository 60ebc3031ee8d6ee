"""Optimizers with state by parameter name: AdamW for everything, or Muon for the matrices and AdamW for the rest.

Names, not positions, tie state to weights: so a growth can map it and a checkpoint can store it as safetensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from espalier.model.mup import Parametrization, role
from espalier.spec import ModelSpec
from espalier.train.masks import Masks, Slots
from espalier.train.muon import Muon
from espalier.train.parallel import ALONE, Parallel, gradient_norm, local, part, whole
from espalier.train.recipe import OptimizerRecipe

# A quantity beside the optimizer's own: what a masked weight is without its mask.
UNMASKED = "unmasked"
# Numbers in the largest register of a processor, which are also the fewest that a thread is given.
REGISTER = 16
# What keeps the factor of a gradient of 0 finite.
CLIP_EPSILON = 1e-6

State = dict[str, dict[str, Tensor]]


class Optimizer:
    """The optimizer of one model: one or two of torch's, stepped together."""

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        recipe: OptimizerRecipe,
        parametrization: Parametrization,
        parallel: Parallel = ALONE,
    ) -> None:
        self.recipe, self.parallel = recipe, parallel
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        self.names: dict[Tensor, str] = {weight: name for name, weight in named}
        matrices = [weight for name, weight in named if role(name, tuple(weight.shape)) == "matrix"]
        vectors = [weight for name, weight in named if role(name, tuple(weight.shape)) == "vector"]
        if recipe.name == "muon":  # it takes one matrix at a time: experts, stacked in one tensor, stay with AdamW
            vectors = vectors + [weight for weight in matrices if weight.ndim > 2]
            matrices = [weight for weight in matrices if weight.ndim == 2]
        width = parametrization.width(spec)
        adam: dict[str, Any] = {
            "betas": (recipe.adam_beta1, recipe.adam_beta2),
            "eps": recipe.adam_epsilon,
        }
        vector_groups = _groups_of(vectors, lr=recipe.vector_learning_rate, weight_decay=0.0)
        if recipe.name == "muon":
            self.parts: list[torch.optim.Optimizer] = [
                Muon(
                    matrices,
                    lr=recipe.learning_rate,
                    weight_decay=recipe.weight_decay,
                    momentum=recipe.muon_momentum,
                ),
                torch.optim.AdamW(vector_groups, **adam),
            ]
        else:
            matrix_groups = _groups_of(
                matrices, lr=recipe.learning_rate / width, weight_decay=recipe.weight_decay * width
            )
            self.parts = [torch.optim.AdamW(matrix_groups + vector_groups, **adam)]
        for group in self._groups():
            group["peak"] = group["lr"]
        self.masks: Masks | None = None

    def mask(self, slots: Slots, unmasked: Mapping[str, Tensor]) -> None:
        """Train `unmasked` weights under masks that `set_level` raises, until their level is 1."""
        self.masks = Masks({name: weight for weight, name in self.names.items()}, slots, unmasked)

    def set_level(self, level: float) -> None:
        """Raise the masks, if there are any, to `level` (0 to 1)."""
        if self.masks:
            self.masks.set_level(level)
            self.masks = None if level >= 1 else self.masks

    def set_factor(self, factor: float) -> None:
        """Set every group's rate to `factor` times its peak."""
        for group in self._groups():
            group["lr"] = group["peak"] * factor

    def clip(self) -> Tensor:
        """Scale the gradients down to `max_grad_norm` together, where it's finite; their norm before (a scalar)."""
        if self.masks:
            self.masks.scale_gradients()
        gradients = [weight.grad for weight in self.names if weight.grad is not None]
        norm = gradient_norm(gradients, self.parallel)
        scale = (self.recipe.max_grad_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
        scale = torch.where(norm.isfinite(), scale, 1.0)
        torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
        return norm

    def step(self) -> None:
        """Update the weights and drop the gradients."""
        with self.masks.lifted() if self.masks else contextlib.nullcontext():
            for part in self.parts:
                part.step()
        self.discard()

    def discard(self) -> None:
        """Drop the gradients; no weight changes."""
        for optimizer in self.parts:
            optimizer.zero_grad(set_to_none=True)

    def norms(self) -> dict[str, float]:
        """Of each parameter's gradient."""
        return {
            name: float(whole(weight.grad).norm()) for weight, name in self.names.items() if weight.grad is not None
        }

    def state(self) -> State:
        """{parameter: {quantity: tensor}}, the live tensors; empty before the first step."""
        state: State = {
            self.names[weight]: {key: value for key, value in quantities.items() if isinstance(value, Tensor)}
            for part in self.parts
            for weight, quantities in part.state.items()
        }
        for name, unmasked in (self.masks.unmasked if self.masks else {}).items():
            state.setdefault(name, {})[UNMASKED] = unmasked
        return state

    def load_state(self, state: State) -> None:
        """Take over the state of an optimizer of the same kind for the same parameters; masks are set by `mask`."""
        for optimizer in self.parts:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    optimizer.state[weight] = {
                        key: part(value, weight).to(_place(value, weight, group), copy=True)
                        for key, value in state.get(self.names[weight], {}).items()
                        if key != UNMASKED
                    }

    def _groups(self) -> Iterator[dict]:
        for optimizer in self.parts:
            yield from optimizer.param_groups


def _groups_of(weights: Sequence[Tensor], **settings: Any) -> list[dict[str, Any]]:
    """Weights with the same settings: those of one mesh at a time, as one call can't take tensors of several, and op by
    op where rows don't fill registers, as vectors don't. Fused, numbers that don't fill one are rounded in another way,
    and a rank may have any number of rows.
    """
    groups: dict[tuple[object, bool], list[Tensor]] = {}
    for weight in weights:
        fills = weight.ndim > 1 and weight.shape[1:].numel() % REGISTER == 0
        groups.setdefault((getattr(weight, "device_mesh", None), fills), []).append(weight)
    ways = {True: {"fused": True, "foreach": False}, False: {"fused": False, "foreach": True}}
    return [{"params": params, **ways[fused], **settings} for (_, fused), params in groups.items()] or [{"params": []}]


def _place(value: Tensor, weight: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Where a quantity lies: beside its weight, but for the count of steps of what isn't fused, which the CPU reads."""
    return local(weight).device if value.ndim or group.get("fused") else torch.device("cpu")
