"""Axes: what each axis of each tensor of a model stands for, found out from the model itself.

There is no table of architectures. A small model of the same kind is built on the meta device, where it costs no
memory; one size is doubled at a time, and the axes that move are watched. Shapes alone leave questions open: in which
order a fused projection holds queries, keys and values, or whether a square matrix writes heads or channels. So every
reading that the shapes allow is tried on a small real model: it holds if shuffling channels, neurons, heads and experts
by it leaves the function as it was, and so does a copy of each of them that halves what it is read with. A tensor that
no reading explains is refused by name, never guessed.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from espalier.errors import ModelError
from espalier.model import reshape
from espalier.model.growth import Growth, IndexMap, LayerMap, Part, Role
from espalier.model.layout import Axes, Axis, Block, Layout, Side, reads_residual, writes_residual

# What sizes are called in configs; the first that the config has, and that moves a tensor, counts.
KEYS: dict[Role, tuple[str, ...]] = {
    "vocab": ("vocab_size",),
    "positions": ("max_position_embeddings",),
    "hidden": ("hidden_size",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "expert_ffn": ("moe_intermediate_size",),
    "shared_ffn": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
}
# The small model's sizes: all different, so that no two are mistaken for each other where they meet in a message.
SMALL: dict[Role, int] = {
    "vocab": 64,
    "positions": 80,
    "ffn": 48,
    "expert_ffn": 40,
    "shared_ffn": 56,
    "experts": 4,
    "heads": 4,
    "kv_heads": 2,
}
SMALL_LAYERS = 2
# The roles that growth adds slots to.
HEADS: frozenset[Role] = frozenset({"heads", "kv_heads", "head_dim"})
GROWING: frozenset[Role] = frozenset({"hidden", "ffn", "expert_ffn", "shared_ffn", "heads", "kv_heads"})
DERIVED_FFN = 4  # times the width, where a config leaves it out
# Logits of a shuffled model may differ by rounding, relative to the largest.
SAME = 1e-3


@dataclass(frozen=True)
class ConfigShape:
    """The shape of any causal LM, over its Hugging Face config; sizes have the names that most families give them.

    keys            what the config calls the size of each role, and "layers", "eps", "scaling", "init"
    head_dim        channels of a head; `follows_width` where it is hidden_size / num_attention_heads, so that these
                    two can only grow together
    embedding_power the model multiplies embeddings by this power of its width
    """

    config: Mapping[str, Any]
    keys: Mapping[str, str]
    head_dim: int
    follows_width: bool
    norm: Literal["rms", "layer"] = "rms"
    normed_heads: Literal["none", "each", "all"] = "none"
    embedding_power: float = 0.0

    def _size(self, role: str) -> Any:
        return self.config[self.keys[role]]

    @property
    def hidden_size(self) -> int:
        return self._size("hidden")

    @property
    def intermediate_size(self) -> int:
        return self._size("ffn") if "ffn" in self.keys else 0

    @property
    def num_hidden_layers(self) -> int:
        return self._size("layers")

    @property
    def num_attention_heads(self) -> int:
        return self._size("heads")

    @property
    def num_key_value_heads(self) -> int:
        return self._size("kv_heads") if "kv_heads" in self.keys else self.num_attention_heads

    @property
    def rms_norm_eps(self) -> float:
        return self._size("eps")

    @property
    def logits_scaling(self) -> float:
        return self._size("scaling") if "scaling" in self.keys else 1.0

    @property
    def tie_word_embeddings(self) -> bool:
        return bool(self.config.get("tie_word_embeddings"))

    @property
    def embedding_scale(self) -> float:
        return self.hidden_size**self.embedding_power

    @property
    def initializer_range(self) -> float:
        return self._size("init") if "init" in self.keys else 0.02

    def fields(self) -> dict[str, Any]:
        return {NAMES.get(role, role): self.config[key] for role, key in self.keys.items()}

    def to_config(self) -> dict[str, Any]:
        return dict(self.config)

    def changed(self, **sizes: Any) -> Self:
        """This shape with other sizes; a size that the model doesn't have is refused."""
        roles = {name: role for role, name in NAMES.items()}
        values: dict[str, Any] = {}
        for name, size in sizes.items():
            if roles.get(name) in self.keys:
                values[self.keys[roles[name]]] = size
            elif name == "num_key_value_heads" and size == sizes.get("num_attention_heads", self.num_attention_heads):
                continue
            else:
                raise ModelError(
                    name,
                    found=f"{self.config.get('model_type')} has no such size",
                    expected=f"one of {', '.join(sorted(self.fields()))}",
                    mend="State a size that the model has.",
                )
        changed = replace(self, config={**self.config, **values})
        changed._require_fit()
        return changed

    def _require_fit(self) -> None:
        heads, kv_heads, hidden = self.num_attention_heads, self.num_key_value_heads, self.hidden_size
        if self.follows_width and hidden != heads * self.head_dim:
            raise ModelError(
                "hidden_size",
                found=f"{hidden} with {heads} heads of {self.head_dim}",
                expected=f"num_attention_heads * {self.head_dim}: in this family the head size follows from the two",
                mend=f"State num_attention_heads={max(hidden // self.head_dim, 1)} and a hidden_size to match.",
            )
        if heads % kv_heads:
            raise ModelError(
                "num_key_value_heads",
                found=f"{kv_heads} for {heads} query heads",
                expected="a divisor of num_attention_heads",
                mend="Change one of the two.",
            )


