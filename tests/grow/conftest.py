"""Tiny models of every family, with no weight at a value that would hide an error."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from espalier.data.stream import Batch
from espalier.grow.apply import grow_model
from espalier.model.build import build
from espalier.model.growth import Growth
from espalier.model.mup import Parametrization
from espalier.spec import DENSE, ModelSpec

ATTENTION = {"mha": 4, "gqa": 2}


def _spec(family: str = "llama", kv_heads: int = 2, tied: bool = False) -> ModelSpec:
    multipliers = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7}
    return ModelSpec(
        family=family,
        vocab_size=40,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=8,
        tie_word_embeddings=tied,
        attention_bias=family in ("granite", "qwen2"),
        rms_norm_eps=1e-2,  # so large that a norm that got it wrong shows
        initializer_range=0.3,
        **({**multipliers, "logits_scaling": 2.0} if family == "granite" else {}),
    )


@pytest.fixture(params=[(f, kv, tied) for f in DENSE for kv in ATTENTION for tied in (True, False)], ids=str)
def any_spec(request) -> ModelSpec:
    family, attention, tied = request.param
    return _spec(family, ATTENTION[attention], tied)


@pytest.fixture
def spec() -> ModelSpec:
    return _spec()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def granite(request) -> ModelSpec:
    return _spec("granite", tied=request.param)


@pytest.fixture
def make():
    """Build a model of a spec, every weight random: norms and biases too."""

    def make(spec: ModelSpec, seed: int = 0) -> PreTrainedModel:
        model = build(spec, Parametrization(kind="standard"), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:
                    weight += 0.3 * torch.randn(weight.shape, generator=generator)
        return model.eval()

    return make


@pytest.fixture
def make_family(make):
    """Build a model of a family, with its embedding tied or not."""

    def make_family(family: str, tied: bool) -> PreTrainedModel:
        # The head size that all mixtures have, and neurons that can be split into shards of whole cache lines.
        shape = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 64}
        return make(_spec(family, tied=tied).changed(**shape))

    return make_family


@pytest.fixture
def grow():
    """Apply growths with the standard initialiser of the last one's shape."""

    def grow(model: PreTrainedModel, *growths: Growth, seed: int = 1) -> PreTrainedModel:
        std_of = Parametrization(kind="standard").std_of(growths[-1].after)
        return grow_model(model, growths, seed=seed, std_of=std_of)

    return grow


@pytest.fixture
def input_ids() -> torch.Tensor:
    """Three sequences in which every token occurs."""
    return torch.randint(0, 40, (3, 30), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def batch_of():
    """Batch number n: eight rows of tokens that follow a rule, so that there is something to learn."""

    def batch_of(number: int) -> Batch:
        generator = np.random.default_rng(number)
        rows = (generator.integers(0, 8, (8, 1)) + np.arange(17) * 3) % 40
        return Batch(rows[:, :-1].copy(), rows[:, 1:].copy(), None)

    return batch_of
