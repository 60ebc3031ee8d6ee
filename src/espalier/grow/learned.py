"""Learned: growth by linear maps that are trained before they are applied (LiGO, arXiv 2303.00980; G_learn in
arXiv 2405.15319).

A growth of index maps is where the maps begin: a row that copies a slot becomes a row of a matrix over all slots, and
a layer that copies a layer a mixture of all layers. Every weight of the grown model is then

    sum over old layers l of  mix[l] * (out @ weight_l @ in^T)

with `out` and `in` of the tensor's roles, shared by all tensors, and `mix` by the tensor's kind. The old weights are
frozen; a few updates of the language-model loss train the maps; then the weights are computed once and are plain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from espalier.errors import ModelError
from espalier.model import reshape
from espalier.model.growth import NEW, Growth, Part, Role
from espalier.model.layout import Axis, Layout, Side
from espalier.model.reshape import Read

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from espalier.data.stream import Batch
    from espalier.train.device import Device
    from espalier.train.loop import Objective

# Adam's rate for the maps, whose entries are of the order of 1; it falls to nothing along a line.
LEARNING_RATE = 0.01


@dataclass(frozen=True)
class Fit:
    """How maps are trained: the number of updates, and the sequences of a forward pass."""

    updates: int
    micro_rows: int


class Maps(nn.Module):
    """The maps of `growths`, applied in order to the weights that `read` gives for `layout`.

    At first the weights are those of `reshape.Grown`, up to rounding. `flops` is what one computation of all weights
    takes, forward.
    """

    def __init__(self, growths: Sequence[Growth], layout: Layout, read: Read) -> None:
        super().__init__()
        self._names = list(layout.tensors)
        for name in self._names:
            self.register_buffer(_key(name), read(name).detach().float(), persistent=False)
        steps: list[_Map] = []
        for growth in growths:
            steps.append(_Map(growth, layout))
            layout = steps[-1].after
        self.steps = nn.Sequential(*steps)
        with FlopCounterMode(display=False) as counter:
            self.materialized()
        self.flops = counter.get_total_flops()

    def forward(self) -> dict[str, Tensor]:
        """Every weight of the grown model, by name, fp32."""
        return self.steps({name: self.get_buffer(_key(name)) for name in self._names})

    def materialized(self) -> dict[str, Tensor]:
        """The weights as plain tensors."""
        with torch.no_grad():
            return {name: weight.clone() for name, weight in self().items()}


class _Map(nn.Module):
    """The maps of one growth: over slots of each role and side, and over layers for each kind of tensor."""

    def __init__(self, growth: Growth, layout: Layout) -> None:
        super().__init__()
        self.growth, self.before = growth, layout
        self.after = reshape.after(layout, growth)
        _require_alike(layout)
        self.slots = nn.ParameterDict()
        for role, map_ in growth.maps.items():
            assert (map_.source != NEW).all(), "maps that are learned begin with copies"
            copies = torch.zeros(len(map_.source), _count(layout, role))
            copies[torch.arange(len(map_.source)), torch.from_numpy(map_.source)] = 1.0
            self.slots[f"{role} out"] = nn.Parameter(copies)
            self.slots[f"{role} in"] = nn.Parameter(copies * torch.from_numpy(map_.share).float()[:, None])
        self.mixes = nn.ParameterDict()
        sources = growth.layers.source
        if sources != tuple(range(growth.before.num_hidden_layers)):
            copied = torch.eye(growth.before.num_hidden_layers)[list(sources)]
            for name in layout.in_layer(0):
                self.mixes[_key(name)] = nn.Parameter(copied.clone())

    def forward(self, old: dict[str, Tensor]) -> dict[str, Tensor]:
        wide = {name: self._widened(name, weight) for name, weight in old.items()}
        weights = {name: wide[name] for name in self.before.in_layer(None)}
        layers = range(self.growth.before.num_hidden_layers)
        for name in self.before.in_layer(0):
            stacked = torch.stack([wide[self.before.with_layer(name, layer)] for layer in layers])
            key = _key(name)
            mixed = torch.tensordot(self.mixes[key], stacked, dims=1) if key in self.mixes else stacked
            weights |= {self.after.with_layer(name, layer): weight for layer, weight in enumerate(mixed)}
        return weights

    def _widened(self, name: str, weight: Tensor) -> Tensor:
        offset = self.before.offsets.get(name, 0.0)
        parts = self.before.parts[name]
        weight = weight + offset
        for index, axis in enumerate(self.before.tensors[name]):
            if not axis.roles.isdisjoint(self.growth.maps):
                weight = self._mapped(weight, index, axis, self._side(axis, parts))
        return weight * self.growth.factor(parts) - offset

    def _side(self, axis: Axis, parts: frozenset[Part]) -> Side:
        """A norm before a tied read-out has the shares that the read-out can't have."""
        shared = axis.side == "in" or (axis.side == "along" and reshape.before_tied_head(self.before, parts))
        return "in" if shared else "out"

    def _mapped(self, weight: Tensor, index: int, axis: Axis, side: Side) -> Tensor:
        blocks = weight.movedim(index, -1).split([block.size for block in axis.blocks], dim=-1)
        mapped = []
        for block, part in zip(axis.blocks, blocks, strict=True):
            key = f"{block.role} {side}"
            if key in self.slots:
                slots = part.unflatten(-1, (block.count, block.unit))
                part = torch.einsum("...ou,no->...nu", slots, self.slots[key]).flatten(-2)
            mapped.append(part)
        return torch.cat(mapped, dim=-1).movedim(-1, index)


