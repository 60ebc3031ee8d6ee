"""The growth operators as methods, from a model folder to a larger one: `espalier grow OPERATOR model=... out=...`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from espalier import files
from espalier.card import GROWN, model_card
from espalier.data.prepare import DataRecipe
from espalier.errors import RecipeError
from espalier.folder import ModelFolder
from espalier.grow import depth, operators, width
from espalier.grow.depth import Block, Place
from espalier.grow.operators import DepthMap, WidthMap
from espalier.method import method
from espalier.model.growth import Growth, Shape
from espalier.model.mup import Parametrization
from espalier.recipe import Recipe
from espalier.report import Report
from espalier.run import RESULTS, Run

if TYPE_CHECKING:
    from espalier.grow.proof import Proof

STANDARD = Parametrization(kind="standard")
# Both models have to be in memory to compare what they compute; beyond this `espalier grow check` has to be asked for.
CHECKED_BYTES = 2_000_000_000


class GrowRecipe(Recipe):
    """What every growth from folder to folder is told."""

    model: Path = Field(description="the model folder to grow")
    out: Path = Field(description="the model folder to write; replaced if it exists")
    seed: int = 0


class DepthRecipe(GrowRecipe):
    """How many times as many layers, or how many."""

    factor: int | None = Field(default=None, ge=2)
    layers: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.factor is None) == (self.layers is None):
            raise ValueError("state either factor or layers")
        return self

    def reach(self, shape: Shape) -> Shape:
        layers = self.layers or self.factor * shape.num_hidden_layers  # type: ignore[operator]
        return _changed(shape, {"num_hidden_layers": layers})


class StackRecipe(DepthRecipe):
    """Which block to repeat: all layers, the upper half, or the half in the middle."""

    block: Block = "all"


class IdentityRecipe(DepthRecipe):
    """Where new layers go: after those that they copy, or on top."""

    place: Place = "after"


class WidthRecipe(GrowRecipe):
    """The sizes to reach; what isn't stated stays as it is."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    parametrization: Parametrization = Field(default=STANDARD, description="of new slots: as the model was initialised")

    def reach(self, shape: Shape) -> Shape:
        return self._carried(_changed(shape, self._sizes()))

    def _sizes(self) -> dict[str, int]:
        return {key: size for key in width.SIZES if (size := getattr(self, key)) is not None}

    def _carried(self, after: Shape) -> Shape:
        """With the multiplier that muP needs."""
        if self.parametrization.kind == "standard":
            return after
        return after.changed(logits_scaling=self.parametrization.logits_scaling(after))


class FpiRecipe(WidthRecipe):
    """How unequal the shares of copies are: 0 leaves copies alike for ever."""

    noise: float = Field(default=0.0, ge=0, lt=1)


class SizesRecipe(WidthRecipe):
    """The sizes to reach in width and depth."""

    num_hidden_layers: int | None = None

    def _sizes(self) -> dict[str, int]:
        layers = {} if self.num_hidden_layers is None else {"num_hidden_layers": self.num_hidden_layers}
        return super()._sizes() | layers


class ReachRecipe(SizesRecipe):
    """Width and depth in one step, by any two operators; AKI-Pro is width=aki depth=interpolate."""

    depth: DepthMap = "stack"
    width: WidthMap = "zero_pad"


class LearnedRecipe(SizesRecipe):
    """What the maps are trained on, and for how long; the text is read with the model's own tokenizer."""

    data: DataRecipe = DataRecipe()
    updates: int = Field(default=100, ge=1)
    batch_tokens: int = Field(default=8192, gt=0)
    per_device_train_batch_size: int = Field(default=8, gt=0)


def _changed(before: Shape, sizes: dict[str, int]) -> Shape:
    """`before` with these sizes; refused if they don't fit together or change nothing."""
    after = before.changed(**sizes)
    if after.fields() == before.fields():
        raise RecipeError(
            ", ".join(sizes) or "the recipe",
            found="the sizes that the model has",
            expected="at least one larger size",
            mend="State a larger one, as in hidden_size=512.",
        )
    return after


