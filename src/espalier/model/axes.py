"""Axes: what each axis of each tensor of a model stands for, found out from the model itself.

The config is built on the meta device, which costs no memory; then one size is doubled at a time and the axes that
move are watched. There is no table of architectures: a tensor that this doesn't explain (fused projections, experts)
is refused by name, never guessed.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.errors import ModelError
from espalier.model.growth import Part, Role

Side = Literal["out", "in", "along"]

SIZES: dict[Role, str] = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}

# An axis of heads moves with their number and with their size; every other axis with one size alone.
ROLES: dict[frozenset[Role], Role] = {
    frozenset({"vocab"}): "vocab",
    frozenset({"hidden"}): "hidden",
    frozenset({"ffn"}): "ffn",
    frozenset({"heads", "head_dim"}): "heads",
    frozenset({"kv_heads", "head_dim"}): "kv_heads",
    frozenset({"head_dim"}): "head_dim",
}


@dataclass(frozen=True)
class Axis:
    """One axis: `size` elements, in runs of `unit` for each head, neuron or channel of its role.

    side  "out": the module writes along it; "in": it reads along it; "along": it scales each element
    """

    role: Role
    size: int
    unit: int
    side: Side


Axes = tuple[Axis, ...]


def writes_residual(axes: Axes) -> bool:
    """Whether the tensor's output goes to the residual stream: embedding, o_proj, down_proj and their biases."""
    return any(axis.role == "hidden" and axis.side == "out" for axis in axes)


def reads_residual(axes: Axes) -> bool:
    """Whether the tensor multiplies what a norm made of the residual stream: q, k, v, gate, up, untied read-out."""
    return any(axis.role == "hidden" and axis.side == "in" for axis in axes)


def scales_residual(axes: Axes) -> bool:
    """Whether the tensor is the weight of a norm over the residual stream."""
    return any(axis.role == "hidden" and axis.side == "along" for axis in axes)


@dataclass(frozen=True)
class Layout:
    """The axes of every tensor; a tied tensor is there once.

    stem  what comes before the layer number in a name, as in "model.layers."
    tied  other names in the state dict for a tensor of `tensors`
    """

    tensors: Mapping[str, Axes]
    stem: str
    tied: Mapping[str, str]

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a tensor belongs to; None outside the layers."""
        return int(name.removeprefix(self.stem).split(".")[0]) if name.startswith(self.stem) else None

    def with_layer(self, name: str, layer: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.stem}{layer}.{name.removeprefix(self.stem).partition('.')[2]}"

    def in_layer(self, layer: int | None) -> list[str]:
        """The names of one layer's tensors; of those outside the layers for None."""
        return [name for name in self.tensors if self.layer_of(name) == layer]

    def parts(self, name: str) -> frozenset[Part]:
        """What the tensor does in the model, as far as growth has to know."""
        axes = self.tensors[name]
        does: dict[Part, bool] = {
            "writes_residual": writes_residual(axes),
            "reads_residual": reads_residual(axes),
            "scales_residual": scales_residual(axes),
            "final_norm": scales_residual(axes) and self.layer_of(name) is None,
            "feeds_head_norm": _head_norm_after(name) in self.tensors,
            "bias": len(axes) == 1 and axes[0].side == "out",
        }
        return frozenset(part for part, holds in does.items() if holds)


def discover(config: dict[str, Any]) -> Layout:
    """The layout of the model that a Hugging Face config describes.

    Raises ModelError with the name of the first tensor whose axes aren't explained by one size and unit each.
    """
    return _discover(json.dumps(config, sort_keys=True))


@functools.cache
def _discover(config_json: str) -> Layout:
    config = _parse(json.loads(config_json))
    real = _on_meta(config)
    roomy = _roomy(config)
    base = _shapes(roomy)
    probes = {role: _shapes(_changed(roomy, key, 2)) for role, key in SIZES.items()}
    tensors: dict[str, Axes] = {}
    tied: dict[str, str] = {}
    names_by_id: dict[int, str] = {}
    for name, tensor in real.state_dict(keep_vars=True).items():
        first = names_by_id.setdefault(id(tensor), name)
        if first == name:
            tensors[name] = _axes_of(name, tensor, real, base, probes, config)
        else:
            tied[name] = first
    layout = Layout(tensors, _stem(config, real), tied)
    _every_size_moves(layout, config)
    _head_norms_are_fed(layout, config)
    return layout