def fit(
    model: PreTrainedModel,
    maps: Maps,
    batches: Callable[[int], Batch],
    how: Fit,
    objective: Objective,
    device: Device,
    after_update: Callable[[int, float], bool],
) -> bool:
    """Train `maps` by the loss of the model whose weights they make, then put the weights into `model`.

    model         of the grown shape, on the device; what its weights hold doesn't matter
    batches       gives the batch of an update by its number
    after_update  is told the number of updates done and the mean loss; False breaks off

    Whether it was brought to its end; if it wasn't, the model isn't touched.
    """
    from espalier.train.loop import backward

    loss = _Loss(model, objective)
    optimizer = torch.optim.Adam(maps.to(device.kind).parameters(), lr=LEARNING_RATE)
    for number in range(how.updates):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - number / how.updates)
        weights = maps()
        # The maps are computed once an update, whatever the number of forward passes.
        leaves = {f"model.{name}": weight.detach().requires_grad_() for name, weight in weights.items()}
        stated = lambda model, *batch: functional_call(loss, leaves, batch)  # noqa: B023, E731
        mean = sum(backward(model, batches(number), how.micro_rows, stated, device))
        made = [(weight, leaf.grad) for weight, leaf in zip(weights.values(), leaves.values(), strict=True)]
        made = [(weight, gradient) for weight, gradient in made if weight.requires_grad]  # others have no map
        torch.autograd.backward([weight for weight, _ in made], [gradient for _, gradient in made])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not after_update(number + 1, mean):
            return False
    model.load_state_dict(maps.materialized(), strict=False)
    return True


class _Loss(nn.Module):
    """An objective as a module, so that its model's weights can be stated in the call."""

    def __init__(self, model: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, *batch: Tensor | None) -> Tensor:
        return self.objective(self.model, *batch)  # type: ignore[arg-type]


def _require_alike(layout: Layout) -> None:
    """Refuse a model whose layers have different tensors: they can't be mixed."""
    kinds = {
        frozenset(layout.with_layer(n, 0) for n in layout.in_layer(i)) for i in range(layout.shape.num_hidden_layers)
    }
    if len(kinds) > 1:
        raise ModelError(
            "depth: learned",
            found="layers that differ in kind",
            expected="layers with the same tensors, which can be mixed",
            mend="Use stack or interpolate.",
        )


def _count(layout: Layout, role: Role) -> int:
    """How many slots of a role the model has."""
    return next(b.count for axes in layout.tensors.values() for axis in axes for b in axis.blocks if b.role == role)


def _key(name: str) -> str:
    """A tensor's name as torch takes it for a parameter's or a buffer's, which can't have dots."""
    return name.replace(".", " ")
