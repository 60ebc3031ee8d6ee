"""The planner refuses what the machine's memory can't hold, before a step is made, and its mend helps; what it settled
holds for any number of ranks.
"""

import re
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch

from espalier import planner, watch
from espalier.budget import flops
from espalier.budget.hardware import Hardware
from espalier.budget.memory import of_one_device
from espalier.errors import BudgetError, RecipeError, ResourceError, RunError
from espalier.ledger import Rates
from espalier.planner import Machine, PlannedRecipe, Settled
from espalier.recipe import parse
from espalier.run import PLAN, Run
from espalier.train.device import Device
from espalier.train.parallel import Parallel
from espalier.world import SINGLE, World

RECIPE = """
data: {vocab_size: 4096, sequence_length: 256}
model: {head_dim: 64}
stages:
  - {num_hidden_layers: 2, hidden_size: 64, duration: 10M tokens}
  - {num_hidden_layers: 8, hidden_size: 512, duration: 10M tokens}
train: {per_device_train_batch_size: 32}
"""
ROOMY = Hardware(
    name="a machine for tests",
    kind="cpu",
    count=2,
    peak_flops={"float32": 1e11, "bfloat16": 1e11},
    memory_bytes=10**11,
    memory_bandwidth=1e10,
    watts=20.0,
    usd_per_hour=0.1,
    kgco2e_per_kwh=0.4,
    sources={},
)


def read(*overrides: str) -> PlannedRecipe:
    return parse(PlannedRecipe, RECIPE, list(overrides), where="recipe.yaml")


def memory_of(recipe: PlannedRecipe, rows: int, recompute: str) -> list[int]:
    return planner._memory(recipe, recipe.specs(), rows, recompute)


def refusal(recipe: PlannedRecipe, memory_bytes: int) -> BudgetError:
    with pytest.raises(BudgetError) as refused:
        planner.require_memory(recipe, replace(ROOMY, memory_bytes=memory_bytes))
    return refused.value


@pytest.mark.parametrize("gigabytes", [1.5, 2, 3, 4])
@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_what_does_not_fit_is_refused_and_each_mend_makes_it_fit(gigabytes, recompute):
    at_hand, stated = int(gigabytes * 1e9), f"train.recompute={recompute}"
    needed = max(memory_of(read(stated), 32, recompute))
    if needed <= at_hand:
        planner.require_memory(read(stated), replace(ROOMY, memory_bytes=at_hand))
        return
    error = refusal(read(stated), at_hand)
    assert error.where.startswith("stage 2") and error.exit_code == 8
    mends = re.fullmatch(r"Set (.+)\.", error.mend).group(1).split(" or ")
    for mend in mends:
        planner.require_memory(read(stated, *mend.split()), replace(ROOMY, memory_bytes=at_hand))


def test_smaller_passes_are_accumulated():
    """An update of 32 rows: gradients are there between its passes."""
    whole, parts = (memory_of(read("train.batch_tokens=" + tokens), 8, "none")[-1] for tokens in ("2048", "8192"))
    assert parts - whole == pytest.approx(4 * flops.parameters(read().specs()[-1]), rel=0.01)


def test_gradients_are_added_in_pairs_where_there_is_room_for_them():
    recipe = read("train.per_device_train_batch_size=4")
    needed = {way: max(planner._memory(recipe, recipe.specs(), 4, "none", way)) for way in ("running", "pairs")}
    gradients = 4 * flops.parameters(recipe.specs()[-1])
    assert needed["pairs"] - needed["running"] == pytest.approx(2 * gradients, rel=0.01), "eight passes"
    for room, expected in ((needed["pairs"], "pairs"), (needed["pairs"] - 1, "running")):
        row = replace(ROOMY, memory_bytes=room)
        assert planner._accumulate(recipe, row, SINGLE) == expected
        assert planner._accumulate(recipe, row, World(0, 2, 0, 2)) == "pairs"


class Counter:
    """A machine's own, in kWh."""

    def __init__(self, *, measured: bool) -> None:
        self.measured, self.kwh = measured, 0.0

    def read_kwh(self) -> float:
        return self.kwh


