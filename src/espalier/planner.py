"""Planner: from a recipe and the machine at hand to a plan and a way to compute, by measuring the recipe's own models.

What isn't stated is tried: the dtype of the matmuls on the largest model, compilation where the run is long enough
to repay a trial. The fastest way is kept in plan.json, and a run that is taken up again computes as it began; what is
the machine's, threads and memory, is shared out anew among other ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import model_validator

from espalier import files, records, units, watch
from espalier.budget import flops, hardware, memory, price
from espalier.budget.hardware import Hardware
from espalier.budget.parallel import Layout, Update, rank_memory
from espalier.budget.plan import Basis, BudgetRecipe, Plan, plan
from espalier.data.prepare import DataRecipe
from espalier.errors import BudgetError, ResourceError, RunError
from espalier.grow.progressive import GrowthRecipe
from espalier.ledger import Cap, Cost, Rates
from espalier.recipe import ByField
from espalier.run import PLAN, Run
from espalier.spec import ModelSpec
from espalier.world import SINGLE, World

if TYPE_CHECKING:
    from espalier.train.device import Attention, Device
    from espalier.train.parallel import Parallel
    from espalier.train.probe import Speed

# What the samples, the export and the page take; it is kept back, before the recipe's reserve.
EXPORT_SECONDS = 5.0
# What comes before training: the interpreter, probes that are cached, data that is packed (bench/2026-11-24-start).
START_SECONDS = 8.0
# The compute capability from which GPUs multiply in float8.
FLOAT8_SINCE = (8, 9)
# Compiling is tried when training takes longer than this many seconds without it.
WORTH_A_TRIAL = 30.0


class PlannedRecipe(GrowthRecipe):
    """What a plan depends on: the growth run, its data and its budget."""

    budget: ByField[BudgetRecipe] = BudgetRecipe()
    data: ByField[DataRecipe] = DataRecipe()

    @model_validator(mode="after")
    def _rows_fit_the_model(self) -> Self:
        length, longest = self.data.sequence_length, self.model.max_position_embeddings
        if length > longest:
            raise ValueError(f"data.sequence_length {length} is more than model.max_position_embeddings {longest}")
        return self

    @property
    def rows(self) -> int:
        """Sequences of one update."""
        return max(self.train.batch_tokens // self.data.sequence_length, 1)

    @property
    def micro_rows(self) -> int:
        """Sequences of one forward pass."""
        return min(self.train.per_device_train_batch_size, self.rows)

    def specs(self) -> list[ModelSpec]:
        """The shapes of the stages; the vocabulary is that of the tokenizer given, or the one asked for."""
        from espalier.data import tokenizer

        given = self.data.tokenizer
        ids = tokenizer.id_count(tokenizer.load(Path(given))) if given else self.data.vocab_size
        return [stage.spec for stage in self.path(ids)]


@dataclass(frozen=True)
class Machine:
    """The hardware row at hand and what a second on it costs."""

    hardware: hardware.Hardware
    rates: Rates


@dataclass(frozen=True)
class Settled:
    """What is going to be done, and with what: a plan, the way to compute, the machine and its prices.

    first    the plan that the run began with
    ranks    that carry it out, and those of them on a machine
    changed  whether the budget or its prices have been changed since the plan was kept
    """

    plan: Plan
    device: Device
    machine: Machine
    first: Plan
    ranks: tuple[int, int]
    changed: bool = False

    def keep(self, run: Run) -> None:
        """Write plan.json: from here on the run does the same, wherever it is taken up again."""
        values = {
            "plan": self.plan.to_json(),
            "first": self.first.to_json(),
            "cap": run.ledger.cap.stated(),
            "device": asdict(self.device),
            "ranks": self.ranks,
            "hardware": asdict(self.machine.hardware),
            "rates": asdict(self.machine.rates),
        }
        records.write(run.folder / PLAN, values)


def machine(recipe: PlannedRecipe, run: Run | None = None) -> Machine:
    """The machine at hand at the recipe's prices; a run, if given, is charged at them from now on."""
    world = run.world if run else SINGLE
    row = world.in_turn(lambda: hardware.here(home=files.home()))
    row = Hardware(**world.told(asdict(row)))  # the leader's, of which all machines are taken to be
    if world.size > 1:
        row = row.part(world.size if row.kind == "cuda" else world.machines)
    here = at_prices(recipe, row)
    if run:
        _price(run, here, recipe.budget.pue)
    return here