# The names of ConfigShape's sizes.
NAMES: dict[str, str] = {role: keys[0] for role, keys in KEYS.items()} | {
    "experts": "num_experts",
    "layers": "num_hidden_layers",
    "eps": "rms_norm_eps",
    "scaling": "logits_scaling",
    "init": "initializer_range",
}


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
        probe = _Probe.of(config)
        readings = _readings(probe)
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


def _on_meta(config: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _on_meta(config).state_dict().items()}


def _with(config: Any, **values: Any) -> Any:
    changed = copy.deepcopy(config)
    for key, value in values.items():
        setattr(changed, key, value)
    return changed


# --- what the shapes say ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Probe:
    """A small config of the same kind, and how the shapes of its tensors move with each size.

    moves  role -> name -> how much each axis grows when the size is doubled; "width" stands for hidden size and heads
           doubled together, where the head size follows from them
    """

    config: Any
    keys: dict[str, str]
    head_dim: int
    follows_width: bool
    base: dict[str, tuple[int, ...]]
    moves: dict[str, dict[str, tuple[int, ...]]]

    @classmethod
    def of(cls, config: Any) -> _Probe:
        heads = getattr(config, "num_attention_heads", None)
        hidden = getattr(config, "hidden_size", None)
        if not isinstance(heads, int) or not isinstance(hidden, int):
            raise _refused(config, "hidden_size, num_attention_heads", "no such sizes in the config")
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        small = _shrunk(config, head_dim)
        follows_width = not _has_head_dim(small, head_dim)
        if not follows_width:
            small.head_dim = head_dim
        aliases = getattr(config, "attribute_map", {})
        keys: dict[str, str] = {}
        moves: dict[str, dict[str, tuple[int, ...]]] = {}
        for role, names in KEYS.items():
            if follows_width and role in ("hidden", "heads"):
                keys[role] = aliases.get(names[0], names[0])
                continue
            for key in names:
                if isinstance(value := getattr(small, key, None), int) and value > 0:
                    moved = _moves(small, **{key: 2 * value})
                    if any(any(by) for by in moved.values()):
                        keys[role], moves[role] = aliases.get(key, key), moved
                        break
        if follows_width:
            moves["width"] = _moves(small, hidden_size=2 * small.hidden_size, num_attention_heads=2 * SMALL["heads"])
        else:
            moves["head_dim"] = _moves(small, head_dim=2 * head_dim)
        return cls(small, keys, head_dim, follows_width, _shapes(small), moves)

    def size(self, role: str) -> int:
        return getattr(self.config, self.keys[role])


