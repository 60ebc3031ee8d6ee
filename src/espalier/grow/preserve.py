"""Preserve: measure what a growth did to the function, and whether every slot it added can learn."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from espalier.model.axes import discover
from espalier.model.growth import Growth, Role
from espalier.model.layout import Axis, Layout

# Growth is exact up to rounding; a relative logit difference beyond this, in fp32, is a broken promise.
EXACT = 1e-4
# Copies whose weights moved by amounts closer than this, relatively, have learned the same.
ALIKE = 1e-4


@dataclass(frozen=True)
class Preservation:
    """How far a grown model's outputs are from the old one's, on the same tokens.

    relative_difference      max |logit difference| / max |logit|
    loss_before, loss_after  next-token cross-entropy in nats
    """

    relative_difference: float
    loss_before: float
    loss_after: float


def check(before: PreTrainedModel, after: PreTrainedModel, input_ids: Tensor) -> Preservation:
    """Compare two models on `input_ids` (batch, length), dropout off, logits in fp32.

    Rounding shows in the result: with fp32 weights an exact growth stays below 1e-5, with bf16 ones it doesn't.
    """
    old, new = _logits(before, input_ids), _logits(after, input_ids)
    relative = ((new - old).abs().max() / old.abs().max()).item()
    return Preservation(relative, _loss(old, input_ids).item(), _loss(new, input_ids).item())


@dataclass(frozen=True)
class Learning:
    """What the first steps of training do to a grown model.

    dead       slots that no gradient reaches, as "tensor: role slot"
    symmetric  roles with copies that move exactly like what they copy, in every tensor that they write
    """

    dead: list[str]
    symmetric: list[Role]


def learning(
    model: PreTrainedModel,
    input_ids: Tensor,
    growths: Sequence[Growth] = (),
    *,
    steps: int = 3,
    learning_rate: float = 0.1,
) -> Learning:
    """Train a copy of a grown model for `steps` SGD steps on `input_ids` (batch, length) and see what moved.

    Gradients reach a new slot in the second step at the latest; in the third, where a norm follows what writes it and
    the read-out is tied (Gemma, GLM 4, OLMo 2). Vocabulary rows and positions are left out of the dead, since a token
    that isn't there has no gradient.
    """
    trained = copy.deepcopy(model).float().eval()  # dropout would tell copies apart
    layout = discover(model.config.to_dict())
    weights = dict(trained.named_parameters())
    began = {name: weight.detach().clone() for name, weight in weights.items()}
    reached = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    optimizer = torch.optim.SGD(weights.values(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(trained(input_ids).logits.float(), input_ids).backward()
        for name, weight in weights.items():
            if weight.grad is not None:
                reached[name] |= weight.grad != 0
        optimizer.step()
    dead = [slot for name, mask in reached.items() for slot in _dead(name, mask, layout)]
    moved = {name: weight.detach() - began[name] for name, weight in weights.items()}
    return Learning(dead, _symmetric(moved, began, layout, growths))


def dead_slots(model: PreTrainedModel, input_ids: Tensor) -> list[str]:
    """The slots that no gradient reaches in two SGD steps: the old ones and the new, in every layer."""
    return learning(model, input_ids, steps=2).dead


def _dead(name: str, reached: Tensor, layout: Layout) -> Iterator[str]:
    for index, axis in enumerate(layout.tensors[name]):
        for role, slots in _by_slot(reached, index, axis):
            # Which expert learns is the router's choice: one that no token was sent to isn't dead.
            if role not in ("vocab", "positions", "experts"):
                for slot in (~slots.any(dim=1)).nonzero().flatten().tolist():
                    yield f"{name}: {role} {slot}"


def _by_slot(values: Tensor, index: int, axis: Axis) -> Iterator[tuple[Role, Tensor]]:
    """(role, values [slots, rest]) of every block of an axis."""
    blocks = values.movedim(index, 0).split([block.size for block in axis.blocks])
    for block, part in zip(axis.blocks, blocks, strict=True):
        yield block.role, part.reshape(block.count, -1)


def _symmetric(
    moved: dict[str, Tensor], began: dict[str, Tensor], layout: Layout, growths: Sequence[Growth]
) -> list[Role]:
    """The roles whose copies were alike in every tensor that writes them, and moved alike."""
    found: list[Role] = []
    rounding = 1e-5 * max(float(movement.abs().max()) for movement in moved.values())
    for growth in growths:
        for role, map_ in growth.maps.items():
            copies = torch.from_numpy(map_.is_copy & (map_.source >= 0)).nonzero().flatten()
            if len(copies) == 0:
                continue
            first = {int(source): slot for slot, source in reversed(list(enumerate(map_.source)))}
            originals = torch.tensor([first[int(map_.source[slot])] for slot in copies])
            alike = [
                torch.allclose(part[copies], part[originals], rtol=ALIKE, atol=rounding)
                for values in (began, moved)
                for name, axes in layout.tensors.items()
                for index, axis in enumerate(axes)
                if axis.side == "out" and role in axis.roles
                for written, part in _by_slot(values[name], index, axis)
                if written == role
            ]
            if alike and all(alike):
                found.append(role)
    return found


def _logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    with torch.no_grad(), _evaluating(model):
        return model(input_ids).logits.float()


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
