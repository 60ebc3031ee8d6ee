"""muP: what a neuron does after a few updates doesn't depend on the width; under the standard one it does."""

import math

import pytest
import torch
from torch.nn import functional as F

from espalier.errors import RecipeError
from espalier.model.build import build
from espalier.model.mup import Parametrization, adds_to_residual, role
from espalier.spec import ModelSpec
from espalier.train.optim import Optimizer
from espalier.train.recipe import OptimizerRecipe

WIDTHS = (32, 64, 128, 256)
STEPS = 4


def shape(width: int, **more) -> ModelSpec:
    return ModelSpec(vocab_size=50, hidden_size=width, head_dim=16, num_hidden_layers=2, **more)


def coordinates(width: int, parametrization: Parametrization, recipe: OptimizerRecipe) -> dict[str, float]:
    """RMS of the logits, every layer's output and what its two parts add, on the batch trained on, from seed 0."""
    spec = parametrization.carried_by(shape(width))
    model = build(spec, parametrization, seed=0)
    optimizer = Optimizer(model, spec, recipe, parametrization)
    ids = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        logits = model(ids[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    found = {}
    for name, module in model.named_modules():
        if adds_to_residual(f"{name}.weight") or name.rpartition(".")[0] == "model.layers":
            module.register_forward_hook(lambda _, inputs, output, name=name: found.update({name: rms(output)}))
    found["logits"] = rms(model(ids[:, :-1]).logits)
    return found


def rms(x: torch.Tensor) -> float:
    return x.detach().pow(2).mean().sqrt().item()


def growth(kind: str, recipe: OptimizerRecipe) -> dict[str, tuple[float, float]]:
    """For every coordinate: largest over smallest of all widths, and the exponent of the width that fits them."""
    by_width = [coordinates(width, Parametrization(kind=kind, base_width=64), recipe) for width in WIDTHS]
    logs = torch.tensor(WIDTHS).float().log()
    logs -= logs.mean()
    found = {}
    for name in by_width[0]:
        values = torch.tensor([one[name] for one in by_width]).log()
        found[name] = (values.max() - values.min()).exp().item(), (logs @ values / (logs @ logs)).item()
    return found


@pytest.fixture(params=["adamw", "muon"])
def recipe(request) -> OptimizerRecipe:
    rates = {"adamw": 0.01, "muon": 0.05}
    return OptimizerRecipe(name=request.param, learning_rate=rates[request.param], vector_learning_rate=0.01)


def test_under_mup_no_activation_grows_with_the_width(recipe):
    for name, (spread, exponent) in growth("mup", recipe).items():
        assert spread < 2 and abs(exponent) < 0.2, f"{name}: times {spread:.2f}, width^{exponent:.2f}"


def test_under_the_standard_parametrisation_activations_grow_with_the_width(recipe):
    for name, (spread, exponent) in growth("standard", recipe).items():
        assert spread > 2 and exponent > 0.3, f"{name}: times {spread:.2f}, width^{exponent:.2f}"


def test_the_logits_are_divided_by_the_width_multiplier_and_other_families_are_refused():
    parametrization = Parametrization(base_width=64)
    for width in WIDTHS:
        spec = parametrization.carried_by(shape(width))
        assert spec.logits_scaling == parametrization.width(spec) == width / 64
    with pytest.raises(RecipeError, match="granite"):
        parametrization.carried_by(shape(64, family="llama"))
    with pytest.raises(RecipeError, match=r"granitemoe family.*no experts"):
        parametrization.carried_by(shape(64, family="granitemoe", num_experts=4, num_experts_per_tok=2))
    standard = Parametrization(kind="standard", base_width=64)
    assert standard.carried_by(shape(128, family="llama")) == shape(128, family="llama")
    assert standard.width(shape(128)) == 1.0


@pytest.mark.parametrize("width", WIDTHS)
def test_the_output_multiplier_multiplies_the_logits_and_nothing_else(width):
    ids = torch.arange(8)[None]
    plain, times_four = (
        build(parametrization.carried_by(shape(width, tie_word_embeddings=True)), parametrization, seed=0)
        for parametrization in (Parametrization(base_width=64), Parametrization(base_width=64, output_multiplier=4.0))
    )
    assert times_four.config.logits_scaling == plain.config.logits_scaling / 4
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), times_four.parameters(), strict=True))
    assert torch.equal(times_four(ids).logits, 4 * plain(ids).logits)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tied", [True, False])
def test_initial_values_follow_the_table(width, tied):
    parametrization = Parametrization(base_width=64, embedding_std=0.7, gain=1.5)
    spec = parametrization.carried_by(shape(width, tie_word_embeddings=tied))
    for name, weight in build(spec, parametrization, seed=0).named_parameters():
        if role(name, tuple(weight.shape)) == "matrix":
            expected = 1.5 / math.sqrt(weight.shape[1]) / (2 if adds_to_residual(name) else 1)
        elif "embed" in name:
            expected = 0.02 if tied else 0.7
        else:
            expected = 0.0
        assert weight.std().item() == pytest.approx(expected, rel=0.1), name
