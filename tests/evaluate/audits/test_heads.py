"""Queries and keys are the model's own, before positions turn them, in whatever way a family holds them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from espalier.errors import ModelError
from espalier.evaluate.audits.heads import attention_layers, look, silenced

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "granite": {"attention_multiplier": 0.3},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "olmo2": {},
    "olmoe": {"num_experts": 2, "num_experts_per_tok": 1},
    "mixtral": {"num_local_experts": 2},
    "cohere": {},
    "phi": {},
    "phi3": {},
    "starcoder2": {},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt2": {"num_key_value_heads": 4},
}
FEW = ("llama", "phi3", "gpt_neox", "gpt2")
IDS = [3, 17, 5, 5, 30, 2, 9, 21, 11]
EACH = torch.eye(len(IDS))


def built(family: str, attention: str = "eager", **more) -> PreTrainedModel:
    """A small model with every weight random, norms too."""
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **more})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight + 0.3 * noise if weight.ndim == 1 else noise / weight.shape[-1] ** 0.5)
    model.set_attn_implementation(attention)
    return model


@pytest.fixture
def unturned(monkeypatch):
    """A model whose rotary positions turn nothing."""

    def unturned(model: PreTrainedModel) -> PreTrainedModel:
        for module in model.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                true = type(module).forward

                def still(*args, _true=true, _module=module, **more):
                    cos, sin = _true(_module, *args, **more)
                    return torch.ones_like(cos), torch.zeros_like(sin)

                monkeypatch.setattr(module, "forward", still)
        return model

    return unturned


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_what_attention_is_made_of_where_positions_turn_nothing(family, unturned):
    model = unturned(built(family))
    layers = attention_layers(model)
    seen = look(model, layers, IDS, EACH, "normed")
    assert seen.qk_LHO.shape == seen.attention_LHO.shape == (2, 4, len(IDS))
    for layer, qk_HO, attention_HO in zip(layers, seen.qk_LHO, seen.attention_LHO, strict=True):
        scale = getattr(layer.module, "scaling", layer.head_dim**-0.5)
        torch.testing.assert_close((scale * qk_HO).softmax(-1), attention_HO)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox"])
def test_positions_turn_attention_and_not_the_scores(family, unturned):
    model = built(family)
    layers = attention_layers(model)
    turned = look(model, layers, IDS, EACH, "normed")
    still = look(unturned(model), layers, IDS, EACH, "normed")
    torch.testing.assert_close(turned.qk_LHO[0], still.qk_LHO[0])  # later layers read what attention wrote
    assert not torch.allclose(turned.attention_LHO[0], still.attention_LHO[0], atol=1e-3)


def test_scores_are_products_of_the_weights():
    model = built("llama")
    layer = model.model.layers[0]
    x_TX = layer.input_layernorm(model.model.embed_tokens(torch.tensor(IDS)))
    query = (layer.self_attn.q_proj.weight @ x_TX[-1]).reshape(4, 8)
    key = (x_TX @ layer.self_attn.k_proj.weight.T).reshape(len(IDS), 2, 8)
    wanted = torch.stack([key[:, head // 2] @ query[head] for head in range(4)])
    torch.testing.assert_close(look(model, attention_layers(model), IDS, EACH, "normed").qk_LHO[0], wanted.detach())


def test_vectors_before_the_norm_are_those_of_a_model_without_it():
    model = built("qwen3")
    layers = attention_layers(model)
    layer, attention = model.model.layers[0], model.model.layers[0].self_attn
    x_TX = layer.input_layernorm(model.model.embed_tokens(torch.tensor(IDS)))
    query = attention.q_proj(x_TX[-1]).reshape(4, 16)
    key = attention.k_proj(x_TX).reshape(len(IDS), 2, 16).repeat_interleave(2, 1)
    found = {vectors: look(model, layers, IDS, EACH, vectors).qk_LHO[0] for vectors in ("projected", "normed")}
    torch.testing.assert_close(found["projected"], torch.einsum("hd,thd->ht", query, key).detach())
    query, key = attention.q_norm(query), attention.k_norm(key)
    torch.testing.assert_close(found["normed"], torch.einsum("hd,thd->ht", query, key).detach())


def test_an_option_of_several_tokens_is_their_mean():
    model = built("llama")
    layers = attention_layers(model)
    share = torch.zeros(2, len(IDS))
    share[0, 4] = 1
    share[1, 2:5] = 1 / 3
    each, both = look(model, layers, IDS, EACH, "normed"), look(model, layers, IDS, share, "normed")
    for one, two in ((each.qk_LHO, both.qk_LHO), (each.attention_LHO, both.attention_LHO)):
        torch.testing.assert_close(two, torch.stack([one[..., 4], one[..., 2:5].mean(-1)], -1))


def test_fused_kernels_tell_scores_and_no_attention():
    eager, fused = built("llama"), built("llama", "sdpa")
    one, two = (look(model, attention_layers(model), IDS, EACH, "normed") for model in (eager, fused))
    assert two.attention_LHO is None
    torch.testing.assert_close(one.qk_LHO, two.qk_LHO)
    torch.testing.assert_close(one.next_V.exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("family", FEW)
def test_a_silent_head_is_one_whose_output_nobody_reads(family):
    model = built(family)
    layers = attention_layers(model)
    before = look(model, layers, IDS, EACH, "normed").next_V
    with silenced(layers, [(0, 1), (1, 3), (1, 0)]):
        silent = look(model, layers, IDS, EACH, "normed").next_V
    torch.testing.assert_close(look(model, layers, IDS, EACH, "normed").next_V, before)
    with torch.no_grad():
        for number, head in ((0, 1), (1, 3), (1, 0)):
            weight = layers[number].output.weight
            columns = weight.T if family == "gpt2" else weight
            columns[:, head * 8 : head * 8 + 8] = 0
    assert not torch.allclose(before, silent, atol=1e-3)
    torch.testing.assert_close(look(model, layers, IDS, EACH, "normed").next_V, silent)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mamba", {"state_size": 4, "expand": 1}),
        ("deepseek_v2", {"q_lora_rank": 8, "kv_lora_rank": 8, "n_routed_experts": 2, "num_experts_per_tok": 1}),
    ],
)
def test_a_model_without_queries_and_keys_is_refused(family, more):
    config = AutoConfig.for_model(family, **{**SIZES, **more})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=family):
        attention_layers(model)
