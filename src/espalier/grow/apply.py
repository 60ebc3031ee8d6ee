"""Apply growths: to a model in memory, to its optimizer's state, and from model folder to model folder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from espalier import files
from espalier.errors import ModelError, RecipeError
from espalier.folder import ModelFolder
from espalier.grow.depth import Place, identity, stack
from espalier.grow.width import zero_pad
from espalier.method import method
from espalier.model import build, reshape
from espalier.model.axes import Layout, discover
from espalier.model.growth import Growth
from espalier.model.mup import Parametrization
from espalier.recipe import Recipe
from espalier.run import Run
from espalier.spec import ModelSpec

State = dict[str, dict[str, Tensor]]

STANDARD = Parametrization(kind="standard")


def grow_model(
    model: PreTrainedModel, growths: Sequence[Growth], *, seed: int, std_of: reshape.StdOf
) -> PreTrainedModel:
    """A new model of the same class: `growths` applied in order; a copy without any. The old model isn't changed.

    seed    of the random slots
    std_of  the initialiser's standard deviation for a name and shape of the grown model
    """
    if not growths:
        return copy.deepcopy(model)
    config = model.config.to_dict()
    layout = discover(config)
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    for growth in growths:
        _require_start(config, growth)
        weights = dict(reshape.apply(growth, layout, weights.__getitem__, seed=seed, std_of=std_of))
        config, layout = grown_config(config, growth), reshape.after(layout, growth)
    grown = type(model).from_pretrained(
        None, config=AutoConfig.for_model(**config), state_dict=weights, dtype=model.dtype
    )
    grown.generation_config = model.generation_config
    return grown.to(model.device).train(model.training)


def grow_moments(state: State, growths: Sequence[Growth], layout: Layout) -> State:
    """The optimizer state, {parameter: {quantity: tensor}}, after `growths` in order: old slots keep their moments.

    layout  of the model before the growths
    """
    for growth in growths:
        grown: State = {}
        for kind in sorted({kind for quantities in state.values() for kind in quantities}):
            old = {name: quantities[kind] for name, quantities in state.items() if kind in quantities}
            for name, value in reshape.apply_moment(growth, layout, old.get, kind):
                grown.setdefault(name, {})[kind] = value
        state, layout = grown, reshape.after(layout, growth)
    return state


def grown_config(config: dict[str, Any], growth: Growth) -> dict[str, Any]:
    """The Hugging Face config after a growth: what it changed, and lists that have an entry for each layer."""
    before, after = growth.before.to_config(), growth.after.to_config()
    changed = {key: value for key, value in after.items() if value != before[key]}
    if config.get("layer_types"):
        changed["layer_types"] = [config["layer_types"][layer] for layer in growth.layers.source]
    return config | changed


def _require_start(config: dict[str, Any], growth: Growth) -> None:
    """Refuse a growth that was planned from another shape than the model has."""
    planned, there = growth.before.to_config(), ModelSpec.from_config(config).to_config()
    differing = [key for key in planned if planned[key] != there[key]]
    if differing:
        raise ModelError(
            f"growth by {growth.operator}: {', '.join(differing)}",
            found=", ".join(f"{there[key]!r} in the model" for key in differing),
            expected=", ".join(f"{planned[key]!r}, as planned" for key in differing),
            mend="Plan from the model's own shape: ModelSpec.from_config, or `after` of the growth before.",
        )


class GrowRecipe(Recipe):
    """What every growth from folder to folder is told."""

    model: Path = Field(description="the model folder to grow")
    out: Path = Field(description="the model folder to write; replaced if it exists")
    seed: int = 0


class StackRecipe(GrowRecipe):
    """How often to repeat the block of layers, or how many layers to reach."""

    factor: int | None = Field(default=None, ge=2)
    layers: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.factor is None) == (self.layers is None):
            raise ValueError("state either factor or layers")
        return self


class IdentityRecipe(GrowRecipe):
    """How many layers to reach, and where the new ones go."""

    layers: int = Field(ge=1)
    place: Place = "after"


class ZeroPadRecipe(GrowRecipe):
    """The sizes to reach; what isn't stated stays as it is."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    parametrization: Parametrization = Field(default=STANDARD, description="of new slots: as the model was initialised")


@method(paper="arXiv 2405.15319", needs="a model folder", costs="reading and writing the weights", status="proven")
def grow_stack(recipe: StackRecipe, run: Run) -> ModelFolder:
    """Repeat the block of layers: all of it learns at once, but the loss jumps at first."""
    parent = ModelFolder.open(recipe.model)
    layers = recipe.layers or recipe.factor * parent.spec.num_hidden_layers  # type: ignore[operator]
    return _grow(recipe, run, parent, stack(parent.spec, _reach(parent.spec, {"num_hidden_layers": layers})))


@method(paper="arXiv 2401.02415", needs="a model folder", costs="reading and writing the weights")
def grow_identity(recipe: IdentityRecipe, run: Run) -> ModelFolder:
    """Add layers that do nothing yet: the function stays exactly the same."""
    parent = ModelFolder.open(recipe.model)
    after = _reach(parent.spec, {"num_hidden_layers": recipe.layers})
    return _grow(recipe, run, parent, identity(parent.spec, after, recipe.place))


@method(paper="arXiv 2309.03852", needs="a model folder", costs="reading and writing the weights")
def grow_zero_pad(recipe: ZeroPadRecipe, run: Run) -> ModelFolder:
    """Widen channels, neurons and heads: the function stays exactly the same."""
    parent = ModelFolder.open(recipe.model)
    stated = recipe.model_dump(exclude={*GrowRecipe.model_fields, "parametrization"}, exclude_none=True)
    after = recipe.parametrization.carried_by(_reach(parent.spec, stated))
    return _grow(recipe, run, parent, zero_pad(parent.spec, after), recipe.parametrization)


def _reach(before: ModelSpec, sizes: dict[str, int]) -> ModelSpec:
    """`before` with these sizes; refused if they don't fit together or change nothing."""
    after = ModelSpec.stated({**before.model_dump(), **sizes}, where=", ".join(sizes))
    if after == before:
        raise RecipeError(
            ", ".join(sizes) or "the recipe",
            found="the sizes that the model has",
            expected="at least one larger size",
            mend="State a larger one, as in hidden_size=512.",
        )
    return after


def _grow(
    recipe: GrowRecipe,
    run: Run,
    parent: ModelFolder,
    growth: Growth,
    parametrization: Parametrization = STANDARD,
) -> ModelFolder:
    """Grow a folder's model and write it, its tokenizer and made.json as one new folder."""
    std_of = parametrization.std_of(growth.after)
    grown = grow_model(build.load(parent), [growth], seed=recipe.seed, std_of=std_of)
    run.charge("grow")
    made = run.made(f"grow.{growth.operator}", seed=recipe.seed, parents=(parent,), growth=growth.record())
    with files.whole_folder(recipe.out, need_bytes=grown.get_memory_footprint()) as folder:
        build.save(grown, folder, parent.path)
        run.write_made(folder, made)
    return ModelFolder.open(recipe.out)
