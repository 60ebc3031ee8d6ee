"""Layouts: how devices should share the training of a shape, so that it fits their memory and an update takes least.

Everything that divides evenly is compared by the arithmetic of `parallel.py`: tensor groups inside a node, stages of
as many layers each, data ranks for the rest. Micro-batches, sharding and recomputation trade memory for time. Experts
stay with their data rank. One device by itself is Espalier's own loop, with the memory that `memory.py` says it takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from espalier.budget import memory, parallel
from espalier.budget.finetune import LOSS_CHUNK
from espalier.budget.flops import parameters, training_flops
from espalier.budget.hardware import Hardware, compute_dtype
from espalier.budget.memory import Dtype, Optimizer, Recompute
from espalier.budget.parallel import Layout, Links, Sharding, StepTime, Update
from espalier.errors import RecipeError
from espalier.spec import ModelSpec

# B/s that a device sends to other nodes where nobody says: 200 Gbit/s each, as common with eight of them in a node.
BETWEEN_NODES = 25e9
# Devices up to which `devices_for` looks.
MOST_DEVICES = 2**17
# Each is slower than the one before and holds less. Dividing nothing is slower than zero1 and holds more.
SHARDINGS: tuple[Sharding, ...] = ("zero1", "zero2", "full")
# Bytes a parameter that ranks of several hold together at the least.
STATE = parallel.MASTER + parallel.GRADIENT + parallel.MOMENTS
# Times no further apart than rounding are the same.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Cluster:
    """`count` devices of a kind; a row of a CPU is one device.

    links     None where none are known, which only a device by itself can do without
    products  the share of the device's peak that matrix products reach
    """

    device: Hardware
    count: int
    links: Links | None
    products: float

    @property
    def room(self) -> int:
        """Bytes of one device."""
        return memory.of_one_device(self.device)

    @property
    def compute(self) -> Dtype:
        """The dtype of products."""
        return compute_dtype(self.device)

    @property
    def speed(self) -> float:
        """FLOP/s of all devices' products."""
        return self.count * self.products * self.device.part(1).peak_flops[self.compute]


@dataclass(frozen=True)
class Work:
    """What all layouts of an update share, and what may be chosen: rows that a rank takes at a time, recomputation."""

    rows: int
    sequence_length: int
    optimizer: Optimizer
    micro_rows: Sequence[int]
    recompute: Sequence[Recompute]

    def like(self, other: Arrangement) -> Work:
        """This work done in another's micro-batches, recomputing as it does."""
        return replace(self, micro_rows=(other.update.micro_rows,), recompute=(other.update.recompute,))


@dataclass(frozen=True)
class Arrangement:
    """A layout, the update made in it, bytes of its fullest rank and of a device, and how long the update takes."""

    layout: Layout
    update: Update
    bytes: int
    room: int
    time: StepTime

    @property
    def seconds_per_token(self) -> float:
        """Of all ranks together."""
        return self.time.total / (self.update.rows * self.update.sequence_length)

    @property
    def busy(self) -> float:
        """The share of an update in which products are computed; the rest is sending and waiting."""
        return self.time.compute / self.time.total

    @property
    def short(self) -> str:
        """Data × tensor × pipeline ranks; of one device the rows that it takes at a time."""
        if self.layout.ranks == 1:
            return _counted(self.update.micro_rows)
        return f"{self.layout.data}×{self.layout.tensor}×{self.layout.pipeline}"

    def __str__(self) -> str:
        axes = {axis: getattr(self.layout, axis) for axis in ("data", "tensor", "pipeline")}
        ranks = " × ".join(f"{parts} {axis}" for axis, parts in axes.items() if parts > 1)
        sharding = {"none": "", "full": "fully sharded"}.get(self.layout.sharding, self.layout.sharding)
        words = [ranks, sharding]
        words += [f"{_counted(self.update.micro_rows)} at a time"]
        words += ["recomputing"] if self.update.recompute == "layers" else []
        return ", ".join(word for word in words if word)


def cluster(device: Hardware, count: int, links: Links | None, products: float) -> Cluster:
    """Devices with the links that are stated, else with their row's; `RecipeError` for several without any."""
    if links is None and device.link_bandwidth:
        links = Links(within=device.link_bandwidth, between=min(device.link_bandwidth, BETWEEN_NODES))
    if count > 1 and links is None:
        raise RecipeError(
            "devices",
            found=f"{count} of {device.name}, of which no link to another is known",
            expected="1",
            mend="Choose other hardware, or state links.within and links.between in B/s.",
        )
    return Cluster(device, count, links, products)


