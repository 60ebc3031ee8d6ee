"""Clusters: devices that share a network, and what is between one cluster and the next, as a file states them.

InfiniBand and RoCE cards can't talk to each other, so ranks of two clusters meet over Ethernet (Holmes,
arXiv 2312.03549). A file is a list of clusters and the speed across:

    clusters:
      - {name: ib, hardware: a100-80g, nodes: 2, devices: 8, network: infiniband, between: 25e9}
      - {name: roce, hardware: a100-80g, nodes: 2, devices: 8, network: roce, between: 12.5e9}
    across: {bandwidth: 0.4e9, latency: 1e-4}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from espalier.budget import memory
from espalier.budget.hardware import Hardware
from espalier.budget.memory import Dtype
from espalier.recipe import Recipe

Network = Literal["infiniband", "roce", "ethernet"]
# Share of the peak that products reach where no speed was measured: half, as in the published run of FLM-101B.
PRODUCTS = 0.5
# What a group's processes need in their environment so that NCCL takes the network that all of them have.
ENVIRONMENT: dict[Network, dict[str, str]] = {
    "infiniband": {"NCCL_IB_DISABLE": "0"},
    "roce": {"NCCL_IB_DISABLE": "0", "NCCL_IB_GID_INDEX": "3"},
    "ethernet": {"NCCL_IB_DISABLE": "1"},
}


class ClusterRecipe(Recipe):
    """Nodes of a kind on one network. Speeds are B/s that a device sends while all others send too.

    hardware     a row of hardware.yaml
    devices      of a node
    within       B/s to other devices of the node; the row's link_bandwidth, if not stated
    between      B/s to other nodes of the cluster: of a card that devices share, each one's part
    speed        FLOP/s of a device's products, as measured; half of its peak, if not stated
    environment  variables for groups on this network, beside those that its kind needs (interface, cards)
    """

    name: str
    hardware: str
    nodes: int = Field(gt=0)
    devices: int = Field(gt=0)
    network: Network
    within: float | None = Field(default=None, gt=0)
    between: float = Field(gt=0)
    speed: float | None = Field(default=None, gt=0)
    environment: dict[str, str] = Field(default_factory=dict)


class AcrossRecipe(Recipe):
    """Between clusters: B/s that a device sends, and the seconds that the first byte takes."""

    bandwidth: float = Field(gt=0)
    latency: float = Field(default=0.0, ge=0)
    environment: dict[str, str] = Field(default_factory=dict)


class ClustersRecipe(Recipe):
    """The form of a file of clusters, in the order in which a launcher numbers their nodes."""

    clusters: tuple[ClusterRecipe, ...] = Field(min_length=1)
    across: AcrossRecipe

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        name, times = Counter(cluster.name for cluster in self.clusters).most_common(1)[0]
        if times > 1:
            raise ValueError(f"{times} clusters named {name!r}")
        return self


@dataclass(frozen=True)
class Device:
    """One device: the numbers of its cluster, of its node there and of its place there, from 0."""

    cluster: int
    node: int
    place: int


@dataclass(frozen=True)
class Link:
    """What a group's ranks send over, at the pace of the slowest two: B/s, and s until a message arrives."""

    network: str
    bandwidth: float
    latency: float
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Clusters:
    """Clusters with their rows of the catalogue."""

    recipe: ClustersRecipe
    hardware: tuple[Hardware, ...]

    def devices(self, cluster: int) -> list[Device]:
        """Those of one cluster, node by node."""
        row = self.recipe.clusters[cluster]
        return [Device(cluster, node, place) for node in range(row.nodes) for place in range(row.devices)]

    @property
    def count(self) -> int:
        return sum(row.nodes * row.devices for row in self.recipe.clusters)

    def speed(self, cluster: int, compute: Dtype) -> float:
        """FLOP/s of a device's products."""
        stated = self.recipe.clusters[cluster].speed
        return stated or PRODUCTS * self.hardware[cluster].part(1).peak_flops[compute]

    def room(self, cluster: int) -> int:
        """Bytes that a process may use on a device."""
        return memory.of_one_device(self.hardware[cluster]) - memory.FRAMEWORK

    def within(self, cluster: int) -> float:
        """B/s between devices of a node."""
        row = self.recipe.clusters[cluster]
        return row.within or self.hardware[cluster].link_bandwidth or row.between

    def link(self, group: Iterable[Device]) -> Link:
        """What connects the ranks of a group."""
        members = set(group)
        numbers = {device.cluster for device in members}
        if len(numbers) > 1:
            across = self.recipe.across
            return Link("between clusters", across.bandwidth, across.latency, _sorted("ethernet", across.environment))
        number = numbers.pop()
        row = self.recipe.clusters[number]
        environment = _sorted(row.network, row.environment)
        if len({device.node for device in members}) > 1:
            return Link(f"{row.network} of {row.name}", row.between, 0.0, environment)
        return Link(f"a node of {row.name}", self.within(number), 0.0, environment)

    def usd_per_hour(self) -> float:
        """Of all devices, idle ones too."""
        return sum(
            row.part(cluster.nodes * cluster.devices).usd_per_hour
            for row, cluster in zip(self.hardware, self.recipe.clusters, strict=True)
        )


def _sorted(network: Network, own: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((ENVIRONMENT[network] | own).items()))
