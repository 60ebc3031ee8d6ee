"""ModelSpec: reads what it writes, agrees with transformers, and refuses by its numbers a shape that can't be built."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoConfig

from espalier.errors import ModelError
from espalier.spec import ATTENTION_BIAS, FAMILIES, MULTIPLIERS, ModelSpec

SIZES = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
factors = st.floats(1e-3, 1e3)


@st.composite
def specs(draw) -> ModelSpec:
    family = draw(st.sampled_from(FAMILIES))
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 4))
    sizes = {
        "vocab_size": draw(st.integers(1, 500)),
        "hidden_size": draw(st.integers(1, 30)) * (heads if family == "llama" else 1),
        "intermediate_size": draw(st.integers(1, 500)),
        "num_hidden_layers": draw(st.integers(1, 5)),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": heads,
        "head_dim": 2 * draw(st.integers(1, 40)),
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
        **({name: draw(factors) for name in MULTIPLIERS} if family == "granite" else {}),
    )


@given(specs())
@settings(deadline=None, max_examples=200)
def test_a_config_reads_back_to_the_same_spec_also_as_transformers_completes_it(spec):
    assert ModelSpec.from_config(spec.to_config()) == spec
    completed = AutoConfig.for_model(**spec.to_config()).to_dict()
    assert ModelSpec.from_config(completed) == spec
    written = spec.to_config()
    assert {key: completed[key] for key in written if completed.get(key) is not None} == {
        key: value for key, value in written.items() if value is not None
    }


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


@pytest.mark.parametrize("family", ATTENTION_BIAS)
@pytest.mark.parametrize("stated", [{}, {"attention_bias": True}, {"attention_bias": False}])
def test_biases_follow_a_family_that_gives_no_choice(family, stated):
    assert ModelSpec(family=family, **SIZES, **stated).attention_bias is ATTENTION_BIAS[family]


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


@pytest.mark.parametrize("name", [name for name, field in ModelSpec.model_fields.items() if field.metadata])
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


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "granite"])
@pytest.mark.parametrize("name", MULTIPLIERS)
def test_a_multiplier_that_the_family_has_no_place_for_is_refused(family, name):
    with pytest.raises(ModelError, match=name):
        ModelSpec.stated({**SIZES, "family": family, name: 3.5}, where="here")


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
