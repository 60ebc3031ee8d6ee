"""Bytes against what autograd keeps, what optimizers hold and what save_pretrained writes."""

import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.budget import memory
from espalier.budget.flops import parameters
from espalier.spec import FAMILIES, MIXTURES, ModelSpec


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


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps_within_3_percent(family, compute, attention):
    spec = small(family)
    planned = training(spec, compute=compute, attention=attention)
    casts = planned.weights - 4 * parameters(spec)
    kept = bytes_kept_by_autograd(build(spec, attention), 3, 40, compute)
    assert planned.activations + casts == pytest.approx(kept, rel=0.03)


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
    planned = training(spec, compute=compute, attention=attention, sequence_length=length)
    casts = planned.weights - 4 * parameters(spec)
    kept = bytes_kept_by_autograd(build(spec, attention), 3, length, compute)
    assert planned.activations + casts == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("family", ["granite", "mixtral"])
def test_with_full_recomputation_a_layer_keeps_its_input_alone(family):
    kept = {}
    for layers in (2, 5):
        model = build(small(family, num_hidden_layers=layers)).train()
        model.activation_checkpointing_enable()
        with PeakBytes() as measured:
            weights = [weight.untyped_storage() for weight in model.parameters()]
            measured.known.update(weights)
            logits = model(input_ids=torch.zeros(3, 40, dtype=torch.long), use_cache=False).logits
        assert logits.requires_grad
        kept[layers] = measured.live
    shallow, deep = (training(small(family, num_hidden_layers=layers), recompute="full") for layers in kept)
    assert deep.activations - shallow.activations == pytest.approx(kept[5] - kept[2], rel=0.001)


def test_full_recomputation_holds_one_layer_at_a_time():
    for layers in (1, 6):
        spec = small(num_hidden_layers=layers)
        plain, again = (training(spec, recompute=choice).activations for choice in ("none", "full"))
        inputs = 3 * 40 * 4 * spec.hidden_size
        one = 3 * 40 * memory.layer_bytes_per_token(spec, 40, "float32", "eager")
        assert plain - again == (layers - 1) * one - layers * inputs


@pytest.mark.parametrize("family", MIXTURES)
def test_what_a_router_keeps_is_counted(family):
    spec = small(family, hidden_size=16, intermediate_size=8, num_experts=50, num_experts_per_tok=8)
    kept = bytes_kept_by_autograd(build(spec, "sdpa"), 3, 40, "float32")
    assert training(spec, attention="sdpa").activations == pytest.approx(kept, rel=0.03)


class PeakBytes(TorchDispatchMode):
    """The most bytes that results of the operators inside the block held at one time."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.release, storage.nbytes())
        return result

    def release(self, size):
        self.live -= size


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_logits_take_three_float32_copies_of_a_chunk(compute):
    spec = small(hidden_size=8, vocab_size=4096)
    head = torch.zeros(4096, 8, requires_grad=True)
    hidden, targets = torch.zeros(32, 8, requires_grad=True), torch.zeros(32, dtype=torch.long)
    with PeakBytes() as measured:
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"):
            loss = functional.cross_entropy(functional.linear(hidden, head).float(), targets)
        loss.backward()
    assert training(spec, compute=compute).logits == pytest.approx(measured.peak, rel=0.25)


def test_a_chunk_is_never_longer_than_the_batch():
    spec = small()
    assert training(spec, loss_chunk=10**9).logits == 12 * 120 * spec.vocab_size


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_optimizer_bytes_are_those_of_adamw_and_of_muon(family, tied):
    spec = small(family, tie_word_embeddings=tied)
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


def test_masters_and_gradients_are_float32_and_autocast_adds_a_copy_of_the_matrices():
    spec = small()
    plain, mixed = training(spec), training(spec, compute="bfloat16")
    assert plain.weights == plain.gradients == mixed.gradients == 4 * parameters(spec)
    matrices = [p for name, p in build(spec).named_parameters() if p.ndim == 2 and "embed" not in name]
    assert mixed.weights - plain.weights == 2 * sum(p.numel() for p in matrices)


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
