"""Parallel: how ranks share the training of one model. Nothing in a model's code knows of it.

    replicate  copies of the model
    shard      ranks that divide a copy: weights, gradients and the optimizer's state. FSDP2, ZeRO stage 3 (arXiv
               1910.02054); with several copies hybrid sharding
    tensor     ranks that divide every product, by the model class's own plan (arXiv 1909.08053)

Data ranks, replicate x shard, have rows of their own; those of a tensor group have the same rows.

An update is the same, bit for bit, whatever number of data ranks (a power of two) shares it, as copies or shards, as
long as each has a micro-batch. Micro-batches are dealt out one by one; gradients are added in pairs, pairs of pairs and
so on, across the ranks of a copy first, then across copies; what remains to be added up is added in float64. A tensor
group adds products up in another order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from transformers import PreTrainedModel

from espalier.errors import RecipeError
from espalier.train.recipe import ParallelRecipe
from espalier.world import World

REPLICATE, SHARD, TENSOR = "replicate", "shard", "tensor"
# What the plans of transformers' classes call the ways to divide a product.
STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
# The method of a model by which an objective is called inside its forward pass.
WITHIN = "within_forward"


@dataclass(frozen=True)
class Parallel:
    """The ranks of a world as copies, shards and tensor groups; a process by itself is one of each."""

    world: World = field(default_factory=World)
    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, world: World, recipe: ParallelRecipe, kind: str) -> Parallel:
        """As `over`; a process by itself shares nothing."""
        return cls.over(world, recipe, kind) if world.size > 1 else ALONE

    @classmethod
    def over(cls, world: World, recipe: ParallelRecipe, kind: str) -> Parallel:
        """All ranks of a world that is joined, as the recipe has it; `RecipeError` where they don't divide so."""
        sizes = replicate, shard, tensor = divided(world, recipe)
        mesh = init_device_mesh(kind, sizes, mesh_dim_names=(REPLICATE, SHARD, TENSOR))
        return cls(world, replicate, shard, tensor, mesh)

    def described(self) -> dict[str, int]:
        """The ranks along each axis."""
        return {REPLICATE: self.replicate, SHARD: self.shard, TENSOR: self.tensor}

    def micro_rows(self, rows: int, most: int) -> int:
        """Rows of a forward pass: the most, up to what is asked for, of which every rank has as many passes."""
        each = rows // self.data_ranks
        if self.data_ranks == 1:
            return min(most, each)
        return max(size for size in range(1, min(most, each) + 1) if each % size == 0)

    def require_rows(self, rows: int) -> None:
        """Refuse updates whose rows can't be dealt out evenly."""
        if rows % self.data_ranks:
            raise RecipeError(
                "train.batch_tokens",
                found=f"{rows} rows an update over {self.data_ranks} data ranks",
                expected=f"a multiple of {self.data_ranks} rows",
                mend="Change train.batch_tokens, or start another number of processes.",
            )

    @property
    def data_ranks(self) -> int:
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        return self.world.rank // self.tensor

    def divide(self, model: PreTrainedModel) -> None:
        """Split the products inside the layers over the tensor group, before anything else is done to them."""
        if self.mesh is not None and self.tensor > 1:
            require_plan(model, self.tensor)
            # It warns of every tensor that is put together over two axes, which only saves and Muon do.
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
            parallelize_module(model.base_model, self.mesh[TENSOR], _styles(model))

    def spread(self, model: PreTrainedModel) -> None:
        """Shard a model over the data ranks, layer by layer, after all else was done to the layers.

        Weights are sent, and gradients added up, in fp32: so the arithmetic is that of one process.
        """
        if self.mesh is None:
            return
        for layer in model.base_model.layers:
            fully_shard(layer, mesh=self.mesh[SHARD])
        fully_shard(model, mesh=self.mesh[SHARD])
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                module.set_custom_reduce_scatter(InPairs())
                if self.replicate > 1:  # not FSDP's own sum over copies, whose order is the network's library's
                    module.set_all_reduce_hook(partial(add_copies, group=self.mesh[REPLICATE].get_group()))
        setattr(model, WITHIN, _call)
        register_fsdp_forward_method(model, WITHIN)

    def gathered(self, *numbers: float) -> list[list[float]]:
        """The numbers of each data rank, in their order."""
        return self.world.numbers(*numbers)[:: self.tensor]

    @cached_property
    def copy(self) -> DeviceMesh | None:
        """The ranks that hold one copy of the model together."""
        return None if self.mesh is None else self.mesh[SHARD, TENSOR]._flatten(f"{SHARD}_{TENSOR}")

    def counts(self, tensor: Tensor) -> bool:
        """Whether this rank's part is nobody else's: what a tensor group doesn't divide each of its ranks has."""
        divided = isinstance(tensor, DTensor) and TENSOR in (tensor.device_mesh.mesh_dim_names or ())
        return divided or self.world.rank % self.tensor == 0

    def added(self, squares: Tensor) -> Tensor:
        """The sum over the ranks of one copy of a float64 scalar."""
        if self.copy is not None:
            distributed.all_reduce(squares, group=self.copy.get_group())
        return squares


