"""Every operator on every family: exact wherever it says so, and only there; no dead part anywhere."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.errors import ModelError
from espalier.grow import operators, preserve
from espalier.grow.apply import grow_model
from espalier.model.axes import discover
from espalier.model.mup import Parametrization

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}
FAMILIES = {
    "llama": {},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "gpt2": {},
    "gpt_neox": {},
    "starcoder2": {},
    "stablelm": {},
    "cohere": {},
    "glm4": {"head_dim": 8},
    "smollm3": {},
    "mixtral": {"num_local_experts": 4},
    "olmoe": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "granitemoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}
NORM_BEHIND_WRITERS = {"gemma2", "gemma3_text", "glm4", "olmo2"}
NORM_OVER_ALL_HEADS = {"olmo2", "olmoe"}
EXACT = 1e-5
IDS = torch.randint(0, 48, (2, 24), generator=torch.Generator().manual_seed(1))


def built(family: str, *, tied: bool):
    """A small model, every weight of ordinary size and none special."""
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    config.tie_word_embeddings = tied
    for key in config.to_dict():
        if key.endswith(("eps", "epsilon")):
            setattr(config, key, 1e-2)  # so large that a norm that got it wrong shows
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight + 0.3 * noise if weight.ndim == 1 else noise / weight.shape[-1] ** 0.5)
    return model


def padded(shape) -> dict[str, int]:
    """Larger sizes, none a multiple of what it was."""
    sizes, heads = shape.fields(), shape.num_attention_heads
    grown = {"hidden_size": shape.hidden_size + 2 * shape.head_dim, "num_attention_heads": heads + 2}
    if "num_key_value_heads" in sizes:
        grown["num_key_value_heads"] = sizes["num_key_value_heads"] + 1
    neurons = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    return grown | {key: sizes[key] + 24 for key in neurons if key in sizes}


def doubled(shape) -> dict[str, int]:
    """Twice as wide; other sizes as they come."""
    grown = padded(shape) | {"hidden_size": 2 * shape.hidden_size, "num_attention_heads": 2 * shape.num_attention_heads}
    if "num_key_value_heads" in grown:
        grown["num_key_value_heads"] = 2 * shape.num_key_value_heads
    return grown


GROWTHS = {
    "zero_pad": padded,
    "fpi": doubled,
    "fpi_shares": doubled,
    "aki": doubled,
    "identity": lambda shape: {"num_hidden_layers": 5},
    "stack": lambda shape: {"num_hidden_layers": 5},
    "interpolate": lambda shape: {"num_hidden_layers": 3},
}


@pytest.fixture(
    scope="module", params=[(f, tied) for f in FAMILIES for tied in (True, False)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def model(request):
    family, tied = request.param
    return built(family, tied=tied)


@pytest.mark.parametrize("operator", GROWTHS)
def test_a_growth_is_exact_where_it_says_so_and_leaves_nothing_dead(model, operator):
    shape = discover(model.config.to_dict()).shape
    growth = (operators.DEPTH | operators.WIDTH)[operator](shape, shape.changed(**GROWTHS[operator](shape)))
    std_of = Parametrization(kind="standard").std_of(growth.after)
    grown = grow_model(model, [growth], seed=1, std_of=std_of)
    grown.set_attn_implementation("eager")
    difference = preserve.check(model, grown, IDS).relative_difference
    assert (difference <= EXACT) == growth.exact
    assert growth.exact == (
        operator in ("fpi", "fpi_shares", "identity")
        or (operator == "zero_pad" and model.config.model_type not in NORM_OVER_ALL_HEADS)
    )
    late = model.config.model_type in NORM_BEHIND_WRITERS and model.config.tie_word_embeddings
    learned = preserve.learning(grown, IDS, [growth], steps=3 if late else 2)
    assert learned.dead == []
    assert bool(learned.symmetric) == (operator == "fpi")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3"])
def test_a_width_that_is_no_multiple_is_flagged_and_measured(family):
    model = built(family, tied=False)
    shape = discover(model.config.to_dict()).shape
    sizes = {"hidden_size": 48, "num_attention_heads": 6}
    growth = operators.WIDTH["fpi"](shape, shape.changed(**sizes))
    grown = grow_model(model, [growth], seed=1, std_of=lambda name, size: 0.0)
    grown.set_attn_implementation("eager")
    assert not growth.exact
    assert preserve.check(model, grown, IDS).relative_difference > 1e-2


REFUSED = {
    "bloom": "depends on the number of heads",
    "falcon": "query_key_value",
    "deepseek_v3": "",
    "opt": "embed_positions",
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_understood_is_refused_by_name(family):
    with pytest.raises(ModelError, match=f"{family}.*{REFUSED[family]}"):
        discover({"model_type": family})
