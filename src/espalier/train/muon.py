"""Muon on matrices that ranks share by rows: each is put together on one of them, which makes its update for all.

So the Newton-Schulz iterations, which need whole matrices, are shared as evenly as the rows, and what they give is the
same, bit for bit, whatever number of ranks there is. On matrices that aren't shared it is torch's Muon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from espalier.train.parallel import local


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, of weights that may be shared by rows."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all weights that have gradients."""
        if not isinstance(self.param_groups[0]["params"][0], DTensor):
            return super().step(closure)
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            momenta = [self._momentum(weight, group["momentum"]) for weight in weights]
            for weight, update in zip(weights, _orthogonal(momenta, group), strict=True):
                rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], weight.shape)
                local(weight).mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
        return None

    def _momentum(self, weight: DTensor, momentum: float) -> DTensor:
        """The direction of a weight's update before it is made orthogonal; its momentum goes on."""
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight.detach())
        assert weight.grad is not None, "weights without a gradient aren't updated"
        gradient, buffer = local(weight.grad), local(state["momentum_buffer"])
        buffer.lerp_(gradient, 1 - momentum)
        ahead = gradient.lerp(buffer, momentum)
        return DTensor.from_local(
            ahead, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )


def _orthogonal(updates: Sequence[DTensor], group: dict[str, Any]) -> list[Tensor]:
    """This rank's part of each update made orthogonal."""
    if any(not _by_rows(update) for update in updates):
        whole = [_iterated(update.full_tensor(), group) for update in updates]
        spread = (
            distribute_tensor(value, update.device_mesh, update.placements, src_data_rank=None)
            for value, update in zip(whole, updates, strict=True)
        )
        return [local(value) for value in spread]
    ranks = updates[0].device_mesh.size(-1)
    batches = (updates[begin : begin + ranks] for begin in range(0, len(updates), ranks))
    return [part for batch in batches for part in _dealt_out(batch, group)]


def _by_rows(update: DTensor) -> bool:
    """Whether the ranks of the mesh's last axis divide its rows, and nothing else is divided."""
    *others, last = update.placements
    return last == Shard(0) and all(placement.is_replicate() for placement in others)


def _dealt_out(updates: Sequence[DTensor], group: dict[str, Any]) -> list[Tensor]:
    """As `_orthogonal`, of at most as many updates as there are ranks: the k-th is put together on rank k."""
    mesh = updates[0].device_mesh
    axis, ranks = mesh.get_group(mesh.ndim - 1), mesh.size(-1)
    own = mesh.get_local_rank(mesh.ndim - 1)
    parts = [local(update) for update in updates]
    sent = [part.numel() for part in parts] + [0] * (ranks - len(parts))
    here = updates[own] if own < len(updates) else None
    held = [0] * ranks if here is None else [rows * here.shape[1] for rows in _rows(here.shape[0], ranks)]
    flat = parts[0].new_empty(sum(held))
    distributed.all_to_all_single(flat, torch.cat([part.flatten() for part in parts]), held, sent, group=axis)
    made = flat if here is None else _iterated(flat.view(here.shape), group).float().flatten()
    back = parts[0].new_empty(sum(sent))
    distributed.all_to_all_single(back, made.contiguous(), sent, held, group=axis)
    pieces = back.split(sent)[: len(parts)]
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


def _rows(rows: int, ranks: int) -> list[int]:
    """How many of a matrix's rows each rank has."""
    most = math.ceil(rows / ranks)
    return [max(min(most, rows - rank * most), 0) for rank in range(ranks)]


def _iterated(update: Tensor, group: dict[str, Any]) -> Tensor:
    return _zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
