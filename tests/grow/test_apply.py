"""Growing models in memory and folders on disk."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from espalier.errors import ModelError, RecipeError
from espalier.folder import ModelFolder
from espalier.grow.apply import IdentityRecipe, StackRecipe, ZeroPadRecipe, grow_model, grow_moments
from espalier.grow.depth import identity, stack
from espalier.grow.preserve import check
from espalier.grow.width import zero_pad
from espalier.method import find
from espalier.model.axes import discover
from espalier.run import Run

METHODS = {
    "grow.stack": (StackRecipe, {"factor": 2}, "num_hidden_layers", 6),
    "grow.identity": (IdentityRecipe, {"layers": 4}, "num_hidden_layers", 4),
    "grow.zero_pad": (ZeroPadRecipe, {"hidden_size": 40}, "hidden_size", 40),
}


@pytest.fixture
def parent(tmp_path, spec, make):
    folder = tmp_path / "small"
    make(spec).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def carry_out(name, parent, out, **settings) -> ModelFolder:
    recipe = METHODS[name][0](model=parent, out=out, **settings)
    run = Run.start(out.with_name(f"run-{out.name}"), recipe, tell=lambda line: None)
    try:
        return find(name).load()(recipe, run)
    finally:
        run.close()


@pytest.mark.parametrize("name", METHODS)
def test_a_grown_folder_opens_generates_and_says_where_it_came_from(name, parent, tmp_path, input_ids):
    _, settings, key, size = METHODS[name]
    folder = carry_out(name, parent, tmp_path / "large", **settings)
    model = AutoModelForCausalLM.from_pretrained(folder.path)
    assert getattr(model.config, key) == size
    assert model.generate(input_ids[:1, :4], max_new_tokens=3, min_new_tokens=3).shape == (1, 7)
    exact = check(AutoModelForCausalLM.from_pretrained(parent), model, input_ids).relative_difference <= 1e-5
    assert folder.made["growth"]["exact"] == exact
    assert folder.made["method"] == name
    assert folder.made["parents"][0]["fingerprint"] == ModelFolder.open(parent).fingerprint()
    assert (folder.path / "tokenizer.json").exists()
    assert json.loads((folder.path / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("name", METHODS)
def test_growing_a_folder_is_a_function_of_recipe_and_seed(name, parent, tmp_path):
    settings = METHODS[name][1]
    prints = [
        carry_out(name, parent, tmp_path / f"out{number}", seed=seed, **settings).fingerprint()
        for number, seed in enumerate((1, 1, 2))
    ]
    assert prints[0] == prints[1]
    assert (prints[0] == prints[2]) == (name != "grow.zero_pad")


def test_a_growth_without_effect_is_refused(parent, tmp_path):
    with pytest.raises(RecipeError, match="hidden_size"):
        carry_out("grow.zero_pad", parent, tmp_path / "large", hidden_size=24)
    assert not (tmp_path / "large").exists()


def test_sizes_that_do_not_fit_together_are_refused(parent, tmp_path):
    with pytest.raises(ModelError, match="num_attention_heads"):
        carry_out("grow.zero_pad", parent, tmp_path / "large", num_attention_heads=5)


@pytest.mark.parametrize("target", [{}, {"factor": 2, "layers": 6}])
def test_stacking_wants_one_target(target, parent, tmp_path):
    with pytest.raises(ValueError, match="either factor or layers"):
        StackRecipe(model=parent, out=tmp_path / "large", **target)


def test_a_growth_planned_from_another_shape_is_refused(spec, make, grow):
    other = spec.changed(rms_norm_eps=1e-5)
    with pytest.raises(ModelError, match="rms_norm_eps"):
        grow(make(spec), stack(other, other.changed(num_hidden_layers=6)))


def test_the_old_model_and_the_random_state_stay_as_they_were(spec, make, grow):
    small = make(spec).train()
    before = {name: weight.clone() for name, weight in small.state_dict().items()}
    state = torch.random.get_rng_state()
    large = grow(small, identity(spec, spec.changed(num_hidden_layers=4)))
    assert torch.equal(state, torch.random.get_rng_state()) and large.training
    with torch.no_grad():
        for weight in large.parameters():
            weight += 1
    assert all(torch.equal(weight, before[name]) for name, weight in small.state_dict().items())


def test_no_growth_gives_a_copy_that_shares_nothing(spec, make):
    small = make(spec)
    same = grow_model(small, [], seed=0, std_of=lambda name, shape: 0.0)
    for name, weight in same.named_parameters():
        old = small.get_parameter(name)
        assert torch.equal(weight, old) and weight.data_ptr() != old.data_ptr()


def test_what_the_growth_does_not_touch_in_the_config_stays(spec, make, grow):
    small = make(spec)
    small.config.attention_dropout, small.config.eos_token_id = 0.25, 7
    large = grow(small, zero_pad(spec, spec.changed(hidden_size=40)))
    assert large.config.attention_dropout == 0.25 and large.config.eos_token_id == 7
    assert large.config.rms_norm_eps == pytest.approx(spec.rms_norm_eps * 24 / 40)


def test_a_trained_model_goes_on_with_the_moments_of_its_optimizer(spec, make, grow, input_ids):
    small = make(spec).train()
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-3)
    small(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    names = {weight: name for name, weight in small.named_parameters()}
    state = {names[weight]: dict(moments) for weight, moments in optimizer.state.items()}
    growths = [stack(spec, spec.changed(num_hidden_layers=6))]
    large = grow(small, *growths)
    grown = grow_moments(state, growths, discover(small.config.to_dict()))
    further = torch.optim.AdamW(large.parameters(), lr=1e-3)
    for name, weight in large.named_parameters():
        further.state[weight] = grown[name]
    large(input_ids, labels=input_ids).loss.backward()
    further.step()
    assert torch.equal(grown["model.layers.5.mlp.up_proj.weight"]["step"], torch.tensor(2.0))
    assert torch.equal(state["model.layers.2.mlp.up_proj.weight"]["step"], torch.tensor(1.0))
