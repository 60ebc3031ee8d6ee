"""Placement: groups that stay inside their networks, and a choice that no other one beats."""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.budget import parallel, pipelining, placement, placing
from espalier.budget.clusters import AcrossRecipe, ClusterRecipe, Clusters, ClustersRecipe, Device
from espalier.budget.hardware import Hardware
from espalier.budget.parallel import Layout, Update
from espalier.budget.placement import Job, Placement
from espalier.errors import RecipeError
from espalier.run import RESULTS, Run
from espalier.spec import ModelSpec

A100 = Hardware(
    "A100", "cuda", 1, {"float32": 19.5e12, "bfloat16": 312e12}, 80 * 10**9, 2e12, 400.0, 1.0, 0.5, {},
    link_bandwidth=3e11,
)  # fmt: skip
# 3.6 billion parameters, as the paper's on four nodes.
SPEC = ModelSpec(family="llama", vocab_size=51_200, hidden_size=3072, num_hidden_layers=30, num_attention_heads=32)


def cluster(name, nodes=2, devices=8, network="infiniband", between=25e9, **more):
    return ClusterRecipe(
        name=name, hardware="a", nodes=nodes, devices=devices, network=network, between=between, **more
    )


def clusters(*rows, bandwidth=0.39e9, latency=1e-4, hardware=A100):
    recipe = ClustersRecipe(clusters=rows, across=AcrossRecipe(bandwidth=bandwidth, latency=latency))
    return Clusters(recipe, (hardware,) * len(rows))


def job(where, spec=SPEC, rows=768, micro_rows=4, length=2048, **more):
    return Job(spec, where, Update(rows, micro_rows, length), **more)


def random_job(seed):
    """Two or three small clusters of different speeds, at most 16 devices, at most 12 layers."""
    draw = random.Random(seed)
    rows, left = [], 16
    for number in range(draw.choice([2, 3])):
        nodes, devices = draw.choice([(1, 1), (1, 2), (2, 1), (2, 2), (1, 4)])
        left -= nodes * devices
        speed = draw.uniform(0.5, 2) * 1e14
        rows.append(cluster(str(number), nodes, devices, "roce", draw.choice([2.5e9, 25e9]), speed=speed))
    spec = ModelSpec(
        family="llama",
        vocab_size=draw.choice([1000, 32_000]),
        hidden_size=draw.choice([512, 1024]),
        num_hidden_layers=draw.randint(3, 12),
        num_attention_heads=4,
        tie_word_embeddings=draw.random() < 0.5,
    )
    # Memory from roomy to tight, so that some placements don't fit.
    state = 18 * 12 * spec.num_hidden_layers * spec.hidden_size**2
    tight = replace(A100, memory_bytes=round(450e6 + draw.choice([0.5, 2, 50]) * state))
    where = clusters(*rows, bandwidth=draw.choice([1e8, 1e9, 1e10]), latency=draw.choice([0, 1e-3]), hardware=tight)
    return Job(spec, where, Update(draw.choice([8, 16, 24]), 1, 512), draw.choice(["none", "zero1"]))


def exhaustive(one):
    """The least seconds of all degrees, assignments of stages to clusters in any order, and splits of the layers."""
    rows, layers, least = one.clusters.recipe.clusters, one.spec.num_hidden_layers, math.inf
    for tensor, data in itertools.product((1, 2, 4), range(1, one.update.rows + 1)):
        if one.update.rows % data:
            continue
        most = [0 if row.devices % tensor else row.nodes * row.devices // (tensor * data) for row in rows]
        for stages in itertools.product(*(range(count + 1) for count in most)):
            if not 0 < sum(stages) <= layers:
                continue
            layout = Layout(
                data=data, tensor=tensor, pipeline=sum(stages), sharding=one.sharding if data > 1 else "none"
            )
            for order in itertools.permutations([number for number in range(len(rows)) if stages[number]]):
                devices = tuple(
                    device
                    for number in order
                    for device in one.clusters.devices(number)[: stages[number] * tensor * data]
                )
                table = placement.timetable(one, Placement(layout, devices, ()))
                for cuts in itertools.combinations(range(1, layers), len(range(layout.pipeline)) - 1):
                    ends = (0, *cuts, layers)
                    least = min(least, table.simulated([b - a for a, b in itertools.pairwise(ends)]))
    return least


@pytest.mark.parametrize("seed", range(8))
def test_the_chosen_placement_is_the_best_of_all(seed):
    one = random_job(seed)
    chosen, least = placement.best(one), exhaustive(one)
    assert (chosen is None) == (least == math.inf)
    if chosen:
        assert placement.seconds(one, chosen) == pytest.approx(least)


shapes = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4, 6]))


