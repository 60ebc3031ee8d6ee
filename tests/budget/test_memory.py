"""Bytes against what autograd keeps, what optimizers hold and what save_pretrained writes."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.budget import memory
from espalier.data.stream import Batch
from espalier.model.build import build as build_model
from espalier.model.mup import Parametrization
from espalier.spec import FAMILIES, MIXTURES, ModelSpec
from espalier.train.device import Device
from espalier.train.loop import backward
from espalier.train.objectives import CHUNK, NextToken
from espalier.train.optim import Optimizer
from espalier.train.recipe import OptimizerRecipe


def small(family="granite", **sizes):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 200} | sizes
    if family in MIXTURES:
        sizes = {"num_experts": 6, "num_experts_per_tok": 2} | sizes
    return ModelSpec(**{"family": family, "vocab_size": 120, "hidden_size": 64, "num_hidden_layers": 2} | sizes)


def build(spec, attention="eager"):
    config = spec.to_config()
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    experts = {"experts_implementation": "eager"} if spec.num_experts else {}
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, **experts)


def training(spec, **choices):
    defaults = {"rows": 3, "sequence_length": 40, "optimizer": "adamw", "compute": "float32", "loss_chunk": 32}
    return memory.training_memory(spec, **(defaults | choices))


def bytes_kept_by_autograd(model, rows, sequence_length, compute):
    """Bytes of the distinct storages that one forward pass keeps for its backward, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    # Of all kinds, so that every expert is hit.
    tokens = torch.arange(rows * sequence_length).reshape(rows, -1) % model.config.vocab_size
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"),
    ):
        logits = model(input_ids=tokens, use_cache=False).logits
    assert logits.requires_grad
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


def casts(spec, compute):
    """Bytes of the copies that autocast makes of the weights of products."""
    matrices = [p for name, p in build(spec).named_parameters() if p.ndim >= 2 and "embed" not in name]
    return 2 * sum(matrix.numel() for matrix in matrices) * (compute == "bfloat16")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps_within_3_percent(family, compute, attention):
    spec = small(family)
    planned = 3 * 40 * memory.activation_bytes_per_token(spec, 40, compute, attention)
    kept = bytes_kept_by_autograd(build(spec, attention), 3, 40, compute)
    assert planned + casts(spec, compute) == pytest.approx(kept, rel=0.03)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from(["eager", "sdpa"]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(24, 100),
    st.integers(1, 4),
)
def test_activations_follow_any_shape(compute, attention, group, key_value_heads, length, layers):
    spec = small(
        num_attention_heads=group * key_value_heads,
        num_key_value_heads=key_value_heads,
        head_dim=16,
        num_hidden_layers=layers,
    )
    planned = 3 * length * memory.activation_bytes_per_token(spec, length, compute, attention)
    kept = bytes_kept_by_autograd(build(spec, attention), 3, length, compute)
    assert planned + casts(spec, compute) == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("family", MIXTURES)
def test_what_a_router_keeps_is_counted(family):
    spec = small(family, hidden_size=16, intermediate_size=8, num_experts=50, num_experts_per_tok=8)
    kept = bytes_kept_by_autograd(build(spec, "sdpa"), 3, 40, "float32")
    assert 3 * 40 * memory.activation_bytes_per_token(spec, 40, "float32", "sdpa") == pytest.approx(kept, rel=0.03)


def update_peak(peak_bytes, spec, *, rows, micro_rows, sequence_length, optimizer, compute, attention, recompute):
    """The most that one update of the product's own loop holds, in bytes; weights and moments are there before it."""
    device = Device(compute=compute, attention=attention, recompute=recompute)
    model = build_model(spec, Parametrization(), seed=0)
    if spec.num_experts:
        model.set_experts_implementation("eager")
    device.place(model)
    trained = Optimizer(model, spec, OptimizerRecipe(name=optimizer), Parametrization())
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, (rows, sequence_length + 1))
    batch = Batch(ids[:, :-1], ids[:, 1:], None)

    def update():
        backward(model, batch, micro_rows, NextToken(), device)
        trained.clip()
        trained.step()

    update()
    held = sum(weight.nbytes for weight in model.parameters())
    held += sum(value.nbytes for quantities in trained.state().values() for value in quantities.values())
    return held + peak_bytes(update)


