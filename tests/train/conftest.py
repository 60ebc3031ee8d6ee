"""A tiny model and everything that a training loop is given."""

import pytest
import torch

from espalier.ledger import Cost
from espalier.model.build import build
from espalier.model.mup import Parametrization
from espalier.spec import ModelSpec
from espalier.train.checkpoint import Progress
from espalier.train.device import Device
from espalier.train.loop import Meter, Segment, State
from espalier.train.optim import Optimizer
from espalier.train.recipe import OptimizerRecipe

MUP = Parametrization(base_width=32)


@pytest.fixture
def spec() -> ModelSpec:
    sizes = {"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2, "num_key_value_heads": 1}
    return MUP.carried_by(ModelSpec(vocab_size=300, max_position_embeddings=64, **sizes))


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture(params=["muon", "adamw"])
def optimizer_recipe(request) -> OptimizerRecipe:
    return OptimizerRecipe(name=request.param)


@pytest.fixture
def begin(spec, device):
    """A state of new weights (the same for the same seed), at step 0."""

    def begin(recipe: OptimizerRecipe | None = None, seed: int = 0) -> State:
        model = build(spec, MUP, seed=seed)
        device.place(model)
        return State(spec, model, Optimizer(model, spec, recipe or OptimizerRecipe(), MUP), Progress())

    return begin


@pytest.fixture
def segment():
    """Four rows an update, two a forward pass, at the full rate."""

    def segment(until_step: int, **more) -> Segment:
        told = {"rows": 4, "micro_rows": 2, "flops_per_token": 10.0, "factor": lambda step: 1.0} | more
        return Segment(until_step=until_step, **told)

    return segment


@pytest.fixture
def meter(make_run):
    return Meter(make_run(), Cost())


@pytest.fixture
def weights():
    """A copy of everything that training changes: the weights and the optimizer's state."""

    def weights(state: State) -> dict[str, torch.Tensor]:
        moments = {
            f"{name} {key}": value
            for name, quantities in state.optimizer.state().items()
            for key, value in quantities.items()
        }
        return {name: value.clone() for name, value in (state.model.state_dict() | moments).items()}

    return weights


@pytest.fixture
def same():
    """Whether two such copies agree bit for bit."""

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    return same
