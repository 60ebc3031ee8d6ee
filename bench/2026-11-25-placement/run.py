"""Is the chosen placement the best one, does it gain what Holmes's paper says, and do real processes rank alike?

    python bench/2026-11-25-placement/run.py

1. Random small cases: the choice beside an exhaustive search by the simulator (both as in tests/budget).
2. Four nodes of eight A100, 3.6 billion parameters, two networks: the choice beside placements that don't look.
3. Four gloo processes send what an update's ranks send, at the pace of throttled links. Products are sleeps, nothing is
   trained: a message is real and counts as come once its link would have brought it.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from scipy.stats import kendalltau
from torch import distributed, multiprocessing

from espalier.budget import parallel, placement, placing
from espalier.budget.clusters import Link
from espalier.budget.parallel import Layout, Update
from espalier.budget.pipelining import Stage
from espalier.budget.placement import Job, Placement
from espalier.spec import ModelSpec

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "tests" / "budget"))
import test_placement as cases  # noqa: E402

RANDOM_SECONDS, FIRST_SEED, ROUNDS, RANKS = 50, 1000, 5, 4
TINY = ModelSpec(family="llama", vocab_size=512, hidden_size=256, num_hidden_layers=8, num_attention_heads=4)


def random_cases() -> dict:
    """How often the choice takes as long as the best of all, and how much longer where it doesn't."""
    longer, none, errors, seed, begin = [], 0, [], FIRST_SEED, time.monotonic()
    while time.monotonic() - begin < RANDOM_SECONDS:
        job = cases.random_job(seed)
        chosen, least = placement.best(job), cases.exhaustive(job)
        if chosen is None:
            assert least == float("inf")
            none += 1
        else:
            seconds = placement.seconds(job, chosen)
            table = placement.timetable(job, chosen)
            errors.append(table.estimated(chosen.layers) / seconds - 1)
            if seconds > least * (1 + 1e-9):
                longer.append({"seed": seed, "longer": seconds / least - 1})
        seed += 1
    formula = {"median": statistics.median(errors), "largest": max(errors), "least": min(errors)}
    return {"cases": seed - FIRST_SEED, "none_fits": none, "not_the_best": longer, "formula_too_long_by": formula}


def published_setting() -> list[dict]:
    """Tokens a second of the choice as a multiple of the others', and as a share of the same devices all on RDMA."""
    found = []
    for gbits in (25, 100):  # of a node's Ethernet card, which eight devices share
        for speeds in ((1.56e14, 1.56e14), (1.97e14, 1.6e14)):
            for micro_rows in (1, 4):
                ib = cases.cluster("ib", speed=speeds[0])
                roce = cases.cluster("roce", network="roce", between=12.5e9, speed=speeds[1])
                mixed = cases.job(cases.clusters(ib, roce, bandwidth=gbits * 1e9 / 64), micro_rows=micro_rows)
                rdma = cases.job(cases.clusters(ib, roce, bandwidth=12.5e9, latency=0), micro_rows=micro_rows)
                chosen, homogeneous = placement.best(mixed), placement.best(rdma)
                assert chosen and homogeneous
                time_of = {one.name: one.seconds for one in placing.compared(mixed, chosen, 1.0)}
                layout = chosen.layout
                found.append(
                    {
                        "gbits": gbits,
                        "tflops": [speed / 1e12 for speed in speeds],
                        "micro_rows": micro_rows,
                        "layout": f"{layout.data}x{layout.tensor}x{layout.pipeline}",
                        "layers": chosen.layers,
                        "seconds": time_of["chosen"],
                        "gain": {name: other / time_of["chosen"] for name, other in time_of.items()},
                        "of_all_rdma": placement.seconds(rdma, homogeneous) / time_of["chosen"],
                    }
                )
    return found


def splits_by_speed() -> list[dict]:
    """The gain of uneven layers over even ones, two clusters of one node each, by how much their speeds differ."""
    found = []
    for ratio in (1.0, 1.1, 1.2, 1.23125, 1.5, 2.0):
        rows = [cases.cluster(name, 1, speed=speed * 1.6e14) for name, speed in (("fast", ratio), ("slow", 1))]
        spec = cases.SPEC.changed(num_hidden_layers=48)
        job = cases.job(cases.clusters(*rows, bandwidth=1.56e9), spec, 512, 1)
        devices = tuple(device for number in (0, 1) for device in job.clusters.devices(number))
        two = Placement(Layout(data=1, tensor=8, pipeline=2), devices, ())
        table = placement.timetable(job, two)
        own = min(placement.splits(table, 48), key=table.simulated)
        by_speed = placement.by_speed(48, [ratio, 1], 1.0)
        even = table.simulated((24, 24))
        found.append({"ratio": ratio, "own": own, "by_speed": by_speed, "gain": even / table.simulated(own)})
        found[-1]["gain_by_speed"] = even / table.simulated(by_speed)
    return found


def throttled_job() -> Job:
    """Two clusters of two nodes with a device each, one slower, a slow link between; an update of about a second."""
    fast = cases.cluster("fast", 2, 1, between=2e8, speed=2e10)
    slow = cases.cluster("slow", 2, 1, between=2e8, speed=1.4e10)
    where = cases.clusters(fast, slow, bandwidth=5e7, latency=2e-3)
    return Job(TINY, where, Update(16, 1, 64, "float32"), "none")


