"""Masks: the model is a plain one at every level, and what is trained is what the mask multiplies."""

import pytest
import torch

from espalier.train.masks import Masks, Slots


@pytest.fixture
def masks():
    """A matrix of which the last row and column are behind a mask, and a norm over two channels that became three."""
    new = torch.tensor([[False, False, True], [False, False, True], [True, True, True]])
    weights = {"matrix": torch.zeros(3, 3), "norm": torch.zeros(3), "other": torch.zeros(3)}
    unmasked = {"matrix": torch.arange(1.0, 10).view(3, 3), "norm": torch.full((3,), 2.0)}
    return weights, Masks(weights, Slots({"matrix": new}, frozenset({"norm"}), 2 / 3), unmasked), new


@pytest.mark.parametrize("level", [0.0, 0.25, 1.0])
def test_a_level_multiplies_new_slots_and_norms_by_what_counts(masks, level):
    weights, mask, new = masks
    mask.set_level(level)
    unmasked = torch.arange(1.0, 10).view(3, 3)
    assert torch.equal(weights["matrix"], torch.where(new, level * unmasked, unmasked))
    assert weights["norm"].tolist() == pytest.approx([2 * ((2 + level) / 3) ** 0.5] * 3)
    assert not weights["other"].any()


def test_at_the_top_the_weights_are_the_unmasked_ones_bit_for_bit(masks):
    weights, mask, _ = masks
    mask.set_level(0.3)
    mask.set_level(1.0)
    assert all(torch.equal(weights[name], unmasked) for name, unmasked in mask.unmasked.items())


def test_gradients_are_those_of_the_unmasked_weights(masks):
    weights, mask, _ = masks
    weights["matrix"].requires_grad_()
    mask.set_level(0.25)
    unmasked = mask.unmasked["matrix"].clone().requires_grad_()
    factor = mask.slots.factor("matrix", 0.25)
    (unmasked * factor).pow(3).sum().backward()
    weights["matrix"].pow(3).sum().backward()
    mask.scale_gradients()
    torch.testing.assert_close(weights["matrix"].grad, unmasked.grad)


def test_what_changes_while_masks_are_lifted_is_trained_and_masked_again(masks):
    weights, mask, new = masks
    mask.set_level(0.5)
    with mask.lifted():
        weights["matrix"] += 1
    assert torch.equal(mask.unmasked["matrix"], torch.arange(2.0, 11).view(3, 3))
    assert torch.equal(weights["matrix"], mask.unmasked["matrix"] * torch.where(new, 0.5, 1.0))
