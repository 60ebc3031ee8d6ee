"""Experts: a mixture of experts out of a dense model, each expert a copy of its MLP (sparse upcycling).

The class of the model changes, so this isn't a matter of index maps: each tensor of the new model is the dense one of
the same name, or is put together from the dense MLP by the roles of its axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from espalier.errors import ModelError
from espalier.folder import ModelFolder
from espalier.grow.apply import Weights, write_grown
from espalier.model import build
from espalier.model.axes import discover
from espalier.model.build import draw
from espalier.model.layout import Layout
from espalier.model.reshape import Read
from espalier.model.shards import SHARD_BYTES
from espalier.model.stored import StoredModel


@dataclass(frozen=True)
class Family:
    """The mixture that holds a dense family's blocks unchanged; keys of its config."""

    model_type: str
    experts: str
    neurons: str = "intermediate_size"
    fixed: tuple[tuple[str, Any], ...] = ()


FAMILIES = {
    "llama": Family("mixtral", "num_local_experts", fixed=(("sliding_window", None),)),
    "mistral": Family("mixtral", "num_local_experts"),
    "granite": Family("granitemoe", "num_local_experts"),
    "qwen3": Family(
        "qwen3_moe",
        "num_experts",
        "moe_intermediate_size",
        fixed=(("norm_topk_prob", True), ("decoder_sparse_step", 1), ("mlp_only_layers", [])),
    ),
}
ROUTER_STD = 0.02


@dataclass(frozen=True)
class Upcycling:
    """How a dense model becomes a mixture: every MLP is copied, and a new router chooses among the copies (Komatsuzaki
    et al., arXiv 2212.05055; AquilaMoE, arXiv 2408.06567). The function stays without noise and drop: gates sum to 1.

    experts    copies of the MLP
    per_token  how many of them each token is sent to
    shards     split each copy's neurons into so many experts of their own, `experts` x `shards` in all; the router's
               rows of one copy are equal, so that its shards are taken together (virtual groups, arXiv 2410.07524)
    noise      added to each expert's weights, in standard deviations of the weight
    drop       share of each expert's neurons that are drawn anew (Drop-Upcycling, arXiv 2502.19261)

    Copies that are alike stay so only until the router sends them different tokens.
    """

    experts: int
    per_token: int = 2
    shards: int = 1
    noise: float = 0.0
    drop: float = 0.0
    seed: int = 0

    @property
    def exact(self) -> bool:
        return self.noise == self.drop == 0


def upcycle(model: PreTrainedModel, how: Upcycling) -> PreTrainedModel:
    """A new model, the mixture of `model`, which isn't changed."""
    old = {name: weight.detach() for name, weight in model.state_dict().items()}
    plan = plan_mixture(model.config.to_dict(), how, old.__getitem__)
    state = {name: plan.read(name) for name in plan.layout.tensors}
    grown = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plan.config), dtype=model.dtype)
    grown.load_state_dict(state | {alias: state[name] for alias, name in plan.layout.tied.items()}, assign=False)
    grown.generation_config = model.generation_config
    return grown.train(model.training)


