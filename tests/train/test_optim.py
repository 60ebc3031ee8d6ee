"""State goes by name, survives a save bit for bit, and every tensor has the rate of its role."""

import pytest
import torch

from espalier.model.build import build
from espalier.model.mup import Parametrization
from espalier.spec import ModelSpec
from espalier.train.masks import Slots
from espalier.train.optim import Optimizer
from espalier.train.recipe import OptimizerRecipe


def groups(optimizer: Optimizer) -> dict[str, dict]:
    """The group of every parameter, by name."""
    return {
        optimizer.names[weight]: group | {"kind": type(part).__name__}
        for part in optimizer.parts
        for group in part.param_groups
        for weight in group["params"]
    }


def is_matrix(name: str) -> bool:
    return ".layers." in name and name.endswith("proj.weight")


def one_step(state, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in state.model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)
    state.optimizer.set_factor(0.5 + 0.1 * seed)
    state.optimizer.clip()
    state.optimizer.step()


@pytest.fixture
def copied():
    """The state as a checkpoint brings it back: other tensors of the same values."""
    return lambda state: {
        name: {key: value.clone() for key, value in quantities.items()} for name, quantities in state.items()
    }


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_state_that_was_saved_goes_on_bit_for_bit(begin, optimizer_recipe, weights, same, copied, steps):
    without_break, saved = begin(optimizer_recipe), begin(optimizer_recipe)
    for seed in range(steps):
        one_step(without_break, seed)
        one_step(saved, seed)
    resumed = begin(optimizer_recipe, seed=1)
    resumed.model.load_state_dict(saved.model.state_dict())
    resumed.optimizer.load_state(copied(saved.optimizer.state()))
    for seed in range(steps, steps + 2):
        one_step(without_break, seed)
        one_step(resumed, seed)
    assert same(weights(without_break), weights(resumed))
    assert not same(weights(saved), weights(resumed))


def test_a_state_is_taken_over_by_value(begin, optimizer_recipe, weights, same):
    first, second = begin(optimizer_recipe), begin(optimizer_recipe)
    one_step(first, 0)
    second.optimizer.load_state(first.optimizer.state())
    before = weights(first)
    one_step(second, 1)
    assert same(weights(first), before)


def test_state_goes_by_the_names_of_the_parameters(begin, optimizer_recipe):
    state = begin(optimizer_recipe)
    assert state.optimizer.state() == {}
    one_step(state, 0)
    named = dict(state.model.named_parameters())
    kept = state.optimizer.state()
    assert kept.keys() == named.keys()
    assert all(
        value.shape in (named[name].shape, ()) for name, quantities in kept.items() for value in quantities.values()
    )


def test_a_step_drops_the_gradients(begin, optimizer_recipe):
    state = begin(optimizer_recipe)
    one_step(state, 0)
    assert all(weight.grad is None for weight in state.model.parameters())


def test_every_parameter_is_trained_once_and_muon_takes_the_layers_matrices_alone(begin):
    state = begin(OptimizerRecipe(name="muon"))
    found = groups(state.optimizer)
    assert found.keys() == {name for name, _ in state.model.named_parameters()}
    assert sum(len(group["params"]) for part in state.optimizer.parts for group in part.param_groups) == len(found)
    assert {name for name, group in found.items() if group["kind"] == "Muon"} == {n for n in found if is_matrix(n)}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["mup", "standard"])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_rates_follow_the_parametrisation(name, kind, width):
    parametrization = Parametrization(kind=kind, base_width=64)
    spec = ModelSpec(vocab_size=40, hidden_size=width, head_dim=16, num_hidden_layers=1, attention_bias=True)
    recipe = OptimizerRecipe(name=name, learning_rate=0.02, vector_learning_rate=0.003, weight_decay=0.1)
    optimizer = Optimizer(build(spec, parametrization, seed=0), spec, recipe, parametrization)
    w = width / 64 if kind == "mup" and name == "adamw" else 1.0
    for parameter, group in groups(optimizer).items():
        rate, decay = (0.02 / w, 0.1 * w) if is_matrix(parameter) else (0.003, 0.0)
        assert group["lr"] == pytest.approx(rate), parameter
        assert group["weight_decay"] == pytest.approx(decay), parameter


def test_a_factor_is_of_the_peak_not_of_the_rate_before(begin, optimizer_recipe):
    optimizer = begin(optimizer_recipe).optimizer
    peaks = {name: group["lr"] for name, group in groups(optimizer).items()}
    for factor in (0.5, 0.0, 1.0):
        optimizer.set_factor(factor)
        assert {name: group["lr"] for name, group in groups(optimizer).items()} == pytest.approx(
            {name: factor * peak for name, peak in peaks.items()}
        )


@pytest.mark.parametrize("size", [0.1, 5.0])
def test_gradients_are_cut_to_the_norm_together_and_the_norm_before_is_told(begin, optimizer_recipe, size):
    state = begin(optimizer_recipe)
    parameters = list(state.model.parameters())
    for weight in parameters:
        weight.grad = torch.zeros_like(weight)
    parameters[0].grad[0, 0], parameters[-1].grad.view(-1)[0] = 0.6 * size, 0.8 * size
    assert state.optimizer.clip().item() == pytest.approx(size)
    after = torch.stack([weight.grad.norm() for weight in parameters]).norm().item()
    assert after == pytest.approx(min(size, 1.0), rel=1e-4)


def test_behind_a_mask_the_unmasked_weight_has_its_share_of_the_gradient(begin, optimizer_recipe):
    state = begin(optimizer_recipe)
    name = "model.embed_tokens.weight"
    weights = dict(state.model.named_parameters())
    halves = torch.arange(weights[name].shape[1]) % 2 == 0
    whole = weights[name].detach().clone()
    state.optimizer.mask(Slots({name: halves.expand(weights[name].shape)}), {name: whole})
    state.optimizer.set_level(0.25)
    assert torch.equal(weights[name].detach(), torch.where(halves, 0.25 * whole, whole))
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    weights[name].grad = torch.ones_like(weights[name])
    norm = state.optimizer.clip().item()
    assert norm == pytest.approx(torch.where(halves, 0.25, 1.0).expand(whole.shape).norm().item(), rel=1e-5)
    state.optimizer.step()
    unmasked = state.optimizer.masks.unmasked[name]
    assert not torch.equal(unmasked, whole)
    assert torch.equal(weights[name].detach(), unmasked * torch.where(halves, 0.25, 1.0))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_stacked_experts_decay_as_matrices_under_adamw_and_are_left_to_it_by_muon(name):
    mixture = ModelSpec(
        family="mixtral",
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    recipe, standard = OptimizerRecipe(name=name, weight_decay=0.1), Parametrization(kind="standard")
    of = groups(Optimizer(build(mixture, standard, seed=0), mixture, recipe, standard))
    experts = [group for weight, group in of.items() if ".experts." in weight]
    (router,) = (group for weight, group in of.items() if weight.endswith("gate.weight"))
    assert len(experts) == 2 and all(group["kind"] == "AdamW" for group in experts)
    assert [group["weight_decay"] for group in experts] == [0.1 if name == "adamw" else 0.0] * 2
    assert router["weight_decay"] == 0.1 and router["kind"] == ("AdamW" if name == "adamw" else "Muon")