def layouts(job: Job) -> dict[str, Placement]:
    """The choice, and others from good to bad."""
    chosen = placement.best(job)
    assert chosen
    listed = tuple(device for number in (0, 1) for device in job.clusters.devices(number))
    two, four = Layout(data=2, pipeline=2), Layout(pipeline=4)
    return {
        "chosen": chosen,
        "2x2 even": Placement(two, listed, (4, 4)),
        "2x2 reversed split": Placement(two, listed, (3, 5)),
        "2x2 in turn": Placement(two, placing.in_turn(listed), (4, 4)),
        "1x4 even": Placement(four, listed, (2, 2, 2, 2)),
        "1x4 in turn": Placement(four, placing.in_turn(listed), (2, 2, 2, 2)),
        "1x4 lopsided": Placement(four, listed, (1, 1, 1, 5)),
        "4x1": Placement(Layout(data=4), listed, (8,)),
        "fast cluster alone": Placement(Layout(data=2), listed[:2], (8,)),
        "two of four": Placement(Layout(pipeline=2), (listed[0], listed[2]), (5, 3)),
    }


class Wire:
    """Messages between processes that come no sooner than their link allows."""

    def __init__(self) -> None:
        self._sent: list = []

    def send(self, size: float, to: int) -> None:
        message = torch.zeros(max(1, round(size / 8)), dtype=torch.float64)
        message[0] = time.monotonic()
        self._sent.append((distributed.isend(message, to), message))

    def receive(self, size: float, sender: int, link: Link) -> None:
        message = torch.empty(max(1, round(size / 8)), dtype=torch.float64)
        distributed.recv(message, sender)
        sleep_until(float(message[0]) + size / link.bandwidth + link.latency)

    def wait(self) -> None:
        for handle, _ in self._sent:
            handle.wait()
        self._sent.clear()


def sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def one_update(rank: int, job: Job, one: Placement, stages: list[Stage]) -> float:
    """Seconds until the last rank is through; a rank without a place waits for the others."""
    distributed.barrier()
    begin = time.monotonic()
    if rank < one.layout.ranks:
        work(rank, job, one, stages)
    took = torch.tensor(time.monotonic() - begin)
    distributed.all_reduce(took, distributed.ReduceOp.MAX)
    return float(took)


def work(rank: int, job: Job, one: Placement, stages: list[Stage]) -> None:
    """What one rank does in an update: 1F1B, then a ring of its data group."""
    layout, wire, data = one.layout, Wire(), one.layout.data
    number, batches = rank // data, job.update.micro_batches(one.layout)
    stream = job.update.tokens * job.spec.hidden_size * 4

    def move(direction: int) -> None:
        """One micro-batch through this stage, down (1) or up (-1) the pipe."""
        sender, to = rank - direction * data, rank + direction * data
        if 0 <= sender < layout.ranks:
            wire.receive(stream, sender, one.link(job.clusters, (rank, sender)))
        time.sleep(stages[number].forward if direction == 1 else stages[number].backward)
        if 0 <= to < layout.ranks:
            wire.send(stream, to)

    ahead = min(layout.pipeline - 1 - number, batches)
    for direction in [1] * ahead + [1, -1] * (batches - ahead) + [-1] * ahead:
        move(direction)
    if data > 1:
        group = next(group for group in one.groups("data") if rank in group)
        ring(wire, rank, group, gradients(job, one, number), one.link(job.clusters, group))
    wire.wait()


def gradients(job: Job, one: Placement, number: int) -> float:
    """Bytes that a rank of a stage sends to reduce its gradients for all."""
    deep = job.spec.changed(num_hidden_layers=one.layers[number] * one.layout.pipeline)
    transfers = parallel.stage_traffic(deep, one.layout, job.update, number)
    return sum(transfer.bytes for transfer in transfers if transfer.axis == "data")


def ring(wire: Wire, rank: int, group: tuple[int, ...], size: float, link: Link) -> None:
    place, count = group.index(rank), len(group)
    hops = 2 * (count - 1)
    for _ in range(hops):
        wire.send(size / hops, group[(place + 1) % count])
        wire.receive(size / hops, group[place - 1], link)


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    job = throttled_job()
    every = layouts(job)
    stages = {name: placement.timetable(job, one).stages(one.layers) for name, one in every.items()}
    times: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(ROUNDS):
        for name, one in every.items():
            times[name].append(one_update(rank, job, one, stages[name]))
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    distributed.destroy_process_group()


def real_processes() -> dict:
    """Measured medians beside the prediction, and how alike they are in order."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(rank_main, (folder,), RANKS)
        times = json.loads(Path(folder, "times.json").read_text())
    job = throttled_job()
    rows = [
        {"name": name, "predicted": placement.seconds(job, one), "measured": times[name], "layers": one.layers}
        for name, one in layouts(job).items()
    ]
    middle = [statistics.median(row["measured"]) for row in rows]
    return {"tau": float(kendalltau([row["predicted"] for row in rows], middle).statistic), "layouts": rows}


def main() -> None:
    result: dict[str, object] = {}
    for part in (real_processes, splits_by_speed, random_cases, published_setting):
        result[part.__name__] = part()
        (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        print(part.__name__, json.dumps(result[part.__name__]), flush=True)


if __name__ == "__main__":
    main()