def _price(run: Run, here: Machine, pue: float) -> None:
    """Charge a run at the machine's prices from now on; its energy is measured if that of every machine is.

    The first rank of each reads its machine's counters, and the leader adds up what it is told of them.
    """
    world, row = run.world, here.hardware
    if row.kind == "cuda" and world.size > 1:
        row = row.part(world.local_size)
    meter = price.best_meter(row) if world.local_rank == 0 else None
    measured = all(world.gathered(meter is None or meter.measured))
    if world.leads:
        assert meter
        run.price(here.rates, (lambda: pue * (meter.read_kwh() + watch.readings())) if measured else None)
    elif meter and measured:
        watch.metered(meter.read_kwh)


def at_prices(recipe: PlannedRecipe, row: hardware.Hardware) -> Machine:
    """A hardware row at the recipe's prices."""
    budget = recipe.budget
    rates = price.rates(
        row,
        pue=budget.pue,
        usd_per_hour=budget.usd_per_hour,
        watts=budget.watts,
        kgco2e_per_kwh=budget.kgco2e_per_kwh,
    )
    return Machine(row, rates)


def settle(recipe: PlannedRecipe, here: Machine, run: Run, parallel: Parallel | None = None) -> Settled:
    """The plan for what is left of the budget, and the device to carry it out on; plan.json's, once there is one.

    parallel  the ranks that share the training; all of them have to call this
    """
    from espalier.train.device import Device

    if parallel is None or parallel.world.size == 1:
        require_memory(recipe, here.hardware)
    else:
        require_memory_of_ranks(recipe, here.hardware, parallel)
    ranks = run.world.size, run.world.local_size
    kept = run.world.told(run.world.led(lambda: _kept(run.folder)))
    if kept:
        made_for = Cap(**kept["cap"]), Rates(**{**kept["rates"], "measured": tuple(kept["rates"]["measured"])})
        device = Device(**kept["device"])
        if tuple(kept["ranks"]) != ranks:
            device = _shared_anew(recipe, device, kept["ranks"][1], here.hardware, run.world)
        return Settled(
            Plan.from_json(kept["plan"]),
            device,
            here,
            Plan.from_json(kept["first"]),
            ranks,
            changed=made_for != (run.ledger.cap, here.rates),
        )
    spent = Cost(**run.world.told(vars(run.ledger.total))) + here.rates.cost(EXPORT_SECONDS)
    device = _choose_compute(recipe, here, run.world, parallel)
    speeds = _probe(recipe, device, recipe.specs(), parallel)
    made = _plan(recipe, here.rates, _per_token(recipe, speeds), "measured", spent)
    if _may_compile(recipe, made):
        compiled = replace(device, compile="layers", attention=_attention(recipe, device))
        faster = _probe(recipe, compiled, recipe.specs(), parallel)
        if recipe.train.torch_compile == "on" or _seconds(made, recipe, faster) < _seconds(made, recipe, speeds):
            device, speeds = compiled, faster
            made = _plan(recipe, here.rates, _per_token(recipe, speeds), "measured", spent)
    return Settled(made, device, here, made, ranks)