@settings(deadline=None, max_examples=25)
@given(st.lists(shapes, min_size=1, max_size=3), st.integers(3, 12), st.sampled_from([8, 12, 32]))
def test_groups_stay_inside_and_every_rank_and_layer_has_its_place(sizes, layers, rows):
    where = clusters(*(cluster(str(number), *size) for number, size in enumerate(sizes)))
    one = job(where, SPEC.changed(num_hidden_layers=layers), rows, 1, 256)
    chosen = placement.best(one)
    assert sum(chosen.layers) == layers and min(chosen.layers) >= 1
    assert len(set(chosen.devices)) == len(chosen.devices) == chosen.layout.ranks <= where.count
    for axis in ("tensor", "data", "pipeline"):
        groups = chosen.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(chosen.layout.ranks))
        assert {len(group) for group in groups} == {getattr(chosen.layout, axis)}
        for group in groups:
            members = [chosen.devices[rank] for rank in group]
            if axis != "pipeline":
                assert len({device.cluster for device in members}) == 1
            if axis == "tensor":
                assert len({device.node for device in members}) == 1
    assert placement.seconds(one, chosen) < math.inf


def test_one_device_takes_what_one_device_does():
    where = clusters(cluster("alone", 1, 1, speed=1e14))
    one = job(where, SPEC.changed(num_hidden_layers=2), 8, 2, 512)
    chosen = placement.best(one)
    row = replace(A100, peak_flops={"float32": 1e14, "bfloat16": 1e14})
    links = parallel.Links(within=1, between=1)
    wanted = parallel.step_time(one.spec, Layout(), one.update, row, links).total
    assert placement.seconds(one, chosen) == pytest.approx(wanted)


@pytest.mark.parametrize("sharding", ["none", "zero1"])
def test_even_stages_of_one_cluster_take_what_the_even_layout_takes(sharding):
    """Where a transfer takes no time, since here it isn't work of its stage but keeps the next one waiting."""
    spec = SPEC.changed(num_hidden_layers=8, vocab_size=256)
    where = clusters(cluster("one", 2, 8, between=1e14, speed=3.12e14))
    one = job(where, spec, 64, 1, 512, sharding=sharding)
    layout = Layout(data=4, tensor=2, pipeline=2, sharding=sharding)
    devices = tuple(where.devices(0))
    links = parallel.Links(within=3e11, between=3e11, per_node=8)
    even = parallel.step_time(spec, layout, one.update, A100, links)
    found = placement.seconds(one, Placement(layout, devices, (4, 4)))
    assert found == pytest.approx(even.total - even.pipeline, rel=0.02)


@pytest.mark.parametrize("speeds", [(197, 160), (200, 100), (160, 197)])
def test_layers_follow_the_speed(speeds):
    rows = [cluster(str(number), 1, 8, speed=speed * 1e12) for number, speed in enumerate(speeds)]
    one = job(clusters(*rows, bandwidth=1e10), SPEC.changed(num_hidden_layers=24), 256, 1)
    chosen = placement.best(one)
    even = replace(chosen, layers=placement.even(24, chosen.layout.pipeline))
    assert chosen.layout.pipeline > 1
    assert placement.seconds(one, chosen) < placement.seconds(one, even)


def test_the_published_split_of_48_layers():
    assert placement.by_speed(48, [197, 160], 1.0) == (26, 22)


@given(st.integers(1, 8), st.integers(0, 40), st.floats(0.5, 4), st.data())
def test_the_split_by_speed_leaves_a_layer_for_each(stages, more, alpha, data):
    speeds = [data.draw(st.floats(1, 10)) for _ in range(stages)]
    for split in (placement.by_speed(stages + more, speeds, alpha), placement.even(stages + more, stages)):
        assert sum(split) == stages + more and min(split) >= 1 and len(split) == stages


def two_networks(**across):
    """Four nodes of eight devices that differ in nothing but their network."""
    return clusters(cluster("ib"), cluster("roce", network="roce", between=12.5e9), **across)


@pytest.mark.parametrize("bandwidth, least", [(0.39e9, 0.82), (1.56e9, 0.95)])  # 25 and 100 Gbit/s for eight devices
def test_the_paper_s_direction_of_effects(bandwidth, least):
    one = job(two_networks(bandwidth=bandwidth))
    time = {option.name: option.seconds for option in placing.compared(one, placement.best(one), 1.0)}
    assert time["nodes in turn"] >= 1.3 * time["chosen"]
    assert time["blind to networks"] >= 1.3 * time["chosen"]
    rdma = job(two_networks(bandwidth=12.5e9, latency=0))
    assert time["chosen"] * least <= placement.seconds(rdma, placement.best(rdma)) < time["chosen"]


