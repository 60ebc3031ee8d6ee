"""A device prepares a model from outside and can be undone; batches arrive as they were."""

import numpy as np
import pytest
import torch

from espalier.data.stream import Batch
from espalier.train.device import Device


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("positions", [None, np.array([[0, 1, 0]])])
def test_tensors_are_the_batch(device, positions):
    batch = Batch(np.array([[1, 2, 3]]), np.array([[2, 3, -100]]), positions)
    found = device.tensors(batch)
    assert found[0].tolist() == [[1, 2, 3]] and found[1].tolist() == [[2, 3, -100]]
    assert found[2] is None if positions is None else found[2].tolist() == positions.tolist()


def test_compiled_layers_compute_what_the_plain_ones_do_and_come_off_again(begin, inputs, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *a, **k: counted(function, *a, **k))
    calls = []

    def counted(function, *args, **more):
        calls.append(1)
        return function(*args, **more)

    model = begin().model
    plain = model(inputs).logits
    compiled = Device(compile="layers")
    compiled.place(model)
    names = list(model.state_dict())
    assert torch.equal(model(inputs).logits, plain) and len(calls) == len(model.base_model.layers)
    assert list(model.state_dict()) == names, "a compiled model saves under the names that others read"
    compiled.release(model)
    assert torch.equal(model(inputs).logits, plain) and len(calls) == len(model.base_model.layers)


@pytest.mark.parametrize("compile", ["off", "layers"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False])
def test_recomputed_layers_keep_less_and_give_the_same_gradients(
    begin, inputs, monkeypatch, compile, compute, training
):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args, **more: function(*args, **more))
    gradients, kept = {}, {}
    for recompute in ("none", "layers"):
        device = Device(compute=compute, compile=compile, recompute=recompute)
        model = begin().model.train(training)  # one that was loaded is in eval mode
        with torch.no_grad():
            model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        device.place(model)
        tensors = {}
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t, seen=tensors: seen.setdefault(id(t), t), lambda t: t)
        with device.autocast(), keep:
            loss = model(inputs, use_cache=False).logits.float().logsumexp(-1).sum()
        loss.backward()
        kept[recompute] = sum(tensor.numel() for tensor in tensors.values())
        gradients[recompute] = {name: weight.grad for name, weight in model.named_parameters()}
        device.release(model)
        assert all("forward" not in vars(layer) for layer in model.base_model.layers)
    assert kept["layers"] < 0.7 * kept["none"]
    for name, expected in gradients["none"].items():
        torch.testing.assert_close(gradients["layers"][name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_products_run_in_the_compute_dtype_and_weights_stay_fp32(begin, inputs, compute):
    model = begin().model
    with Device(compute=compute).autocast():
        product = inputs.float() @ torch.ones(6, 2)
        model(inputs)
    assert product.dtype == getattr(torch, compute)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_layers_multiply_in_float8_and_keep_their_weights_and_names(begin, inputs):
    """Emulated here: the rounding is float8's, the speed isn't."""
    pytest.importorskip("torchao")
    found = {}
    for compute in ("float8", "bfloat16"):
        device, model = Device(compute=compute), begin().model
        names = list(model.state_dict())
        device.place(model)
        with device.autocast():
            loss = model.base_model(inputs).last_hidden_state.sin().sum()
        loss.backward()
        weight = model.base_model.layers[0].mlp.down_proj.weight
        assert list(model.state_dict()) == names and weight.dtype == weight.grad.dtype == torch.float32
        found[compute] = float(loss.detach()), weight.grad
    (coarse, gradient), (fine, expected) = found.values()
    assert coarse != fine and coarse == pytest.approx(fine, abs=2)
    apart = torch.linalg.vector_norm(gradient - expected) / torch.linalg.vector_norm(expected)
    assert 0.01 < apart < 0.3


def test_threads_are_those_of_the_plan():
    before = torch.get_num_threads()
    try:
        Device(threads=before + 1).prepare()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_the_one_asked_for_and_changes_no_loss(begin, inputs, attention):
    model = begin().model
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    reference = model(inputs).logits
    Device(attention=attention).place(model)
    assert model.config._attn_implementation == attention
    torch.testing.assert_close(model(inputs).logits, reference, rtol=1e-4, atol=1e-4)
