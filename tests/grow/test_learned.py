"""Learned growth: it begins as the copies that it could have been, and its maps are trained by the loss."""

import pytest
import torch

from espalier.errors import ModelError
from espalier.grow import learned
from espalier.grow.operators import learns, plan_growth
from espalier.model.axes import discover
from espalier.train.device import Device
from espalier.train.objectives import NextToken

SIZES = {
    "wider": {"hidden_size": 48, "intermediate_size": 60, "num_attention_heads": 8},
    "deeper": {"num_hidden_layers": 7},
    "both": {"hidden_size": 36, "num_hidden_layers": 5, "intermediate_size": 50},
}


@pytest.fixture
def begin(make, grow):
    """The maps to a shape, the old model and the model that the same growths make by copies."""

    def begin(spec, sizes):
        growths = plan_growth(spec, spec.changed(**sizes), depth="learned", width="learned")
        model = make(spec)
        maps = learned.Maps(growths, discover(model.config.to_dict()), model.state_dict().__getitem__)
        return maps, model, grow(model, *growths)

    return begin


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_maps_begin_as_the_copies_that_they_stand_for(begin, any_spec, sizes):
    maps, _, copied = begin(any_spec, sizes)
    weights = dict(copied.named_parameters())
    made = maps.materialized()
    assert made.keys() == weights.keys()
    for name, weight in made.items():
        torch.testing.assert_close(weight, weights[name].detach(), rtol=1e-5, atol=1e-6)


def test_a_changed_factor_on_the_logits_is_made_up_for(begin, granite):
    maps, _, copied = begin(granite, SIZES["wider"] | {"logits_scaling": 2 * granite.logits_scaling})
    made = maps.materialized()
    for name, weight in copied.named_parameters():
        torch.testing.assert_close(made[name], weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_training_lowers_the_loss_and_leaves_the_old_model_alone(begin, spec, batch_of, sizes):
    maps, old, grown = begin(spec, sizes)
    kept = {name: weight.clone() for name, weight in old.state_dict().items()}
    losses = []
    how = learned.Fit(updates=20, micro_rows=2)
    whole = learned.fit(
        grown, maps, batch_of, how, NextToken(), Device(), lambda done, loss: losses.append(loss) or True
    )
    assert whole and len(losses) == 20
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(weight, kept[name]) for name, weight in old.state_dict().items())
    made, weights = maps.materialized(), dict(grown.named_parameters())
    assert all(torch.equal(weight, made[name]) for name, weight in weights.items())
    moved = [name for name, value in maps.named_parameters() if value.requires_grad]
    assert any("out" in name for name in moved) or any("mixes" in name for name in moved)


def test_what_was_broken_off_leaves_the_model_alone(begin, spec, batch_of):
    maps, _, grown = begin(spec, SIZES["wider"])
    kept = {name: weight.clone() for name, weight in grown.state_dict().items()}
    how = learned.Fit(updates=5, micro_rows=4)
    assert not learned.fit(grown, maps, batch_of, how, NextToken(), Device(), lambda done, loss: done < 3)
    assert all(torch.equal(weight, kept[name]) for name, weight in grown.state_dict().items())


@pytest.mark.parametrize("micro_rows", [1, 4])
def test_micro_batches_change_nothing(begin, spec, batch_of, micro_rows):
    maps, _, grown = begin(spec, SIZES["both"])
    whole, _, again = begin(spec, SIZES["both"])
    told = lambda done, loss: True  # noqa: E731
    learned.fit(grown, maps, batch_of, learned.Fit(3, micro_rows), NextToken(), Device(), told)
    learned.fit(again, whole, batch_of, learned.Fit(3, 8), NextToken(), Device(), told)
    expected = dict(again.named_parameters())
    for name, weight in grown.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


def test_the_computation_of_the_weights_is_counted(begin, spec):
    maps, *_ = begin(spec, SIZES["deeper"])
    layer = discover(spec.to_config())
    per_layer = sum(torch.Size(layer.sizes(name)).numel() for name in layer.in_layer(0))
    assert maps.flops == 2 * per_layer * 3 * 7


def test_learned_and_copied_maps_are_not_mixed(spec):
    both = spec.changed(hidden_size=48, num_hidden_layers=6)
    assert learns(plan_growth(spec, both, depth="learned", width="learned"))
    assert not learns(plan_growth(spec, both))
    with pytest.raises(ModelError, match=r"learned together with zero_pad"):
        learns(plan_growth(spec, both, depth="learned", width="zero_pad"))