def best(spec: ModelSpec, cluster: Cluster, work: Work) -> Arrangement | None:
    """The arrangement with the shortest update of those that fit; None if none does.

    Of several as short it has the largest micro-batch, then the fewest ranks to a replica.
    """
    # The ranks hold the state together, however they divide it: where that doesn't fit nothing needs to be tried.
    if cluster.count > 1 and STATE * parameters(spec) > cluster.count * (cluster.room - memory.FRAMEWORK):
        return None
    found: Arrangement | None = None
    for layout, update in _divisions(spec, cluster, work):
        if found and _least_seconds(spec, layout, update, cluster) >= found.time.total:
            continue
        for sharded in _sharded(layout):
            one = _arrangement(spec, sharded, update, cluster, work)
            if found and one.time.total >= found.time.total * (1 - ROUNDING):
                break
            if one.bytes <= one.room:
                found = one
    return found


def smallest(spec: ModelSpec, cluster: Cluster, work: Work) -> Arrangement | None:
    """The arrangement that takes least memory, whether it fits or not; None if nothing divides evenly."""
    every = (
        _arrangement(spec, sharded, update, cluster, work)
        for layout, update in _divisions(spec, cluster, work)
        for sharded in _sharded(layout)
    )
    return min(every, key=lambda one: one.bytes, default=None)


def devices_for(spec: ModelSpec, cluster: Cluster, work: Work) -> int | None:
    """How many devices it takes, the cluster's doubled as often as need be; None if that doesn't help."""
    count = cluster.count
    while cluster.links and count <= MOST_DEVICES:
        if best(spec, replace(cluster, count=count), work):
            return count
        count *= 2
    return None


def _divisions(spec: ModelSpec, cluster: Cluster, work: Work) -> Iterator[tuple[Layout, Update]]:
    """All that divides evenly: the fewest ranks to a replica first, then the largest micro-batches."""
    per_node = cluster.links.per_node if cluster.links else 1
    heads = math.gcd(spec.num_attention_heads, spec.num_key_value_heads, spec.intermediate_size)
    replicas = [
        (tensor, pipeline)
        for tensor in _divisors(math.gcd(heads, per_node, cluster.count))
        for pipeline in _divisors(math.gcd(spec.num_hidden_layers, cluster.count // tensor))
    ]
    for tensor, pipeline in sorted(replicas, key=math.prod):
        data = cluster.count // (tensor * pipeline)
        for micro_rows in sorted(work.micro_rows, reverse=True):
            if work.rows % (data * micro_rows):
                continue
            for recompute in work.recompute:
                update = Update(work.rows, micro_rows, work.sequence_length, cluster.compute, recompute)
                yield Layout(data=data, tensor=tensor, pipeline=pipeline), update


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def _sharded(layout: Layout) -> list[Layout]:
    """A layout with all that its data ranks may divide, the fastest first."""
    if layout.data == 1:
        return [layout]
    return [layout.model_copy(update={"sharding": sharding}) for sharding in SHARDINGS]


def _arrangement(spec: ModelSpec, layout: Layout, update: Update, cluster: Cluster, work: Work) -> Arrangement:
    links = cluster.links or Links(within=1, between=1)  # one rank sends nothing
    time = parallel.step_time(spec, layout, update, cluster.device, links, efficiency=cluster.products)
    return Arrangement(layout, update, _bytes(spec, layout, update, work.optimizer), cluster.room, time)


def _least_seconds(spec: ModelSpec, layout: Layout, update: Update, cluster: Cluster) -> float:
    """What an update takes at the least: its products and their bubble, with nothing to send and even stages."""
    work = update.rows * update.sequence_length * training_flops(spec, update.sequence_length, update.recompute)
    return work / cluster.speed * (1 + (layout.pipeline - 1) / update.micro_batches(layout))


def _bytes(spec: ModelSpec, layout: Layout, update: Update, optimizer: Optimizer) -> int:
    """What a process of the fullest rank holds; ranks of several are taken to train by AdamW, which holds most."""
    if layout.ranks > 1:
        return memory.FRAMEWORK + parallel.rank_memory(spec, layout, update).total
    # Espalier's loop begins in float32 and tries whether bfloat16 is faster.
    dtypes: set[Dtype] = {"float32", update.compute}
    return memory.FRAMEWORK + max(
        memory.training_memory(
            spec,
            rows=update.micro_rows,
            sequence_length=update.sequence_length,
            optimizer=optimizer,
            compute=dtype,
            loss_chunk=LOSS_CHUNK,
            attention="sdpa",
            recompute=update.recompute,
            passes=update.micro_batches(layout),
        ).total
        for dtype in dtypes
    )


def _counted(rows: int) -> str:
    return f"{rows} row{'s' * (rows > 1)}"
