"""Objectives: from a model and a batch to a loss that can be differentiated.

Shapes: B rows, T positions, N = B*T, C positions of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from espalier.data.stream import IGNORED
from espalier.errors import ModelError

CHUNK = 1024

ChunkLoss = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def chunk_loss(logits_CV: Tensor, labels_C: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies of softmax(scale * logits), and its gradient with respect to the logits (C, V)."""
    kept_C = labels_C != IGNORED
    target_C1 = labels_C.clamp(min=0).unsqueeze(1)
    log_probs_CV = torch.log_softmax(logits_CV.float() * scale, dim=-1)
    loss = -(log_probs_CV.gather(1, target_C1).squeeze(1) * kept_C).sum()
    is_target_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == target_C1
    grad_CV = (log_probs_CV.exp() - is_target_CV.float()) * (kept_C.unsqueeze(1) * scale)
    return loss, grad_CV.to(logits_CV.dtype)


@dataclass(frozen=True)
class NextToken:
    """Next-token prediction. `chunk_loss` may be the compiled one."""

    chunk_loss: ChunkLoss = chunk_loss

    def __call__(
        self, model: PreTrainedModel, input_ids_BT: Tensor, labels_BT: Tensor, position_ids_BT: Tensor | None
    ) -> Tensor:
        """Sum of the cross entropies (nats) over the labels, which are shifted already and may be `IGNORED`."""
        decoder = model.base_model
        hidden_BTD = decoder(input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False).last_hidden_state
        weight_VD, scale = read_out(model)
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), weight_VD, labels_BT.flatten(), scale, self.chunk_loss)


def read_out(model: PreTrainedModel) -> tuple[Tensor, float]:
    """The head's weight (V, D) and the factor on its logits; a head that does more is refused."""
    head, config = model.get_output_embeddings(), model.config
    if head.bias is not None or getattr(config, "final_logit_softcapping", None):
        raise ModelError(
            f"{type(model).__name__}: the language-model head",
            found="a bias or a soft cap on the logits",
            expected="a plain linear head",
            mend="Train a model of another family.",
        )
    return head.weight, 1.0 / getattr(config, "logits_scaling", 1.0)


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, scale: float, chunk: ChunkLoss = chunk_loss
) -> Tensor:
    """Sum over N of the cross entropies of softmax(scale * hidden @ weight^T), under autocast's dtype.

    The logits of CHUNK positions exist at a time, and only theirs in fp32: memory doesn't grow with N * V.
    """
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, scale, chunk, dtype)
    hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    losses = [chunk(hidden_ND[rows] @ weight_VD.T, labels_N[rows], scale)[0] for rows in _chunks(len(labels_N))]
    return torch.stack(losses).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients in the forward pass, while a chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        scale: float,
        chunk: ChunkLoss,
        dtype: torch.dtype,
    ) -> Tensor:
        hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None  # a frozen head needs none
        total = torch.zeros((), device=hidden.device)
        for rows in _chunks(len(labels_N)):
            loss, grad_logits = chunk(hidden[rows] @ weight.T, labels_N[rows], scale)
            total += loss
            grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = None if grad_weight is None else grad_weight.mul_(grads[0])
        return grad_hidden.mul_(grads[0]), grad_weight, None, None, None, None


def _chunks(length: int) -> list[slice]:
    return [slice(begin, begin + CHUNK) for begin in range(0, length, CHUNK)]
