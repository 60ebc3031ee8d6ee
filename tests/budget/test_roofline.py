"""The roofline's FLOPs are torch's, its bytes are the weights' and the cache's, and times follow from both."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.budget import flops, memory, roofline
from espalier.budget.hardware import Hardware
from espalier.budget.roofline import Roofline, Setting
from espalier.spec import FAMILIES, MIXTURES, ModelSpec

PROPERTY = settings(max_examples=40, deadline=None)
MACHINE = Hardware(
    "x", "cuda", 1, {"float32": 1e12, "bfloat16": 4e12}, 10**10, 1e11, 100, 1, 0.4, {}, link_bandwidth=1e10
)
LLAMA_7B = ModelSpec(
    family="llama", vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, head_dim=128
)


@st.composite
def specs(draw):
    groups, family = draw(st.integers(1, 3)), draw(st.sampled_from(FAMILIES))
    hidden = groups * 32 * draw(st.integers(1, 4))
    return ModelSpec(
        family=family,
        **experts(family),
        vocab_size=draw(st.integers(30, 3000)),
        hidden_size=hidden,
        num_hidden_layers=draw(st.integers(1, 4)),
        num_attention_heads=hidden // 16 if family == "olmoe" else groups * draw(st.sampled_from([1, 2])),
        num_key_value_heads=groups,
        head_dim=16,
        tie_word_embeddings=draw(st.booleans()),
    )


def experts(family):
    return {"num_experts": 6, "num_experts_per_tok": 2} if family in MIXTURES else {}


def small(**sizes):
    sizes = {"family": "llama", "vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16} | sizes
    return ModelSpec(**experts(sizes["family"]) | sizes)


attentions = st.sampled_from(["eager", "sdpa"])


def on(spec, machine=MACHINE, **setting):
    return Roofline(spec, machine, Setting(**setting))


def rows(phase):
    return {row.name: row for row in phase.rows}


def model(spec, attention):
    config = spec.to_config()
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    # torch has no formula for transformers' own kernel for experts.
    kernels = {"experts_implementation": "eager"} if spec.num_experts else {}
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, **kernels).eval()


def in_passes(spec, attention, mode, *, batch, prompt):
    """What a mode counts in the pass over the prompt, and in the next one."""
    network, ids = model(spec, attention), torch.zeros(batch, prompt, dtype=torch.long)
    with torch.inference_mode():
        with mode() as first:
            out = network(ids, use_cache=True, logits_to_keep=1)
        with mode() as second:
            network(ids[:, :1], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    return first, second


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decoding_do_the_flops_that_torch_counts(family):
    spec, counter = small(family=family, num_key_value_heads=2), lambda: FlopCounterMode(display=False)
    first, second = in_passes(spec, "eager", counter, batch=3, prompt=10)
    line = on(spec, batch=3, attention="eager")
    assert line.prefill(10).flops == first.get_total_flops()
    assert line.decode(11).flops == second.get_total_flops()


class Kernels(TorchDispatchMode):
    """Counts operators that compute something: no views, and no casts to the dtype that is there."""

    FREE = ("view", "reshape", "transpose", "slice", "unsqueeze", "expand", "to", "lift_fresh", "detach_", "dropout")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function.name().removeprefix("aten::").split(".")[0]] += 1
        return function(*args, **(kwargs or {}))

    @property
    def count(self):
        return sum(n for name, n in self.seen.items() if name not in self.FREE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layers", [1, 3, 8])
def test_as_many_kernels_are_counted_as_transformers_starts(layers, attention):
    spec = small(num_hidden_layers=layers)
    _, second = in_passes(spec, attention, Kernels, batch=1, prompt=10)
    counted = on(spec, replace(MACHINE, kernel_seconds=1.0), attention=attention).decode(11)
    assert sum(row.seconds_of["overhead"] for row in counted.rows) == pytest.approx(second.count, rel=0.15)


@PROPERTY
@given(specs(), st.integers(1, 40), st.integers(1, 5))
def test_training_does_the_flops_that_flops_counts(spec, length, batch):
    for attention, recompute in (("eager", "none"), ("sdpa", "scores")):
        step = on(spec, batch=batch, attention=attention).training(length)
        assert step.flops == pytest.approx(batch * length * flops.training_flops(spec, length, recompute), rel=1e-12)


@PROPERTY
@given(specs(), st.integers(1, 3000), st.integers(1, 50), attentions)
def test_a_decoding_step_reads_every_weight_but_the_table_of_embeddings_and_the_whole_cache(
    spec, context, batch, attention
):
    step = on(spec, batch=batch, weight_bits=4, cache_bits=16, attention=attention).decode(context)
    products = [op for op in flops.operators(spec, 1) if op.inputs]
    hit = lambda op: op.copies * (1 - (1 - op.used / op.copies) ** batch)  # noqa: E731  (experts that the batch meets)
    weights = sum(op.count * hit(op) * op.inputs * op.outputs for op in products)
    assert sum(row.weights for row in step.rows) == pytest.approx(weights / 2)
    cached = memory.cache_bytes_per_token(spec, "bfloat16") * batch
    assert sum(row.cache for row in step.rows) == cached * (context + 1)


def test_only_fused_attention_keeps_the_scores_out_of_memory():
    eager, fused = (on(small(), attention=attention).prefill(500) for attention in ("eager", "sdpa"))
    square = 2 * 4 * 500 * 500 * 2  # layers, heads, scores, bytes
    assert eager.bytes - fused.bytes == 4 * square  # written and read, by the product, softmax and the next product
    assert eager.flops == fused.flops


def test_only_the_last_position_of_a_prompt_has_logits_and_each_costs_two_flops_a_weight():
    line = on(LLAMA_7B, batch=3)
    for phase in (line.prefill(100), line.decode(100)):
        assert rows(phase)["lm_head"].flops == 2 * 3 * 4096 * 32_000
    assert rows(line.training(100))["lm_head"].flops == 3 * 2 * 300 * 4096 * 32_000


@PROPERTY
@given(specs(), st.integers(1, 200), st.sampled_from([0.0, 1e-6]), attentions)
def test_an_operator_takes_its_longest_bound_and_the_overhead(spec, prompt, overhead, attention):
    line = on(spec, replace(MACHINE, kernel_seconds=overhead), attention=attention)
    for row in (*line.prefill(prompt).rows, *line.decode(prompt).rows, *line.training(prompt).rows):
        roofs = row.flops / 4e12, row.bytes / 1e11
        assert row.seconds == pytest.approx(max(roofs) + row.seconds_of["overhead"])
        assert (row.seconds_of["overhead"] > 0) == (overhead > 0)
        if row.bound == "compute":
            assert row.intensity >= line.ridge and row.seconds_of["overhead"] <= roofs[0]
        elif row.bound == "memory":
            assert row.intensity <= line.ridge and row.seconds_of["overhead"] <= roofs[1]
        else:
            assert row.bound == "overhead" and row.seconds_of["overhead"] >= max(roofs)


def test_numbers_of_32_bits_are_computed_at_the_peak_of_float32_and_fewer_bits_a_weight_save_no_flops():
    compute = [
        rows(on(LLAMA_7B, weight_bits=weights, activation_bits=bits).prefill(512))["gate"].seconds_of["compute"]
        for weights, bits in ((4, 32), (16, 16), (32, 16))
    ]
    assert compute == pytest.approx([4 * compute[1], compute[1], compute[1]])


@PROPERTY
@given(specs(), st.integers(1, 50), st.integers(1, 30), attentions)
def test_a_generation_is_its_prompt_and_every_step_with_the_cache_as_it_grows(spec, prompt, generated, attention):
    line = on(spec, attention=attention)
    steps = [line.decode(context).seconds for context in range(prompt + 1, prompt + generated)]
    assert len(steps) == generated - 1
    assert line.generation(prompt, generated) == pytest.approx(line.prefill(prompt).seconds + sum(steps))
    assert steps == sorted(steps)


def test_long_generations_cost_more_than_steps_at_the_length_of_the_prompt():
    line = on(small(num_hidden_layers=8))
    assert line.generation(10, 2000) > 1.2 * (line.prefill(10).seconds + 1999 * line.decode(11).seconds)


@PROPERTY
@given(specs(), st.floats(0.1, 50))
def test_products_turn_compute_bound_at_the_turning_batch_and_not_before(spec, ridge):
    machine = replace(MACHINE, peak_flops={"float32": ridge * 1e11, "bfloat16": ridge * 1e11})
    turning = on(spec, machine).turning_batch()

    def surplus(batch):
        products = [row for row in on(spec, machine, batch=batch).decode(1).rows if row.weights]
        return sum(row.seconds_of["compute"] - row.seconds_of["memory"] for row in products)

    if turning is None:
        assert surplus(10**6) < 0
    else:
        assert surplus(turning) >= 0
        assert turning == 1 or surplus(turning - 1) < 0


def test_products_too_narrow_for_the_machine_never_turn():
    assert on(small(), replace(MACHINE, memory_bandwidth=1e9)).turning_batch() is None


def with_experts(monkeypatch, copies, used):
    """Replace gate by a choice of experts; the FLOPs of a token are those of all it uses."""
    dense = flops.operators

    def operators(spec, length):
        for op in dense(spec, length):
            if op.name == "gate":
                op = replace(op, flops=used * op.flops, parameters=copies * op.parameters, copies=copies, used=used)
            yield op

    monkeypatch.setattr(roofline, "operators", lambda spec, length: list(operators(spec, length)))


@pytest.mark.parametrize(("copies", "used"), [(8, 2), (64, 6), (4, 4)])
def test_a_batch_reads_as_many_experts_as_its_tokens_hit(monkeypatch, copies, used):
    one = rows(on(small()).decode(1))["gate"].weights
    with_experts(monkeypatch, copies, used)
    chance = random.Random(0)
    for batch in (1, 3, 20, 500):
        draws = [{e for _ in range(batch) for e in chance.sample(range(copies), used)} for _ in range(300)]
        row = rows(on(small(), replace(MACHINE, kernel_seconds=1.0), batch=batch).decode(1))["gate"]
        mean = sum(map(len, draws)) / len(draws)
        assert row.weights / one == pytest.approx(mean, rel=0.03)
        assert row.seconds_of["overhead"] == pytest.approx(2 * mean, rel=0.03)  # a kernel an expert, in two layers
        assert row.flops == batch * used * 2 * 2 * 64 * small().intermediate_size


@PROPERTY
@given(specs(), st.sampled_from([2, 4, 8]), st.integers(1, 64), attentions)
def test_devices_divide_the_work_and_sum_the_hidden_state_twice_a_layer(spec, devices, batch, attention):
    one = on(spec, batch=batch, attention=attention)
    many = on(spec, MACHINE.part(devices), batch=batch, attention=attention, devices=devices)
    for alone, shared in ((one.prefill(32), many.prefill(32)), (one.decode(32), many.decode(32))):
        assert alone.flops == shared.flops
        assert "all_reduce" not in rows(alone)
        for name, row in rows(alone).items():
            there = rows(shared)[name]
            assert (there.weights, there.cache) == (row.weights, row.cache)
            assert row.activations <= there.activations <= devices * row.activations
            assert there.seconds_of["compute"] == pytest.approx(row.seconds_of["compute"] / devices)
    tokens = batch * spec.hidden_size * 2 * spec.num_hidden_layers
    sent = rows(many.decode(32))["all_reduce"]
    assert (sent.bound, sent.bytes) == ("link", 0)
    assert sent.seconds == pytest.approx(tokens * 2 * 2 * (devices - 1) / devices / 1e10)


@PROPERTY
@given(specs(), st.integers(1, 100), st.integers(1, 100), st.integers(1, 9))
def test_memory_is_weights_cache_and_one_layer(spec, prompt, generated, batch):
    needed = on(spec, batch=batch, weight_bits=8).memory(prompt, generated)
    assert needed["weights"] == flops.parameters(spec)
    assert needed["cache"] == batch * (prompt + generated) * memory.cache_bytes_per_token(spec, "bfloat16")
    deeper = on(spec.changed(num_hidden_layers=9), batch=batch).memory(prompt, generated)
    assert needed["activations"] == deeper["activations"] >= 2 * 2 * batch * prompt * spec.hidden_size


def test_the_bound_of_a_phase_is_that_of_most_of_its_time():
    line = on(LLAMA_7B, MACHINE)
    assert (line.prefill(2048).bound, line.decode(2048).bound) == ("compute", "memory")
    assert on(small(), replace(MACHINE, kernel_seconds=1e-3)).decode(10).bound == "overhead"


def test_llama_on_an_a6000_is_bounded_as_published():
    """arXiv 2402.16363: intensities of 1024 to 1215 in the prompt's products, 1.0 in decoding's; 18 ms a token."""
    a6000 = replace(MACHINE, peak_flops={"float32": 38.7e12, "bfloat16": 154.8e12}, memory_bandwidth=768e9)
    line = on(LLAMA_7B, a6000, attention="eager")
    assert line.ridge == pytest.approx(201.6, abs=0.1)
    read, written = rows(line.prefill(2048)), rows(line.decode(2048))
    assert (read["q"].intensity, read["up"].intensity) == pytest.approx((1024, 1215), rel=1e-3)
    assert (read["q"].bound, read["scores"].bound) == ("compute", "memory")
    assert all(row.intensity == pytest.approx(1.0, abs=0.02) for row in written.values() if row.flops)
    assert sum(row.seconds for row in written.values() if row.flops) == pytest.approx(18e-3, rel=0.05)
    assert sum(row.seconds for row in read.values() if row.flops) == pytest.approx(196e-3, rel=0.05)
    assert 180 < line.turning_batch() < 240


def test_an_operator_without_products_has_no_intensity():
    assert rows(on(small()).decode(5))["norms"].intensity == 0.0
    assert math.isfinite(rows(on(small(), MACHINE.part(2), devices=2).decode(5))["all_reduce"].intensity)