def energy_of(ranks, tmp_path, monkeypatch, *, machines: int, measured=(True, True)) -> list:
    """(measured figures, kWh) of an entry for which the first machine drew 1 kWh and the second 10."""

    def work(world: World) -> list:
        local = 2 // machines
        world = replace(world, local_rank=world.rank % local, local_size=local)
        counter = Counter(measured=measured[world.rank])
        monkeypatch.setattr(planner.price, "best_meter", lambda row: counter)
        monkeypatch.setattr(planner.hardware, "here", lambda home: ROOMY)
        with watch.over(world, deadline=0.5, patience=60):
            run = Run.start(tmp_path / "run", read(), tell=lambda line: None, world=world)
            planner.machine(read("budget.pue=2"), run)
            counter.kwh += 1.0 + 9 * world.rank
            world.gathered(0)
            time.sleep(0.3)
            run.charge("train")
            world.gathered(0)
            run.close()
        entries = run.ledger.entries
        return [list(entries[0].measured), entries[0].cost.kwh] if world.leads else []

    return ranks(2, work)[0]


def test_the_energy_of_all_machines_is_added_up(ranks, tmp_path, monkeypatch):
    assert energy_of(ranks, tmp_path, monkeypatch, machines=2) == [["seconds", "kwh"], 2 * 11.0]


def test_ranks_of_one_machine_read_its_counters_once(ranks, tmp_path, monkeypatch):
    assert energy_of(ranks, tmp_path, monkeypatch, machines=1) == [["seconds", "kwh"], 2 * 1.0]


@pytest.mark.parametrize("measured", [(True, False), (False, True)])
def test_energy_is_measured_on_all_machines_or_estimated(measured, ranks, tmp_path, monkeypatch):
    figures, kwh = energy_of(ranks, tmp_path, monkeypatch, machines=2, measured=measured)
    assert figures == ["seconds"] and kwh < 1e-4


def test_a_run_that_just_fits_is_let_through():
    needed = max(memory_of(read(), 32, "none"))
    planner.require_memory(read(), replace(ROOMY, memory_bytes=needed))
    refusal(read(), needed - 1)


def test_the_largest_batch_that_fits_is_found_at_once_among_millions():
    recipe = read("train.batch_tokens=10_000_000_000", "train.per_device_train_batch_size=30_000_000")
    at_hand = max(memory_of(recipe, 3_000_000, "none"))
    assert refusal(recipe, at_hand).mend.startswith("Set train.per_device_train_batch_size=3000000 or ")


def test_a_model_that_fits_in_no_way_is_told_so():
    assert "smaller model" in refusal(read(), 600_000_000).mend


def test_ranks_that_divide_a_model_need_less_each_and_share_the_memory_of_a_cpu():
    recipe, needs = read(), []
    for size in (2, 4, 8):
        world = World(0, size, 0, size)
        parallel = Parallel(world, shard=size)
        of_gpus, of_cpu = (
            smallest_that_fits(
                lambda size, row=row, parallel=parallel: planner.require_memory_of_ranks(
                    recipe, replace(row, memory_bytes=size), parallel
                )
            )
            for row in (replace(ROOMY, kind="cuda", count=size), ROOMY)
        )
        assert of_cpu == pytest.approx(of_gpus, rel=0.01)
        needs.append(of_gpus / size)
    assert needs[0] > needs[1] > needs[2]
    with pytest.raises(BudgetError, match="on each of 8 ranks"):
        planner.require_memory_of_ranks(recipe, replace(ROOMY, memory_bytes=10**9), parallel)


def smallest_that_fits(require) -> int:
    """Bytes by halving."""
    low, high = 0, 2**40
    while high - low > 2**20:
        middle = (low + high) // 2
        try:
            require(middle)
            high = middle
        except BudgetError:
            low = middle
    return high


def test_gpus_count_one_by_one():
    assert of_one_device(replace(ROOMY, kind="cuda", count=4)) == ROOMY.memory_bytes // 4
    assert of_one_device(replace(ROOMY, count=4)) == ROOMY.memory_bytes


def test_nothing_is_tried_before_the_refusal(monkeypatch, make_run):
    monkeypatch.setattr(planner, "_probe", lambda *_: pytest.fail("a step was made"))
    small = Machine(replace(ROOMY, memory_bytes=10**9), Rates())
    with pytest.raises(BudgetError, match="memory"):
        planner.settle(read(), small, make_run())


def test_float8_is_refused_where_it_would_be_emulated(make_run):
    with pytest.raises(ResourceError, match=r"a GPU of at least 8\.9"):
        planner.settle(read("train.fp8=on"), Machine(ROOMY, Rates()), make_run())


