"""The pipeline: verbs chained by their artifacts. Plan, prepare data, train by growing, evaluate, export, report.

Every step is charged to one ledger; at the cap, at Ctrl-C and at the end there is a model folder that can be used.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from pydantic import Field

from espalier import errors, files, recipe, units
from espalier.budget import flops, hardware, memory, price
from espalier.budget.plan import Basis, BudgetRecipe, Plan, plan
from espalier.data.prepare import DataRecipe
from espalier.grow.progressive import GrowthRecipe, grow_run
from espalier.ledger import Cost, Rates
from espalier.report import Report
from espalier.run import FINAL, PLAN, RESULTS, Run, read_json
from espalier.spec import ModelSpec

if TYPE_CHECKING:
    from espalier.data.pack import Tokens
    from espalier.grow.progressive import Outcome
    from espalier.train.device import Device

# What a compiled step saves of an eager one's time, and what compiling a width costs: see bench/.
COMPILE_SAVES = 0.2
COMPILE_SECONDS = 25.0
# Share of the matmul peak that a small model's training reaches, for prices before anything was measured.
USUAL_MFU = 0.3
# What is kept back for the samples, the export and the page.
EXPORT_SECONDS = 10.0


class SampleRecipe(recipe.Recipe):
    """Prompts that the finished model continues, to show what it writes."""

    prompts: tuple[str, ...] = ("def ", "import ")
    max_new_tokens: int = Field(default=64, gt=0)


class PretrainRecipe(GrowthRecipe):
    """The main job: what `espalier run` takes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    budget: BudgetRecipe = BudgetRecipe()
    data: DataRecipe = DataRecipe()
    samples: SampleRecipe = SampleRecipe()

    @property
    def rows(self) -> int:
        """Sequences of one update."""
        return max(self.train.batch_tokens // self.data.sequence_length, 1)


@dataclass(frozen=True)
class Machine:
    """The hardware row at hand, what a second on it costs, and how the arithmetic runs."""

    hardware: hardware.Hardware
    rates: Rates
    device: Device


def main(path: Path, overrides: list[str], *, runs: Path, dry_run: bool, tell: Callable[[str], None]) -> int:
    """Carry out a recipe file; the exit code."""
    resolved = recipe.load(PretrainRecipe, path, overrides)
    if dry_run:
        tell(recipe.dump(resolved))
        tell(priced(resolved))
        return 0
    began = psutil.Process().create_time()
    with Run.start(runs / resolved.name, resolved, cap=resolved.budget.cap(), tell=tell, since=began) as run:
        if run.state["status"] == "finished":
            tell(f"{run.folder} is finished; nothing to do. Change the name to run it again.")
            return 0
        with run.signals():
            return pretrain(resolved, run)


def pretrain(resolved: PretrainRecipe, run: Run) -> int:
    """The main job in a run folder: exit code 0 when done, else that of the way in which it ended early."""
    from espalier import story
    from espalier.data import pack, tokenizer
    from espalier.data.prepare import prepare

    machine = _machine(resolved, run)
    run.charge("start")
    machine, _ = _planned(resolved, machine, run)  # refuses what can't be done before anything goes into data
    run.charge("plan")

    dataset = prepare(resolved.data, home=files.home(), tell=run.tell)
    given, vocab_size = resolved.data.tokenizer, resolved.data.vocab_size
    vocabulary = tokenizer.choose(given, dataset, vocab_size, home=files.home(), tell=run.tell)
    tokens = {
        split: pack.tokenize(dataset, split, vocabulary, home=files.home(), tell=run.tell)
        for split in ("train", "validation")
    }
    run.charge("data")

    machine, made_plan = _keep_plan(*_planned(resolved, machine, run), run)
    story.tell_plan(made_plan, run.ledger.cap)
    run.charge("plan")

    outcome = _grow(resolved, made_plan, machine, tokens, vocabulary, run)
    if outcome.ending == "signal":
        return _interrupted(run)
    _export(resolved, made_plan, outcome, machine, vocabulary, run)
    page = story.write_page(run.folder)
    run.finish("finished", {"done": "", "budget": "the budget was spent"}[outcome.ending])
    story.tell(run.folder)
    run.tell(f"model   {run.folder / FINAL}\nreport  {page.resolve()}")
    return errors.EXIT_BUDGET_SPENT if outcome.ending == "budget" else 0


def priced(resolved: PretrainRecipe) -> str:
    """What a recipe would take, from the hardware's peak alone."""
    row = hardware.here(home=files.home())
    rates = _rates(resolved, row)
    length, speed = resolved.data.sequence_length, row.peak_flops[hardware.compute_dtype(row)] * USUAL_MFU
    speeds = [flops.training_flops(spec, length) / speed for spec in _specs(resolved)]
    estimate = _priced(resolved, rates, speeds, "estimated")
    total, scratch = estimate.total, estimate.from_scratch
    return (
        f"training on {row.name}, estimated: {units.count(total.tokens)} tokens, {units.si(total.flops, 'FLOP')}, "
        f"{units.duration(total.seconds)}, {units.money(total.usd)}, {units.si(total.kwh * 1000, 'Wh')}\n"
        f"from scratch at the final size: {units.si(scratch.flops, 'FLOP')}, {units.duration(scratch.seconds)}, "
        f"{units.money(scratch.usd)}"
    )


def _machine(resolved: PretrainRecipe, run: Run) -> Machine:
    """The machine at hand; a run that goes on computes as it began."""
    from espalier.train.device import Device

    row = hardware.here(home=files.home())
    rates = _rates(resolved, row)
    meter = price.best_meter(row)
    run.price(rates, meter.read_kwh if meter.measured else None)
    planned = read_json(run.folder / PLAN, None)
    if planned:
        return Machine(row, rates, Device(**planned["device"]))
    bf16 = {"auto": hardware.compute_dtype(row), "on": "bfloat16", "off": "float32"}[resolved.train.bf16]
    device = Device(
        kind=row.kind,
        threads=resolved.train.threads or hardware.free_cores(),
        compute=bf16,
        compile="layers" if resolved.train.torch_compile == "on" else "off",
    )
    return Machine(row, rates, device)


def _rates(resolved: PretrainRecipe, row: hardware.Hardware) -> Rates:
    budget = resolved.budget
    return price.rates(
        row,
        pue=budget.pue,
        usd_per_hour=budget.usd_per_hour,
        watts=budget.watts,
        kgco2e_per_kwh=budget.kgco2e_per_kwh,
    )


def _planned(resolved: PretrainRecipe, machine: Machine, run: Run) -> tuple[Machine, Plan]:
    """The plan for what is left of the budget, from measured speeds, and the machine set to carry it out."""
    kept = read_json(run.folder / PLAN, None)
    if kept:
        return machine, Plan.from_json(kept["plan"])
    draft = _priced(resolved, machine.rates, _probe(resolved, machine.device), "measured", run.ledger.total)
    if resolved.train.torch_compile == "auto" and _compile_pays(draft):
        machine = replace(machine, device=replace(machine.device, compile="layers"))
        draft = _priced(resolved, machine.rates, _probe(resolved, machine.device), "measured", run.ledger.total)
    return machine, draft


def _keep_plan(machine: Machine, made_plan: Plan, run: Run) -> tuple[Machine, Plan]:
    """Write plan.json: from here on, the run does the same wherever it is taken up again."""
    values = {
        "plan": made_plan.to_json(),
        "device": asdict(machine.device),
        "hardware": asdict(machine.hardware),
        "rates": asdict(machine.rates),
    }
    files.write_json(run.folder / PLAN, values)
    return machine, made_plan


def _priced(
    resolved: PretrainRecipe, rates: Rates, speeds: list[float], basis: Basis, spent: Cost | None = None
) -> Plan:
    return plan(
        list(zip(_specs(resolved), resolved.durations(), strict=True)),
        rows=resolved.rows,
        sequence_length=resolved.data.sequence_length,
        seconds_per_token=speeds,
        basis=basis,
        rates=rates,
        cap=resolved.budget.cap(),
        spent=spent,
        reserve=resolved.budget.reserve,
    )


def _specs(resolved: PretrainRecipe) -> list[ModelSpec]:
    """The shapes of the stages; the vocabulary is that of the tokenizer given, or the one asked for."""
    from espalier.data import tokenizer

    given = resolved.data.tokenizer
    vocab_size = tokenizer.load(Path(given)).get_vocab_size() if given else resolved.data.vocab_size
    return [stage.spec for stage in resolved.path(vocab_size)]


def _probe(resolved: PretrainRecipe, device: Device) -> list[float]:
    """Seconds a token of every stage, from a few real steps."""
    from espalier.train.objectives import next_token
    from espalier.train.probe import probe

    device.set_threads()
    micro_rows = min(resolved.train.per_device_train_batch_size, resolved.rows)
    length = resolved.data.sequence_length
    speeds = [
        probe(
            spec,
            resolved.parametrization,
            resolved.optimizer,
            next_token,
            device,
            micro_rows=micro_rows,
            sequence_length=length,
            home=files.home(),
        )
        for spec in _specs(resolved)
    ]
    return [speed.seconds_per_token(resolved.rows * length) for speed in speeds]


def _compile_pays(draft: Plan) -> bool:
    """Whether compiling saves more than it costs; layers of one width compile once, however many they are."""
    widths = {stage.spec.changed(num_hidden_layers=1) for stage in draft.stages}
    return draft.total.seconds * COMPILE_SAVES > COMPILE_SECONDS * len(widths)


def _grow(
    resolved: PretrainRecipe,
    made_plan: Plan,
    machine: Machine,
    tokens: dict[str, Tokens],
    vocabulary: Path,
    run: Run,
) -> Outcome:
    from espalier.data import tokenizer
    from espalier.data.stream import Stream
    from espalier.grow.progressive import Setting
    from espalier.train.loop import State
    from espalier.train.objectives import next_token
    from espalier.train.validate import HeldOut, validate

    words = tokenizer.load(vocabulary)
    lengths = tokenizer.byte_lengths(words)
    train_stream, held_out_stream = (
        Stream(
            tokens[split],
            sequence_length=resolved.data.sequence_length,
            seed=resolved.seed,
            attend=resolved.data.attend,
            eos_id=tokenizer.eos_id(vocabulary),
        )
        for split in ("train", "validation")
    )
    rows = min(max(resolved.train.eval_tokens // resolved.data.sequence_length, 1), held_out_stream.rows)

    def held_out(state: State) -> HeldOut:
        return validate(
            state.model,
            held_out_stream,
            lengths,
            next_token,
            machine.device,
            rows=rows,
            micro_rows=resolved.train.per_device_train_batch_size,
        )

    last = made_plan.stages[-1]
    evaluation = last.cost * (rows * resolved.data.sequence_length / last.cost.tokens / 3)
    setting = Setting(
        run=run,
        train_stream=train_stream,
        held_out=held_out,
        tokenizer=vocabulary,
        device=machine.device,
        reserve=replace(evaluation + machine.rates.cost(EXPORT_SECONDS), tokens=0.0),
        peak_flops=machine.hardware.peak_flops[machine.device.compute],
        terminal=sys.stdout.isatty(),
    )
    return grow_run(resolved, made_plan, setting)


def _export(
    resolved: PretrainRecipe, made_plan: Plan, outcome: Outcome, machine: Machine, vocabulary: Path, run: Run
) -> None:
    """The final model folder, with results, samples, made.json and card."""
    from espalier.card import model_card
    from espalier.data import tokenizer
    from espalier.infer.sample import complete
    from espalier.model import build

    state = outcome.state
    model = state.model
    machine.device.release(model)
    results = Report(run.name, context={"tokens": state.progress.tokens, "step": state.progress.step})
    held_out = outcome.held_out
    assert held_out is not None, "only a signal ends a run without its held-out loss"
    results.add("held-out", "loss", held_out.loss, stderr=held_out.stderr, n=held_out.tokens, note="nats a token")
    results.add("held-out", "bpb", held_out.bpb, n=held_out.tokens, note="bits a byte")
    prompts = resolved.samples.prompts
    completions = complete(model, tokenizer.load(vocabulary), prompts, max_new_tokens=resolved.samples.max_new_tokens)
    results.context["samples"] = [list(pair) for pair in zip(prompts, completions, strict=True)]
    results.save(run.folder / RESULTS)
    run.charge("evaluate")
    need = memory.folder_bytes(state.spec, "float32")
    with files.whole_folder(run.folder / FINAL, need_bytes=need) as folder:
        build.save(model, folder, vocabulary)
        made: dict[str, Any] = run.made(
            "pretrain",
            seed=resolved.seed,
            hardware=machine.hardware.name,
            measured=list(run.ledger.entries[-1].measured),
            stages=[stage.spec.model_dump() for stage in made_plan.stages],
        )
        run.write_made(folder, made)
        parameters = flops.parameters(state.spec)
        files.write_text(folder / "README.md", model_card(run.name, made, state.spec, parameters, results))
    run.charge("export")


def _interrupted(run: Run) -> int:
    number = run.stop_signal
    assert number is not None
    run.finish("stopped", signal.Signals(number).name)
    run.tell(f"Stopped with a checkpoint in {run.folder}, a model folder that can be used. Run it again to go on.")
    return 128 + number
