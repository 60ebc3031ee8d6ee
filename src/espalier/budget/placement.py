"""Placement: which devices of several clusters do what, so that slow links carry little and an update takes least.

Tensor ranks are neighbours in a node, data ranks share a cluster's network, and the pipeline goes from cluster to
cluster, since activations are the least that can be sent (Holmes, arXiv 2312.03549, section 3). Degrees, the clusters'
order, the stages of each and the layers of each stage are searched together: a bound by products alone drops most,
`pipelining.estimated` ranks the rest, and `pipelining.simulated` decides between those near the best. Bytes and
memory are those of `parallel.py`, where a stage of n layers is like one of p even stages of a model with n·p layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from espalier.budget import memory, parallel, pipelining
from espalier.budget.clusters import Clusters, Device, Link
from espalier.budget.flops import forward_flops, operators, training_flops
from espalier.budget.parallel import Layout, Sharding, Update
from espalier.budget.pipelining import Stage
from espalier.spec import ModelSpec

# The formula takes up to this share too long (tests/budget/test_pipelining.py): who is nearer may be the best.
TOLERANCE = 0.2
# Of those, at most so many are followed pass by pass.
FOLLOWED = 64


@dataclass(frozen=True)
class Job:
    """What is placed, and how: the share of data ranks' traffic that products hide, what those ranks divide."""

    spec: ModelSpec
    clusters: Clusters
    update: Update
    sharding: Sharding = "zero1"
    overlap: float = 0.0


@dataclass(frozen=True)
class Placement:
    """A layout, the devices of its ranks in order (tensor, then data, then stages), and the layers of each stage."""

    layout: Layout
    devices: tuple[Device, ...]
    layers: tuple[int, ...]

    def stage(self, number: int) -> tuple[Device, ...]:
        """The devices of one stage."""
        size = self.layout.tensor * self.layout.data
        return self.devices[number * size : (number + 1) * size]

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """The ranks of every group of an axis; each rank is in one of them."""
        ranks, tensor, stage = range(self.layout.ranks), self.layout.tensor, self.layout.tensor * self.layout.data
        if axis == "tensor":
            return [tuple(ranks[first : first + tensor]) for first in ranks[::tensor]]
        if axis == "data":
            stages = (ranks[first : first + stage] for first in ranks[::stage])
            return [tuple(one[place::tensor]) for one in stages for place in range(tensor)]
        return [tuple(ranks[place::stage]) for place in range(stage)]

    def link(self, clusters: Clusters, ranks: Sequence[int]) -> Link:
        """What connects the ranks of a group."""
        return clusters.link(self.devices[rank] for rank in ranks)


@dataclass(frozen=True)
class _Seat:
    """A stage's place by its number of layers: seconds of none and of each, and how many fit its devices."""

    none: Stage
    each: Stage
    most: int

    def stage(self, layers: int) -> Stage:
        pairs = zip(vars(self.none).values(), vars(self.each).values(), strict=True)
        return Stage(*(none + layers * each for none, each in pairs))


@dataclass(frozen=True)
class Timetable:
    """A placement's seats, from which the time of any split of the layers follows."""

    seats: tuple[_Seat, ...]
    micro_batches: int
    tied: float

    def estimated(self, layers: Sequence[int]) -> float:
        """Seconds of an update by formula, infinite where layers don't fit."""
        if not self.fits(layers):
            return math.inf
        return pipelining.estimated(self.stages(layers), self.micro_batches, self.tied)

    def simulated(self, layers: Sequence[int]) -> float:
        """Seconds of an update, pass by pass; infinite where layers don't fit."""
        if not self.fits(layers):
            return math.inf
        return pipelining.simulated(self.stages(layers), self.micro_batches, self.tied)

    def stages(self, layers: Sequence[int]) -> list[Stage]:
        return [seat.stage(count) for seat, count in zip(self.seats, layers, strict=True)]

    def fits(self, layers: Sequence[int]) -> bool:
        return all(1 <= count <= seat.most for seat, count in zip(self.seats, layers, strict=True))

    @cached_property
    def paces(self) -> list[float]:
        """Seconds that a layer keeps each stage for a micro-batch."""
        return [seat.each.busy for seat in self.seats]


def best(job: Job) -> Placement | None:
    """The placement with the shortest update of those that fit; None if none does."""
    near: list[tuple[float, Placement, Timetable]] = []
    least = math.inf
    for bound, placement in sorted(_placements(job), key=lambda one: one[0]):
        if bound > least:
            break  # all others take longer still
        table = timetable(job, placement)
        for layers in splits(table, job.spec.num_hidden_layers):
            seconds = table.estimated(layers)
            least = min(least, seconds)
            near.append((seconds, replace(placement, layers=layers), table))
    near = sorted((one for one in near if one[0] <= least * (1 + TOLERANCE)), key=lambda one: one[0])[:FOLLOWED]
    finite = [(table.simulated(placement.layers), placement) for _, placement, table in near]
    return min(finite, key=lambda one: one[0])[1] if finite and least < math.inf else None