@method(
    paper="arXiv 2405.15319",
    needs="a model folder of any causal LM",
    costs="reading and writing the weights",
    status="proven",
)
def grow_stack(recipe: StackRecipe, run: Run) -> ModelFolder:
    """Repeat the block of layers: all of it learns at once, but the loss jumps at first."""
    return _grow(recipe, run, lambda before, after: [depth.stack(before, after, recipe.block)])


@method(paper="arXiv 2408.06567", needs="a model folder of any causal LM", costs="reading and writing the weights")
def grow_interpolate(recipe: DepthRecipe, run: Run) -> ModelFolder:
    """Repeat each layer in place: the loss jumps less than with stack."""
    return _grow(recipe, run, lambda before, after: [depth.interpolate(before, after)])


@method(paper="arXiv 2011.13635", needs="a model folder of any causal LM", costs="reading and writing the weights")
def grow_gradual(recipe: DepthRecipe, run: Run) -> ModelFolder:
    """Copy the top layers once more, a few at each of many growths."""
    return _grow(recipe, run, lambda before, after: [depth.gradual(before, after)])


@method(paper="arXiv 2312.15166", needs="a model folder of any causal LM", costs="reading and writing the weights")
def grow_overlap(recipe: DepthRecipe, run: Run) -> ModelFolder:
    """Put two copies of the stack on each other and leave out layers where they meet."""
    return _grow(recipe, run, lambda before, after: [depth.overlap(before, after)])


@method(paper="arXiv 2401.02415", needs="a model folder of any causal LM", costs="reading and writing the weights")
def grow_identity(recipe: IdentityRecipe, run: Run) -> ModelFolder:
    """Add layers that do nothing yet: the function stays exactly the same."""
    return _grow(recipe, run, lambda before, after: [depth.identity(before, after, recipe.place)])


@method(paper="arXiv 2309.03852", needs="a model folder of any causal LM", costs="reading and writing the weights")
def grow_zero_pad(recipe: WidthRecipe, run: Run) -> ModelFolder:
    """Widen channels, neurons and heads by new ones: the function stays exactly the same."""
    return _grow(recipe, run, lambda before, after: [width.zero_pad(before, after)])


@method(paper="arXiv 2110.07143", needs="a model folder of any causal LM", costs="reading and writing the weights")
def grow_fpi(recipe: FpiRecipe, run: Run) -> ModelFolder:
    """Widen by copies that divide the work: exact where the width is a multiple of what it was."""
    return _grow(recipe, run, lambda before, after: [width.fpi(before, after, recipe.noise, recipe.seed)])


@method(paper="arXiv 2110.07143", needs="a model folder of any causal LM", costs="reading and writing the weights")
def grow_aki(recipe: WidthRecipe, run: Run) -> ModelFolder:
    """Widen by copies that take the rows of the layer above: not exact, but different from the start."""
    return _grow(recipe, run, lambda before, after: [width.aki(before, after)])


@method(paper="arXiv 2408.06567", needs="a model folder of any causal LM", costs="reading and writing the weights")
def grow_reach(recipe: ReachRecipe, run: Run) -> ModelFolder:
    """Grow width and depth in one step, by any two operators (AKI-Pro: width=aki depth=interpolate)."""
    plan = lambda before, after: operators.plan_growth(before, after, depth=recipe.depth, width=recipe.width)  # noqa: E731
    return _grow(recipe, run, plan)