def upcycle_folder(
    parent: ModelFolder,
    out: Path,
    how: Upcycling,
    *,
    finish: Callable[[Path], None],
    tell: Callable[[str], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the mixture of a folder's model into the folder `out`; as `apply.grow_folder` does."""
    stored = StoredModel.open(parent, discover(parent.config))
    plan = plan_mixture(parent.config, how, stored.read)
    in_memory = lambda: upcycle(build.load(parent, dtype="auto"), how)  # noqa: E731
    write_grown(
        parent,
        out,
        plan,
        stored,
        ["upcycle", asdict(how)],
        in_memory,
        finish=finish,
        tell=tell,
        shard_bytes=shard_bytes,
    )


def plan_mixture(config: dict[str, Any], how: Upcycling, read: Read) -> Weights:
    """The mixture of the model that `config` describes and whose tensors `read` gives."""
    mixture = _mixture_config(AutoConfig.for_model(**config), how).to_dict()
    dense, mixed = discover(config), discover(mixture)
    is_kept = lambda name: name in dense.tensors and dense.sizes(name) == mixed.sizes(name)  # noqa: E731
    return Weights(
        mixture,
        mixed,
        lambda name: read(name) if is_kept(name) else _tensor(name, mixed, dense, read, how),
        origin=lambda name: name if is_kept(name) else None,
        kin=lambda name: name if is_kept(name) else _mlp(dense, mixed.layer_of(name))[0],
    )


def _mixture_config(dense: Any, how: Upcycling) -> Any:
    family = FAMILIES.get(dense.model_type)
    if family is None:
        raise ModelError(
            "model_type",
            found=dense.model_type,
            expected=f"one of {', '.join(FAMILIES)}, for which transformers has a mixture with the same attention",
            mend="Upcycle a model of one of these families.",
        )
    if how.per_token > how.experts:
        raise ModelError(
            "experts_per_token",
            found=f"{how.per_token} of {how.experts} experts",
            expected="no more than there are",
            mend="Raise experts or lower experts_per_token.",
        )
    if dense.intermediate_size % how.shards:
        raise ModelError(
            "shards",
            found=f"{dense.intermediate_size} neurons in {how.shards} shards",
            expected="a divisor of intermediate_size",
            mend="Choose such a number.",
        )
    known = AutoConfig.for_model(family.model_type).to_dict()
    own = ("model_type", "architectures", "transformers_version")
    shared = {key: value for key, value in dense.to_dict().items() if key in known and key not in own}
    chosen = {
        family.neurons: dense.intermediate_size // how.shards,
        family.experts: how.experts * how.shards,
        "num_experts_per_tok": how.per_token * how.shards,
    }
    return AutoConfig.for_model(family.model_type, **{**shared, **dict(family.fixed), **chosen})


def _tensor(name: str, mixed: Layout, dense: Layout, old: Read, how: Upcycling) -> Tensor:
    """A tensor that the dense model hasn't: a router, or experts put together from the MLP."""
    axes = mixed.tensors[name]
    if not any("experts" in axis.roles for axis in axes):
        raise ModelError(
            name,
            found=f"{dense.sizes(name) if name in dense.tensors else 'no such tensor'} in the dense model",
            expected=f"{mixed.sizes(name)}, as the mixture of its family has it",
            mend="The mixture can't hold this shape (a head_dim of its own, for example); upcycle another model.",
        )
    layer = mixed.layer_of(name)
    if "routes" in mixed.parts[name]:
        rows = draw(name, (how.experts, axes[1].size), ROUTER_STD, how.seed)
        return rows.repeat_interleave(how.shards, dim=0)
    gate, up, down = (old(part) for part in _mlp(dense, layer))
    writes = next(index for index, axis in enumerate(axes) if axis.side == "out")
    if "hidden" in axes[writes].roles:  # a copy's shards add up with its gate divided between them
        whole, across = (down * how.shards)[None].repeat(how.experts, 1, 1), 2
    else:
        whole, across = torch.stack([gate, up], dim=1)[None].repeat(how.experts, 1, 1, 1), 1
    if not how.exact:
        whole = _varied(whole, across, name, how)
    parts = torch.stack(whole.chunk(how.shards, dim=across), dim=1).flatten(0, 1)
    return parts if across == 2 else parts.transpose(1, 2).flatten(1, 2)


def _varied(whole: Tensor, across: int, name: str, how: Upcycling) -> Tensor:
    """The experts' weights (experts, ...) with noise, and with some neurons (along `across`) drawn anew."""
    std = whole.float().std().item()
    if how.noise:
        whole = whole + draw(f"{name} noise", tuple(whole.shape), how.noise * std, how.seed).to(whole)
    if how.drop:
        experts, neurons = whole.shape[0], whole.shape[across]
        # The same neurons in gate, up and down: the key leaves the tensor's own name out.
        layer = name.rpartition(".experts")[0]
        order = draw(f"{layer} drop", (experts, neurons), 1.0, how.seed).argsort(dim=1)
        anew = order < round(how.drop * neurons)
        shape = [experts] + [1] * (whole.ndim - 1)
        shape[across] = neurons
        fresh = draw(f"{name} fresh", tuple(whole.shape), std, how.seed).to(whole)
        whole = torch.where(anew.view(shape), fresh, whole)
    return whole


def _mlp(dense: Layout, layer: int | None) -> tuple[str, str, str]:
    """The names of a layer's gate, up and down projections."""
    names = [name for name in dense.in_layer(layer) if any("ffn" in axis.roles for axis in dense.tensors[name])]
    gate, up, down = (next(name for name in names if f"{part}_proj" in name) for part in ("gate", "up", "down"))
    return gate, up, down
