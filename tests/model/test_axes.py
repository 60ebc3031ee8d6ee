"""Axes are found from the model; what they don't explain is refused by name."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.errors import ModelError
from espalier.model.axes import discover
from espalier.model.layout import Axis
from espalier.spec import DENSE, ModelSpec


def spec(family: str = "llama", **more) -> ModelSpec:
    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 3, "head_dim": 8}
    return ModelSpec(family=family, **{**sizes, "num_attention_heads": 6, "num_key_value_heads": 3, **more})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", DENSE)
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
    heads, kv_heads = (lambda side: Axis.of("heads", 6, 8, side)), (lambda side: Axis.of("kv_heads", 3, 8, side))
    hidden, ffn = (lambda side: Axis.of("hidden", 24, 1, side)), (lambda side: Axis.of("ffn", 56, 1, side))
    assert tensors[layer + "self_attn.q_proj.weight"] == (heads("out"), hidden("in"))
    assert tensors[layer + "self_attn.k_proj.weight"] == (kv_heads("out"), hidden("in"))
    assert tensors[layer + "self_attn.v_proj.weight"] == (kv_heads("out"), hidden("in"))
    assert tensors[layer + "self_attn.o_proj.weight"] == (hidden("out"), heads("in"))
    assert tensors[layer + "mlp.down_proj.weight"] == (hidden("out"), ffn("in"))
    assert tensors[layer + "input_layernorm.weight"] == (hidden("along"),)
    assert tensors["model.embed_tokens.weight"] == (Axis.of("vocab", 40, 1, "in"), hidden("out"))
    assert tensors["lm_head.weight"] == (Axis.of("vocab", 40, 1, "out"), hidden("in"))


def test_sizes_that_are_equal_by_chance_are_still_told_apart():
    square = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    tensors = discover(spec(**square, num_attention_heads=4, num_key_value_heads=4).to_config()).tensors
    roles = {name: tuple(axis.blocks[0].role for axis in axes) for name, axes in tensors.items()}
    assert roles["model.layers.0.self_attn.q_proj.weight"] == ("heads", "hidden")
    assert roles["model.layers.0.self_attn.v_proj.weight"] == ("kv_heads", "hidden")
    assert roles["model.layers.0.mlp.up_proj.weight"] == ("ffn", "hidden")
    assert roles["lm_head.weight"] == ("vocab", "hidden")


def test_what_a_tensor_does_follows_from_its_axes():
    layout = discover(spec("qwen3").to_config())
    holders = {
        part: {name.replace("model.layers.0.", "") for name in layout.tensors if part in layout.parts[name]}
        for part in ("writes_residual", "final_norm", "feeds_norm")
    }
    in_first_layer = {name for name in holders["writes_residual"] if "layers" not in name}
    assert in_first_layer == {"model.embed_tokens.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight"}
    assert holders["final_norm"] == {"model.norm.weight"}
    assert {name for name in holders["feeds_norm"] if "layers" not in name} == {
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
    }


def test_biases_are_written_along_and_norms_scaled_along():
    layout = discover(spec("qwen2").to_config())
    bias, norm = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.input_layernorm.weight"
    assert "bias" in layout.parts[bias] and "bias" not in layout.parts[norm]
    assert "scales_residual" in layout.parts[norm] and "scales_residual" not in layout.parts[bias]


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


def blocks(axis: Axis) -> list[tuple[str, int]]:
    return [(block.role, block.unit) for block in axis.blocks]


FUSED = {
    "phi3": ({"pad_token_id": 0}, "self_attn.qkv_proj.weight", 0, [("heads", 8), ("kv_heads", 8), ("kv_heads", 8)]),
    "glm4": ({"head_dim": 8, "pad_token_id": 0}, "mlp.gate_up_proj.weight", 0, [("ffn", 1), ("ffn", 1)]),
    "gpt2": ({}, "attn.c_attn.weight", 1, [("heads", 8)] * 3),
    "gpt_neox": ({}, "attention.query_key_value.weight", 0, [("heads", 24)]),
    "mixtral": ({"num_local_experts": 4}, "mlp.experts.gate_up_proj", 1, [("ffn", 1), ("ffn", 1)]),
    "gpt_oss": ({"num_local_experts": 4, "head_dim": 8}, "mlp.experts.gate_up_proj", 2, [("ffn", 2)]),
}


@pytest.mark.parametrize("model_type", FUSED)
def test_the_order_inside_a_fused_projection_is_found_from_the_function(model_type):
    more, name, index, expected = FUSED[model_type]
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    layout = discover({"model_type": model_type, "num_hidden_layers": 2, "num_key_value_heads": 2, **small, **more})
    axes = next(axes for full, axes in layout.tensors.items() if full.endswith(f".0.{name}"))
    assert blocks(axes[index]) == expected
    assert axes[index].side == "out"


def test_a_head_size_that_follows_from_the_width_binds_the_two():
    shape = discover({"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 4}).shape
    assert shape.changed(hidden_size=48, num_attention_heads=6).to_config()["n_head"] == 6
    with pytest.raises(ModelError, match="hidden_size"):
        shape.changed(hidden_size=48)


def test_what_is_special_in_a_family_is_found():
    gemma = discover({"model_type": "gemma2", "num_hidden_layers": 2, "head_dim": 8})
    assert set(gemma.offsets.values()) == {1.0}
    assert gemma.shape.embedding_scale == pytest.approx(gemma.shape.hidden_size**0.5)
    assert gemma.shape.norm == "rms"
    neox = discover({"model_type": "gpt_neox", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4})
    assert neox.shape.norm == "layer" and not neox.offsets and neox.shape.embedding_scale == 1.0
    olmo = discover({"model_type": "olmo2", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4})
    assert olmo.shape.normed_heads == "all"
    feeding = {name for name, parts in olmo.parts.items() if "feeds_norm" in parts and ".0." in name}
    assert feeding == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk"}


def test_layers_of_a_kind_that_the_first_do_not_have_are_refused():
    mixed = {"num_hidden_layers": 4, "mlp_only_layers": [3], "num_experts": 4, "head_dim": 8, "hidden_size": 32}
    with pytest.raises(ModelError, match=r"layers\.3\.mlp.*first layers"):
        discover({"model_type": "qwen3_moe", "num_attention_heads": 4, **mixed})


@pytest.mark.parametrize("values", [{"model_type": "nonesuch"}, {"model_type": "llama", "num_attention_heads": 7}])
def test_a_config_that_transformers_refuses_is_refused_with_its_words(values):
    with pytest.raises(ModelError, match=r"config\.json: found (Unrecognized model|The hidden size)"):
        discover(values)