@pytest.mark.parametrize("recompute", ["none", "layers"])
@pytest.mark.parametrize(
    "optimizer, compute, attention",
    [
        ("adamw", "float32", "sdpa"),
        ("muon", "bfloat16", "eager"),
        ("muon", "bfloat16", "causal_halves"),
        ("adamw", "bfloat16", "sdpa"),
    ],
)
@pytest.mark.parametrize(
    "layers, vocab_size, rows, micro_rows, length",
    [
        (4, 4096, 16, 16, 160),  # the loss, in its second chunk, is the peak
        (12, 64, 32, 16, 128),  # the backward pass in the last layer
        (1, 64, 1, 1, 16),  # the update
    ],
    ids=["loss", "backward", "update"],
)
def test_the_peak_of_an_update_is_within_10_percent_of_the_allocator_s(
    peak_bytes, optimizer, compute, attention, recompute, layers, vocab_size, rows, micro_rows, length
):
    spec = small("llama", hidden_size=128, intermediate_size=352, num_hidden_layers=layers, vocab_size=vocab_size)
    work = {"sequence_length": length, "optimizer": optimizer, "compute": compute, "attention": attention}
    work["recompute"] = recompute
    measured = update_peak(peak_bytes, spec, rows=rows, micro_rows=micro_rows, **work)
    planned = memory.training_memory(
        spec, rows=micro_rows, loss_chunk=CHUNK, passes=rows // micro_rows, accumulate="pairs", **work
    )
    assert planned.total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("recompute", ["none", "layers"])
@pytest.mark.parametrize("optimizer, compute, attention", [("adamw", "float32", "sdpa"), ("muon", "bfloat16", "eager")])
@pytest.mark.parametrize(
    "family, sizes, rows, micro_rows, length",
    [
        ("mixtral", {"num_hidden_layers": 4, "vocab_size": 4096}, 16, 16, 160),  # the loss is the peak
        ("mixtral", {"num_experts": 4}, 32, 32, 128),  # the backward pass in the last layer
        ("olmoe", {"num_experts": 4, "num_key_value_heads": 4}, 64, 32, 128),  # and with gradients from before
        ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 1}, 8, 8, 64),  # in the first layer
        ("granitemoe", {"num_hidden_layers": 1}, 1, 1, 16),  # gradients of stacked experts
    ],
)
def test_the_peak_of_a_mixture_is_within_10_percent_of_the_allocator_s(
    peak_bytes, family, sizes, rows, micro_rows, length, optimizer, compute, attention, recompute
):
    spec = small(family, **{"hidden_size": 128, "intermediate_size": 352, "vocab_size": 64} | sizes)
    work = {"sequence_length": length, "optimizer": optimizer, "compute": compute, "attention": attention}
    work["recompute"] = recompute
    measured = update_peak(peak_bytes, spec, rows=rows, micro_rows=micro_rows, **work)
    planned = memory.training_memory(
        spec, rows=micro_rows, loss_chunk=CHUNK, passes=rows // micro_rows, accumulate="pairs", **work
    )
    assert planned.total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("family", ["granite", "mixtral"])
def test_recomputation_keeps_the_inputs_of_the_layers_alone(family):
    tokens, deep, shallow = 3 * 40, small(family, num_hidden_layers=9), small(family, num_hidden_layers=5)
    kept = [memory.activation_bytes_per_token(spec, 40, "float32", "sdpa", "layers") for spec in (deep, shallow)]
    assert kept[0] - kept[1] == 4 * 4 * 64
    model = build(deep, "sdpa")
    for layer in model.base_model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    assert kept[0] * tokens == pytest.approx(bytes_kept_by_autograd(model, 3, 40, "float32"), rel=0.03)