def _shrunk(config: Any, head_dim: int) -> Any:
    """The config with few layers, heads, neurons and experts; what isn't a size stays as it is."""
    small = copy.deepcopy(config)
    layers = config.num_hidden_layers
    for key, value in list(vars(small).items()):
        if isinstance(value, list) and len(value) == layers and not key.endswith(("token_id", "token_ids")):
            setattr(small, key, (value * SMALL_LAYERS)[:SMALL_LAYERS])
    for key in ("bos_token_id", "eos_token_id"):
        setattr(small, key, 0)
    small.pad_token_id = None
    values = {"num_hidden_layers": SMALL_LAYERS, "hidden_size": SMALL["heads"] * head_dim}
    for role, names in KEYS.items():
        for key in names:
            current = getattr(small, key, None)
            if isinstance(current, int) and current > 0 and role in SMALL:
                values[key] = min(SMALL[role], max(current, 1)) if role == "experts" else SMALL[role]
            elif current is None and role == "ffn" and hasattr(small, key):
                values[key] = SMALL[role]  # a size left to be derived is stated, so that it can be moved alone
    positions = values.pop("max_position_embeddings", None)
    small = _with(small, **values)
    if _moves_a_tensor(small, "max_position_embeddings"):  # learned ones; others are left as they are
        small.max_position_embeddings = positions
    if isinstance(per_token := getattr(small, "num_experts_per_tok", None), int):
        small.num_experts_per_tok = min(per_token, SMALL["experts"] // 2)
    return small


def _moves_a_tensor(config: Any, key: str) -> bool:
    value = getattr(config, key, None)
    return isinstance(value, int) and _shapes(config) != _shapes(_with(config, **{key: 2 * value}))


def _has_head_dim(small: Any, head_dim: int) -> bool:
    """Whether the head size is a size of its own: it moves tensors, and the width moves none of its in its place."""
    try:
        stated = _with(small, head_dim=head_dim)
        moved = _moves(stated, head_dim=2 * head_dim)
    except AttributeError:
        return False
    with_width = _moves(stated, hidden_size=2 * small.hidden_size)
    with_heads = _moves(stated, num_key_value_heads=2 * SMALL["kv_heads"])
    mixed = any(a and b for name in moved for a, b in zip(with_width[name], with_heads[name], strict=True))
    return any(any(by) for by in moved.values()) and not mixed


def _moves(config: Any, **changed: int) -> dict[str, tuple[int, ...]]:
    before, after = _shapes(config), _shapes(_with(config, **changed))
    return {
        name: tuple(b - a for a, b in zip(shape, after.get(name, shape), strict=True)) for name, shape in before.items()
    }


Reading = dict[str, Axes]  # what the axes of one module's tensors are


def _readings(probe: _Probe) -> list[list[Reading]]:
    """For every module of the first layer, and those outside the layers, the readings that its shapes allow."""
    model = _on_meta(probe.config)
    stem = _stem(probe, model)
    owned: dict[str, list[str]] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or (name.startswith(stem) and not name.startswith(f"{stem}0.")):
            continue
        seen.add(id(tensor))
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    return [_module_readings(names, model, probe) for names in owned.values()]


def _module_readings(names: list[str], model: nn.Module, probe: _Probe) -> list[Reading]:
    """Every reading in which a bias is what the weight beside it writes."""
    options = [list(_tensor_readings(name, model, probe)) for name in names]
    readings = [dict(zip(names, choice, strict=True)) for choice in itertools.product(*options)]
    return [reading for reading in readings if len({_written(axes) for axes in reading.values()} - {None}) <= 1]


def _written(axes: Axes) -> tuple[Block, ...] | None:
    """What a tensor writes; None for one that is written along an axis of its own, as experts are."""
    written = [axis.blocks for axis in axes if axis.side == "out"]
    return written[0] if written and not any(axis.side == "along" for axis in axes) else None


def _stem(probe: _Probe, model: nn.Module) -> str:
    """What comes before the layer number, from the names that appear when there is one layer more."""
    longer = _with(probe.config, num_hidden_layers=SMALL_LAYERS + 1)
    for key, value in list(vars(longer).items()):
        if isinstance(value, list) and len(value) == SMALL_LAYERS and not key.endswith(("token_id", "token_ids")):
            setattr(longer, key, [*value, value[-1]])
    appeared = [name.split(".") for name in _shapes(longer) if name not in model.state_dict()]
    shared = [parts[0] for parts in zip(*appeared, strict=False) if len(set(parts)) == 1]
    if str(SMALL_LAYERS) not in shared:
        raise _refused(
            probe.config, "the layers", f"no common place of what a layer more adds ({len(appeared)} tensors)"
        )
    return ".".join(shared[: shared.index(str(SMALL_LAYERS))]) + "."


def _tensor_readings(name: str, model: nn.Module, probe: _Probe) -> Iterator[Axes]:
    """Every combination of what its axes can be."""
    options = [_block_readings(name, index, probe) for index in range(len(probe.base[name]))]
    if len(options) == 1 or not all(len(readings) > 1 for readings in options):
        # Only a matrix from width to width, or a bias beside one, can be about heads where heads follow the width.
        options = [
            _channels(readings) if len(options) > 1 or _is_norm(name, model, inside=False) else readings
            for readings in options
        ]
    for blocks in itertools.product(*options):
        if len(blocks) == 2 and all(b[0].role == "heads" for b in blocks):
            continue  # heads are read from the residual stream, or written to it
        sides = _sides(name, blocks, model, probe)
        yield tuple(Axis(b, side) for b, side in zip(blocks, sides, strict=True))


def _channels(readings: list[tuple[Block, ...]]) -> list[tuple[Block, ...]]:
    """Channels rather than heads, where an axis can be either."""
    return [blocks for blocks in readings if blocks[0].role == "hidden"] or readings


def _is_norm(name: str, model: nn.Module, *, inside: bool = True) -> bool:
    """Whether the tensor belongs to a module that has vectors only: it scales and shifts.

    inside  count one that lies deeper than the layer, in its attention or MLP, too
    """
    owner = name.rpartition(".")[0]
    vectors = all(weight.ndim == 1 for weight in model.get_submodule(owner).parameters(recurse=False))
    depth = len(owner.partition(".0.")[2].split(".")) if ".0." in owner else 1
    return vectors and (inside or depth == 1)


def _block_readings(name: str, index: int, probe: _Probe) -> list[tuple[Block, ...]]:
    """The runs of slots that one axis can consist of, the likeliest first."""
    size = probe.base[name][index]
    parts: list[tuple[Role, int, int]] = []  # role, slots, how often
    moved = {role: by[name][index] for role, by in probe.moves.items() if by[name][index]}
    if "width" in moved:
        return _width_readings(name, index, size, moved, probe)
    for role in moved:
        if role == "head_dim":
            continue
        head = probe.size(role) * probe.head_dim
        unit = probe.head_dim if role in ("heads", "kv_heads") and moved[role] % head == 0 else 1
        times, rest = divmod(moved[role], probe.size(role) * unit)
        if rest or not times:
            raise _refused(probe.config, name, f"axis {index} of {size}, of which {role} moves {moved[role]}")
        parts.append((role, unit, times))  # type: ignore[arg-type]
    if not moved:
        return [(Block("fixed", size),)]
    if not parts:
        parts = [("head_dim", 1, moved["head_dim"] // probe.head_dim)]
    count = lambda role: probe.head_dim if role == "head_dim" else probe.size(role)  # noqa: E731
    if size != sum(count(role) * unit * times for role, unit, times in parts):
        moved_by = " and ".join(probe.keys.get(role, role) for role in moved)
        raise _refused(probe.config, name, f"axis {index} of {size}, which follows {moved_by} in part")
    runs = [Block(role, count(role), unit) for role, unit, times in parts for _ in range(times)]
    readings = list(dict.fromkeys(itertools.permutations(runs))) if len(parts) > 1 else [tuple(runs)]
    if len(parts) == 1 and len(runs) > 1:
        readings.append((Block(runs[0].role, runs[0].count, runs[0].unit * len(runs)),))
    return readings


def _width_readings(
    name: str, index: int, size: int, moved: Mapping[str, int], probe: _Probe
) -> list[tuple[Block, ...]]:
    """An axis that moves with hidden size and heads together: channels or heads, several times or interleaved."""
    hidden, heads = probe.size("hidden"), probe.size("heads")
    times, rest = divmod(moved["width"], hidden)
    if rest or size != times * hidden or len(moved) > 1:
        raise _refused(probe.config, name, f"axis {index} of {size}, which follows hidden_size in part")
    head = Block("heads", heads, probe.head_dim)
    if times == 1:
        return [(Block("hidden", hidden),), (head,)]
    return [(head,) * times, (Block("heads", heads, times * probe.head_dim),)]


def _sides(name: str, blocks: tuple[tuple[Block, ...], ...], model: nn.Module, probe: _Probe) -> tuple[Side, ...]:
    """Which way each axis faces, by the module that owns the tensor; by its roles in a module of the model's own."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    bias = leaf.endswith("bias")
    if isinstance(module, nn.Linear):
        return ("out",) if bias else ("out", "in")
    if type(module).__name__ == "Conv1D":
        return ("out",) if bias else ("in", "out")
    if isinstance(module, nn.Embedding):
        return ("in", "out")
    if _is_norm(name, model):
        along: Side = "along"
        return (along,) * len(blocks)
    roles = [axis[0].role for axis in blocks]
    if roles == ["experts"]:
        return ("out",)
    if roles == ["experts", "hidden"]:
        return ("along", "out") if bias else ("out", "in")
    if len(roles) == 2 and roles[0] == "experts" and bias:
        return ("along", "out")
    if len(roles) == 3 and roles[0] == "experts" and "hidden" in roles:
        # A gate and an up projection side by side can only be written; what is left over is down.
        wide = next(i for i in (1, 2) if roles[i] != "hidden")
        is_fused = sum(block.size for block in blocks[wide]) > blocks[wide][0].count
        sides: list[Side] = ["along", "in", "in"]
        sides[wide if is_fused else 3 - wide] = "out"
        return tuple(sides)
    if len(roles) == 1:
        return ("along",)
    shape = probe.base[name]
    raise _refused(probe.config, name, f"a tensor of shape {shape} in a {type(module).__name__}")


# --- what the function says ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Small:
    """A small real model with every weight random, on which readings are proved."""

    probe: _Probe
    stem: str
    readings: list[list[Reading]]
    model: PreTrainedModel
    weights: dict[str, Tensor]
    input_ids: Tensor

    @classmethod
    def of(cls, probe: _Probe, readings: list[list[Reading]]) -> _Small:
        config = copy.deepcopy(probe.config)
        if eps := _eps_key(config):
            setattr(config, eps, 1e-10)  # so that what a norm scales away is scaled away
        torch.manual_seed(0)
        model = _real(config)
        weights = {name: _random(weight) for name, weight in model.named_parameters()}
        input_ids = torch.randint(0, SMALL["vocab"], (2, 12))
        small = cls(probe, _stem(probe, _on_meta(probe.config)), readings, model, weights, input_ids)
        try:
            small.logits(weights)
        except RuntimeError as error:
            raise _refused(config, "the model", f"a small one of its kind that doesn't run ({error})") from error
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
        config = _with(probe.config, **{probe.keys[role]: size for role, size in doubled.items()})
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
            raise _refused(probe.config, "the model", "a function that depends on the number of heads or channels")

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
        return _refused(
            self.probe.config,
            name,
            f"no reading of the tensors by which the order of {' and '.join(roles)} doesn't matter",
        )


MOST_READINGS = 512


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


def _shuffles(probe: _Probe, roles: frozenset[Role]) -> dict[Role, IndexMap]:
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


# --- what each tensor does -------------------------------------------------------------------------------------------


def _at_full_size(config: Any, probe: _Probe, small: _Small, kinds: Mapping[str, Axes]) -> Layout:
    """The layout of the model itself, each of whose tensors has to be of a known kind and of the size it says."""
    traits = _Traits.of(small, kinds)
    small.require_sizes(kinds, traits)
    model = _on_meta(config)
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
            raise _refused(config, name, "a tensor that the first layers don't have")
        axes = tuple(
            replace(axis, blocks=tuple(replace(b, count=counts.get(b.role, b.count)) for b in axis.blocks))
            for axis in kinds[kind]
        )
        if tuple(axis.size for axis in axes) != tuple(tensor.shape):
            raise _refused(
                config, name, f"shape {tuple(tensor.shape)}, where {tuple(axis.size for axis in axes)} was expected"
            )
        tensors[name] = axes
    return traits.laid_out(Layout(shape, tensors, {}, small.stem, tied), shape)


def _shape_of(probe: _Probe) -> ConfigShape:
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
            raise _refused(small.probe.config, "norms", f"norms of kinds {sorted(types)}")
        head_norms = {role for name in norms.values() for role in kinds[name][0].roles} & HEADS
        if head_norms and not feeding:
            raise _refused(small.probe.config, "norms over heads", "no projection that they alone follow")
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
    raise _refused(small.probe.config, name, "a norm that isn't linear in its weight")


def _embedding_power(small: _Small, kinds: Mapping[str, Axes]) -> float:
    """How the factor on embeddings grows with the width: 0, or 0.5 where they are multiplied by its square root."""
    probe = small.probe
    wide = {"hidden_size": 2 * probe.size("hidden")}
    if probe.follows_width:
        wide["num_attention_heads"] = 2 * probe.size("heads")
    scales = [_embedding_scale(config, small, kinds) for config in (probe.config, _with(probe.config, **wide))]
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


def _refused(config: Any, name: str, found: str) -> ModelError:
    return ModelError(
        f"{config.model_type}: {name}",
        found=found,
        expected="axes that each follow the sizes of the config",
        mend="This family can't be reshaped yet; report the tensor.",
    )