ALONE = Parallel()


def divided(world: World, recipe: ParallelRecipe) -> tuple[int, int, int]:
    """(replicate, shard, tensor) ranks; their product is the world's size."""
    if world.size % recipe.tensor or world.local_size % recipe.tensor:
        raise RecipeError(
            "train.parallel.tensor",
            found=f"{recipe.tensor} ranks of {world.local_size} on a machine",
            expected="a divisor of them: a tensor group sends too much to leave its machine",
            mend="Lower train.parallel.tensor, or start as many processes on every machine.",
        )
    data = world.size // recipe.tensor
    shard = recipe.shard or data
    if data % shard:
        raise RecipeError(
            "train.parallel.shard",
            found=f"{shard} ranks to a copy, of {data}",
            expected=f"a divisor of {data}",
            mend="Leave it out: all ranks divide one copy.",
        )
    return data // shard, shard, recipe.tensor


def require_plan(model: PreTrainedModel, ranks: int) -> None:
    """Refuse to split a model whose class says not how, or says so in ways that we don't know."""
    config = model.config
    unknown = sorted(set((config.base_model_tp_plan or {"": "no plan"}).values()) - set(STYLES))
    sizes = {
        name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    }
    uneven = [f"{name} {size}" for name, size in sizes.items() if size % ranks]
    if unknown or uneven:
        raise RecipeError(
            "train.parallel.tensor",
            found=f"{ranks} ranks, and {type(model).__name__} with {', '.join(unknown or uneven)}",
            expected="a class whose plan splits by columns and rows, and sizes that the ranks divide",
            mend="Lower train.parallel.tensor, or change the sizes.",
        )


def _styles(model: PreTrainedModel) -> dict[str, ParallelStyle]:
    return {name: STYLES[style]() for name, style in model.config.base_model_tp_plan.items()}


