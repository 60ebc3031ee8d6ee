"""Depth operators: what each layer is, and what becomes of the function."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import ModelError
from espalier.grow.depth import identity, stack
from espalier.grow.preserve import check, dead_slots
from espalier.spec import ModelSpec

DEPTHS = st.tuples(st.integers(1, 9), st.integers(0, 20)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def deep(layers: int) -> ModelSpec:
    return ModelSpec(vocab_size=8, hidden_size=8, num_attention_heads=2, num_hidden_layers=layers)


@given(DEPTHS)
def test_stacking_repeats_whole_blocks_and_then_the_top_layers(depths):
    old, new = depths
    source = stack(deep(old), deep(new)).layers.source
    rest = new % old
    assert len(source) == new
    assert all(source[i] == i % old for i in range(new - rest))
    assert list(source[new - rest :]) == list(range(old - rest, old))


@given(DEPTHS, st.sampled_from(["after", "top"]))
def test_identity_growth_keeps_every_old_layer_once_and_in_order(depths, place):
    layers = identity(deep(depths[0]), deep(depths[1]), place).layers
    kept = [source for i, source in enumerate(layers.source) if i not in layers.new]
    assert kept == list(range(depths[0])) and len(layers.source) == depths[1]


@given(DEPTHS)
def test_identity_layers_are_spread_evenly_above_what_they_copy(depths):
    old, new = depths
    source = identity(deep(old), deep(new)).layers.source
    copies = [source.count(layer) for layer in range(old)]
    assert sorted(source) == list(source)
    assert max(copies) - min(copies) <= 1


def test_stacked_layers_are_copies_bit_for_bit(any_spec, make, grow):
    small = make(any_spec)
    large = grow(small, stack(any_spec, any_spec.changed(num_hidden_layers=7)))
    old, new = small.state_dict(), large.state_dict()
    assert len([name for name in new if "layers.6." in name]) > 0
    for name, weight in new.items():
        parts = name.split(".")
        if "layers" in parts:
            parts[2] = str([0, 1, 2, 0, 1, 2, 2][int(parts[2])])
        assert torch.equal(weight, old[".".join(parts)])


def test_stacking_says_that_it_changes_the_function_and_does(spec, make, grow, input_ids):
    change = stack(spec, spec.changed(num_hidden_layers=6))
    small = make(spec)
    assert not change.exact
    assert check(small, grow(small, change), input_ids).relative_difference > 1e-2


def test_identity_growth_is_exact_and_every_new_slot_learns(any_spec, make, grow, input_ids):
    change = identity(any_spec, any_spec.changed(num_hidden_layers=5))
    small = make(any_spec)
    large = grow(small, change)
    assert change.exact
    assert check(small, large, input_ids).relative_difference <= 1e-5
    assert dead_slots(large, input_ids) == []


def test_identity_layers_can_go_on_top(spec, make, grow, input_ids):
    small = make(spec)
    large = grow(small, identity(spec, spec.changed(num_hidden_layers=5), "top"))
    assert check(small, large, input_ids).relative_difference <= 1e-5
    for layer, zero in ((2, False), (3, True), (4, True)):
        assert (large.model.layers[layer].mlp.down_proj.weight == 0).all() == zero


def test_a_sliding_window_stays_with_its_layer(make, grow, input_ids):
    from transformers import AutoConfig, AutoModelForCausalLM

    spec = deep(2).changed(family="qwen3", rms_norm_eps=1e-6, attention_multiplier=0.5, vocab_size=40)
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "use_sliding_window": True}
    small = AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec.to_config(), **kinds))
    large = grow(small, identity(spec, deep(4).changed(**spec.model_dump(exclude={"num_hidden_layers"}))))
    assert large.config.layer_types == ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert check(small, large, input_ids).relative_difference <= 1e-5


@pytest.mark.parametrize("operator", [stack, identity])
def test_fewer_layers_are_refused(operator):
    with pytest.raises(ModelError, match=r"num_hidden_layers.*shrinks"):
        operator(deep(3), deep(2))


@pytest.mark.parametrize("operator", [stack, identity])
def test_another_size_is_refused_by_name(operator):
    with pytest.raises(ModelError, match=r"^intermediate_size"):
        operator(deep(2), deep(4).changed(intermediate_size=256))