def test_float8_is_refused_by_the_gpu_that_is_there(monkeypatch):
    device = Device(kind="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ResourceError, match=r"compute capability 8\.0"):
        planner._require_float8(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    planner._require_float8(device)


def test_rows_longer_than_the_model_takes_are_refused():
    assert read("model.max_position_embeddings=256").data.sequence_length == 256
    with pytest.raises(RecipeError, match=r"sequence_length 256 is more than model\.max_position_embeddings 255"):
        read("model.max_position_embeddings=255")


def test_a_run_that_has_trained_is_not_planned_anew(monkeypatch, make_run):
    monkeypatch.setattr(planner, "_probe", lambda *_: pytest.fail("a step was made"))
    run = make_run()
    (run.folder / "checkpoint-3").mkdir()
    with pytest.raises(RunError, match="no such file") as refused:
        planner.settle(read(), Machine(ROOMY, Rates()), run)
    assert refused.value.where == str(run.folder / PLAN) and refused.value.mend.startswith("Restore the file")


THREADS = 4


@pytest.fixture
def begun(tmp_path):
    """A run that was planned for some ranks of this machine; what is settled when other ranks take it up."""

    def begun(recipe: PlannedRecipe, size: int, **device) -> Callable[..., Settled]:
        made = planner.estimate(recipe, Machine(ROOMY, Rates()))
        kept = Settled(made, Device(threads=THREADS, **device), Machine(ROOMY, Rates()), made, (size, size))
        with Run.start(tmp_path / "run", recipe, tell=print) as run:
            kept.keep(run)

        def again(world: World, row: Hardware = ROOMY) -> Settled:
            with Run.start(tmp_path / "run", recipe, tell=print, world=world) as run:
                parallel = Parallel.of(world, recipe.train.parallel, "cpu")
                settled = planner.settle(recipe, Machine(row, Rates()), run, parallel)
                assert settled.plan == made
                return settled

        return again

    return begun


@pytest.mark.parametrize("before, now, threads", [(1, 1, 4), (2, 2, 4), (1, 2, 2), (2, 1, 8), (2, 4, 2), (1, 8, 1)])
def test_other_ranks_share_the_threads_of_the_machine(begun, ranks, before, now, threads):
    again = begun(read(), before)
    assert ranks(now, lambda world: again(world).device.threads) == [threads] * now


def test_threads_that_are_stated_are_those_of_any_number_of_ranks(begun, ranks):
    again = begun(read("train.threads=4"), 1)
    assert ranks(2, lambda world: again(world).device.threads) == [4] * 2


def test_another_number_of_ranks_computes_as_the_run_began(begun, ranks):
    began = {"compute": "bfloat16", "compile": "layers", "attention": "causal_halves", "recompute": "layers"}
    again = begun(read(), 1, **began)
    assert ranks(2, lambda world: asdict(again(world).device)) == [asdict(Device(threads=2, **began))] * 2


def test_gradients_are_added_in_the_way_there_is_room_for_when_ranks_change(begun, ranks):
    recipe = read("train.per_device_train_batch_size=4")
    scarce = replace(ROOMY, memory_bytes=max(planner._memory(recipe, recipe.specs(), 4, "none", "pairs")) - 1)
    again = begun(recipe, 1, accumulate="running")
    assert again(SINGLE, scarce).device.accumulate == "running"
    assert ranks(2, lambda world: again(world).device.accumulate) == ["pairs"] * 2
    assert begun(recipe, 2)(SINGLE, scarce).device.accumulate == "running"


def test_ranks_that_take_a_run_up_must_have_room_for_it(begun, ranks):
    again = begun(read(), 2)
    needed = smallest_that_fits(lambda size: planner.require_memory(read(), replace(ROOMY, memory_bytes=size)))
    with pytest.raises(BudgetError, match="stage 2: memory"):
        again(SINGLE, replace(ROOMY, memory_bytes=needed - 2**20))
    again(SINGLE, replace(ROOMY, memory_bytes=needed))

    def refused(world: World) -> str:
        with pytest.raises(BudgetError, match="on each of 4 ranks") as refusal:
            again(world, replace(ROOMY, memory_bytes=10**9))
        world.gathered(world.rank)  # who is refused first would leave while others still meet
        return refusal.value.where

    assert ranks(4, refused) == ["stage 2: memory"] * 4
