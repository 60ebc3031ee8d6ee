"""Axes: what each axis of each tensor of a model stands for, found out from the model itself.

There is no table of architectures. `readings` are what shapes allow; they leave questions open: in which order a fused
projection holds queries, keys and values, or whether a square matrix writes heads or channels. So each is tried on a
small real model: it holds if shuffling channels, neurons, heads and experts by it leaves the function as it was, and
so does a copy of each of them that halves what it is read with. A tensor that no reading explains is refused by name,
never guessed.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from espalier.errors import ModelError
from espalier.model import reshape
from espalier.model.growth import Growth, IndexMap, LayerMap, Part, Role
from espalier.model.layout import Axes, Layout, reads_residual, writes_residual
from espalier.model.readings import (
    SMALL,
    SMALL_LAYERS,
    Probe,
    Reading,
    on_meta,
    readings_of,
    refused,
    stem_of,
    with_sizes,
)
from espalier.model.shape import ConfigShape

HEADS: frozenset[Role] = frozenset({"heads", "kv_heads", "head_dim"})
# The roles that growth adds slots to.
GROWING: frozenset[Role] = frozenset({"hidden", "ffn", "expert_ffn", "shared_ffn", "heads", "kv_heads"})
DERIVED_FFN = 4  # times the width, where a config leaves it out
# Logits of a shuffled model may differ by rounding, relative to the largest.
SAME = 1e-3
MOST_READINGS = 512


def discover(config: dict[str, Any]) -> Layout:
    """The layout of the model that a Hugging Face config describes.

    Raises ModelError with the name of the first tensor that isn't explained. Takes about a second the first time;
    no weights are needed, and memory for a small model only.
    """
    return _discover(json.dumps(config, sort_keys=True))


@functools.cache
def _discover(config_json: str) -> Layout:
    with torch.random.fork_rng(devices=[]):
        config = _parse(json.loads(config_json))
        probe = Probe.of(config)
        readings = readings_of(probe)
        small = _Small.of(probe, readings)
        kinds = small.proven()
        return _at_full_size(config, probe, small, kinds)


def _parse(values: dict[str, Any]) -> Any:
    try:
        return AutoConfig.for_model(**values)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(
            "config.json",
            found=str(error.__cause__ or error).split("\n", 1)[0],
            expected="a config that transformers can build",
            mend="Correct the config, or upgrade transformers if the model is newer than it.",
        ) from error


@dataclass(frozen=True)
class _Small:
    """A small real model with every weight random, on which readings are proved."""

    probe: Probe
    stem: str
    readings: list[list[Reading]]
    model: PreTrainedModel
    weights: dict[str, Tensor]
    input_ids: Tensor

    @classmethod
    def of(cls, probe: Probe, readings: list[list[Reading]]) -> _Small:
        config = copy.deepcopy(probe.config)
        if eps := _eps_key(config):
            setattr(config, eps, 1e-10)  # so that what a norm scales away is scaled away
        torch.manual_seed(0)
        model = _real(config)
        weights = {name: _random(weight) for name, weight in model.named_parameters()}
        input_ids = torch.randint(0, SMALL["vocab"], (2, 12))
        small = cls(probe, stem_of(probe, on_meta(probe.config)), readings, model, weights, input_ids)
        try:
            small.logits(weights)
        except RuntimeError as error:
            raise refused(config, "the model", f"a small one of its kind that doesn't run ({error})") from error
        return small

    def logits(self, weights: Mapping[str, Tensor], model: PreTrainedModel | None = None) -> Tensor:
        """What the model, or a larger one, computes with these weights."""
        with torch.no_grad():
            return torch.func.functional_call(model or self.model, dict(weights), (self.input_ids,)).logits

    def same(self, weights: Mapping[str, Tensor], model: PreTrainedModel | None = None) -> bool:
        """Whether the function is that of the model's own weights."""
        expected = self.logits(self.weights)
        return bool((self.logits(weights, model) - expected).abs().max() <= SAME * expected.abs().max())

    def layout(self, kinds: Mapping[str, Axes]) -> Layout:
        """A layout of the small model, without parts."""
        tensors = {name: kinds[self.kind_of(name)] for name in self.weights}
        parts: dict[str, frozenset[Part]] = {name: frozenset() for name in tensors}
        return Layout(_shape_of(self.probe), tensors, parts, self.stem)

    def kind_of(self, name: str) -> str:
        """The same tensor in the first layer."""
        if not name.startswith(self.stem):
            return name
        return f"{self.stem}0.{name.removeprefix(self.stem).partition('.')[2]}"

    def layers_of(self, kind: str) -> list[str]:
        """The tensor of every layer that is of this kind."""
        return [name for name in self.weights if self.kind_of(name) == kind]

    def proven(self) -> dict[str, Axes]:
        """The readings by which shuffling every role leaves the function as it was."""
        first: Reading = {}
        for choice in itertools.islice(itertools.product(*self.readings), MOST_READINGS):
            kinds = {name: axes for reading in choice for name, axes in reading.items()}
            first = first or kinds
            if self.same(self._shuffled(kinds, None)):
                return kinds
        failing = [role for role in sorted(_roles(first)) if not self.same(self._shuffled(first, role))]
        raise self._unproven(first, failing)

    def require_sizes(self, kinds: Mapping[str, Axes], traits: _Traits) -> None:
        """Refuse a model whose function isn't kept by copying every slot and halving what reads it.

        That fails where a tensor was taken to read what it writes, and where the function depends on a size itself,
        as with positions that each head sees in its own way.
        """
        probe, layout = self.probe, traits.laid_out(self.layout(kinds), _shape_of(self.probe))
        doubled = {role: 2 * probe.size(role) for role in probe.keys if role in _roles(kinds) & GROWING}
        config = with_sizes(probe.config, **{probe.keys[role]: size for role, size in doubled.items()})
        if eps := _eps_key(config):
            setattr(config, eps, 1e-10)
        maps = {role: IndexMap.copies([*range(size // 2)] * 2) for role, size in doubled.items()}
        embeds = 2 ** -traits.shape["embedding_power"]
        factors: dict[Part, float] = {"embeds": embeds}
        if layout.shape.tie_word_embeddings:
            factors["final_norm"] = 1 / embeds
        growth = Growth("copies", layout.shape, layout.shape, True, LayerMap.same(SMALL_LAYERS), maps, factors=factors)
        grown = dict(reshape.apply(growth, layout, self.weights.__getitem__, seed=0, std_of=lambda name, shape: 0.0))
        if not self.same(grown, _real(config)):
            raise refused(probe.config, "the model", "a function that depends on the number of heads or channels")

    def _shuffled(self, kinds: Mapping[str, Axes], only: Role | None) -> dict[str, Tensor]:
        layout = self.layout(kinds)
        together = {"heads", "kv_heads"} if only in ("heads", "kv_heads") else {only}
        shuffles = _shuffles(self.probe, _roles(kinds)).items()
        maps = {role: map_ for role, map_ in shuffles if only is None or role in together}
        growth = Growth("shuffle", layout.shape, layout.shape, True, LayerMap.same(SMALL_LAYERS), maps)
        return dict(reshape.apply(growth, layout, self.weights.__getitem__, seed=0, std_of=lambda name, shape: 0.0))

    def _unproven(self, kinds: Mapping[str, Axes], failing: list[Role]) -> ModelError:
        roles = failing or sorted(_roles(kinds))
        with_role = [n for n, axes in kinds.items() if any(axis.roles & set(roles) for axis in axes)]
        ambiguous = [n for readings in self.readings if len(readings) > 1 for n in readings[0]]
        name = next(iter([n for n in with_role if n in ambiguous] or with_role or ambiguous), "the model")
        return refused(
            self.probe.config,
            name,
            f"no reading of the tensors by which the order of {' and '.join(roles)} doesn't matter",
        )


def _real(config: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.set_attn_implementation("eager")
    return model


def _random(weight: Tensor) -> Tensor:
    """Values of ordinary size, none of them special: 1 + noise for vectors, unit variance of a product for matrices."""
    noise = torch.randn(weight.shape)
    if weight.ndim == 1:
        return 1 + 0.3 * noise
    return noise / weight.shape[-1] ** 0.5


def _roles(kinds: Mapping[str, Axes]) -> frozenset[Role]:
    return frozenset(role for axes in kinds.values() for axis in axes for role in axis.roles)


def _shuffles(probe: Probe, roles: frozenset[Role]) -> dict[Role, IndexMap]:
    """A random order of every role that has none of its own; query heads stay with their key-value heads."""
    random = np.random.default_rng(0)
    maps: dict[Role, IndexMap] = {}
    for role in sorted(roles & {"hidden", "ffn", "expert_ffn", "shared_ffn", "experts"}):
        maps[role] = IndexMap.take(random.permutation(probe.size(role)).tolist())
    heads = probe.size("heads")
    groups = probe.size("kv_heads") if "kv_heads" in probe.keys else heads
    group_order = random.permutation(groups)
    each = heads // groups
    maps["heads"] = IndexMap.take([int(g) * each + int(r) for g in group_order for r in random.permutation(each)])
    if "kv_heads" in probe.keys:
        maps["kv_heads"] = IndexMap.take(group_order.tolist())
    return maps


def _at_full_size(config: Any, probe: Probe, small: _Small, kinds: Mapping[str, Axes]) -> Layout:
    """The layout of the model itself, each of whose tensors has to be of a known kind and of the size it says."""
    traits = _Traits.of(small, kinds)
    small.require_sizes(kinds, traits)
    model = on_meta(config)
    # What is left to be derived from the width is stated, so that it stays when the width grows.
    stated: dict[str, int] = {} if probe.follows_width else {"head_dim": probe.head_dim}
    if getattr(config, probe.keys.get("ffn", "vocab_size")) is None:
        stated[probe.keys["ffn"]] = DERIVED_FFN * config.hidden_size
    shape = replace(_shape_of(probe), config={**config.to_dict(), **stated})
    shape = replace(shape, keys={**shape.keys, **_value_keys(config)})
    counts = {role: shape.config[shape.keys[role]] for role in _roles(kinds) & shape.keys.keys()}
    tensors: dict[str, Axes] = {}
    tied: dict[str, str] = {}
    names_by_id: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = names_by_id.setdefault(id(tensor), name)
        if first != name:
            tied[name] = first
            continue
        kind = small.kind_of(name)
        if kind not in kinds:
            raise refused(config, name, "a tensor that the first layers don't have")
        axes = tuple(
            replace(axis, blocks=tuple(replace(b, count=counts.get(b.role, b.count)) for b in axis.blocks))
            for axis in kinds[kind]
        )
        if tuple(axis.size for axis in axes) != tuple(tensor.shape):
            raise refused(
                config, name, f"shape {tuple(tensor.shape)}, where {tuple(axis.size for axis in axes)} was expected"
            )
        tensors[name] = axes
    return traits.laid_out(Layout(shape, tensors, {}, small.stem, tied), shape)


def _shape_of(probe: Probe) -> ConfigShape:
    aliases = getattr(probe.config, "attribute_map", {})
    keys = {**probe.keys, "layers": aliases.get("num_hidden_layers", "num_hidden_layers")}
    return ConfigShape(probe.config.to_dict(), keys, probe.head_dim, probe.follows_width)


def _value_keys(config: Any) -> dict[str, str]:
    keys = {}
    if eps := _eps_key(config):
        keys["eps"] = eps
    for role, key in (("scaling", "logits_scaling"), ("init", "initializer_range")):
        if isinstance(getattr(config, key, None), float):
            keys[role] = key
    return keys


def _eps_key(config: Any) -> str | None:
    """What the config calls the small number in its norms."""
    found = [key for key, value in config.to_dict().items() if key.endswith(("eps", "epsilon")) and value is not None]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class _Traits:
    """What each kind of tensor does, and what is special in this family."""

    parts: dict[str, frozenset[Part]]
    offsets: dict[str, float]
    shape: dict[str, Any]

    def laid_out(self, layout: Layout, shape: ConfigShape) -> Layout:
        """A layout with what its tensors do, over a shape with what is special in it."""
        kind_of = lambda name: layout.with_layer(name, 0)  # noqa: E731
        offsets = {name: self.offsets.get(kind_of(name), 0.0) for name in layout.tensors}
        return replace(
            layout,
            shape=replace(shape, **self.shape),
            parts={name: self.parts[kind_of(name)] for name in layout.tensors},
            offsets={name: offset for name, offset in offsets.items() if offset},
        )

    @classmethod
    def of(cls, small: _Small, kinds: Mapping[str, Axes]) -> _Traits:
        final = _final_norm(small, kinds)
        feeding = _feeding_norms(small, kinds)
        norms = {name.rpartition(".")[0]: name for name, axes in kinds.items() if _is_norm_weight(name, axes)}
        offsets, types = {}, set()
        for owner, name in norms.items():
            module = small.model.get_submodule(owner)
            offsets[name] = _offset(small, module, name)
            if "hidden" in kinds[name][0].roles:
                types.add(_norm_type(module, small.weights[name]))
        if len(types) != 1:
            raise refused(small.probe.config, "norms", f"norms of kinds {sorted(types)}")
        head_norms = {role for name in norms.values() for role in kinds[name][0].roles} & HEADS
        if head_norms and not feeding:
            raise refused(small.probe.config, "norms over heads", "no projection that they alone follow")
        parts = {name: _parts(name, axes, kinds, final, feeding) for name, axes in kinds.items()}
        shape = {
            "norm": types.pop(),
            "normed_heads": "none" if not head_norms else "each" if head_norms == {"head_dim"} else "all",
            "embedding_power": _embedding_power(small, kinds),
        }
        return cls(parts, offsets, shape)


def _parts(
    name: str, axes: Axes, kinds: Mapping[str, Axes], final: str | None, feeding: frozenset[str]
) -> frozenset[Part]:
    owner = name.rpartition(".")[0]
    along_hidden = len(axes) == 1 and axes[0].side == "along" and "hidden" in axes[0].roles
    does: dict[Part, bool] = {
        "embeds": len(axes) == 2 and axes[0].roles <= {"vocab", "positions"} and axes[0].side == "in",
        "writes_residual": writes_residual(axes),
        "reads_residual": reads_residual(axes),
        "scales_residual": along_hidden and not name.endswith("bias"),
        "final_norm": owner == final,
        "feeds_norm": owner in feeding,
        "routes": any("experts" in axis.roles and axis.side == "out" for axis in axes),
        "bias": name.endswith("bias"),
    }
    return frozenset(part for part, holds in does.items() if holds)


def _is_norm_weight(name: str, axes: Axes) -> bool:
    return len(axes) == 1 and axes[0].side == "along" and name.endswith("weight")


def _final_norm(small: _Small, kinds: Mapping[str, Axes]) -> str | None:
    """The module whose output the read-out reads."""
    outputs: dict[str, Tensor] = {}
    seen: list[Tensor] = []
    owners = {name.rpartition(".")[0] for name, axes in kinds.items() if _is_norm_weight(name, axes)}
    hooks = [
        small.model.get_submodule(owner).register_forward_hook(
            lambda module, args, output, owner=owner: outputs.__setitem__(owner, output)
        )
        for owner in owners
        if not owner.startswith(small.stem)
    ]
    readout = small.model.get_output_embeddings()
    hooks.append(readout.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
    small.logits(small.weights)
    for hook in hooks:
        hook.remove()
    return next(
        (o for o, output in outputs.items() if output.shape == seen[0].shape and torch.equal(output, seen[0])), None
    )


def _feeding_norms(small: _Small, kinds: Mapping[str, Axes]) -> frozenset[str]:
    """The modules whose output can be doubled and attention gives the same, since a norm over heads follows."""
    owners = {
        name.rpartition(".")[0]
        for name, axes in kinds.items()
        if any(axis.side == "out" and axis.roles & {"heads", "kv_heads"} for axis in axes)
    }
    attended = next(
        name.rpartition(".")[0]
        for name, axes in kinds.items()
        if any(a.side == "in" and "heads" in a.roles for a in axes)
    )
    outputs: list[Tensor] = []
    hook = small.model.get_submodule(attended).register_forward_hook(lambda m, args, output: outputs.append(output))
    feeding = set()
    small.logits(small.weights)
    for owner in owners:
        own = lambda name, owner=owner: small.kind_of(name).rpartition(".")[0] == owner  # noqa: E731
        small.logits({name: weight * 2 if own(name) else weight for name, weight in small.weights.items()})
        if (outputs[-1] - outputs[0]).abs().max() <= SAME * outputs[0].abs().max():
            feeding.add(owner)
    hook.remove()
    return frozenset(feeding)


def _norm_type(module: nn.Module, weight: Tensor) -> str:
    x = torch.randn(3, len(weight))
    with torch.no_grad():
        same = torch.allclose(module(x + 5.0), module(x), atol=1e-3, rtol=1e-3)
    return "layer" if same else "rms"


def _offset(small: _Small, module: nn.Module, name: str) -> float:
    """What the norm adds to its weight: 0, or 1 as in Gemma."""
    x = torch.randn(3, *small.weights[name].shape)
    zero = {n: torch.zeros_like(w) for n, w in module.named_parameters()}
    one = {n: torch.ones_like(w) if n == "weight" else torch.zeros_like(w) for n, w in module.named_parameters()}
    with torch.no_grad():
        at_zero, at_one = (torch.func.functional_call(module, weights, (x,)) for weights in (zero, one))
    for offset in (0.0, 1.0):
        if torch.allclose(at_zero, at_one * offset / (1 + offset), atol=1e-5):
            return offset
    raise refused(small.probe.config, name, "a norm that isn't linear in its weight")


def _embedding_power(small: _Small, kinds: Mapping[str, Axes]) -> float:
    """How the factor on embeddings grows with the width: 0, or 0.5 where they are multiplied by its square root."""
    probe = small.probe
    wide = {"hidden_size": 2 * probe.size("hidden")}
    if probe.follows_width:
        wide["num_attention_heads"] = 2 * probe.size("heads")
    scales = [_embedding_scale(config, small, kinds) for config in (probe.config, with_sizes(probe.config, **wide))]
    return round(float(np.log2(scales[1] / scales[0])), 3) if all(scales) else 0.0  # 0: a norm follows at once


def _embedding_scale(config: Any, small: _Small, kinds: Mapping[str, Axes]) -> float:
    """What the first layer gets for embeddings of 1 (and positions of 0)."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    got: list[Tensor] = []
    layer = model.get_submodule(f"{small.stem}0")
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: got.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            axes = kinds[small.kind_of(name)]
            if len(axes) == 2 and axes[0].roles == {"positions"}:
                weight.zero_()
        model.get_input_embeddings().weight.fill_(1.0)
        model(small.input_ids)
    return got[0].mean().item()
