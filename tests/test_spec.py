"""ModelSpec: reads what it writes, agrees with transformers, and refuses by its numbers a shape that can't be built."""

import math

import pytest
from annotated_types import Gt
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoConfig

from espalier.errors import ModelError
from espalier.spec import DENSE, FAMILIES, FIXED, MIXTURES, MULTIPLIED, MULTIPLIERS, ModelSpec

SIZES = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
factors = st.floats(1e-3, 1e3)


def sizes_of(family: str) -> dict:
    return {"family": family, **SIZES, **(EXPERTS if family in MIXTURES else {})}


@st.composite
def specs(draw) -> ModelSpec:
    family = draw(st.sampled_from(FAMILIES))
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 4))
    head_dim = 2 * draw(st.integers(1, 40))
    width = {"llama": heads, "olmoe": heads * head_dim}.get(family)
    experts = draw(st.integers(1, 6)) if family in MIXTURES else 0
    sizes = {
        "vocab_size": draw(st.integers(1, 500)),
        "hidden_size": width if family == "olmoe" else draw(st.integers(1, 30)) * (width or 1),
        "intermediate_size": draw(st.integers(1, 500)),
        "num_hidden_layers": draw(st.integers(1, 5)),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)) if experts else 0,
        "norm_topk_prob": draw(st.booleans()) if experts else False,
        "max_position_embeddings": draw(st.integers(1, 9999)),
    }
    return ModelSpec(
        family=family,
        **sizes,
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        rope_theta=draw(st.floats(1, 1e7)),
        rms_norm_eps=draw(st.floats(1e-8, 1e-3)),
        initializer_range=draw(st.floats(1e-4, 1)),
        **({name: draw(factors) for name in MULTIPLIERS} if family in MULTIPLIED else {}),
    )


@given(specs())
@settings(deadline=None, max_examples=200)
def test_a_config_reads_back_to_the_same_spec_also_as_transformers_completes_it(spec):
    assert ModelSpec.from_config(spec.to_config()) == spec
    completed = AutoConfig.for_model(**spec.to_config())
    assert ModelSpec.from_config(completed.to_dict()) == spec
    assert {key: getattr(completed, key) for key in spec.to_config()} == spec.to_config()


@given(specs())
def test_a_spec_reads_back_from_its_own_values_and_changes_alone_what_is_changed(spec):
    assert ModelSpec(**spec.model_dump()) == spec
    deeper = spec.changed(num_hidden_layers=spec.num_hidden_layers + 1)
    assert deeper.changed(num_hidden_layers=spec.num_hidden_layers) == spec
    assert deeper != spec


@given(specs())
def test_sizes_of_all_heads_together_are_products(spec):
    assert spec.query_size == spec.num_attention_heads * spec.head_dim
    assert spec.key_value_size == spec.num_key_value_heads * spec.head_dim


@given(st.integers(1, 64), st.integers(1, 32))
def test_sizes_left_out_are_derived_from_those_stated(heads, half):
    head_dim, hidden = 2 * half, heads * 2 * half
    by_heads = ModelSpec(vocab_size=9, num_hidden_layers=1, hidden_size=hidden, num_attention_heads=heads)
    by_size = ModelSpec(vocab_size=9, num_hidden_layers=1, hidden_size=hidden, head_dim=head_dim)
    assert by_heads == by_size
    assert by_heads.num_key_value_heads == heads
    assert by_heads.intermediate_size % 32 == 0
    assert 0 <= by_heads.intermediate_size - hidden * 8 / 3 < 32
    assert math.isclose(by_heads.attention_multiplier, head_dim**-0.5)


@pytest.mark.parametrize("family, name", [(family, name) for family, fixed in FIXED.items() for name in fixed])
@pytest.mark.parametrize("stated", [None, True, False])
def test_what_a_family_gives_no_choice_of_follows_it(family, name, stated):
    spec = ModelSpec(**sizes_of(family), **{name: stated})
    assert getattr(spec, name) is FIXED[family][name]
    built = AutoConfig.for_model(**spec.to_config())
    assert getattr(built, name, FIXED[family][name]) is FIXED[family][name]


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("name", EXPERTS)
def test_a_dense_family_has_no_experts(family, name):
    with pytest.raises(ModelError, match=f"the {family} family has no experts"):
        ModelSpec.stated({**sizes_of(family), name: 2}, where="here")


