"""Where masks lie: a growth without its masks, masked at 0, is the growth that keeps the function."""

import pytest
import torch

from espalier.errors import ModelError
from espalier.grow import masked, width
from espalier.grow.operators import plan_growth
from espalier.model.axes import discover

WIDER = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 8}
CASES = {
    "wider": (WIDER, {"width": "masked"}),
    "deeper": ({"num_hidden_layers": 7}, {"depth": "masked"}),
    "both": (WIDER | {"num_hidden_layers": 7}, {"width": "masked", "depth": "masked"}),
    "wider, then stacked": (WIDER | {"num_hidden_layers": 7}, {"width": "masked", "depth": "stack"}),
    "padded, then deeper": (WIDER | {"num_hidden_layers": 7}, {"depth": "masked"}),
}


@pytest.mark.parametrize("sizes, operators", CASES.values(), ids=CASES)
def test_masks_at_0_on_the_unmasked_growth_are_the_growth(spec, make, grow, sizes, operators):
    growths = plan_growth(spec, spec.changed(**sizes), **operators)
    model = make(spec)
    grown = grow(model, *growths).state_dict()
    unmasked = grow(model, *(growth.unmasked() for growth in growths)).state_dict()
    slots = masked.slots(growths, discover(model.config.to_dict()))
    assert slots.names
    for name, weight in unmasked.items():
        shown = weight * slots.factor(name, 0.0) if name in slots.names else weight
        torch.testing.assert_close(shown, grown[name], rtol=1e-6, atol=0)
        if name in slots.elements:
            assert torch.equal(weight * slots.factor(name, 1.0), weight)
            assert not torch.equal(weight, grown[name]), "what a mask raises isn't nothing"


def test_a_growth_without_masks_has_none(spec, make):
    growths = plan_growth(spec, spec.changed(**WIDER, num_hidden_layers=6))
    assert masked.slots(growths, discover(spec.to_config())).names == []
    assert [growth.unmasked() for growth in growths] == growths


def test_norms_that_subtract_the_mean_are_refused():
    config = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 40, "n_positions": 16}
    before = discover(config).shape
    with pytest.raises(ModelError, match="norms that subtract the mean"):
        width.masked(before, before.changed(intermediate_size=256))