def test_every_hop_between_clusters_takes_its_latency():
    small = SPEC.changed(num_hidden_layers=4)
    near, far = (job(two_networks(latency=latency), small, 512, sharding="none") for latency in (0, 0.1))
    devices = tuple(device for number in (0, 1) for device in near.clusters.devices(number))
    ring = Placement(Layout(data=32), devices, (4,))
    assert placement.seconds(far, ring) - placement.seconds(near, ring) == pytest.approx(2 * 31 * 0.1)
    pipe = Placement(Layout(data=16, pipeline=2), devices, (2, 2))
    sooner, later = (placement.timetable(one, pipe).stages(pipe.layers)[0] for one in (near, far))
    assert later.onward - sooner.onward == pytest.approx(0.1) and later.tail == sooner.tail


def test_a_model_that_fits_nowhere_has_no_placement():
    where = clusters(cluster("small", 1, 2), hardware=replace(A100, memory_bytes=10**9))
    assert placement.best(job(where)) is None


def test_a_group_is_as_fast_as_its_slowest_link():
    where = clusters(
        cluster("ib", environment={"NCCL_IB_HCA": "mlx5_0"}), cluster("roce", network="roce", between=1e10)
    )
    links = [
        where.link([Device(0, 0, 0), Device(0, 0, 1)]),
        where.link([Device(0, 0, 0), Device(0, 1, 0)]),
        where.link([Device(1, 0, 0), Device(1, 1, 0)]),
        where.link([Device(0, 0, 0), Device(0, 1, 0), Device(1, 0, 0)]),
    ]
    assert [link.bandwidth for link in links] == [3e11, 25e9, 1e10, 0.39e9]
    assert dict(links[1].environment) == {"NCCL_IB_DISABLE": "0", "NCCL_IB_HCA": "mlx5_0"}
    assert dict(links[3].environment)["NCCL_IB_DISABLE"] == "1"


FILE = """
clusters:
  - {name: ib, hardware: a100-80g, nodes: 2, devices: 2, network: infiniband, between: 25e9}
  - {name: roce, hardware: a100-80g, nodes: 1, devices: 2, network: roce, between: 12.5e9}
across: {bandwidth: 1e9}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPALIER_HOME", str(tmp_path / "home"))
    (tmp_path / "clusters.yaml").write_text(FILE)
    return placing.PlacementRecipe(clusters=tmp_path / "clusters.yaml", model=SPEC, batch=48, micro_batch=2)


def test_what_is_written_is_what_was_chosen(recipe, tmp_path):
    with Run.start(tmp_path / "run", recipe) as run:
        text = placing.place(recipe, run)
    found = json.loads((tmp_path / "run" / placing.PLACEMENT).read_text())
    ranks = found["data"] * found["tensor"] * found["pipeline"]
    assert [row["rank"] for row in found["ranks"]] == list(range(ranks)) and ranks + found["idle_devices"] == 6
    assert sum(found["layers"]) == 30
    for group in found["groups"]:
        rows = [found["ranks"][rank] for rank in group["ranks"]]
        others = {"tensor", "data", "stage"} - {"stage" if group["axis"] == "pipeline" else group["axis"]}
        assert all(len({row[other] for row in rows}) == 1 for other in others)
        crosses = len({row["cluster"] for row in rows}) > 1
        assert (group["network"] == "between clusters") == crosses
    rows = json.loads((tmp_path / "run" / RESULTS).read_text())["rows"]
    assert rows[0]["task"] == "chosen" and rows[0]["value"] == pytest.approx(found["seconds"])
    assert "even layers" in text and "espalier run" in text


@pytest.mark.parametrize(
    "old, new, text",
    [
        ("a100-80g", "a1000", "clusters.0.hardware"),
        ("name: roce", "name: ib", "2 clusters named"),
        ("48", "7", "batch"),
    ],
)
def test_what_can_not_be_placed_is_refused(recipe, old, new, text):
    recipe.clusters.write_text(FILE.replace(old, new))
    wanted = recipe.model_copy(update={"batch": 7 if old == "48" else 48})
    with pytest.raises(RecipeError, match=text):
        placing.job_of(wanted)


def test_too_little_memory_is_said_with_figures(recipe, tmp_path):
    wanted = recipe.model_copy(update={"model": SPEC.changed(num_hidden_layers=300)})
    with Run.start(tmp_path / "run", wanted) as run, pytest.raises(RecipeError, match="6 devices"):
        placing.place(wanted, run)


def test_the_formula_is_near_enough_for_what_is_placed():
    for seed in range(8):
        one = random_job(seed)
        chosen = placement.best(one)
        if chosen:
            table = placement.timetable(one, chosen)
            stages, batches = table.stages(chosen.layers), table.micro_batches
            true = pipelining.simulated(stages, batches, table.tied)
            assert pipelining.estimated(stages, batches, table.tied) <= true * (1 + placement.TOLERANCE)