def within(model: nn.Module, work: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`work(model, *inputs)` as a forward pass of the model: where it is sharded, with its outer weights gathered."""
    if hasattr(model, WITHIN):
        return getattr(model, WITHIN)(model, work, *inputs)
    return work(model, *inputs)


def forget(model: PreTrainedModel) -> None:
    """Let go of weights that a pass without a backward one has gathered: the next update would not reach them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _call(model: nn.Module, work: Callable[..., Tensor], *inputs: Any) -> Tensor:
    return work(model, *inputs)


class InPairs(ReduceScatter):
    """Sums over ranks in one fixed tree, ((0+1)+(2+3))+..., whatever the network's library would do."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: distributed.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        output_tensor.copy_(_added_part(input_tensor, group))


def add_copies(tensor: Tensor, *, group: distributed.ProcessGroup) -> None:
    """Put the sum over ranks in the same tree in a tensor's place, on all of them: each adds a part of it up."""
    if tensor.is_cuda:  # FSDP lets go of it before its stream for this is done
        tensor.record_stream(torch.cuda.current_stream())
    padded = F.pad(tensor.flatten(), (0, -tensor.numel() % group.size()))
    distributed.all_gather_single(padded, _added_part(padded, group), group=group)
    tensor.copy_(padded[: tensor.numel()].view_as(tensor))


def _added_part(tensor: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """This rank's part, of as many as there are ranks, of the sum over them."""
    received = torch.empty_like(tensor)
    distributed.all_to_all_single(received, tensor, group=group)
    return in_pairs(list(received.chunk(group.size())))


def in_pairs(parts: list[Tensor]) -> Tensor:
    """The sum of tensors, added in pairs, pairs of pairs and so on; the first holds it afterwards."""
    while len(parts) > 1:
        for left, right in zip(parts[::2], parts[1::2], strict=False):
            left.add_(right)
        parts = parts[::2]
    return parts[0]


class Pairs:
    """Gradients of micro-batches added in pairs, pairs of pairs and so on; at most log2 of them are held at a time.

    Autograd itself adds every second one to the first.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights
        self._done = 0
        self._held: list[list[Tensor | None]] = []

    def add(self, *, last: bool) -> None:
        """One more backward pass is done; after the last the weights have the sum as their gradients."""
        self._done += 1
        if last:
            while self._held:
                self._merge()
        elif self._done % 2 == 0:
            for _ in range((self._done & -self._done).bit_length() - 2):
                self._merge()
            self._held.append([weight.grad for weight in self.weights])
            for weight in self.weights:
                weight.grad = None

    def _merge(self) -> None:
        """Add the gradients to those held last."""
        for weight, held in zip(self.weights, self._held.pop(), strict=True):
            if weight.grad is None:
                weight.grad = held
            elif held is not None:
                weight.grad = local_add(held, weight.grad)


def local_add(held: Tensor, more: Tensor) -> Tensor:
    local(held).add_(local(more))
    return held


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; the tensor itself where it isn't shared."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; the tensor itself where it isn't shared."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def part(value: Tensor, like: Tensor) -> Tensor:
    """A tensor, that every rank has whole or that is shared in another way, shared as `like` is."""
    if not isinstance(like, DTensor) or value.shape != like.shape or _alike(value, like):
        return value
    value = whole(value).expand(like.shape).to(local(like).device).contiguous()
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def spread_rows(value: Tensor, parallel: Parallel) -> Tensor:
    """A tensor that every rank has whole, of which each is to keep some rows."""
    if parallel.mesh is None or value.ndim == 0:
        return value
    return distribute_tensor(value.contiguous(), parallel.mesh[SHARD], [Shard(0)], src_data_rank=None)


def gradient_norm(gradients: list[Tensor], parallel: Parallel) -> Tensor:
    """The norm of all gradients together (a scalar), the same whatever number of ranks divides them by rows.

    Summed in float64, whose rounding fp32 doesn't show.
    """
    counted = [gradient for gradient in gradients if parallel.counts(gradient)]
    squares = torch.stack([_square(local(gradient)) for gradient in counted])
    return parallel.added(squares.sum()).sqrt().float()


def _square(rows: Tensor) -> Tensor:
    """The sum of the squares: of each row in fp32, of the rows in float64."""
    rows = rows.flatten(1) if rows.ndim > 1 else rows.unsqueeze(-1)
    return torch.linalg.vector_norm(rows, dim=1).double().square().sum()


def _alike(value: Tensor, like: DTensor) -> bool:
    """Whether a tensor is shared as another is."""
    return isinstance(value, DTensor) and value.placements == like.placements and value.device_mesh == like.device_mesh


def empty(model: PreTrainedModel, kind: str) -> None:
    """Give a sharded model that was built on the meta device memory for its weights, and the buffers of its class."""
    model.to_empty(device=kind)
    for module in model.modules():
        if module._buffers:
            model._init_weights(module)


@torch.no_grad()
def materialise(model: PreTrainedModel, kind: str, read: Callable[[str], Tensor]) -> None:
    """Give a sharded model that was built on the meta device its parts of what `read` makes, one tensor at a time."""
    empty(model, kind)
    for name, weight in model.named_parameters():
        local(weight).copy_(local(part(read(name), weight)))
