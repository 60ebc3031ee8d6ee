"""Build, load and save: weights follow from seed and name, and folders are those that transformers opens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.folder import WEIGHTS, ModelFolder
from espalier.model.build import TOKENIZER_FILES, build, draw, load, save
from espalier.model.mup import Parametrization
from espalier.spec import FAMILIES, MIXTURES, ModelSpec

STANDARD = Parametrization(kind="standard")
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(params=FAMILIES)
def spec(request) -> ModelSpec:
    experts = {"num_experts": 4, "num_experts_per_tok": 2} if request.param in MIXTURES else {}
    return ModelSpec(family=request.param, attention_bias=request.param == "qwen2", **SIZES, **experts)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(spec):
    one, again, other = (build(spec, STANDARD, seed=seed) for seed in (7, 7, 8))
    for name, weight in one.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
        assert torch.equal(weight, other.get_parameter(name)) == (weight.ndim == 1)


def test_weights_do_not_depend_on_torch_s_random_state(spec):
    torch.manual_seed(1)
    one = build(spec, STANDARD, seed=0).state_dict()
    torch.manual_seed(2)
    assert all(torch.equal(value, one[name]) for name, value in build(spec, STANDARD, seed=0).state_dict().items())


def test_a_layer_is_the_same_whatever_is_above_it(spec):
    deep = build(spec.changed(num_hidden_layers=4), STANDARD, seed=0)
    for name, weight in build(spec, STANDARD, seed=0).named_parameters():
        if weight.ndim > 1:  # its standard deviation may follow the depth
            larger = deep.get_parameter(name)
            torch.testing.assert_close(larger * weight.norm() / larger.norm(), weight)


@settings(deadline=None, max_examples=20)
@given(st.text(min_size=1, max_size=20), st.integers(0, 2**40), st.floats(0.01, 3))
def test_a_draw_has_its_standard_deviation_and_follows_from_seed_and_name(name, seed, std):
    drawn = draw(name, (100, 100), std, seed)
    assert torch.equal(drawn, draw(name, (100, 100), std, seed))
    assert not torch.equal(drawn, draw(name + "x", (100, 100), std, seed))
    assert drawn.std().item() == pytest.approx(std, rel=0.1)
    assert abs(drawn.mean().item()) < 0.1 * std


def test_norms_are_one_and_biases_zero(spec):
    for name, weight in build(spec, STANDARD, seed=0).named_parameters():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0)), name


def test_the_model_has_the_shape_asked_for_and_computes_in_fp32(spec):
    model = build(spec, STANDARD, seed=0, eos_token_id=5)
    assert ModelSpec.from_config(model.config.to_dict()) == spec
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert model.config.eos_token_id == model.config.bos_token_id == 5
    assert model.generation_config.eos_token_id == 5


def test_a_saved_model_comes_back_bit_for_bit_and_opens_elsewhere(spec, tmp_path):
    model = build(spec, STANDARD, seed=0)
    save(model, tmp_path, None)
    inputs = torch.arange(6).reshape(2, 3)
    for opened in (load(ModelFolder.open(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert all(torch.equal(value, opened.state_dict()[name]) for name, value in model.state_dict().items())
        assert torch.equal(opened(inputs).logits, model.eval()(inputs).logits)
    assert AutoConfig.from_pretrained(tmp_path).architectures == [type(model).__name__]
    assert ModelFolder(tmp_path).spec == spec


@pytest.mark.parametrize("family", MIXTURES)
def test_stacked_experts_are_drawn_as_the_mlp_of_a_dense_model_is(family):
    spec = ModelSpec(family=family, **SIZES, intermediate_size=64, num_experts=4, num_experts_per_tok=2)
    stds = {
        name.rpartition("experts.")[2]: w.std().item() for name, w in build(spec, STANDARD, seed=0).named_parameters()
    }
    assert stds["gate_up_proj"] == pytest.approx(spec.initializer_range, rel=0.05)
    assert stds["down_proj"] == pytest.approx(spec.initializer_range / 2, rel=0.05)  # over sqrt(2 layers of 2)


def test_a_tied_model_saves_its_embedding_once(tmp_path):
    model = build(ModelSpec(tie_word_embeddings=True, **SIZES), STANDARD, seed=0)
    save(model, tmp_path, None)
    with safe_open(tmp_path / WEIGHTS, "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
    again = load(ModelFolder.open(tmp_path))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_the_tokenizer_s_files_are_copied_as_far_as_there_are_any(tmp_path):
    tokenizer, folder = tmp_path / "tokenizer", tmp_path / "model"
    tokenizer.mkdir()
    for name in (*TOKENIZER_FILES[:2], "notes.txt"):
        (tokenizer / name).write_text(name)
    save(build(ModelSpec(**SIZES), STANDARD, seed=0), folder, tokenizer)
    assert {name for name in TOKENIZER_FILES if (folder / name).exists()} == set(TOKENIZER_FILES[:2])
    assert not (folder / "notes.txt").exists()
