"""Axes are found from the model; what they don't explain is refused by name."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.errors import ModelError
from espalier.model.axes import Axis, discover
from espalier.spec import FAMILIES, ModelSpec


def spec(family: str = "llama", **more) -> ModelSpec:
    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 3, "head_dim": 8}
    return ModelSpec(family=family, **{**sizes, "num_attention_heads": 6, "num_key_value_heads": 3, **more})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_family_is_laid_out_once_with_its_own_shape(family, tied):
    config = spec(family, tie_word_embeddings=tied).to_config()
    layout = discover(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    weights = dict(model.named_parameters())
    assert layout.tensors.keys() == weights.keys()
    for name, axes in layout.tensors.items():
        assert tuple(axis.size for axis in axes) == weights[name].shape
    assert layout.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})


def test_projections_have_the_roles_and_sides_of_attention_and_of_the_mlp():
    tensors = discover(spec().to_config()).tensors
    layer = "model.layers.1."
    heads, kv_heads = (lambda side: Axis("heads", 48, 8, side)), (lambda side: Axis("kv_heads", 24, 8, side))
    hidden, ffn = (lambda side: Axis("hidden", 24, 1, side)), (lambda side: Axis("ffn", 56, 1, side))
    assert tensors[layer + "self_attn.q_proj.weight"] == (heads("out"), hidden("in"))
    assert tensors[layer + "self_attn.k_proj.weight"] == (kv_heads("out"), hidden("in"))
    assert tensors[layer + "self_attn.v_proj.weight"] == (kv_heads("out"), hidden("in"))
    assert tensors[layer + "self_attn.o_proj.weight"] == (hidden("out"), heads("in"))
    assert tensors[layer + "mlp.down_proj.weight"] == (hidden("out"), ffn("in"))
    assert tensors[layer + "input_layernorm.weight"] == (hidden("along"),)
    assert tensors["model.embed_tokens.weight"] == (Axis("vocab", 40, 1, "in"), hidden("out"))
    assert tensors["lm_head.weight"] == (Axis("vocab", 40, 1, "out"), hidden("in"))


def test_sizes_that_are_equal_by_chance_are_still_told_apart():
    square = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    tensors = discover(spec(**square, num_attention_heads=4, num_key_value_heads=4).to_config()).tensors
    roles = {name: tuple(axis.role for axis in axes) for name, axes in tensors.items()}
    assert roles["model.layers.0.self_attn.q_proj.weight"] == ("heads", "hidden")
    assert roles["model.layers.0.self_attn.v_proj.weight"] == ("kv_heads", "hidden")
    assert roles["model.layers.0.mlp.up_proj.weight"] == ("ffn", "hidden")
    assert roles["lm_head.weight"] == ("vocab", "hidden")


def test_what_a_tensor_does_follows_from_its_axes():
    layout = discover(spec("qwen3").to_config())
    holders = {
        part: {name.replace("model.layers.0.", "") for name in layout.tensors if part in layout.parts(name)}
        for part in ("writes_residual", "final_norm", "feeds_head_norm")
    }
    in_first_layer = {name for name in holders["writes_residual"] if "layers" not in name}
    assert in_first_layer == {"model.embed_tokens.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight"}
    assert holders["final_norm"] == {"model.norm.weight"}
    assert {name for name in holders["feeds_head_norm"] if "layers" not in name} == {
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
    }


def test_biases_are_written_along_and_norms_scaled_along():
    layout = discover(spec("qwen2").to_config())
    bias, norm = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.input_layernorm.weight"
    assert "bias" in layout.parts(bias) and "bias" not in layout.parts(norm)
    assert "scales_residual" in layout.parts(norm) and "scales_residual" not in layout.parts(bias)


def test_a_name_knows_its_layer_and_its_place_in_another():
    layout = discover(spec().to_config())
    assert layout.layer_of("model.norm.weight") is None
    assert layout.layer_of("model.layers.2.mlp.up_proj.weight") == 2
    assert layout.with_layer("model.layers.2.mlp.up_proj.weight", 11) == "model.layers.11.mlp.up_proj.weight"
    in_layers = [name for layer in (None, 0, 1, 2) for name in layout.in_layer(layer)]
    assert sorted(in_layers) == sorted(layout.tensors)


def test_a_layout_costs_no_memory_and_leaves_the_random_state_alone():
    heads = {"num_attention_heads": 2**17, "num_key_value_heads": 2**17}
    huge = spec(hidden_size=2**20, vocab_size=2**22, intermediate_size=2**22, **heads)
    state = torch.random.get_rng_state()
    embedding = discover(huge.to_config()).tensors["model.embed_tokens.weight"]
    assert [axis.size for axis in embedding] == [2**22, 2**20]
    assert torch.equal(state, torch.random.get_rng_state())


FUSED = {
    "phi3": ({"pad_token_id": 0}, "self_attn.qkv_proj.weight"),
    "gpt_neox": ({}, "attention.query_key_value.weight"),
    "mixtral": ({}, "mlp."),
}


@pytest.mark.parametrize("model_type", FUSED)
def test_fused_and_unknown_tensors_are_refused_by_name(model_type):
    more, name = FUSED[model_type]
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    with pytest.raises(ModelError, match=name):
        discover({"model_type": model_type, "num_hidden_layers": 2, **small, **more})


def test_a_size_that_is_twice_in_one_axis_is_refused():
    config = {"model_type": "glm", "num_hidden_layers": 2, "pad_token_id": 0, "vocab_size": 64}
    with pytest.raises(ModelError, match=r"mlp\.gate_up_proj\.weight.*intermediate_size gives 13696"):
        discover(config)


def test_a_head_size_that_follows_from_the_width_is_refused():
    config = {"model_type": "opt", "num_hidden_layers": 2, "vocab_size": 64}
    with pytest.raises(ModelError, match="opt"):
        discover(config)


@pytest.mark.parametrize("values", [{"model_type": "nonesuch"}, {"model_type": "llama", "num_attention_heads": 7}])
def test_a_config_that_transformers_refuses_is_refused_with_its_words(values):
    with pytest.raises(ModelError, match=r"config\.json: found (Unrecognized model|The hidden size)"):
        discover(values)
