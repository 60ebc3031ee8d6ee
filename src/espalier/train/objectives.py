"""Objectives: from a model and a batch to a loss that can be differentiated.

Shapes: B rows, T positions, N = B*T, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from espalier.data.stream import IGNORED
from espalier.errors import ModelError

CHUNK = 1024


def next_token(
    model: PreTrainedModel, input_ids_BT: Tensor, labels_BT: Tensor, position_ids_BT: Tensor | None
) -> Tensor:
    """Sum of the cross entropies (nats) of all labels that aren't `IGNORED`, as a scalar.

    Labels are already shifted. The logits of a chunk of positions exist at a time, never all of them.
    """
    hidden_BTD = model.base_model(
        input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False
    ).last_hidden_state
    weight_VD, scale = read_out(model)
    return linear_cross_entropy(hidden_BTD.flatten(0, 1), weight_VD, labels_BT.flatten(), scale)


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


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, scale: float) -> Tensor:
    """Sum over N of the cross entropy of softmax(scale * hidden @ weight^T); fp32 logits of CHUNK rows at a time."""
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, scale)


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients in the forward pass, while a chunk's logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, scale: float) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_ND.dtype
        hidden_ND, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for begin in range(0, len(labels_N), CHUNK):
            rows = slice(begin, begin + CHUNK)
            loss, grad_logits = _chunk(hidden_ND[rows] @ weight.T, labels_N[rows], scale, dtype)
            total += loss
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden_ND[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None, None


def _chunk(logits_CV: Tensor, labels_C: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss of a chunk and its gradient with respect to hidden @ weight^T."""
    keep_C = labels_C != IGNORED
    target_C1 = labels_C.clamp(min=0).unsqueeze(1)
    log_probs_CV = torch.log_softmax(logits_CV.float() * scale, dim=-1)
    loss = -(log_probs_CV.gather(1, target_C1).squeeze(1) * keep_C).sum()
    grad_CV = log_probs_CV.exp_()
    grad_CV.scatter_add_(1, target_C1, -torch.ones_like(target_C1, dtype=grad_CV.dtype))
    return loss, (grad_CV * (keep_C.unsqueeze(1) * scale)).to(dtype)