def seconds(job: Job, placement: Placement) -> float:
    """An update, followed pass by pass; infinite where it doesn't fit the devices."""
    return timetable(job, placement).simulated(placement.layers)


def even(layers: int, stages: int) -> tuple[int, ...]:
    """As many layers for every stage, and what is left over for the last ones."""
    each, left = divmod(layers, stages)
    return (each,) * (stages - left) + (each + 1,) * left


def by_speed(layers: int, speeds: Sequence[float], alpha: float) -> tuple[int, ...]:
    """Holmes's split: floor(alpha · its share of the speeds · layers) for each stage, from 1; the last take the rest.

    Where alpha promises more layers than there are, the first stages have theirs, and at least one is left for each.
    """
    split: list[int] = []
    for number, speed in enumerate(speeds[:-1]):
        after = len(speeds) - number - 1
        wanted = max(1, math.floor(alpha * speed / sum(speeds) * layers + 1e-9))
        split.append(min(wanted, layers - sum(split) - after))
    return (*split, layers - sum(split))


def timetable(job: Job, placement: Placement) -> Timetable:
    """The seats of a placement's stages; its own layers don't matter."""
    layout = placement.layout
    tied = 0.0
    for transfer in parallel.stage_traffic(_deep(job, layout, 1), layout, job.update, 0):
        if (transfer.axis, transfer.kind) == ("pipeline", "all-reduce"):
            tied = _slowest(transfer.bytes, 2, _ends(job, placement))
    seats = tuple(_seat(job, placement, number) for number in range(layout.pipeline))
    return Timetable(seats, job.update.micro_batches(layout), tied)


def splits(table: Timetable, layers: int) -> list[tuple[int, ...]]:
    """Splits worth timing: for every pace that a stage can keep, the one that fills the fastest stages first.

    The best of them is improved by moving one layer at a time for as long as that helps.
    """
    paces = sorted({seat.stage(count).busy for seat in table.seats for count in range(1, layers + 1)})
    found = {split for pace in paces if (split := _filled(table, layers, pace))}
    if not found:
        return []
    split = min(found, key=table.estimated)
    while (better := min(_moves(split), key=table.estimated, default=split)) and table.estimated(
        better
    ) < table.estimated(split):
        split = better
        found.add(split)
    return sorted(found, key=table.estimated)[:FOLLOWED]


def _filled(table: Timetable, layers: int, pace: float) -> tuple[int, ...] | None:
    """Layers for stages that none takes longer than `pace`, where that can be: the fastest have as many as they can."""
    count = len(table.seats)
    most = []
    for seat in table.seats:
        room = math.floor((pace - seat.none.busy) / seat.each.busy + 1e-9)
        most.append(min(room, seat.most, layers - count + 1))
    if min(most) < 1 or sum(most) < layers:
        return None
    split, left = [1] * count, layers - count
    for number in sorted(range(count), key=lambda number: table.paces[number]):
        more = min(most[number] - 1, left)
        split[number] += more
        left -= more
    return tuple(split)


