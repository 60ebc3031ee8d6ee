"""Preserve: measure what a growth did to the function, and whether every slot it added can learn."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from espalier.model.axes import Layout, discover


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


def dead_slots(model: PreTrainedModel, input_ids: Tensor, *, steps: int = 2, learning_rate: float = 0.1) -> list[str]:
    """The slots that no gradient reaches in the first `steps` SGD steps, as "tensor: role slot"; [] when all learn.

    A slot is a channel, neuron or head of one tensor: the old ones and the new, in every layer. Vocabulary rows are
    left out, since a token that isn't in `input_ids` (batch, length) has no gradient. The model isn't changed.
    """
    trained = copy.deepcopy(model).train()
    layout = discover(model.config.to_dict())
    weights = dict(trained.named_parameters())
    reached = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    optimizer = torch.optim.SGD(weights.values(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(trained(input_ids).logits.float(), input_ids).backward()
        for name, weight in weights.items():
            if weight.grad is not None:
                reached[name] |= weight.grad != 0
        optimizer.step()
    return [dead for name, mask in reached.items() for dead in _dead(name, mask, layout)]


def _dead(name: str, reached: Tensor, layout: Layout) -> Iterator[str]:
    for index, axis in enumerate(layout.tensors[name]):
        if axis.role == "vocab":
            continue
        slots = reached.movedim(index, 0).reshape(axis.size // axis.unit, -1).any(dim=1)
        for slot in (~slots).nonzero().flatten().tolist():
            yield f"{name}: {axis.role} {slot}"


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
