"""Zero padding: the same function in any larger size, and every new slot learns."""

import pytest
import torch

from espalier.errors import ModelError
from espalier.grow.apply import grow_moments
from espalier.grow.depth import identity
from espalier.grow.preserve import check, dead_slots
from espalier.grow.width import zero_pad
from espalier.model.axes import discover

ALL = {"hidden_size": 36, "intermediate_size": 64, "num_attention_heads": 12, "num_key_value_heads": 4}
ALONE = [
    {"hidden_size": 40},
    {"intermediate_size": 56},
    {"num_attention_heads": 8},
    {"num_attention_heads": 8, "num_key_value_heads": 4},
]


def test_widening_is_exact_and_every_slot_learns(any_spec, make, grow, input_ids):
    change = zero_pad(any_spec, any_spec.changed(**ALL))
    small = make(any_spec)
    large = grow(small, change)
    assert change.exact
    assert check(small, large, input_ids).relative_difference <= 1e-5
    assert dead_slots(large, input_ids) == []


@pytest.mark.parametrize("sizes", ALONE, ids=" ".join)
def test_each_size_can_grow_alone(granite, sizes, make, grow, input_ids):
    small = make(granite)
    large = grow(small, zero_pad(granite, granite.changed(**sizes)))
    assert check(small, large, input_ids).relative_difference <= 1e-5
    assert dead_slots(large, input_ids) == []


def test_the_grown_model_has_the_shapes_that_transformers_builds(any_spec, make, grow):
    after = any_spec.changed(hidden_size=40, intermediate_size=72, num_attention_heads=8)
    large = grow(make(any_spec), zero_pad(any_spec, after))
    built = make(after)
    assert {n: w.shape for n, w in large.named_parameters()} == {n: w.shape for n, w in built.named_parameters()}
    assert type(large) is type(built)
    tied = large.get_output_embeddings().weight is large.get_input_embeddings().weight
    assert tied == any_spec.tie_word_embeddings


def test_a_changed_logits_scaling_goes_into_the_final_norm(granite, make, grow, input_ids):
    change = zero_pad(granite, granite.changed(hidden_size=48, logits_scaling=4.0))
    small = make(granite)
    large = grow(small, change)
    assert large.config.logits_scaling == 4.0
    assert check(small, large, input_ids).relative_difference <= 1e-5


def test_width_and_depth_together_and_twice_stay_exact(any_spec, make, grow, input_ids):
    growths, spec = [], any_spec
    for hidden, layers in ((32, 4), (48, 7)):
        growths.append(zero_pad(spec, spec.changed(hidden_size=hidden, intermediate_size=2 * hidden)))
        spec = growths[-1].after
        growths.append(identity(spec, spec.changed(num_hidden_layers=layers)))
        spec = growths[-1].after
    small = make(any_spec)
    large = grow(small, *growths)
    assert large.config.num_hidden_layers == 7 and large.config.hidden_size == 48
    assert check(small, large, input_ids).relative_difference <= 1e-5
    assert dead_slots(large, input_ids) == []


def test_growths_in_one_go_or_one_by_one_give_the_same_model(spec, make, grow):
    first = identity(spec, spec.changed(num_hidden_layers=4))
    second = zero_pad(first.after, first.after.changed(intermediate_size=56))
    small = make(spec)
    at_once, in_turn = grow(small, first, second), grow(grow(small, first), second)
    for name, weight in in_turn.state_dict().items():
        assert torch.equal(weight, at_once.state_dict()[name])


def test_a_second_growth_draws_other_values_than_the_first(spec, make, grow):
    first = zero_pad(spec, spec.changed(intermediate_size=56))
    second = zero_pad(first.after, first.after.changed(intermediate_size=72))
    gate = grow(make(spec), first, second).state_dict()["model.layers.0.mlp.gate_proj.weight"]
    assert not torch.equal(gate[40:56], gate[56:72])
    assert gate.unique().numel() == gate.numel()


def test_old_slots_keep_their_weights_and_moments_bit_for_bit(spec, make, grow):
    after = spec.changed(hidden_size=48, intermediate_size=56, num_attention_heads=6, num_key_value_heads=3)
    change = zero_pad(spec, after)
    small = make(spec)
    large = dict(grow(small, change).named_parameters())
    state = {
        name: {"exp_avg": torch.randn_like(w), "exp_avg_sq": torch.rand_like(w), "step": torch.tensor(9.0)}
        for name, w in small.named_parameters()
    }
    moments = grow_moments(state, [change], discover(small.config.to_dict()))
    assert moments.keys() == large.keys()
    for name, weight in small.named_parameters():
        corner = tuple(slice(size) for size in weight.shape)
        assert moments[name]["step"] == 9
        added = torch.ones_like(large[name], dtype=torch.bool)
        added[corner] = False
        for kind in ("exp_avg", "exp_avg_sq"):
            assert moments[name][kind].shape == large[name].shape
            assert not moments[name][kind][added].any()
            if weight.ndim == 2:
                assert torch.equal(moments[name][kind][corner], state[name][kind])
        if weight.ndim == 2:
            assert torch.equal(large[name][corner], weight)


def test_moments_agree_with_the_gradients_of_the_grown_model(any_spec, make, grow, input_ids):
    """The grown model's gradients in old slots are what the small one's become under the moments' rule."""
    sizes = {"hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 8}
    more = {"logits_scaling": 3.0} if any_spec.family == "granite" else {}
    change = zero_pad(any_spec, any_spec.changed(**sizes, **more))
    small = make(any_spec)
    large = grow(small, change)
    for model in (small, large):
        model(input_ids, labels=input_ids).loss.backward()
    layout = discover(small.config.to_dict())
    gradients = {name: {"exp_avg": weight.grad} for name, weight in small.named_parameters()}
    mapped = grow_moments(gradients, [change], layout)
    ones = {name: {"exp_avg": torch.ones_like(weight)} for name, weight in small.named_parameters()}
    old_slots = grow_moments(ones, [change], layout)
    for name, weight in large.named_parameters():
        old = old_slots[name]["exp_avg"] != 0
        scale = weight.grad.abs().max()
        torch.testing.assert_close(mapped[name]["exp_avg"][old] / scale, weight.grad[old] / scale, rtol=1e-3, atol=1e-5)


REFUSED = {
    "hidden_size": ({"hidden_size": 16}, "shrinks"),
    "num_key_value_heads": ({"num_key_value_heads": 4}, "query heads for each"),
    "head_dim": ({"head_dim": 16, "attention_multiplier": 0.25}, "as before"),
    "vocab_size": ({"vocab_size": 64}, "as before"),
    "tie_word_embeddings": ({"tie_word_embeddings": True}, "as before"),
    "num_hidden_layers": ({"num_hidden_layers": 9}, "as before"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_can_not_be_done_exactly_is_refused_by_name(key, spec):
    sizes, message = REFUSED[key]
    with pytest.raises(ModelError, match=f"^{key}: .*{message}"):
        zero_pad(spec, spec.changed(**sizes))


@pytest.mark.parametrize("key", ["embedding_multiplier", "attention_multiplier", "residual_multiplier"])
def test_a_changed_multiplier_is_refused_by_name(key, granite):
    with pytest.raises(ModelError, match=f"^{key}: "):
        zero_pad(granite, granite.changed(hidden_size=48, **{key: 0.11}))
