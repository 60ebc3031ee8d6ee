"""Apply growths: to a model in memory, to its optimizer's state, and from model folder to model folder.

All three make each tensor by `reshape.Grown`, from the same seed, so they agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from espalier import files
from espalier.errors import ModelError
from espalier.folder import ModelFolder
from espalier.model import build, reshape, shards
from espalier.model.axes import discover
from espalier.model.growth import Growth, Shape
from espalier.model.layout import Layout
from espalier.model.reshape import Grown, Read, StdOf
from espalier.model.stored import Form, Pieces, StoredModel

State = dict[str, dict[str, Tensor]]


def grow_model(model: PreTrainedModel, growths: Sequence[Growth], *, seed: int, std_of: StdOf) -> PreTrainedModel:
    """A new model of the same class: `growths` applied in order; a copy without any. The old model isn't changed.

    seed    of the random slots
    std_of  the initialiser's standard deviation for a name and shape of the grown model
    """
    config = model.config.to_dict()
    old = {name: weight.detach() for name, weight in model.state_dict().items()}
    plan = plan_weights(config, growths, old.__getitem__, seed=seed, std_of=std_of)
    weights = {name: plan.read(name).clone() for name in plan.layout.tensors}
    grown = type(model).from_pretrained(
        None, config=AutoConfig.for_model(**plan.config), state_dict=weights, dtype=model.dtype
    )
    grown.generation_config = model.generation_config
    # Or it would be saved under the names that `weights` has, not those of the family's published files.
    vars(grown).pop("_weight_conversions", None)
    return grown.to(model.device).train(model.training)


def grow_moments(
    state: State,
    growths: Sequence[Growth],
    layout: Layout,
    whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    hold: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> State:
    """The optimizer state, {parameter: {quantity: tensor}}, after `growths` in order: old slots keep their moments.

    layout  of the model before the growths
    whole   puts a tensor together that ranks share, and `hold` shares one out, so that none holds all of them
    """
    for growth in growths:
        grown: State = {}
        for kind in sorted({kind for quantities in state.values() for kind in quantities}):
            old = {name: quantities[kind] for name, quantities in state.items() if kind in quantities}
            read = partial(_put_together, old, whole)
            for name, value in reshape.apply_moment(growth, layout, read, kind):
                grown.setdefault(name, {})[kind] = hold(value)
        state, layout = grown, reshape.after(layout, growth)
    return state


def _put_together(values: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor], name: str) -> Tensor | None:
    return whole(values[name]) if name in values else None


@dataclass(frozen=True)
class Weights:
    """A grown model that isn't there yet: its config and layout, and a function that makes any one tensor.

    origin  the tensor of the model before all growths that a name stands for, bit for bit; None where it is made
    kin     a tensor of the model before all growths whose dtype this one gets
    """

    config: dict[str, Any]
    layout: Layout
    read: Read
    origin: Callable[[str], str | None]
    kin: Callable[[str], str]


def plan_weights(config: dict[str, Any], growths: Sequence[Growth], read: Read, *, seed: int, std_of: StdOf) -> Weights:
    """What `growths` make of the model that `config` describes and whose tensors `read` gives.

    Raises ModelError, before any tensor is read, if the growths were planned from another shape, or if transformers
    would build another model from the grown config.
    """
    layout = discover(config)
    steps: list[Grown] = []
    for growth in growths:
        _require_start(layout.shape, growth)
        steps.append(Grown(growth, layout, read, seed, std_of))
        config = grown_config(config, layout, growth)
        layout, read = steps[-1].layout, steps[-1].read
    if growths:
        _require_fit(config, layout)
    return Weights(config, layout, read, partial(_origin, steps), partial(_kin, steps))


def _origin(steps: Sequence[Grown], name: str) -> str | None:
    origin: str | None = name
    for step in reversed(steps):
        origin = step.origin(origin) if origin is not None else None
    return origin


def _kin(steps: Sequence[Grown], name: str) -> str:
    for step in reversed(steps):
        name = step.targets[name].source
    return name


def grown_config(config: dict[str, Any], layout: Layout, growth: Growth) -> dict[str, Any]:
    """The Hugging Face config after a growth: what it changed, and lists that have an entry for each layer."""
    before, after = growth.before.to_config(), growth.after.to_config()
    changed = {key: value for key, value in after.items() if value != before.get(key)}
    stated = {key: value for key, value in layout.shape.to_config().items() if config.get(key) is None}
    layers = growth.before.num_hidden_layers
    if layers != growth.after.num_hidden_layers:
        for key, value in config.items():
            if isinstance(value, list) and len(value) == layers and not key.endswith(("token_id", "token_ids")):
                changed[key] = [value[layer] for layer in growth.layers.source]
    return config | stated | changed


def _require_start(shape: Shape, growth: Growth) -> None:
    """Refuse a growth that was planned from another shape than the model has."""
    planned, there = growth.before.fields(), shape.fields()
    differing = [key for key in there if key in planned and planned[key] != there[key]]
    if differing:
        raise ModelError(
            f"growth by {growth.operator}: {', '.join(differing)}",
            found=", ".join(f"{there[key]!r} in the model" for key in differing),
            expected=", ".join(f"{planned[key]!r}, as planned" for key in differing),
            mend="Plan from the model's own shape, or from `after` of the growth before.",
        )


def _require_fit(config: dict[str, Any], layout: Layout) -> None:
    """Refuse a growth whose tensors aren't those of the model that its config describes."""
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    expected = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items() if name not in layout.tied}
    planned = {name: layout.sizes(name) for name in layout.tensors}
    for name in sorted(expected.keys() | planned.keys()):
        if expected.get(name) != planned.get(name):
            raise ModelError(
                f"{config['model_type']}: {name}",
                found=f"shape {planned.get(name, 'none')} after the growth",
                expected=f"{expected.get(name, 'no such tensor')}, as transformers builds it",
                mend="Layers of this model differ in kind; choose a depth whose layers are of the kinds they replace.",
            )


