"""FLOPs and parameters against what torch and transformers count."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.budget import flops
from espalier.spec import FAMILIES, MIXTURES, ModelSpec

PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
SMALL = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


def build(spec, attention="eager", device="cpu"):
    config = spec.to_config()
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device(device):
        # torch's counter has no formula for the grouped products that transformers prefers for experts.
        experts = {"experts_implementation": "eager"} if spec.num_experts else {}
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, **experts)


@st.composite
def specs(draw):
    key_value_heads = draw(st.integers(1, 3))
    heads = key_value_heads * draw(st.integers(1, 3))
    family, head_dim = draw(st.sampled_from(FAMILIES)), draw(st.sampled_from([8, 16, 24]))
    experts = draw(st.integers(1, 5)) if family in MIXTURES else 0
    return ModelSpec(
        family=family,
        vocab_size=draw(st.integers(30, 200)),
        # transformers wants a multiple for some families
        hidden_size=heads * (head_dim if family == "olmoe" else draw(st.integers(8, 20))),
        intermediate_size=draw(st.integers(32, 150)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        num_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)) if experts else 0,
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
    )


def small(family="granite", **sizes):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2} | sizes
    if family in MIXTURES:
        sizes = {"num_experts": 6, "num_experts_per_tok": 2} | sizes
    return ModelSpec(family=family, vocab_size=120, hidden_size=64, num_hidden_layers=2, **sizes)


def counted(model, rows, sequence_length, *, backward, mapping=None):
    tokens = torch.randint(0, model.config.vocab_size, (rows, sequence_length))
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        logits = model(input_ids=tokens, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / (rows * sequence_length)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_transformers_model(family, tied, bias):
    spec = small(family, tie_word_embeddings=tied, attention_bias=bias)
    assert flops.parameters(spec) == build(spec, device="meta").num_parameters()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models_are_exact(name):
    spec = ModelSpec.from_config(PUBLISHED[name]["config"])
    assert flops.parameters(spec) == PUBLISHED[name]["parameters"]
    assert build(spec, device="meta").num_parameters() == PUBLISHED[name]["parameters"]


@pytest.mark.parametrize("name", [name for name, model in PUBLISHED.items() if "active_billions" in model])
def test_active_parameters_of_published_mixtures_are_what_their_makers_say(name):
    active = flops.active_parameters(ModelSpec.from_config(PUBLISHED[name]["config"]))
    assert active / 1e9 == pytest.approx(PUBLISHED[name]["active_billions"], abs=0.06)


@SMALL
@given(specs())
def test_parameters_are_exact_for_any_shape(spec):
    assert flops.parameters(spec) == build(spec, device="meta").num_parameters()


@SMALL
@given(specs(), st.integers(1, 3), st.integers(2, 40))
def test_eager_flops_are_those_that_torch_counts(spec, rows, sequence_length):
    model = build(spec)
    forward = counted(model, rows, sequence_length, backward=False)
    both = counted(model, rows, sequence_length, backward=True)
    assert flops.forward_flops(spec, sequence_length) == pytest.approx(forward, rel=0.01)
    assert flops.training_flops(spec, sequence_length) == pytest.approx(both, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_sdpa_flops_are_those_that_torch_counts_with_scores_made_twice(family):
    spec = small(family)
    aten = torch.ops.aten
    # torch has no formula for the CPU kernels; they do the products of the other fused kernels.
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    model = build(spec, "sdpa")
    forward = counted(model, 2, 48, backward=False, mapping=mapping)
    both = counted(model, 2, 48, backward=True, mapping=mapping)
    assert flops.forward_flops(spec, 48) == pytest.approx(forward, rel=0.01)
    assert flops.training_flops(spec, 48, "scores") == pytest.approx(both, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [1, 9, 40])
def test_prefill_and_every_decoded_token_cost_what_torch_counts(family, prompt):
    spec = small(family)
    model = build(spec).eval()
    tokens = torch.randint(0, 120, (1, prompt + 5))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cache = model(tokens[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
    assert flops.prefill_flops(spec, prompt) == pytest.approx(counter.get_total_flops(), rel=0.01)
    for context in range(prompt + 1, prompt + 6):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            cache = model(tokens[:, context - 1 : context], past_key_values=cache, use_cache=True).past_key_values
        assert flops.decode_flops(spec, context) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("family", MIXTURES)
def test_active_parameters_are_those_that_a_token_passes(family):
    few, more, all_of_them = (small(family, num_experts_per_tok=used) for used in (2, 3, 6))
    one_expert = 3 * few.hidden_size * few.intermediate_size * few.num_hidden_layers
    assert flops.active_parameters(more) - flops.active_parameters(few) == one_expert
    assert flops.active_parameters(all_of_them) == flops.parameters(few)


def test_all_parameters_of_a_dense_model_are_active():
    assert flops.active_parameters(small()) == flops.parameters(small())


@SMALL
@given(specs(), st.integers(2, 40))
def test_recomputed_layers_cost_what_torch_counts(spec, sequence_length):
    model = build(spec)
    for layer in model.base_model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    both = counted(model, 2, sequence_length, backward=True)
    assert flops.training_flops(spec, sequence_length, "layers") == pytest.approx(both, rel=0.001)


def test_only_attention_depends_on_the_sequence_length():
    short, long = (flops.operators(small(), length) for length in (16, 32))
    changed = {a.name for a, b in zip(short, long, strict=True) if a != b}
    assert changed == {"scores", "values"}


def test_tied_embeddings_save_parameters_and_no_flops():
    free, tied = small(), small(tie_word_embeddings=True)
    assert flops.parameters(free) - flops.parameters(tied) == 120 * 64
    assert flops.forward_flops(free, 16) == flops.forward_flops(tied, 16)


def test_narayanan_estimate_gives_the_published_totals_of_gpt3():
    gpt3 = ModelSpec(
        family="llama", vocab_size=50_257, hidden_size=12_288, num_hidden_layers=96, num_attention_heads=96
    )
    zetta = [flops.narayanan_flops(gpt3, 2048, choice) * 300e9 / 1e21 for choice in ("none", "full")]
    assert zetta == pytest.approx([322.6, 430.2], abs=0.1)


@given(st.integers(1, 12), st.sampled_from([32, 64, 128]), st.integers(16, 4096), st.integers(100, 5000))
def test_narayanan_estimate_is_exact_for_twelve_d_squared_a_layer(layers, third, length, vocab):
    hidden = 3 * third
    spec = ModelSpec(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=8 * third,  # three matrices of 8/3 d hold what two of 4 d do
        num_hidden_layers=layers,
        num_attention_heads=3,
    )
    head, down = 2 * hidden * vocab, 2 * hidden * 8 * third
    full = flops.training_flops(spec, length, "layers") + layers * down  # it recomputes a layer's last product too
    assert flops.narayanan_flops(spec, length, "full") == pytest.approx(full)
    none = flops.training_flops(spec, length) - 3 * head / 4  # and without recomputation has 3/4 of them
    assert flops.narayanan_flops(spec, length, "none") == pytest.approx(none)