@pytest.mark.parametrize("family", MIXTURES)
@given(experts=st.integers(0, 5), used=st.integers(0, 9))
def test_a_mixture_sends_a_token_to_one_expert_up_to_all(family, experts, used):
    sizes = {**sizes_of(family), "num_experts": experts, "num_experts_per_tok": used}
    if 1 <= used <= experts:
        assert ModelSpec(**sizes).num_experts == experts
    else:
        with pytest.raises(ModelError, match=f"num_experts {experts} with num_experts_per_tok {used}"):
            ModelSpec.stated(sizes, where="here")


@pytest.mark.parametrize("family", MIXTURES)
def test_gates_sum_to_one_where_the_family_makes_them(family):
    spec = ModelSpec(**sizes_of(family), norm_topk_prob=False)
    assert spec.norm_topk_prob is (family in ("mixtral", "granitemoe"))
    assert ("norm_topk_prob" in spec.to_config()) is (family in ("qwen3_moe", "olmoe"))


@given(st.integers(1, 300), st.integers(1, 10))
def test_the_olmoe_family_wants_a_width_of_all_heads_together(hidden, heads):
    assume(hidden != 4 * heads)
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "head_dim": 4}
    with pytest.raises(ModelError, match=f"hidden_size {hidden} isn't num_attention_heads {heads} times head_dim 4"):
        ModelSpec.stated({**sizes_of("olmoe"), **sizes}, where="here")


def test_an_expert_s_neurons_are_read_where_the_family_states_them():
    written = ModelSpec(**sizes_of("qwen3_moe"), intermediate_size=24).to_config()
    assert written["moe_intermediate_size"] == 24 and "intermediate_size" not in written
    assert ModelSpec.from_config({**written, "intermediate_size": 999}).intermediate_size == 24


@pytest.mark.parametrize(
    "family, key, value",
    [
        *((family, "hidden_act", "gelu") for family in FAMILIES),
        *((family, "sliding_window", 16) for family in ("mistral", "mixtral")),
        *((family, "mlp_bias", True) for family in ("llama", "granite")),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
        ("qwen3_moe", "mlp_only_layers", [0]),
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("olmoe", "clip_qkv", 8.0),
        ("qwen3_moe", "shared_expert_intermediate_size", 8),
        ("granitemoe", "shared_intermediate_size", 8),
    ],
)
def test_what_a_spec_cannot_say_is_refused_by_name(family, key, value):
    config = ModelSpec(**sizes_of(family)).to_config()
    with pytest.raises(ModelError) as refused:
        ModelSpec.from_config({**config, key: value}, where="m/config.json")
    assert refused.value.where == f"m/config.json: {key}"
    assert repr(value) in refused.value.found


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_a_config_that_is_silent_about_its_window_has_the_one_that_transformers_gives_it(family):
    config = {key: value for key, value in ModelSpec(**sizes_of(family)).to_config().items() if key != "sliding_window"}
    if AutoConfig.for_model(**config).sliding_window is None:
        assert ModelSpec.from_config(config).family == family
    else:
        with pytest.raises(ModelError, match="sliding_window 4096"):
            ModelSpec.from_config(config)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_a_window_counts_where_it_is_switched_on(family):
    config = ModelSpec(**sizes_of(family)).to_config()
    assert ModelSpec.from_config({**config, "sliding_window": 16}) == ModelSpec.from_config(config)
    off = {**config, "sliding_window": 16, "use_sliding_window": False}
    assert ModelSpec.from_config(off) == ModelSpec.from_config(config)
    with pytest.raises(ModelError, match="sliding_window 16"):
        ModelSpec.from_config({**off, "use_sliding_window": True})


@given(st.integers(1, 300), st.integers(1, 40))
def test_a_width_that_heads_do_not_divide_is_refused_with_widths_that_would_do(hidden, parts):
    assume(hidden % parts)
    for name in ("num_attention_heads", "head_dim"):
        with pytest.raises(ModelError) as refused:
            ModelSpec.stated(
                {"vocab_size": 9, "num_hidden_layers": 1, "hidden_size": hidden, name: parts}, where="here"
            )
        found = refused.value.found
        assert f"hidden_size {hidden}" in found and f"{name} {parts}" in found
        assert f"{-(-hidden // parts) * parts} would be" in found
        assert refused.value.where == "here"