@method(paper="arXiv 2303.00980", needs="a model folder, and text", costs="some updates of the larger model")
def grow_learned(recipe: LearnedRecipe, run: Run) -> ModelFolder:
    """Mix old channels, neurons, heads and layers by maps that are trained first (LiGO)."""
    from espalier.budget import hardware
    from espalier.data import tokenizer
    from espalier.data.prepare import corpus
    from espalier.data.stream import Stream
    from espalier.grow import apply, learned
    from espalier.model import build
    from espalier.model.axes import discover
    from espalier.train.device import Device
    from espalier.train.objectives import NextToken

    parent = ModelFolder.open(recipe.model)
    layout = discover(parent.config)
    growths = operators.plan_growth(layout.shape, recipe.reach(layout.shape), depth="learned", width="learned")
    run.tell(_promise(growths))
    row = hardware.here(home=files.home())
    device = Device(kind=row.kind, threads=hardware.free_cores())
    device.prepare()
    text = corpus(recipe.data.model_copy(update={"tokenizer": str(recipe.model)}), home=files.home(), tell=run.tell)
    run.charge("data")
    stream = Stream(
        text.train,
        sequence_length=recipe.data.sequence_length,
        seed=recipe.seed,
        attend=recipe.data.attend,
        eos_id=tokenizer.eos_id(text.tokenizer),
    )
    rows = max(recipe.batch_tokens // recipe.data.sequence_length, 1)
    old = build.load(parent, dtype="auto")
    after = growths[-1].after
    model = apply.grow_model(old, growths, seed=recipe.seed, std_of=recipe.parametrization.std_of(after))
    model.to(device.kind)
    tell_every = max(recipe.updates // 10, 1)

    def told(done: int, loss: float) -> bool:
        run.charge("train", tokens=rows * recipe.data.sequence_length, step=done)
        if done % tell_every == 0:
            run.tell(f"update {done} of {recipe.updates}: loss {loss:.3f}")
        return True

    learned.fit(
        model,
        learned.Maps(growths, layout, old.state_dict().__getitem__),
        lambda number: stream.batch(number * rows, rows),
        learned.Fit(recipe.updates, min(recipe.per_device_train_batch_size, rows)),
        NextToken(),
        device,
        told,
    )
    with files.whole_folder(recipe.out, need_bytes=model.get_memory_footprint()) as folder:
        build.save(model.cpu(), folder, parent.path)
        _finish(folder, parent, after, [growth.record() for growth in growths], recipe, run)
    return ModelFolder.open(recipe.out)


class UpcycleRecipe(GrowRecipe):
    """How many experts, how many of them for each token, and what tells them apart."""

    experts: int = Field(default=8, ge=1)
    experts_per_token: int = Field(default=2, ge=1)
    shards: int = Field(default=1, ge=1, description="split each copy's neurons into so many experts (fine-grained)")
    noise: float = Field(default=0.0, ge=0, description="on each expert's weights, in standard deviations")
    drop: float = Field(default=0.0, ge=0, lt=1, description="share of each expert's neurons that are drawn anew")


@method(
    paper="arXiv 2212.05055",
    needs="a Llama, Mistral, Granite or Qwen3 folder",
    costs="reading the weights and writing the mixture's",
)
def grow_upcycle(recipe: UpcycleRecipe, run: Run) -> ModelFolder:
    """Make a mixture of experts whose experts are copies of the MLP: exact without noise and drop."""
    from espalier.grow.experts import Upcycling, upcycle_folder
    from espalier.model.axes import discover

    parent = ModelFolder.open(recipe.model)
    settings = recipe.model_dump(include={"experts", "shards", "noise", "drop", "seed"})
    how = Upcycling(per_token=recipe.experts_per_token, **settings)
    run.tell(f"upcycle: {'exact' if how.exact else 'the function changes (noise and drop are not exact)'}")
    step = {"operator": "upcycle", "exact": how.exact, "experts_per_token": how.per_token, **settings}

    def finish(folder: Path) -> None:
        _finish(folder, parent, discover(ModelFolder(folder).config).shape, [step], recipe, run)

    upcycle_folder(parent, recipe.out, how, finish=finish, tell=run.tell)
    return ModelFolder.open(recipe.out)


class CheckRecipe(Recipe):
    """Two model folders, of which the larger was grown from the smaller."""

    before: Path
    after: Path
    seed: int = Field(default=0, description="of the tokens that both read")


@method(needs="a model folder and the one that was grown from it", costs="a few passes of both models")
def grow_check(recipe: CheckRecipe, run: Run) -> Report:
    """Compare a grown model with the one it came from: the function, and slots that can't learn."""
    from espalier.grow import proof
    from espalier.model.axes import discover

    before, after = ModelFolder.open(recipe.before), ModelFolder.open(recipe.after)
    made = after.made or {}
    growths = operators.recorded(discover(before.config).shape, made.get("growth", []))
    found = proof.prove(before, after.path, growths, seed=recipe.seed)
    report = found.report(str(recipe.after))
    report.save(run.folder / RESULTS)
    for line in found.lines():
        run.tell(line)
    if made.get("growth"):
        proof.require_promise(found, exact=all(step["exact"] for step in made["growth"]), where=str(recipe.after))
    return report


def _grow(recipe: DepthRecipe | WidthRecipe, run: Run, plan: Callable[[Shape, Shape], Sequence[Growth]]) -> ModelFolder:
    """Grow a folder's model and write it, its tokenizer, made.json and a card as one new folder."""
    from espalier.grow import apply
    from espalier.model.axes import discover

    parent = ModelFolder.open(recipe.model)
    shape = discover(parent.config).shape
    growths = plan(shape, recipe.reach(shape))
    after = growths[-1].after
    run.tell(_promise(growths))
    parametrization = recipe.parametrization if isinstance(recipe, WidthRecipe) else STANDARD
    apply.grow_folder(
        parent,
        recipe.out,
        growths,
        seed=recipe.seed,
        std_of=parametrization.std_of(after),
        finish=lambda folder: _finish(folder, parent, after, [g.record() for g in growths], recipe, run, growths),
        tell=run.tell,
    )
    return ModelFolder.open(recipe.out)


def _finish(
    folder: Path,
    parent: ModelFolder,
    shape: Shape,
    steps: list[dict[str, Any]],
    recipe: GrowRecipe,
    run: Run,
    growths: Sequence[Growth] = (),
) -> None:
    """Compare the new folder with its parent, refuse a broken promise, write made.json and the card."""
    from espalier.model import shards

    exact = all(step["exact"] for step in steps)
    proof = _proved(parent, folder, growths, run, exact=exact, seed=recipe.seed)
    run.charge("grow")
    made = run.made(
        "grow." + "+".join(step["operator"] for step in steps),
        seed=recipe.seed,
        parents=(parent,),
        growth=steps,
        proof=proof.record() if proof else None,
    )
    run.write_made(folder, made)
    grown, name = ModelFolder(folder), recipe.out.name
    results = proof.report(name) if proof else Report(name)
    parameters = shards.Weights.open(grown).elements
    card = model_card(name, grown.config["model_type"], shape, parameters, made, results, limits=GROWN)
    files.write_text(folder / "README.md", card)


def _promise(growths: Sequence[Growth]) -> str:
    """What is about to be done and whether the function stays, in a line."""
    steps = ", then ".join(growth.operator for growth in growths)
    inexact = [growth.operator for growth in growths if not growth.exact]
    return f"{steps}: {f'the function changes ({chr(44).join(inexact)} is not exact here)' if inexact else 'exact'}"


def _proved(
    parent: ModelFolder, folder: Path, growths: Sequence[Growth], run: Run, *, exact: bool, seed: int
) -> Proof | None:
    """Compare the new folder with its parent and refuse a broken promise; None for models too large for that."""
    from espalier.grow import proof

    size = sum(path.stat().st_size for path in ModelFolder(folder).weight_files())
    if size > CHECKED_BYTES:
        run.tell(f"Not compared with its parent: {size / 1e9:.1f} GB. `espalier grow check` does it.")
        return None
    found = proof.prove(parent, folder, growths, seed=seed)
    for line in found.lines():
        run.tell(line)
    proof.require_promise(found, exact=exact, where=str(folder))
    return found