def _parse(values: dict[str, Any]) -> Any:
    """The config object, with its head size stated rather than derived from sizes that are about to change."""
    try:
        config = AutoConfig.for_model(**values)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(
            "config.json",
            found=str(error.__cause__ or error).split("\n", 1)[0],
            expected="a config that transformers can build",
            mend="Correct the config, or upgrade transformers if the model is newer than it.",
        ) from error
    heads = getattr(config, "num_attention_heads", None)
    if getattr(config, "head_dim", None) is None and heads:
        config.head_dim = config.hidden_size // heads
    if getattr(config, "num_key_value_heads", None) is None:
        config.num_key_value_heads = heads
    for key in SIZES.values():
        if not isinstance(getattr(config, key, None), int):
            raise ModelError(
                f"{config.model_type}: {key}",
                found="no such size in the config",
                expected=f"{', '.join(SIZES.values())}",
                mend="Only models with these sizes can be reshaped.",
            )
    return config


def _roomy(config: Any) -> Any:
    """The config with so many heads, and so wide, that any one size can be doubled and the rest still fit."""
    return _changed(_changed(config, "num_attention_heads", 2), "hidden_size", 4)


def _changed(config: Any, key: str, factor: int) -> Any:
    changed = copy.deepcopy(config)
    setattr(changed, key, getattr(config, key) * factor)
    return changed


def _on_meta(config: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _on_meta(config).state_dict().items()}


def _axes_of(
    name: str,
    tensor: torch.Tensor,
    model: nn.Module,
    base: dict[str, tuple[int, ...]],
    probes: dict[Role, dict[str, tuple[int, ...]]],
    config: Any,
) -> Axes:
    sides = _sides(name, tensor, model)
    if sides is None:
        kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
        raise _unexplained(config, name, f"a tensor of shape {tuple(tensor.shape)} in a {kind}")
    axes = []
    for index, side in enumerate(sides):
        moves = frozenset(role for role in probes if probes[role][name][index] != base[name][index])
        role = ROLES.get(moves)
        if role is None:
            moved_by = " and ".join(sorted(SIZES[role] for role in moves)) or "no size"
            raise _unexplained(config, name, f"axis {index} of {tensor.shape[index]}, which follows {moved_by}")
        unit = config.head_dim if role in ("heads", "kv_heads") else 1
        count = getattr(config, SIZES[role])
        doubles = probes[role][name][index] == 2 * base[name][index]
        if tensor.shape[index] != count * unit or not doubles:
            raise _unexplained(
                config, name, f"axis {index} of {tensor.shape[index]}, where {SIZES[role]} gives {count * unit}"
            )
        axes.append(Axis(role, tensor.shape[index], unit, side))
    return tuple(axes)


def _sides(name: str, tensor: torch.Tensor, model: nn.Module) -> tuple[Side, ...] | None:
    """Which way each axis faces, by the type of the module that owns the tensor; None where that isn't known."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if tensor.ndim == 2 and isinstance(module, nn.Linear):
        return ("out", "in")
    if tensor.ndim == 2 and isinstance(module, nn.Embedding):
        return ("in", "out")
    if tensor.ndim == 1 and leaf in ("weight", "bias"):
        return ("out",) if leaf == "bias" else ("along",)
    return None


def _stem(config: Any, model: nn.Module) -> str:
    """What comes before the layer number, from the names that appear when there is one layer more."""
    layers = config.num_hidden_layers
    longer = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        longer.layer_types = [*config.layer_types, config.layer_types[-1]]
    longer.num_hidden_layers = layers + 1
    appeared = [name.split(".") for name in _shapes(longer) if name not in model.state_dict()]
    shared = [parts[0] for parts in zip(*appeared, strict=False) if len(set(parts)) == 1]
    if str(layers) not in shared:
        raise _unexplained(config, "the layers", f"no common place of what a layer more adds ({len(appeared)} tensors)")
    return ".".join(shared[: shared.index(str(layers))]) + "."


def _every_size_moves(layout: Layout, config: Any) -> None:
    """A size that moves no tensor is hidden in another one, as heads are where head size = hidden / heads."""
    moved = {axis.role for axes in layout.tensors.values() for axis in axes}
    for role, key in SIZES.items():
        if role not in moved and role != "head_dim":
            raise _unexplained(config, key, "a size that no tensor follows")


def _head_norms_are_fed(layout: Layout, config: Any) -> None:
    fed = {_head_norm_after(name) for name in layout.tensors}
    for name, axes in layout.tensors.items():
        if axes[0].role == "head_dim" and name not in fed:
            raise _unexplained(config, name, "a norm over head_dim whose projection isn't known")


def _head_norm_after(name: str) -> str:
    """The norm over each head that a projection's output passes, where there is one: q_proj -> q_norm."""
    return f"{name.rpartition('.')[0].removesuffix('_proj')}_norm.weight"


def _unexplained(config: Any, name: str, found: str) -> ModelError:
    return ModelError(
        f"{config.model_type}: {name}",
        found=found,
        expected="axes that each follow one size (separate projections, no experts)",
        mend="Use a family with separate q, k, v, gate and up projections, such as granite or llama.",
    )
