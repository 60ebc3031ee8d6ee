"""The pipeline: verbs chained by their artifacts. Plan, prepare data, train by growing, evaluate, export, report.

Every step is charged to one ledger; at the cap, at Ctrl-C and at the end there is a model folder that can be used.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import psutil
from pydantic import Field, model_validator

from espalier import errors, files, planner, recipe, records, watch
from espalier.budget import flops, memory
from espalier.budget.plan import Plan
from espalier.data import origin
from espalier.data.origin import Origin
from espalier.data.prepare import Corpus, corpus
from espalier.errors import DataError
from espalier.folder import ModelFolder
from espalier.grow.progressive import grow_run
from espalier.planner import Machine, PlannedRecipe, Settled
from espalier.report import Report
from espalier.run import FINAL, RESULTS, Run
from espalier.world import World

if TYPE_CHECKING:
    from espalier.grow.progressive import Outcome
    from espalier.train.parallel import Parallel

# Seconds after which a rank gives up waiting for another: longer than anything that one does alone.
PATIENCE = 6 * 3600.0
MOST_EVAL_TOKENS = 2**20


class SampleRecipe(recipe.Recipe):
    """Prompts that the finished model continues, to show what it writes."""

    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ("def ", "import ")
    max_new_tokens: int = Field(default=64, gt=0)


class ExpectedRecipe(recipe.Recipe):
    """The loss that a law expected, to be compared with what the run comes to; in 95% of cases between low and high."""

    loss: float = Field(gt=0)
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.low is None) != (self.high is None):
            raise ValueError("only one of low and high")
        return self


class PretrainRecipe(PlannedRecipe):
    """The main job: what `espalier run` takes."""

    name: recipe.Safe[str] = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    samples: recipe.Safe[SampleRecipe] = SampleRecipe()
    expected: recipe.Safe[ExpectedRecipe | None] = Field(default=None, description="written by `espalier plan`")


def main(
    path: Path,
    overrides: list[str],
    *,
    runs: Path,
    dry_run: bool,
    tell: Callable[[str], None],
    accept: Collection[str] = (),
    accept_data: str = "",
) -> int:
    """Carry out a recipe file, by all the processes that torchrun started; the exit code.

    accept       keys whose new values an unfinished run may take over
    accept_data  digest of other data with which it may go on
    """
    world = World.here()
    with world.joined(seconds=PATIENCE):
        resolved = world.together(lambda: recipe.load(PretrainRecipe, path, overrides))
        if dry_run:
            if world.leads:
                tell(recipe.dump(resolved))
                tell(planner.priced(resolved))
            return 0
        began = psutil.Process().create_time()
        with Run.start(
            runs / resolved.name,
            resolved,
            cap=resolved.budget.cap(),
            tell=tell,
            since=began,
            accept=accept,
            world=world,
        ) as run:
            if world.told(run.state["status"] if world.leads else None) == "finished":
                run.tell(f"{run.folder} is finished; nothing to do. Change the name to run it again.")
                return 0
            return pretrain(resolved, run, accept_data=accept_data)


def pretrain(resolved: PretrainRecipe, run: Run, *, accept_data: str = "") -> int:
    """The main job in a run folder: exit code 0 when done, else that of the way in which it ended early."""
    from espalier import story

    watch.beside(0, "planning")
    here = planner.machine(resolved, run)
    parallel = _parallel(resolved, here, run)
    run.charge("start")
    planner.settle(resolved, here, run, parallel)  # refuses what can't be done before anything goes into data
    run.charge("plan")

    watch.beside(0, "preparing data", more=PATIENCE)
    text = run.world.in_turn(
        lambda: corpus(origin.with_own_tokenizer(resolved.data, run.folder), home=files.home(), tell=run.tell)
    )
    _require_one_origin(text, run)
    run.world.led(lambda: origin.require_same(run.folder, text, accept=accept_data, tell=run.tell))
    run.charge("data")

    watch.beside(0, "planning")
    settled = planner.settle(resolved, here, run, parallel)
    run.world.led(lambda: settled.keep(run))
    run.world.led(lambda: story.tell_plan(settled.plan, run.ledger.cap))
    run.charge("plan")

    with run.signals():  # until here there is nothing to save
        outcome = _grow(resolved, settled, text, run, parallel)
    if outcome.ending == "signal":
        return _interrupted(run)
    _export(resolved, settled, outcome, text.tokenizer, run, parallel)
    run.world.led(lambda: _tell_end(outcome, run))
    return errors.EXIT_BUDGET_SPENT if outcome.ending == "budget" else 0


def _require_one_origin(text: Corpus, run: Run) -> None:
    """Refuse ranks whose machines have prepared other data than the leader's."""
    digests = run.world.gathered(Origin.of(text).digest)
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise DataError(
            f"rank {other}",
            found=f"data {digests[other]}",
            expected=f"the leader's, {digests[0]}",
            mend="Have the same sources on every machine, or a disk that all share.",
        )


def _parallel(resolved: PretrainRecipe, here: Machine, run: Run) -> Parallel:
    """How the ranks share the training."""
    from espalier.train.parallel import Parallel

    parallel = Parallel.of(run.world, resolved.train.parallel, here.hardware.kind)
    parallel.require_rows(resolved.rows)
    return parallel


def _tell_end(outcome: Outcome, run: Run) -> None:
    from espalier import story

    page = story.write_page(run.folder)
    run.finish("finished", {"done": "", "budget": "the budget was spent"}[outcome.ending])
    story.tell(run.folder)
    run.tell(f"model   {run.folder / FINAL}\nreport  {page.resolve()}")


