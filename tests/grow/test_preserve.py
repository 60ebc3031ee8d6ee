"""The checks themselves: they see a change, and they see a slot that can't learn."""

import copy

import pytest
import torch

from espalier.grow.preserve import check, dead_slots, learning


def test_a_model_agrees_with_itself_and_the_loss_is_the_model_s_own(spec, make, input_ids):
    model = make(spec)
    found = check(model, model, input_ids)
    assert found.relative_difference == 0
    assert found.loss_before == found.loss_after
    assert found.loss_before == pytest.approx(model(input_ids, labels=input_ids).loss.item(), rel=1e-5)


def test_a_change_is_measured_relative_to_the_largest_logit(spec, make, input_ids):
    before, after = make(spec), make(spec)
    with torch.no_grad():
        after.lm_head.weight *= 1.5
    assert check(before, after, input_ids).relative_difference == pytest.approx(0.5, rel=1e-4)


def test_the_check_leaves_the_training_mode_as_it_was(spec, make, input_ids):
    training, evaluating = make(spec).train(), make(spec).eval()
    check(training, evaluating, input_ids)
    assert training.training and not evaluating.training


def test_a_neuron_without_input_and_output_is_found_dead_and_the_model_is_left_alone(spec, make, input_ids):
    model = make(spec)
    layer = "model.layers.1.mlp."
    with torch.no_grad():
        for name, row in (("gate_proj", (5, ...)), ("up_proj", (5, ...)), ("down_proj", (..., 5))):
            model.get_submodule(layer + name).weight[row] = 0
    before = copy.deepcopy(model.state_dict())
    assert dead_slots(model, input_ids) == [
        f"{layer}{name}.weight: ffn 5" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_one_step_is_not_enough_for_what_lies_behind_a_zero_writer(spec, make, input_ids):
    model = make(spec)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 3] = 0
    assert learning(model, input_ids, steps=1).dead == [
        f"model.layers.0.mlp.{name}.weight: ffn 3" for name in ("gate_proj", "up_proj")
    ]
    assert learning(model, input_ids, steps=2).dead == []
