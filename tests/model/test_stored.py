"""A model's tensors are read from what transformers wrote of them, and written as transformers writes them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.folder import WEIGHTS, ModelFolder
from espalier.model.axes import discover
from espalier.model.shards import Planned, Stored
from espalier.model.stored import Form, Pieces, StoredModel

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
EXPERTS = {"num_experts": 11, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "llama": {},
    "gpt2": {},
    "gpt_neox": {},
    "granitemoe": {"num_local_experts": 4},
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2},
    "qwen3_moe": {**EXPERTS, "num_key_value_heads": 2, "head_dim": 8},
}
STACKED = {"mixtral", "qwen3_moe"}


def built(family: str, *, tied: bool = False):
    """A small model with weights that differ."""
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family], bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def opened(path) -> StoredModel:
    folder = ModelFolder.open(path)
    return StoredModel.open(folder, discover(folder.config))


def change(path, **tensors) -> None:
    """Replace tensors in the only file of a folder; None takes one away."""
    there = load_file(path / WEIGHTS) | tensors
    save_file({name: tensor for name, tensor in there.items() if tensor is not None}, path / WEIGHTS)


@pytest.fixture(params=[(family, tied) for family in FAMILIES for tied in (True, False)], ids=str)
def model(request):
    family, tied = request.param
    return built(family, tied=tied)


def test_each_tensor_is_read_as_transformers_loads_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    stored = opened(tmp_path)
    weights = model.state_dict()
    assert stored.sources.keys() | stored.form.layout.tied.keys() == weights.keys()
    for name in stored.sources:
        assert torch.equal(stored.read(name), weights[name]), name
        assert stored.on_meta(name).shape == weights[name].shape


def test_a_model_is_written_in_the_pieces_that_transformers_writes(model, tmp_path):
    model.save_pretrained(tmp_path)
    stored = opened(tmp_path)
    weights = model.state_dict()
    whole = [Planned(name, tuple(weights[name].shape), torch.float32) for name in stored.sources]
    pieces = Pieces(stored.form, whole, weights.__getitem__)
    expected = load_file(tmp_path / WEIGHTS)
    assert pieces.can_be_read and {piece.name for piece in pieces.planned} == expected.keys()
    for piece in pieces.planned:
        assert torch.equal(pieces.make(piece.name), expected[piece.name]) and piece.shape == expected[piece.name].shape
    copied = Pieces(stored.form, whole, stored.pieces)
    for piece in copied.planned:
        place = copied.make(piece.name)
        assert isinstance(place, Stored) and torch.equal(stored.weights.read(place.name), expected[piece.name])


@pytest.mark.parametrize("family", sorted(STACKED))
def test_a_tensor_is_made_once_for_all_its_pieces(family, tmp_path):
    model = built(family)
    model.save_pretrained(tmp_path)
    stored, made = opened(tmp_path), []
    whole = [stored.on_meta(name) for name in stored.sources]
    planned = [Planned(n, tuple(t.shape), t.dtype) for n, t in zip(stored.sources, whole, strict=True)]
    pieces = Pieces(stored.form, planned, lambda name: (made.append(name), stored.read(name))[1])
    assert len(pieces.planned) > len(planned)
    for piece in pieces.planned:
        pieces.make(piece.name)
    assert made == list(stored.sources)


@pytest.mark.parametrize("family", sorted(STACKED))
def test_experts_that_are_stored_stacked_are_read_and_written_one_by_one(family, tmp_path):
    """As transformers saves a model that it has loaded from such names."""
    model = built(family)
    model.save_pretrained(tmp_path, save_original_format=False)
    stored, weights = opened(tmp_path), model.state_dict()
    assert stored.weights.names and set(stored.weights.names) == weights.keys()
    name = next(name for name in stored.sources if name.endswith("gate_up_proj"))
    assert torch.equal(stored.read(name), weights[name])
    assert len(stored.form.split(name, weights[name])) > 1 and stored.pieces(name) is None


def test_a_bare_model_is_read_without_its_prefix_and_the_masks_that_old_files_have(tmp_path):
    model = built("gpt2", tied=True)
    model.save_pretrained(tmp_path)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}, tmp_path / WEIGHTS)
    stored, weights = opened(tmp_path), model.state_dict()
    assert stored.sources and all(torch.equal(stored.read(name), weights[name]) for name in stored.sources)
    name = "transformer.h.1.ln_1.weight"
    assert [piece.name for piece in stored.pieces(name)] == ["h.1.ln_1.weight"]
    assert list(stored.form.split(name, weights[name])) == [name]


W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
CHANGES = {
    "one missing": {W1: None},
    "one too many": {"model.layers.1.surprise.weight": torch.ones(2)},
    "another shape": {W1: torch.ones(23, 32)},
    "stored twice": {"model.layers.1.mlp.gate.weight": torch.ones(4, 32)},
}


@pytest.mark.parametrize("changed", CHANGES)
def test_files_that_do_not_make_the_model_exactly_are_not_understood(changed, tmp_path):
    built("mixtral").save_pretrained(tmp_path)
    assert opened(tmp_path).sources
    change(tmp_path, **CHANGES[changed])
    assert not opened(tmp_path).sources


def test_pieces_that_would_not_make_the_model_again_are_told():
    config = built("mixtral").config.to_dict()
    form = Form.of(config, discover(config))
    whole = [Planned(name, form.layout.sizes(name), torch.float32) for name in form.layout.tensors]
    assert Pieces(form, whole, lambda name: []).can_be_read
    assert not Pieces(form, whole[:-1], lambda name: []).can_be_read