def test_a_longer_chunk_than_the_batch_changes_nothing():
    spec = small(vocab_size=4096)
    assert training(spec, loss_chunk=10**9) == training(spec, loss_chunk=120)
    assert training(spec, loss_chunk=60).total < training(spec, loss_chunk=120).total


def test_compiled_losses_and_fewer_passes_hold_less():
    spec = small(vocab_size=4096)
    assert training(spec, compile="layers").total < training(spec).total < training(spec, passes=2).total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_optimizer_bytes_are_those_of_adamw_and_of_muon(family, tied):
    optimizer_bytes_are_those_held(small(family, tie_word_embeddings=tied))


def test_muon_leaves_a_single_stacked_expert_to_adamw_too():
    optimizer_bytes_are_those_held(small("mixtral", num_experts=1, num_experts_per_tok=1))


def optimizer_bytes_are_those_held(spec):
    model = build(spec)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    in_layers = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in in_layers)]
    held = {
        "adamw": state_bytes(torch.optim.AdamW(model.parameters())),
        "muon": state_bytes(torch.optim.Muon(in_layers)) + state_bytes(torch.optim.AdamW(others)),
    }
    assert {name: memory.optimizer_bytes(spec, name) for name in held} == held


def state_bytes(optimizer):
    """Bytes of the moments after one step; the step counters, one number a tensor, are left out."""
    optimizer.step()
    states = optimizer.state.values()
    return sum(v.nbytes for state in states for v in state.values() if torch.is_tensor(v) and v.ndim)


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_the_weights_of_the_layers_products(family):
    spec = small(family)
    held = sum(p.numel() for name, p in build(spec).named_parameters() if p.ndim >= 2 and ".layers." in name)
    assert memory.layer_matrices(spec) == held


def test_total_is_the_sum_of_the_parts():
    need = training(small())
    assert need.total == sum(vars(need).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_bytes_are_those_of_the_cache_that_transformers_keeps(dtype):
    spec = small("llama", num_hidden_layers=3)
    model = build(spec).to(getattr(torch, dtype))
    cache = model(input_ids=torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory.cache_bytes_per_token(spec, dtype) * 7 == held


@pytest.mark.parametrize("experts", [10, 60])
def test_folder_bytes_bound_what_is_saved_of_experts_stored_one_by_one(tmp_path, experts):
    spec = small("qwen3_moe", hidden_size=16, intermediate_size=4, num_hidden_layers=20, num_experts=experts)
    build(spec).save_pretrained(tmp_path)
    room = memory.folder_bytes(spec, "float32") - sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0 <= room < 350_000


@pytest.mark.parametrize("layers", [1, 150])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_folder_bytes_bound_what_is_saved(tmp_path, layers, dtype, tied):
    spec = small("qwen3", hidden_size=16, num_hidden_layers=layers, tie_word_embeddings=tied)
    build(spec).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    saved = sum(path.stat().st_size for path in tmp_path.iterdir())
    room = memory.folder_bytes(spec, dtype) - saved
    assert 0 <= room < 250_000


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checkpoint_bytes_bound_the_model_and_its_moments(tmp_path, optimizer):
    spec = small(num_hidden_layers=20)
    model = build(spec)
    model.save_pretrained(tmp_path)
    moments = {f"{name}.first": torch.zeros_like(p) for name, p in model.named_parameters()}
    matrix = {name for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name}
    for name, parameter in model.named_parameters():
        if optimizer == "adamw" or name not in matrix:
            moments[f"{name}.second"] = torch.zeros_like(parameter)
    save_file(moments, tmp_path / "optimizer.safetensors")
    saved = sum(path.stat().st_size for path in tmp_path.iterdir())
    room = memory.checkpoint_bytes(spec, optimizer) - saved
    assert 0 <= room < 400_000