@given(st.integers(1, 300), st.integers(1, 40))
def test_the_llama_family_wants_a_width_that_heads_divide_even_where_their_size_is_stated(hidden, heads):
    assume(hidden % heads)
    sizes = {**SIZES, "hidden_size": hidden, "num_attention_heads": heads, "head_dim": 4}
    assert ModelSpec(family="granite", **sizes).hidden_size == hidden
    with pytest.raises(ModelError, match=f"hidden_size {hidden} .*num_attention_heads {heads}"):
        ModelSpec.stated({"family": "llama", **sizes}, where="here")


@given(st.integers(1, 30), st.integers(1, 30))
def test_query_heads_that_key_value_heads_do_not_divide_are_refused(heads, kv_heads):
    assume(heads % kv_heads)
    sizes = {**SIZES, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 4}
    with pytest.raises(ModelError, match=f"num_attention_heads {heads} .*num_key_value_heads {kv_heads}"):
        ModelSpec.stated(sizes, where="here")


@given(st.integers(0, 50).map(lambda n: 2 * n + 1))
def test_an_odd_head_is_refused(head_dim):
    with pytest.raises(ModelError, match=f"head_dim {head_dim} is odd"):
        ModelSpec.stated({**SIZES, "head_dim": head_dim}, where="here")


@pytest.mark.parametrize(
    "name",
    [name for name, field in ModelSpec.model_fields.items() if any(isinstance(rule, Gt) for rule in field.metadata)],
)
@given(size=st.integers(-5, 0))
def test_a_size_of_nothing_is_refused_by_name(name, size):
    for read in (lambda sizes: ModelSpec.stated(sizes, where="here"), _as_config):
        with pytest.raises(ModelError, match=f"{name}: .*greater than 0"):
            read({**SIZES, "head_dim": 12, name: size})


def _as_config(sizes):
    return ModelSpec.from_config({"model_type": "llama", **sizes})


@given(st.floats(1, 10, exclude_min=True))
def test_initial_values_of_a_spread_that_transformers_refuses_are_refused(std):
    with pytest.raises(ModelError, match="initializer_range"):
        ModelSpec.stated({**SIZES, "initializer_range": std}, where="here")


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_size_that_nothing_derives_is_asked_for_by_name(name):
    sizes = {key: size for key, size in SIZES.items() if key != name} | {"head_dim": 12, "intermediate_size": 8}
    with pytest.raises(ModelError, match=f"{name}: Field required"):
        _as_config(sizes)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MULTIPLIED])
@pytest.mark.parametrize("name", MULTIPLIERS)
def test_a_multiplier_that_the_family_has_no_place_for_is_refused(family, name):
    with pytest.raises(ModelError, match=name):
        ModelSpec.stated({**sizes_of(family), name: 3.5}, where="here")


@pytest.mark.parametrize("model_type", ["gpt2", None, 3])
def test_another_model_type_is_refused_with_the_known_ones(model_type):
    with pytest.raises(ModelError) as refused:
        ModelSpec.from_config({"model_type": model_type, **SIZES}, where="m/config.json")
    assert refused.value.where == "m/config.json: model_type"
    assert repr(model_type) in refused.value.found
    assert all(family in refused.value.expected for family in FAMILIES)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
        {"rope_scaling": {"type": "linear", "factor": 2}},
    ],
)
def test_scaled_positions_are_refused_however_they_are_written(rope):
    with pytest.raises(ModelError, match="rope_type"):
        ModelSpec.from_config({"model_type": "llama", **SIZES, **rope})


@given(theta=st.floats(1, 1e7))
def test_the_base_of_rotary_positions_is_read_from_either_place(theta):
    old, new = {"rope_theta": theta}, {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    assert _as_config({**SIZES, **old}) == _as_config({**SIZES, **new})
    assert _as_config({**SIZES, **old}).rope_theta == theta


def test_a_spec_takes_no_unknown_key_and_no_change_in_place():
    with pytest.raises(ValidationError, match="hiden_size"):
        ModelSpec(**SIZES, hiden_size=3)
    with pytest.raises(ValidationError, match="frozen"):
        ModelSpec(**SIZES).hidden_size = 3