def _grow(resolved: PretrainRecipe, settled: Settled, text: Corpus, run: Run, parallel: Parallel) -> Outcome:
    """The growth run on the corpus, with its streams, its held-out loss and its reserve."""
    from espalier.data import tokenizer
    from espalier.data.stream import Stream
    from espalier.grow.progressive import Setting
    from espalier.train.loop import State
    from espalier.train.objectives import NextToken, chunk_loss
    from espalier.train.validate import HeldOut, validate

    device, data = settled.device, resolved.data
    train_stream, held_out_stream = (
        Stream(
            tokens,
            sequence_length=data.sequence_length,
            seed=resolved.seed,
            attend=data.attend,
            eos_id=tokenizer.eos_id(text.tokenizer),
        )
        for tokens in (text.train, text.validation)
    )
    lengths = tokenizer.byte_lengths(tokenizer.load(text.tokenizer))
    # By the first plan: the held-out text stays the same, whatever becomes of the plan.
    rows = min(_eval_tokens(resolved, settled.first) // data.sequence_length, held_out_stream.rows)
    if rows > resolved.micro_rows:  # whole passes only: another shape would be compiled for
        rows -= rows % resolved.micro_rows
    objective = NextToken(device.compiled(chunk_loss))

    def held_out(state: State) -> HeldOut:
        return validate(
            state.model,
            held_out_stream,
            lengths,
            objective,
            device,
            rows=rows,
            micro_rows=resolved.micro_rows,
            parallel=parallel,
        )

    last = settled.plan.stages[-1]
    evaluation = last.cost * (rows * data.sequence_length / last.cost.tokens / 3)
    setting = Setting(
        run=run,
        train_stream=train_stream,
        held_out=held_out,
        objective=objective,
        tokenizer=text.tokenizer,
        device=device,
        evaluation=replace(evaluation, tokens=0.0),
        end=settled.machine.rates.cost(planner.EXPORT_SECONDS),
        share=resolved.budget.reserve,
        peak_flops=settled.machine.hardware.peak_flops["float32" if device.compute == "float32" else "bfloat16"],
        terminal=sys.stdout.isatty() and run.world.leads,
        keep=lambda plan: run.world.led(lambda: replace(settled, plan=plan).keep(run)),
        parallel=parallel,
        changed=settled.changed,
    )
    return grow_run(resolved, settled.plan, setting)


def _eval_tokens(resolved: PretrainRecipe, plan: Plan) -> int:
    """Held-out tokens of one evaluation: what is stated, or what half the reserve pays for, within reason.

    A token costs a third of its training; every growth is evaluated twice, and the end once.
    """
    if resolved.train.eval_tokens:
        return max(resolved.train.eval_tokens, resolved.data.sequence_length)
    times = resolved.train.evaluations + 2 * len(plan.stages) + 1
    affordable = plan.total.tokens * 3 * resolved.budget.reserve / 2 / times
    least = resolved.train.per_device_train_batch_size * resolved.data.sequence_length
    return int(min(max(affordable, least), MOST_EVAL_TOKENS))


def _export(
    resolved: PretrainRecipe, settled: Settled, outcome: Outcome, vocabulary: Path, run: Run, parallel: Parallel
) -> None:
    """The final model folder, with results, samples, made.json and card."""
    from espalier.card import model_card
    from espalier.data import tokenizer
    from espalier.infer.sample import complete
    from espalier.train import checkpoint

    state = outcome.state
    model = state.model
    step, need = state.progress.step, memory.folder_bytes(state.spec, "float32")
    watch.beside(step, "writing samples")
    settled.device.release(model)
    results = Report(run.name, context={"tokens": state.progress.tokens, "step": state.progress.step})
    held_out = outcome.held_out
    assert held_out is not None, "only a signal ends a run without its held-out loss"
    results.add("held-out", "loss", held_out.loss, stderr=held_out.stderr, n=held_out.tokens, note="nats a token")
    results.add("held-out", "bpb", held_out.bpb, n=held_out.tokens, note="bits a byte")
    prompts = resolved.samples.prompts
    completions = complete(model, tokenizer.load(vocabulary), prompts, max_new_tokens=resolved.samples.max_new_tokens)
    results.context["samples"] = [list(pair) for pair in zip(prompts, completions, strict=True)]
    run.world.led(lambda: results.save(run.folder / RESULTS))
    run.charge("evaluate")

    def describe(folder: Path) -> None:
        made: dict[str, Any] = run.made(
            "pretrain",
            seed=resolved.seed,
            hardware=settled.machine.hardware.name,
            measured=list(run.ledger.entries[-1].measured),
            data=records.read(run.folder / origin.RECORD, None),
            tokenizer=ModelFolder(folder).tokenizer_fingerprint(),
            stages=[stage.spec.model_dump() for stage in settled.plan.stages],
        )
        run.write_made(folder, made)
        parameters = flops.parameters(state.spec)
        card = model_card(run.name, state.spec.family, state.spec, parameters, made, results)
        files.write_text(folder / "README.md", card)

    watch.beside(step, "exporting", more=watch.moving(need))
    checkpoint.save_model(
        run.folder / FINAL,
        model,
        tokenizer=vocabulary,
        need_bytes=need,
        also=describe,
        parallel=parallel,
    )
    run.charge("export")


def _interrupted(run: Run) -> int:
    number = run.stop_signal
    assert number is not None
    run.finish("stopped", signal.Signals(number).name)
    run.tell(f"Stopped with a checkpoint in {run.folder}, a model folder that can be used. Run it again to go on.")
    return {signal.SIGINT: errors.EXIT_INTERRUPTED, signal.SIGTERM: errors.EXIT_TERMINATED}[signal.Signals(number)]