def _shared_anew(recipe: PlannedRecipe, device: Device, before: int, row: Hardware, world: World) -> Device:
    """A kept device for another number of ranks: as many threads on a machine as the `before` ranks on it had together;
    gradients added in pairs if there is room for it now. All else stays, as the arithmetic depends on it.
    """
    threads = recipe.train.threads or max(device.threads * before // world.local_size, 1)
    return replace(device, threads=threads, accumulate=_accumulate(recipe, row, world))


def _kept(folder: Path) -> Any:
    """What plan.json holds, None before there is one; a run that has trained without it is refused."""
    kept = records.read(folder / PLAN, None)
    if kept is None and any(folder.glob("checkpoint-*")):
        raise RunError(
            str(folder / PLAN),
            found="no such file",
            expected="the plan that the run's checkpoints were trained by",
            mend="Restore the file, or choose another name=... and run the recipe again.",
        )
    return kept


def speeds(recipe: PlannedRecipe, here: Machine, specs: Sequence[ModelSpec], seconds: float) -> list[Speed]:
    """How fast this machine trains shapes, computing as a run of `seconds` would."""
    device = _choose_compute(recipe, here)
    if recipe.train.torch_compile == "on" or (recipe.train.torch_compile == "auto" and seconds > WORTH_A_TRIAL):
        device = replace(device, compile="layers", attention=_attention(recipe, device))
    return _probe(recipe, device, specs)


def require_memory(recipe: PlannedRecipe, row: hardware.Hardware) -> None:
    """Refuse a run of which a stage doesn't fit the memory of one device, before it takes the machine down."""
    at_hand = memory.of_one_device(row)
    needs = _memory(recipe, recipe.specs(), recipe.micro_rows, recipe.train.recompute)
    need = max(needs)
    if need <= at_hand:
        return
    ways: Sequence[memory.Recompute] = ("layers",) if recipe.train.recompute == "layers" else ("none", "layers")
    mends = [mend for way in ways if (mend := _mend(recipe, way, at_hand))]
    raise BudgetError(
        f"stage {needs.index(need) + 1}: memory",
        found=f"{units.si(need, 'B')} at its most in a pass of {recipe.micro_rows} sequences",
        expected=f"at most {units.si(at_hand, 'B')}, what {row.name} has",
        mend=f"Set {' or '.join(mends)}." if mends else "Choose a smaller model or a machine with more memory.",
    )


def require_memory_of_ranks(recipe: PlannedRecipe, row: Hardware, parallel: Parallel) -> None:
    """Refuse a run of which a stage doesn't fit the memory that each rank has."""
    at_hand = memory.of_one_device(row) // (parallel.world.size if row.kind == "cpu" else 1)
    needs = memory_of_ranks(recipe, parallel)
    if (need := max(needs)) > at_hand:
        raise BudgetError(
            f"stage {needs.index(need) + 1}: memory",
            found=f"{units.si(need, 'B')} on each of {parallel.world.size} ranks at its most",
            expected=f"at most {units.si(at_hand, 'B')}, what a rank on {row.name} has",
            mend="Start more processes on more devices, or set train.recompute=layers or a smaller "
            "train.per_device_train_batch_size.",
        )


def memory_of_ranks(recipe: PlannedRecipe, parallel: Parallel) -> list[int]:
    """Bytes that a rank holds at its most at each stage: its part of a copy, and rows of its own."""
    layout = Layout(data=parallel.shard, tensor=parallel.tensor, sharding="full")
    update = Update(
        rows=recipe.rows // parallel.replicate,
        micro_rows=parallel.micro_rows(recipe.rows, recipe.micro_rows),
        sequence_length=recipe.data.sequence_length,
        compute="bfloat16" if recipe.train.bf16 == "on" else "float32",
        recompute=recipe.train.recompute,
        accumulate="pairs",
    )
    return [memory.FRAMEWORK + rank_memory(spec, layout, update).total for spec in recipe.specs()]


def most_memory(recipe: PlannedRecipe) -> int:
    """Bytes that the largest stage holds at its most."""
    return max(_memory(recipe, recipe.specs(), recipe.micro_rows, recipe.train.recompute))


def _mend(recipe: PlannedRecipe, recompute: memory.Recompute, at_hand: int) -> str:
    """The settings by which passes with this recomputation fit; "" if there are none."""
    specs = recipe.specs()
    rows = memory.most_that_fit(
        lambda rows: rows <= recipe.micro_rows and max(_memory(recipe, specs, rows, recompute)) <= at_hand
    )
    settings: dict[str, object] = {"train.recompute": recompute} if recompute != recipe.train.recompute else {}
    settings |= {"train.per_device_train_batch_size": rows} if rows < recipe.micro_rows else {}
    return " ".join(f"{key}={value}" for key, value in settings.items()) if rows else ""


def _memory(
    recipe: PlannedRecipe,
    specs: Sequence[ModelSpec],
    rows: int,
    recompute: memory.Recompute,
    accumulate: memory.Accumulate = "running",
) -> list[int]:
    """Bytes that each stage holds at its most with passes of `rows`, in the way that is tried first: op by op."""
    from espalier.train.objectives import CHUNK

    return [
        memory.FRAMEWORK
        + memory.training_memory(
            spec,
            rows=rows,
            sequence_length=recipe.data.sequence_length,
            optimizer=recipe.optimizer.name,
            compute="bfloat16" if recipe.train.bf16 == "on" else "float32",
            loss_chunk=CHUNK,
            attention="sdpa",
            recompute=recompute,
            passes=math.ceil(recipe.rows / rows),
            accumulate=accumulate,
        ).total
        for spec in specs
    ]


def priced(recipe: PlannedRecipe) -> str:
    """What a recipe would take here, from the hardware's peak alone."""
    here = machine(recipe)
    estimated = estimate(recipe, here)
    total, scratch = estimated.total, estimated.from_scratch
    return (
        f"training on {here.hardware.name}, estimated: {units.count(total.tokens)} tokens, "
        f"{units.si(total.flops, 'FLOP')}, {units.duration(total.seconds)}, {units.money(total.usd)}, "
        f"{units.si(total.kwh * 1000, 'Wh')}\n"
        f"from scratch at the final size: {units.si(scratch.flops, 'FLOP')}, {units.duration(scratch.seconds)}, "
        f"{units.money(scratch.usd)}"
    )


def estimate(recipe: PlannedRecipe, machine: Machine) -> Plan:
    """The plan of a recipe on a machine whose speed nobody measured: its peak, used as training usually does."""
    row, again = machine.hardware, recipe.train.recompute
    speed = row.peak_flops[hardware.compute_dtype(row)] * hardware.USUAL_MFU
    per_token = [flops.training_flops(spec, recipe.data.sequence_length, again) / speed for spec in recipe.specs()]
    return _plan(recipe, machine.rates, per_token, "estimated")


def _plan(
    recipe: PlannedRecipe, rates: Rates, per_token: Sequence[float], basis: Basis, spent: Cost | None = None
) -> Plan:
    return plan(
        list(zip(recipe.specs(), recipe.durations(), strict=True)),
        rows=recipe.rows,
        sequence_length=recipe.data.sequence_length,
        seconds_per_token=per_token,
        basis=basis,
        rates=rates,
        cap=recipe.budget.cap(),
        spent=spent,
        reserve=recipe.budget.reserve,
        recompute=recipe.train.recompute,
    )


def _choose_compute(
    recipe: PlannedRecipe, here: Machine, world: World = SINGLE, parallel: Parallel | None = None
) -> Device:
    """The dtype in which the largest model trains fastest: small matmuls may gain nothing from bfloat16."""
    from espalier.train.device import Device

    threads = recipe.train.threads or world.told(max(hardware.free_cores() // world.local_size, 1))
    device = Device(
        kind=here.hardware.kind,
        threads=threads,
        compute="float32",
        recompute=recipe.train.recompute,
        accumulate=_accumulate(recipe, here.hardware, world),
    )
    if recipe.train.fp8 == "on":
        _require_float8(device)
        return replace(device, compute="float8")
    half = replace(device, compute="bfloat16")
    if recipe.train.bf16 == "off" or hardware.compute_dtype(here.hardware) == "float32":
        return half if recipe.train.bf16 == "on" else device
    if recipe.train.bf16 == "on":
        return half
    largest = recipe.specs()[-1:]
    return min((device, half), key=lambda candidate: _probe(recipe, candidate, largest, parallel)[0].per_token)


def _accumulate(recipe: PlannedRecipe, row: Hardware, world: World) -> memory.Accumulate:
    """In pairs, unless one process can't hold what that takes; ranks hold but their parts of it."""
    needs = _memory(recipe, recipe.specs(), recipe.micro_rows, recipe.train.recompute, "pairs")
    return "pairs" if world.size > 1 or max(needs) <= memory.of_one_device(row) else "running"


def _require_float8(device: Device) -> None:
    import torch

    found = torch.cuda.get_device_capability() if device.kind == "cuda" else None
    if found is None or found < FLOAT8_SINCE:
        raise ResourceError(
            "train.fp8",
            found="a CPU" if found is None else f"a GPU of compute capability {found[0]}.{found[1]}",
            expected=f"a GPU of at least {FLOAT8_SINCE[0]}.{FLOAT8_SINCE[1]}, which multiplies in float8",
            mend="Leave train.fp8 out, or choose an L40S, an H100 or a newer one.",
        )


def _may_compile(recipe: PlannedRecipe, eager: Plan) -> bool:
    wanted = recipe.train.torch_compile
    return wanted == "on" or (wanted == "auto" and eager.total.seconds > WORTH_A_TRIAL)


def _attention(recipe: PlannedRecipe, device: Device) -> Attention:
    """The attention that is fastest when compiled: our own on short rows of a CPU."""
    from espalier.train.attention import LONGEST

    short = device.kind == "cpu" and recipe.data.attend == "row" and recipe.data.sequence_length <= LONGEST
    return "causal_halves" if short else "sdpa"


def _probe(
    recipe: PlannedRecipe, device: Device, specs: Sequence[ModelSpec], parallel: Parallel | None = None
) -> list[Speed]:
    from espalier.train.objectives import NextToken, chunk_loss
    from espalier.train.parallel import ALONE
    from espalier.train.probe import probe

    device.prepare()
    parallel = parallel or ALONE
    objective = NextToken(device.compiled(chunk_loss))
    return [
        probe(
            spec,
            recipe.parametrization,
            recipe.optimizer,
            objective,
            device,
            micro_rows=parallel.micro_rows(recipe.rows, recipe.micro_rows),
            sequence_length=recipe.data.sequence_length,
            home=files.home(),
            parallel=parallel,
        )
        for spec in specs
    ]


def _per_token(recipe: PlannedRecipe, speeds: Sequence[Speed]) -> list[float]:
    return [speed.seconds_per_token(recipe.rows * recipe.data.sequence_length) for speed in speeds]


def _seconds(work: Plan, recipe: PlannedRecipe, speeds: Sequence[Speed]) -> float:
    """How long a plan's tokens take at these speeds, getting ready included."""
    per_token = _per_token(recipe, speeds)
    return sum(
        stage.cost.tokens * rate + speed.ready
        for stage, rate, speed in zip(work.stages, per_token, speeds, strict=True)
    )
