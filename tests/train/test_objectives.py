"""The chunked loss is the plain one, in value and gradients, without ever holding all logits."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.data.stream import IGNORED
from espalier.errors import ModelError
from espalier.train.objectives import CHUNK, NextToken, linear_cross_entropy, read_out

SHAPES = [(7, 5, 11), (CHUNK, 4, 9), (2 * CHUNK + 13, 4, 9)]


def problem(rows: int, hidden: int, vocab: int, ignored: float = 0.0):
    generator = torch.Generator().manual_seed(rows)
    hidden_ND = torch.randn(rows, hidden, generator=generator)
    weight_VD = torch.randn(vocab, hidden, generator=generator)
    labels_N = torch.randint(0, vocab, (rows,), generator=generator)
    labels_N[torch.rand(rows, generator=generator) < ignored] = IGNORED
    return hidden_ND, weight_VD, labels_N


def value_and_gradients(loss_of, hidden_ND, weight_VD):
    hidden_ND, weight_VD = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    loss = loss_of(hidden_ND, weight_VD)
    (3 * loss).backward()
    return loss.detach(), hidden_ND.grad, weight_VD.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_loss_and_gradients_are_those_of_the_full_logits(shape, ignored, scale):
    hidden_ND, weight_VD, labels_N = problem(*shape, ignored)

    def plain(hidden, weight):
        return F.cross_entropy(scale * hidden @ weight.T, labels_N, ignore_index=IGNORED, reduction="sum")

    expected = value_and_gradients(plain, hidden_ND, weight_VD)
    found = value_and_gradients(lambda h, w: linear_cross_entropy(h, w, labels_N, scale), hidden_ND, weight_VD)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def test_a_frozen_head_changes_no_other_gradient():
    hidden_ND, weight_VD, labels_N = problem(2 * CHUNK + 13, 4, 9)
    _, expected, _ = value_and_gradients(lambda h, w: linear_cross_entropy(h, w, labels_N, 0.5), hidden_ND, weight_VD)
    hidden_ND.requires_grad_()
    (3 * linear_cross_entropy(hidden_ND, weight_VD, labels_N, 0.5)).backward()
    assert torch.equal(hidden_ND.grad, expected) and weight_VD.grad is None


class Largest(TorchDispatchMode):
    """The number of elements of the largest fp32 tensor that any operation returned."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                self.found = max(self.found, value.numel())
        return result


def test_all_logits_never_exist_at_once():
    rows, vocab = 3 * CHUNK + 1, 64
    hidden_ND, weight_VD, labels_N = problem(rows, 4, vocab)
    with Largest() as watched:
        value_and_gradients(lambda h, w: linear_cross_entropy(h, w, labels_N, 1.0), hidden_ND, weight_VD)
    assert 0 < watched.found <= CHUNK * vocab < rows * vocab


def test_the_watch_sees_the_plain_loss():
    hidden_ND, weight_VD, labels_N = problem(300, 4, 64)
    with Largest() as watched:
        F.cross_entropy(hidden_ND @ weight_VD.T, labels_N)
    assert watched.found == 300 * 64


def test_without_gradients_the_value_is_the_same():
    hidden_ND, weight_VD, labels_N = problem(50, 5, 11, 0.2)
    with_gradients = value_and_gradients(lambda h, w: linear_cross_entropy(h, w, labels_N, 1.0), hidden_ND, weight_VD)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden_ND, weight_VD, labels_N, 1.0), with_gradients[0])


def test_under_autocast_the_loss_is_near_that_in_fp32():
    hidden_ND, weight_VD, labels_N = problem(200, 16, 30)
    exact = linear_cross_entropy(hidden_ND, weight_VD, labels_N, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grad_hidden, grad_weight = value_and_gradients(
            lambda h, w: linear_cross_entropy(h, w, labels_N, 0.5), hidden_ND, weight_VD
        )
    assert loss == pytest.approx(exact.item(), rel=0.01)
    assert grad_hidden.dtype == grad_weight.dtype == torch.float32


@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_next_token_is_the_model_s_own_loss_summed_over_labels(begin, scaling):
    model = begin().model
    model.config.logits_scaling = scaling
    with torch.no_grad():
        model.lm_head.weight.normal_()
    ids_BT = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(1))
    inputs_BT, labels_BT = ids_BT[:, :-1], ids_BT[:, 1:].clone()
    labels_BT[0, 2] = IGNORED
    logits = model(inputs_BT).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    assert NextToken()(model, inputs_BT, labels_BT, None).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_head_that_does_more_than_a_product_is_refused(begin):
    model = begin().model
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match="soft cap"):
        read_out(model)
    del model.config.final_logit_softcapping
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(300))
    with pytest.raises(ModelError, match="bias"):
        read_out(model)