def grow_folder(
    parent: ModelFolder,
    out: Path,
    growths: Sequence[Growth],
    *,
    seed: int,
    std_of: StdOf,
    finish: Callable[[Path], None],
    tell: Callable[[str], None],
    shard_bytes: int = shards.SHARD_BYTES,
) -> None:
    """Grow a folder's model into the folder `out`, which appears whole; after a kill, the same call goes on.

    Two tensors are in memory at a time; experts that are stored one by one are a tensor together, as in the model. The
    whole model is in memory where transformers does more to a tensor than to rename, join or split it.

    finish  puts what else belongs there into the new folder, and may refuse it
    """
    stored = StoredModel.open(parent, discover(parent.config))
    plan = plan_weights(parent.config, growths, stored.read, seed=seed, std_of=std_of)
    stds = [std_of(name, plan.layout.sizes(name)) for name in plan.layout.tensors]
    identity = [[growth.identity() for growth in growths], stds, seed]
    in_memory = lambda: grow_model(build.load(parent, dtype="auto"), growths, seed=seed, std_of=std_of)  # noqa: E731
    write_grown(parent, out, plan, stored, identity, in_memory, finish=finish, tell=tell, shard_bytes=shard_bytes)


def write_grown(
    parent: ModelFolder,
    out: Path,
    plan: Weights,
    stored: StoredModel,
    identity: list[Any],
    in_memory: Callable[[], PreTrainedModel],
    *,
    finish: Callable[[Path], None],
    tell: Callable[[str], None],
    shard_bytes: int,
) -> None:
    """Write a planned model, whose tensors are made of `stored`, as the folder `out`; see `grow_folder`.

    identity   all that the weights depend on besides `parent`, as JSON
    in_memory  makes the same model at once, for families whose files aren't understood
    """
    pieces = _pieces(plan, stored)
    names = [piece.name for piece in pieces.planned] if pieces else []
    key = files.digest([parent.identity(), identity, shard_bytes, names])
    need = stored.weights.bytes * plan.layout.elements // max(stored.form.layout.elements, 1)
    with files.resumable_folder(out, key, need_bytes=need) as journal:
        if pieces:
            shards.write(journal.folder, pieces.planned, pieces.make, shard_bytes=shard_bytes, done=journal)
            files.write_json(journal.folder / "config.json", _saved_config(plan.config, pieces.form))
            build.copy_tokenizer(parent.path, journal.folder, also=(build.GENERATION,))
        else:
            tell("How transformers loads this family isn't understood: the whole model is held in memory.")
            build.save(in_memory(), journal.folder, parent.path)
        finish(journal.folder)


def _pieces(plan: Weights, stored: StoredModel) -> Pieces | None:
    """The tensors of the new model's files; None if how transformers stores it or the old one isn't understood.

    What stays as it was is copied unread.
    """
    if not stored.sources:
        return None
    dtypes = {name: stored.on_meta(plan.kin(name)).dtype for name in plan.layout.tensors}

    def make(name: str) -> Tensor | list[shards.Stored]:
        origin = plan.origin(name)
        copied = stored.pieces(origin) if origin else None
        return copied or plan.read(name).to(dtypes[name])

    whole = [shards.Planned(name, plan.layout.sizes(name), dtype) for name, dtype in dtypes.items()]
    pieces = Pieces(Form.of(plan.config, plan.layout), whole, make)
    return pieces if pieces.can_be_read else None


def _saved_config(config: dict[str, Any], form: Form) -> dict[str, Any]:
    return AutoConfig.for_model(**config).to_diff_dict() | {"architectures": [type(form.model).__name__]}