def _moves(split: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """One layer from one stage to another."""
    for giver, taker in itertools.permutations(range(len(split)), 2):
        if split[giver] > 1:
            moved = list(split)
            moved[giver] -= 1
            moved[taker] += 1
            yield tuple(moved)


def _placements(job: Job) -> Iterator[tuple[float, Placement]]:
    """Everything to be compared, layers left open, with seconds that its update takes at the least."""
    spec, update, clusters = job.spec, job.update, job.clusters
    sizes = [len(clusters.devices(number)) for number in range(len(clusters.hardware))]
    for tensor in _divisors(math.gcd(spec.num_attention_heads, spec.num_key_value_heads, spec.intermediate_size)):
        for data in _divisors(update.rows // update.micro_rows):
            size = tensor * data
            ranges = [
                range(0 if row.devices % tensor else devices // size + 1) or range(1)
                for row, devices in zip(clusters.recipe.clusters, sizes, strict=True)
            ]
            for stages in itertools.product(*ranges):
                if not 0 < sum(stages) <= spec.num_hidden_layers:
                    continue
                sharding: Sharding = job.sharding if data > 1 else "none"
                layout = Layout(data=data, tensor=tensor, pipeline=sum(stages), sharding=sharding)
                bound = _least(job, layout, stages)
                for order in itertools.permutations([number for number, count in enumerate(stages) if count]):
                    devices = [
                        device for number in order for device in clusters.devices(number)[: stages[number] * size]
                    ]
                    yield bound, Placement(layout, tuple(devices), ())


def _least(job: Job, layout: Layout, stages: Sequence[int]) -> float:
    """Seconds of the products alone, with layers that could be cut at will: the first micro-batch, then the others."""
    speeds = [layout.tensor * job.clusters.speed(number, job.update.compute) for number in range(len(stages))]
    work = job.update.tokens * training_flops(job.spec, job.update.sequence_length, job.update.recompute)
    first = work / max(speed for speed, count in zip(speeds, stages, strict=True) if count)
    together = sum(speed * count for speed, count in zip(speeds, stages, strict=True))
    return first + (job.update.micro_batches(layout) - 1) * work / together


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def _deep(job: Job, layout: Layout, layers: int) -> ModelSpec:
    """The model whose even stages have so many layers each."""
    return job.spec.changed(num_hidden_layers=layers * layout.pipeline)


def _seat(job: Job, placement: Placement, number: int) -> _Seat:
    one, two = (_stage(job, placement, number, layers) for layers in (1, 2))
    each = Stage(*(b - a for a, b in zip(vars(one).values(), vars(two).values(), strict=True)))
    none = Stage(*(a - b for a, b in zip(vars(one).values(), vars(each).values(), strict=True)))
    room = min(job.clusters.room(device.cluster) for device in placement.stage(number))

    def fits(layers: int) -> bool:
        deep = _deep(job, placement.layout, layers)
        held = parallel.stage_memory(deep, placement.layout, job.update, number).total
        return layers <= job.spec.num_hidden_layers and held <= room

    return _Seat(none, each, memory.most_that_fit(fits))


def _stage(job: Job, placement: Placement, number: int, layers: int) -> Stage:
    """The times of one stage with so many layers."""
    layout, update = placement.layout, job.update
    batches = update.micro_batches(layout)
    members = placement.stage(number)
    last = number == layout.pipeline - 1
    links = {axis: _links(job, placement, axis, number) for axis in ("tensor", "data")}
    tensor = tail = 0.0
    for transfer in parallel.stage_traffic(_deep(job, layout, layers), layout, update, number):
        if transfer.axis == "tensor":
            tensor += _slowest(transfer.bytes, 0, links["tensor"]) / batches
        elif transfer.axis == "data":
            hops = (layout.data - 1) * (2 if transfer.kind == "all-reduce" else 1)
            tail += (1 - job.overlap) * _slowest(transfer.bytes, hops, links["data"])
    speed = layout.tensor * min(job.clusters.speed(device.cluster, update.compute) for device in members)
    forward, both = _flops(job, layers, head=last)
    share = forward / both
    busy = update.tokens * both / speed + tensor
    stream = update.tokens * job.spec.hidden_size * memory.SIZE[update.compute] / layout.tensor
    onward = 0.0 if last else _slowest(stream, 1, _onward(job, placement, number))
    return Stage(share * busy, (1 - share) * busy, onward, tail)


def _flops(job: Job, layers: int, *, head: bool) -> tuple[int, int]:
    """FLOPs a token of a stage, forward and in both directions."""
    spec, length = job.spec.changed(num_hidden_layers=layers), job.update.sequence_length
    left_out = 0 if head else operators(spec, length)[-1].flops
    both = training_flops(spec, length, job.update.recompute)
    return forward_flops(spec, length) - left_out, both - 3 * left_out


def _links(job: Job, placement: Placement, axis: str, number: int) -> set[Link]:
    """What the groups of an axis within one stage send over."""
    members, tensor = placement.stage(number), placement.layout.tensor
    if axis == "tensor":
        groups = [members[first : first + tensor] for first in range(0, len(members), tensor)]
    else:
        groups = [members[place::tensor] for place in range(tensor)]
    return {job.clusters.link(group) for group in groups}


def _onward(job: Job, placement: Placement, number: int) -> set[Link]:
    """What the ranks of a stage and those of the next send over."""
    pairs = zip(placement.stage(number), placement.stage(number + 1), strict=True)
    return {job.clusters.link(pair) for pair in pairs}


def _ends(job: Job, placement: Placement) -> set[Link]:
    """What the ranks of the first and the last stage send over."""
    pairs = zip(placement.stage(0), placement.stage(placement.layout.pipeline - 1), strict=True)
    return {job.clusters.link(pair) for pair in pairs}


def _slowest(size: float, hops: int, links: set[Link]) -> float:
    """Seconds until the last of several groups has sent `size` bytes a rank, in so many hops."""
    return max(size / link.bandwidth + hops * link.latency for link in links) if size else 0.0
