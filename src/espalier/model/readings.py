"""Readings: what the axes of a model's tensors can be, as far as shapes tell.

A small config of the same kind is built on the meta device, where it costs no memory; one size is doubled at a time,
and the axes that move are watched.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from espalier.errors import ModelError
from espalier.model.growth import Role
from espalier.model.layout import Axes, Axis, Block, Side
from espalier.model.shape import KEYS

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


@dataclass(frozen=True)
class Probe:
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
    def of(cls, config: Any) -> Probe:
        heads = getattr(config, "num_attention_heads", None)
        hidden = getattr(config, "hidden_size", None)
        if not isinstance(heads, int) or not isinstance(hidden, int):
            raise refused(config, "hidden_size, num_attention_heads", "no such sizes in the config")
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
    small = with_sizes(small, **values)
    if _moves_a_tensor(small, "max_position_embeddings"):  # learned ones; others are left as they are
        small.max_position_embeddings = positions
    if isinstance(per_token := getattr(small, "num_experts_per_tok", None), int):
        small.num_experts_per_tok = min(per_token, SMALL["experts"] // 2)
    return small


def _moves_a_tensor(config: Any, key: str) -> bool:
    value = getattr(config, key, None)
    return isinstance(value, int) and _shapes(config) != _shapes(with_sizes(config, **{key: 2 * value}))


def _has_head_dim(small: Any, head_dim: int) -> bool:
    """Whether the head size is a size of its own: it moves tensors, and the width moves none of its in its place."""
    try:
        stated = with_sizes(small, head_dim=head_dim)
        moved = _moves(stated, head_dim=2 * head_dim)
    except AttributeError:
        return False
    with_width = _moves(stated, hidden_size=2 * small.hidden_size)
    with_heads = _moves(stated, num_key_value_heads=2 * SMALL["kv_heads"])
    mixed = any(a and b for name in moved for a, b in zip(with_width[name], with_heads[name], strict=True))
    return any(any(by) for by in moved.values()) and not mixed


def _moves(config: Any, **changed: int) -> dict[str, tuple[int, ...]]:
    before, after = _shapes(config), _shapes(with_sizes(config, **changed))
    return {
        name: tuple(b - a for a, b in zip(shape, after.get(name, shape), strict=True)) for name, shape in before.items()
    }


Reading = dict[str, Axes]  # what the axes of one module's tensors are


def readings_of(probe: Probe) -> list[list[Reading]]:
    """For every module of the first layer, and those outside the layers, the readings that its shapes allow."""
    model = on_meta(probe.config)
    stem = stem_of(probe, model)
    owned: dict[str, list[str]] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or (name.startswith(stem) and not name.startswith(f"{stem}0.")):
            continue
        seen.add(id(tensor))
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    return [_module_readings(names, model, probe) for names in owned.values()]


def _module_readings(names: list[str], model: nn.Module, probe: Probe) -> list[Reading]:
    """Every reading in which a bias is what the weight beside it writes."""
    options = [list(_tensor_readings(name, model, probe)) for name in names]
    readings = [dict(zip(names, choice, strict=True)) for choice in itertools.product(*options)]
    return [reading for reading in readings if len({_written(axes) for axes in reading.values()} - {None}) <= 1]


def _written(axes: Axes) -> tuple[Block, ...] | None:
    """What a tensor writes; None for one that is written along an axis of its own, as experts are."""
    written = [axis.blocks for axis in axes if axis.side == "out"]
    return written[0] if written and not any(axis.side == "along" for axis in axes) else None


def stem_of(probe: Probe, model: nn.Module) -> str:
    """What comes before the layer number, from the names that appear when there is one layer more."""
    longer = with_sizes(probe.config, num_hidden_layers=SMALL_LAYERS + 1)
    for key, value in list(vars(longer).items()):
        if isinstance(value, list) and len(value) == SMALL_LAYERS and not key.endswith(("token_id", "token_ids")):
            setattr(longer, key, [*value, value[-1]])
    appeared = [name.split(".") for name in _shapes(longer) if name not in model.state_dict()]
    shared = [parts[0] for parts in zip(*appeared, strict=False) if len(set(parts)) == 1]
    if str(SMALL_LAYERS) not in shared:
        raise refused(
            probe.config, "the layers", f"no common place of what a layer more adds ({len(appeared)} tensors)"
        )
    return ".".join(shared[: shared.index(str(SMALL_LAYERS))]) + "."


def _tensor_readings(name: str, model: nn.Module, probe: Probe) -> Iterator[Axes]:
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


def _block_readings(name: str, index: int, probe: Probe) -> list[tuple[Block, ...]]:
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
            raise refused(probe.config, name, f"axis {index} of {size}, of which {role} moves {moved[role]}")
        parts.append((role, unit, times))  # type: ignore[arg-type]
    if not moved:
        return [(Block("fixed", size),)]
    if not parts:
        parts = [("head_dim", 1, moved["head_dim"] // probe.head_dim)]
    count = lambda role: probe.head_dim if role == "head_dim" else probe.size(role)  # noqa: E731
    if size != sum(count(role) * unit * times for role, unit, times in parts):
        moved_by = " and ".join(probe.keys.get(role, role) for role in moved)
        raise refused(probe.config, name, f"axis {index} of {size}, which follows {moved_by} in part")
    runs = [Block(role, count(role), unit) for role, unit, times in parts for _ in range(times)]
    readings = list(dict.fromkeys(itertools.permutations(runs))) if len(parts) > 1 else [tuple(runs)]
    if len(parts) == 1 and len(runs) > 1:
        readings.append((Block(runs[0].role, runs[0].count, runs[0].unit * len(runs)),))
    return readings


def _width_readings(
    name: str, index: int, size: int, moved: Mapping[str, int], probe: Probe
) -> list[tuple[Block, ...]]:
    """An axis that moves with hidden size and heads together: channels or heads, several times or interleaved."""
    hidden, heads = probe.size("hidden"), probe.size("heads")
    times, rest = divmod(moved["width"], hidden)
    if rest or size != times * hidden or len(moved) > 1:
        raise refused(probe.config, name, f"axis {index} of {size}, which follows hidden_size in part")
    head = Block("heads", heads, probe.head_dim)
    if times == 1:
        return [(Block("hidden", hidden),), (head,)]
    return [(head,) * times, (Block("heads", heads, times * probe.head_dim),)]


def _sides(name: str, blocks: tuple[tuple[Block, ...], ...], model: nn.Module, probe: Probe) -> tuple[Side, ...]:
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
    raise refused(probe.config, name, f"a tensor of shape {shape} in a {type(module).__name__}")


def on_meta(config: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in on_meta(config).state_dict().items()}


def with_sizes(config: Any, **values: Any) -> Any:
    changed = copy.deepcopy(config)
    for key, value in values.items():
        setattr(changed, key, value)
    return changed


def refused(config: Any, name: str, found: str) -> ModelError:
    return ModelError(
        f"{config.model_type}: {name}",
        found=found,
        expected="axes that each follow the sizes of the config",
        mend="This family can't be reshaped yet; report the tensor.",
    )
