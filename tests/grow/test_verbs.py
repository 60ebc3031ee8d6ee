"""The growth verbs: from a model folder to a larger one that opens anywhere and says where it came from."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from espalier.errors import ModelError, RecipeError
from espalier.folder import ModelFolder
from espalier.grow.preserve import check
from espalier.grow.verbs import CheckRecipe, StackRecipe, WidthRecipe
from espalier.method import find
from espalier.model.mup import Parametrization
from espalier.recipe import load
from espalier.run import Run

# Settings, and a size that comes out.
METHODS = {
    "grow.stack": ({"factor": 2}, "num_hidden_layers", 6),
    "grow.interpolate": ({"layers": 5}, "num_hidden_layers", 5),
    "grow.gradual": ({"layers": 4}, "num_hidden_layers", 4),
    "grow.overlap": ({"layers": 4}, "num_hidden_layers", 4),
    "grow.identity": ({"layers": 4}, "num_hidden_layers", 4),
    "grow.zero_pad": ({"hidden_size": 40}, "hidden_size", 40),
    "grow.fpi": ({"hidden_size": 48, "noise": 0.3}, "hidden_size", 48),
    "grow.aki": ({"intermediate_size": 56}, "intermediate_size", 56),
    "grow.reach": (
        {"hidden_size": 48, "num_hidden_layers": 5, "width": "aki", "depth": "interpolate"},
        "hidden_size",
        48,
    ),
}
METHODS["grow.upcycle"] = ({"experts": 3, "noise": 0.1}, "num_local_experts", 3)
RANDOM = {"grow.zero_pad", "grow.fpi", "grow.upcycle"}


@pytest.fixture
def parent(tmp_path, spec, make):
    folder = tmp_path / "small"
    make(spec).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    return folder


def carry_out(name, told=None, **settings):
    """What the command line does."""
    card = find(name)
    resolved = load(card.recipe(), None, [f"{key}={value}" for key, value in settings.items()])
    place = resolved.out if hasattr(resolved, "out") else resolved.after
    run = Run.start(
        place.with_name(f"run-{name}-{place.name}"), resolved, tell=(told if told is not None else []).append
    )
    try:
        return card.load()(resolved, run)
    finally:
        run.close()


@pytest.mark.parametrize("name", METHODS)
def test_a_grown_folder_opens_generates_and_says_where_it_came_from(name, parent, tmp_path, input_ids):
    settings, key, size = METHODS[name]
    told: list[str] = []
    folder = carry_out(name, told, model=parent, out=tmp_path / "large", **settings)
    model = AutoModelForCausalLM.from_pretrained(folder.path)
    assert getattr(model.config, key) == size
    assert model.generate(input_ids[:1, :4], max_new_tokens=3, min_new_tokens=3).shape == (1, 7)
    exact = check(AutoModelForCausalLM.from_pretrained(parent), model, input_ids).relative_difference <= 1e-5
    made = folder.made
    assert all(step["exact"] for step in made["growth"]) == exact == (made["proof"]["relative_difference"] <= 1e-5)
    assert made["proof"]["dead"] == []
    assert made["method"].startswith("grow.")
    assert made["parents"][0]["fingerprint"] == ModelFolder.open(parent).fingerprint()
    assert ("exact" in told[0]) and ("not exact" in told[0]) != exact
    assert (folder.path / "tokenizer.json").exists()
    assert model.generation_config.temperature == 0.5
    assert "Parts of this model are new" in (folder.path / "README.md").read_text()
    assert json.loads((folder.path / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("name", METHODS)
def test_growing_a_folder_is_a_function_of_recipe_and_seed(name, parent, tmp_path):
    prints = [
        carry_out(name, model=parent, out=tmp_path / f"out{number}", seed=seed, **METHODS[name][0]).fingerprint()
        for number, seed in enumerate((1, 1, 2))
    ]
    assert prints[0] == prints[1]
    assert (prints[0] == prints[2]) == (name not in RANDOM)


def test_a_growth_without_effect_is_refused(parent, tmp_path):
    with pytest.raises(RecipeError, match="hidden_size"):
        carry_out("grow.zero_pad", model=parent, out=tmp_path / "large", hidden_size=24)
    assert not (tmp_path / "large").exists()


def test_sizes_that_do_not_fit_together_are_refused(parent, tmp_path):
    with pytest.raises(ModelError, match="num_key_value_heads"):
        carry_out("grow.zero_pad", model=parent, out=tmp_path / "large", num_attention_heads=5)


def test_a_size_that_the_model_does_not_have_is_refused_with_those_it_has(parent, tmp_path):
    with pytest.raises(ModelError, match=r"moe_intermediate_size.*hidden_size"):
        carry_out("grow.zero_pad", model=parent, out=tmp_path / "large", moe_intermediate_size=64)


@pytest.mark.parametrize("target", [{}, {"factor": 2, "layers": 6}])
def test_stacking_wants_one_target(target, parent, tmp_path):
    with pytest.raises(ValueError, match="either factor or layers"):
        StackRecipe(model=parent, out=tmp_path / "large", **target)


def test_a_bare_folder_of_another_family_grows(tmp_path, input_ids):
    config = GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    small = GPT2LMHeadModel(config).eval()
    small.save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "generation_config.json").unlink()
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3, "depth": "identity"}
    folder = carry_out("grow.reach", model=tmp_path / "small", out=tmp_path / "large", **sizes)
    large = AutoModelForCausalLM.from_pretrained(folder.path).eval()
    assert (large.config.n_embd, large.config.n_inner, large.config.n_layer) == (48, 128, 3)
    with torch.no_grad():
        assert torch.allclose(large(input_ids).logits, small(input_ids).logits, atol=1e-4)


def test_a_wider_model_has_the_multiplier_of_one_that_was_built_so(granite, tmp_path):
    parametrization = Parametrization(base_width=16, output_multiplier=3.0)
    recipe = WidthRecipe(model=tmp_path, out=tmp_path / "large", hidden_size=64, parametrization=parametrization)
    built = parametrization.carried_by(granite.changed(hidden_size=64))
    assert recipe.reach(parametrization.carried_by(granite)).logits_scaling == built.logits_scaling == 4 / 3


def test_a_width_that_its_heads_do_not_follow_is_refused(tmp_path):
    sizes = {"vocab_size": 40, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match=r"48 with 4 heads of 8.*num_attention_heads=6"):
        carry_out("grow.zero_pad", model=tmp_path / "small", out=tmp_path / "large", hidden_size=48)


def test_maps_are_learned_from_text_that_the_model_s_own_tokenizer_reads(finished, corpus, tmp_path):
    told: list[str] = []
    parent = finished / "final"
    depth = ModelFolder.open(parent).config["num_hidden_layers"]
    data = {"data.sources": f"[{corpus}]", "data.sequence_length": 16, "data.held_out": 0.1}
    sizes = {"num_hidden_layers": depth + 1, "intermediate_size": 512}
    more = {"batch_tokens": 128, "updates": 3, **sizes, **data}
    folder = carry_out("grow.learned", told, model=parent, out=tmp_path / "large", **more)
    model = AutoModelForCausalLM.from_pretrained(folder.path)
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (depth + 1, 512)
    assert folder.made["method"] == "grow.learned+learned" and not folder.made["growth"][0]["exact"]
    assert any(line.startswith("update 3 of 3: loss ") for line in told)
    again = carry_out("grow.learned", model=parent, out=tmp_path / "again", **more)
    assert again.fingerprint() == folder.fingerprint()


@pytest.mark.parametrize("noise, alike", [(0.0, True), (0.5, False)])
def test_check_finds_copies_that_stay_alike(noise, alike, parent, tmp_path):
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 8}
    folder = carry_out("grow.fpi", model=parent, out=tmp_path / "large", noise=noise, **sizes)
    told: list[str] = []
    report = carry_out("grow.check", told, before=parent, after=folder.path)
    assert (report.value("growth", "symmetric roles") > 0) == alike
    assert any(line.startswith("copies that stay alike: ") and ("none" in line) != alike for line in told)


def test_check_compares_two_folders(parent, tmp_path):
    folder = carry_out("grow.zero_pad", model=parent, out=tmp_path / "large", hidden_size=40)
    told: list[str] = []
    report = carry_out("grow.check", told, before=parent, after=folder.path)
    assert report.value("growth", "relative logit difference") <= 1e-5
    assert report.value("growth", "dead slots") == 0
    assert told[0].startswith("the same function")


def test_check_refuses_a_model_that_broke_its_promise(parent, tmp_path):
    folder = carry_out("grow.identity", model=parent, out=tmp_path / "large", layers=4)
    bare = tmp_path / "changed"
    shutil.copytree(folder.path, bare)
    (bare / "manifest.json").unlink()
    weights = load_file(bare / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, bare / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="promises the same function"):
        carry_out("grow.check", before=parent, after=bare)
    assert CheckRecipe(before=parent, after=bare).seed == 0


def test_copies_that_stay_alike_are_told(parent, tmp_path):
    told: list[str] = []
    carry_out("grow.fpi", told, model=parent, out=tmp_path / "equal", hidden_size=48)
    carry_out("grow.fpi", told, model=parent, out=tmp_path / "unequal", hidden_size=48, noise=0.5)
    alike = [line for line in told if "alike" in line]
    assert alike == ["copies that stay alike: hidden", "copies that stay alike: none"]
