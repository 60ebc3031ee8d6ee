"""The growth run: train small, grow, go on. One model, one data order and one ledger through all stages.

FLM-101B (arXiv 2309.03852) trained 16B -> 51B -> 101B so. A stage is a shape and a duration; between two stages the
model grows by the operators that the later stage names, its optimizer state with it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from espalier import units, watch
from espalier.budget import flops, memory
from espalier.budget.plan import Duration, DurationText, Plan
from espalier.errors import BudgetError, ModelError, RunError
from espalier.grow import operators
from espalier.grow.operators import DepthOperator, WidthOperator
from espalier.grow.pace import Pace
from espalier.ledger import Cost
from espalier.model.growth import Growth
from espalier.model.mup import Parametrization
from espalier.recipe import ByField, Flagged, Recipe
from espalier.run import STAGE
from espalier.spec import DenseFamily, ModelSpec
from espalier.train.recipe import OptimizerRecipe, ScheduleRecipe, Stretch, TrainRecipe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from espalier.data.stream import Stream
    from espalier.model.reshape import StdOf
    from espalier.run import Run
    from espalier.train.checkpoint import Progress, Saver
    from espalier.train.device import Device
    from espalier.train.loop import Ending, Meter, Moment, Objective, State
    from espalier.train.moments import Validate
    from espalier.train.parallel import Parallel
    from espalier.train.validate import HeldOut

LOG_LINES = 300


class ShapeRecipe(Recipe):
    """Sizes under their Hugging Face names; what is left out is derived (see ModelSpec)."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None

    def sizes(self) -> dict[str, int]:
        """The sizes that are stated."""
        return {name: size for name in ShapeRecipe.model_fields if (size := getattr(self, name)) is not None}


class ModelRecipe(ShapeRecipe):
    """What all stages share; a stage's own sizes come on top."""

    family: DenseFamily = "granite"
    head_dim: int = 32
    vocab_size: int | None = Field(default=None, description="the tokenizer's size, if not stated")
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False


# What a stage's growths may be told; arms of a comparison may be told the same.
OptimizerState = Literal["carried", "fresh"]
Fit = Annotated[float, Field(gt=0, lt=1)]
Ramp = Annotated[float, Field(gt=0, le=1)]
RateFactor = Annotated[float, Field(gt=0)]


class StageRecipe(ShapeRecipe):
    """One stage: its shape, how long it lasts, and how the model before it grows into it.

    optimizer_state  what becomes of the moments: carried with the weights, or fresh, as G_stack's paper has it; if not
                     stated they are carried wherever they can be, which is not after `learned` maps
    fit              the share of the stage's steps that train the maps, where an operator is `learned`
    ramp             the share of the stage's steps over which masks are raised, where an operator is `masked`
    rate             the stage's factor on the schedule's learning rate, as FLM lowered it from stage to stage
    """

    duration: DurationText
    depth: DepthOperator = "stack"
    width: WidthOperator = "zero_pad"
    optimizer_state: OptimizerState | None = None
    fit: Fit = 0.1
    ramp: Ramp = 0.25
    rate: RateFactor = 1.0


class TrainingRecipe(Recipe):
    """What training is told whatever its stages are."""

    seed: int = 1
    model: ModelRecipe = ModelRecipe()
    parametrization: Parametrization = Parametrization()
    optimizer: ByField[OptimizerRecipe] = OptimizerRecipe()
    schedule: Flagged[ScheduleRecipe] = ScheduleRecipe()
    train: ByField[TrainRecipe] = TrainRecipe()


class GrowthRecipe(TrainingRecipe):
    """Everything about the model and its training; data and budget come on top in the pipeline's recipe."""

    stages: tuple[StageRecipe, ...] = Field(min_length=1)

    def durations(self) -> list[Duration]:
        return [Duration.parse(stage.duration) for stage in self.stages]

    def path(self, vocab_size: int) -> list[GrownStage]:
        """Every stage's shape and how it comes from the one before, checked: none shrinks, each can be built."""
        shared = {"vocab_size": vocab_size, **self.model.model_dump(exclude_none=True)}
        path: list[GrownStage] = []
        for number, stage in enumerate(self.stages, start=1):
            sizes = {**shared, **stage.sizes()}
            spec = self.parametrization.carried_by(ModelSpec.stated(sizes, where=f"stage {number}"))
            growths = _growths(path[-1].spec, spec, stage, number) if path else ()
            spec.require_vocabulary(vocab_size, where=f"stage {number}: vocab_size")
            if growths:
                spec = spec.changed(rms_norm_eps=growths[-1].after.rms_norm_eps)
            path.append(GrownStage(spec, growths))
        return path


@dataclass(frozen=True)
class GrownStage:
    """A stage's shape, and the growths (in order) that lead to it from the stage before."""

    spec: ModelSpec
    growths: tuple[Growth, ...]


def _growths(before: ModelSpec, after: ModelSpec, stage: StageRecipe, number: int) -> tuple[Growth, ...]:
    try:
        growths = tuple(operators.plan_growth(before, after, depth=stage.depth, width=stage.width))
        if operators.learns(growths) and stage.optimizer_state == "carried":
            raise ModelError(
                "optimizer_state",
                found="carried, through maps that are learned",
                expected="fresh: moments aren't linear in the weights",
                mend="Leave optimizer_state out, or use another operator.",
            )
        return growths
    except ModelError as error:
        where = f"stage {number}: {error.where}"
        raise ModelError(where, found=error.found, expected=error.expected, mend=error.mend) from None


@dataclass(frozen=True)
class Setting:
    """What a growth run works with, beside its recipe and plan.

    evaluation  one held-out loss, of the last stage
    end         what follows the run
    share       of the budget that is kept back for evaluations and checkpoints on the way
    parallel    the ranks that share the training
    keep        called with a plan that takes the place of the one before
    changed     whether the budget or its prices have changed since the plan was made
    """

    run: Run
    train_stream: Stream
    held_out: Callable[[State], HeldOut]
    objective: Objective
    tokenizer: Path
    device: Device
    evaluation: Cost
    end: Cost
    share: float
    peak_flops: float
    terminal: bool
    keep: Callable[[Plan], None]
    parallel: Parallel
    changed: bool = False

    @property
    def reserve(self) -> Cost:
        """What is kept back: two held-out losses of a growth that may be under way, one at the end, what follows."""
        return self.evaluation * 3 + self.end


@dataclass(frozen=True)
class Outcome:
    """How a growth run ended, the state it left and its held-out loss (unless a signal was in a hurry)."""

    state: State
    ending: Ending
    held_out: HeldOut | None = None


def grow_run(recipe: GrowthRecipe, plan: Plan, setting: Setting) -> Outcome:
    """Carry out a plan from its newest checkpoint, or from the start; after a spike again, from before it."""
    _require_growths_of_ranks(recipe, plan, setting)
    setting.device.prepare()
    pace = Pace(
        setting.run,
        plan,
        recipe.durations(),
        share=setting.share,
        growth=setting.evaluation * 2,
        end=setting.reserve,
        keep=setting.keep,
    )
    while (outcome := _from_newest(recipe, pace, setting)) is None:
        gc.collect()  # layers whose pass is wrapped refer to themselves: the model would stay beside the one to come
        setting = replace(setting, changed=True)  # what was done in vain is missing at the end
    return outcome


def _from_newest(recipe: GrowthRecipe, pace: Pace, setting: Setting) -> Outcome | None:
    """Train from the newest checkpoint, or from the start, to the end; None after a spike that led back to another."""
    from espalier.train.checkpoint import Saver

    run, plan = setting.run, pace.plan
    largest = memory.checkpoint_bytes(plan.stages[-1].spec, recipe.optimizer.name)
    watch.beside(0, "taking up the run", more=watch.moving(largest))
    state = _resume(recipe, plan, setting)
    if state is None:
        run.world.led(lambda: _require_reserve(plan, setting))
        state = _begin(recipe, plan, setting)
    run.went_on(state.progress.step)
    if state.progress.step:
        pace.adapt(state.progress, 1.0, changed=setting.changed)
    run.charge("start")
    beside = recipe.train.save == "beside" or (recipe.train.save == "auto" and setting.device.kind == "cuda")
    with Saver(
        run.folder,
        tokenizer=setting.tokenizer,
        keep=recipe.train.keep_checkpoints,
        every=recipe.train.keep_every,
        when="beside" if beside else "at once",
        parallel=setting.parallel,
    ) as saver:
        return _to_the_end(recipe, pace, setting, state, saver)


def _to_the_end(recipe: GrowthRecipe, pace: Pace, setting: Setting, state: State, saver: Saver) -> Outcome | None:
    """Train a state through the stages that are left; None after a spike that led back to another."""
    from espalier.train import moments
    from espalier.train.loop import Meter

    run, plan = setting.run, pace.plan
    meter = Meter(run, setting.reserve)
    save = moments.Save(
        run,
        meter,
        saver,
        every=recipe.train.save_steps,
        need_bytes=lambda s: memory.checkpoint_bytes(s.spec, recipe.optimizer.name),
    )
    log = moments.Log(
        run,
        every=recipe.train.logging_steps or max(plan.steps // LOG_LINES, 1),
        learning_rate=recipe.optimizer.learning_rate,
        peak_flops=setting.peak_flops,
        samples_per_epoch=setting.train_stream.rows,
    )
    every = max(plan.steps // recipe.train.evaluations, 1)
    length = setting.train_stream.sequence_length
    validates = [
        moments.Validate(
            run, meter, setting.held_out, every=every, flops_per_token=flops.forward_flops(stage.spec, length)
        )
        for stage in plan.stages
    ]
    ending: Ending = "done"
    with moments.Bar(run, lambda: pace.plan, terminal=setting.terminal) as bar:
        for number in range(len(plan.stages)):
            if state.progress.step >= pace.plan.stages[number].last_step and number < len(plan.stages) - 1:
                continue
            validate = validates[number]
            if number > state.progress.stage:
                save.now(state)  # a growth that fails or is broken off begins again from here
                if recipe.train.keep == "stages":
                    _keep_stage(recipe, setting, state)
                grown = _grow(recipe, pace.plan, setting, state, number, validates[number - 1], validate)
                if grown is None:
                    ending = "budget" if run.stop_signal is None else "signal"
                    break
                state = grown
            ending = _train(recipe, setting, state, pace, meter, saver, (pace, log, validate, save, bar))
            if ending != "done":
                break
    if ending == "spike":
        return None
    if ending == "signal":
        save.now(state)
        return Outcome(state, ending)
    save.now(state)  # what is killed from here on evaluates and exports the same model
    return Outcome(state, ending, validates[state.progress.stage].now(state))


def _train(
    recipe: GrowthRecipe,
    setting: Setting,
    state: State,
    pace: Pace,
    meter: Meter,
    saver: Saver,
    watched: Sequence[Moment],
) -> Ending:
    """Train to the end of the stage, a stretch at a time, and after each look at the pace."""
    from espalier.train.loop import Segment, train

    number = state.progress.stage
    stage = pace.plan.stages[number]
    meter.expect(stage.cost * (1 / stage.steps))
    goes_back = partial(_goes_back, recipe, setting, saver, meter, stage.rows)
    while state.progress.step < stage.last_step:
        segment = Segment(
            until_step=pace.next_look(state.progress),
            rows=stage.rows,
            micro_rows=recipe.train.per_device_train_batch_size,
            flops_per_token=stage.flops_per_token,
            factor=_factor(recipe, pace.plan, number),
            level=_level(recipe, pace.plan, number),
            spike_sigmas=math.inf if recipe.train.on_spike == "off" else recipe.train.spike_sigmas,
        )
        ending = train(
            state,
            setting.train_stream,
            segment,
            setting.objective,
            setting.device,
            meter,
            watched,
            setting.parallel,
            ends_at=goes_back,
        )
        if ending != "done":
            return ending
        pace.look(state.progress)
        stage = pace.plan.stages[number]
    return "done"


def _goes_back(recipe: GrowthRecipe, setting: Setting, saver: Saver, meter: Meter, rows: int, state: State) -> bool:
    """Whether a spike at the latest step leads back to an earlier checkpoint, the newest from now on; told either way.

    rows  samples of an update
    """
    from espalier.train import checkpoint, guards

    run, progress, remembered = setting.run, state.progress, state.progress.guards
    meter.flush(state)
    spike = f"Spike {remembered.sigmas:.1f} sigma at step {progress.step}"
    path = None
    if recipe.train.on_spike == "rewind" and remembered.rewinds < guards.MOST_REWINDS:
        saver.finish()
        try:
            path = checkpoint.newest(run.folder, run.tell, run.world, until=progress.step - guards.LEADING - 1)
        except RunError as error:  # this state is whole, whatever became of those before it
            run.tell(f"Nowhere to go back to: {error.found}.")
    if path is None:
        run.log_metrics(step=progress.step, stage=progress.stage, spike=remembered.sigmas)
        run.tell(f"{spike}; training goes on.")
        return False
    samples = progress.samples - (guards.LEADING + 1) * rows, progress.samples + guards.FOLLOWING * rows
    earlier = checkpoint.pass_over(path, remembered, *samples, run.world)
    run.charge("rewind", stage=progress.stage, step=progress.step)
    run.log_metrics(
        step=earlier.step, stage=earlier.stage, rewound_from=progress.step, spike=remembered.sigmas, skipped=samples
    )
    batches = f"{progress.step - guards.LEADING}-{progress.step + guards.FOLLOWING}"
    run.tell(f"{spike}: rewound to {earlier.step}, skipping batches {batches}")
    return True


def _factor(recipe: GrowthRecipe, plan: Plan, number: int) -> Callable[[int], float]:
    """The rate's factor at a step of stage `number`, taken at the middle of the step."""
    stage, total = plan.stages[number], plan.total.flops
    begin = sum(earlier.cost.flops for earlier in plan.stages[:number]) / total
    share = stage.cost.flops / total
    rates = [later.rate for later in recipe.stages[number : number + 2]]
    stretch = Stretch(begin, begin + share, *rates)

    def factor(step: int) -> float:
        return recipe.schedule.factor(begin + (step - stage.first_step + 0.5) / stage.steps * share, stretch)

    return factor


def _level(recipe: GrowthRecipe, plan: Plan, number: int) -> Callable[[int], float]:
    """The level of masks at a step of stage `number`: the first one raises them, the last of the ramp to 1."""
    stage = plan.stages[number]
    ramp = max(recipe.stages[number].ramp * stage.steps, 1.0)
    return lambda step: min((step - stage.first_step + 1) / ramp, 1.0)


def _require_growths_of_ranks(recipe: GrowthRecipe, plan: Plan, setting: Setting) -> None:
    """Refuse growths that only a process by itself can do, before anything is trained."""
    for number, stage in enumerate(recipe.path(plan.stages[0].spec.vocab_size), start=1):
        if operators.learns(stage.growths) and setting.parallel.mesh is not None:
            raise ModelError(
                f"stage {number}",
                found=f"growth by learned maps on {setting.run.world.size} ranks",
                expected="an operator that needs no training, or one process",
                mend="Choose depth: stack or width: zero_pad, or start the run without torchrun.",
            )


def _require_reserve(plan: Plan, setting: Setting) -> None:
    """Refuse to begin when the budget pays for no step and the evaluation and export after it."""
    first = plan.stages[0]
    needed = setting.reserve + first.cost * (1 / first.steps)
    if not setting.run.affords(needed):
        share = setting.run.ledger.cap.share_spent(setting.run.ledger.total)
        raise BudgetError(
            "budget",
            found=f"{share:.0%} of it spent before training",
            expected=f"enough for one step, the evaluation and the export ({units.duration(needed.seconds)})",
            mend="Raise the budget under another name=...; the data is cached and costs nothing the next time.",
        )


def _begin(recipe: GrowthRecipe, plan: Plan, setting: Setting) -> State:
    import torch

    from espalier.train.checkpoint import Progress
    from espalier.train.device import initial_model

    torch.manual_seed(recipe.seed)  # whatever planning has drawn, which a run that is begun again doesn't repeat
    model = initial_model(
        plan.stages[0].spec,
        recipe.parametrization,
        setting.device,
        setting.parallel,
        seed=recipe.seed,
        eos_token_id=setting.train_stream.eos_id,
    )
    setting.run.rewind_metrics(0, stage=0)
    return _state(recipe, plan, setting, model, Progress(), {})


def _resume(recipe: GrowthRecipe, plan: Plan, setting: Setting) -> State | None:
    from espalier.train import checkpoint

    run, parallel = setting.run, setting.parallel
    path = checkpoint.newest(run.folder, run.tell, run.world)
    if path is None:
        return None
    model, moments, progress = checkpoint.load(path, setting.device, parallel)
    run.rewind_metrics(progress.step, stage=progress.stage)
    before, now = checkpoint.written_by(path), parallel.world.size
    ranks = f" Ranks: {before} -> {now}; the order of the data is kept." if before != now else ""
    run.tell(f"Resumed at step {progress.step} from {path}, verified.{ranks}")
    return _state(recipe, plan, setting, model, progress, moments)


def _state(
    recipe: GrowthRecipe,
    plan: Plan,
    setting: Setting,
    model: PreTrainedModel,
    progress: Progress,
    moments: dict[str, dict[str, Tensor]],
) -> State:
    """The state of a run that is in stage `progress.stage`, of a placed model.

    Masks are put on where `moments` has unmasked weights.
    """
    from espalier.grow import masked
    from espalier.model import axes
    from espalier.train.loop import State
    from espalier.train.optim import UNMASKED, Optimizer

    number = progress.stage
    spec = plan.stages[number].spec
    optimizer = Optimizer(model, spec, recipe.optimizer, recipe.parametrization, setting.parallel)
    optimizer.load_state(moments)
    if unmasked := {name: quantities[UNMASKED] for name, quantities in moments.items() if UNMASKED in quantities}:
        layout = axes.discover(plan.stages[number - 1].spec.to_config())
        growths = recipe.path(spec.vocab_size)[number].growths
        optimizer.mask(masked.slots(growths, layout), unmasked)
    return State(spec, model, optimizer, progress)


def _keep_stage(recipe: GrowthRecipe, setting: Setting, state: State) -> None:
    """The model as its stage left it, a model folder of its own; once, however often the run is taken up here."""
    from espalier.train import checkpoint

    run, progress = setting.run, state.progress
    path = run.folder / f"{STAGE}{progress.stage + 1}"
    if run.world.told(path.exists()):
        return
    need = memory.folder_bytes(state.spec, "float32")
    watch.beside(progress.step, "saving", more=watch.moving(need))
    checkpoint.save_model(
        path,
        state.model,
        tokenizer=setting.tokenizer,
        need_bytes=need,
        also=lambda folder: run.write_made(folder, run.made("pretrain", seed=recipe.seed, progress=progress.counts)),
        parallel=setting.parallel,
    )
    run.charge("checkpoint", stage=progress.stage, step=progress.step)


def _grow(
    recipe: GrowthRecipe, plan: Plan, setting: Setting, state: State, number: int, before: Validate, after: Validate
) -> State | None:
    """Grow into stage `number`; refuse, and keep the model as it was, when an exact operator wasn't.

    None, and the model as it was, if a signal or the budget ended the training of learned maps.
    """
    from espalier.grow import apply, masked, preserve
    from espalier.model import axes
    from espalier.train.moments import spending
    from espalier.train.optim import UNMASKED
    from espalier.train.parallel import forget, spread_rows, whole

    run, spec = setting.run, plan.stages[number].spec
    growths = recipe.path(spec.vocab_size)[number].growths
    before_loss = before.now(state)
    need = memory.checkpoint_bytes(spec, recipe.optimizer.name)
    watch.beside(state.progress.step, "growing", more=watch.moving(need))
    watch.anew()
    setting.device.release(state.model)
    std_of = recipe.parametrization.std_of(spec)
    layout = axes.discover(state.model.config.to_dict())
    seed = recipe.seed + number
    model = _grown_model(setting, state.model, growths, seed=seed, std_of=std_of)
    progress = replace(state.progress, stage=number, guards=state.progress.guards.anew())
    learns = operators.learns(growths)
    if learns:
        fitted = _fit(recipe, plan, setting, state.model, model, growths, progress)
        if fitted is None:
            return None
        progress = fitted
    batch = setting.train_stream.take(setting.train_stream.order(0, 1))
    with setting.device.unrounded(state.model, model):  # what is promised is promised of the weights
        kept = preserve.check(state.model, model, setting.device.tensors(batch)[0])
    forget(state.model)
    forget(model)
    if all(growth.exact for growth in growths) and kept.relative_difference > preserve.EXACT:
        raise ModelError(
            f"growth into stage {number + 1}",
            found=f"logits that differ by {kept.relative_difference:.1e} of the largest",
            expected=f"at most {preserve.EXACT:.0e}, as {', '.join(g.operator for g in growths)} promises",
            mend="The checkpoint before the growth is intact; use depth: stack, and report this shape.",
        )
    unmasked = [growth.unmasked() for growth in growths]
    carried = recipe.stages[number].optimizer_state != "fresh" and not learns
    hold = partial(spread_rows, parallel=setting.parallel)
    moments = apply.grow_moments(state.optimizer.state(), unmasked, layout, whole, hold) if carried else {}
    if slots := masked.slots(growths, layout).names:
        old = state.model.state_dict()
        trained = apply.plan_weights(
            state.model.config.to_dict(), unmasked, lambda name: whole(old[name]), seed=seed, std_of=std_of
        )
        for name in slots:
            moments.setdefault(name, {})[UNMASKED] = hold(trained.read(name))
    if setting.parallel.mesh is None:
        setting.device.place(model)
    grown = _state(recipe, plan, setting, model, progress, moments)
    run.charge("grow", stage=number, step=progress.step)
    after_loss = after.now(grown)
    run.log_metrics(
        step=progress.step,
        stage=number,
        num_tokens=progress.tokens,
        total_flos=progress.flops,
        **spending(run),
        growth=[growth.record() for growth in growths],
        loss_before=before_loss.loss,
        loss_after=after_loss.loss,
        relative_difference=kept.relative_difference,
    )
    run.tell(
        f"Grown into stage {number + 1} at step {progress.step}: "
        f"held-out loss {before_loss.loss:.3f} -> {after_loss.loss:.3f}"
    )
    return grown


def _grown_model(
    setting: Setting, old: PreTrainedModel, growths: Sequence[Growth], *, seed: int, std_of: StdOf
) -> PreTrainedModel:
    """The grown model, placed unless its maps are still to be learned; by ranks that share it a tensor at a time."""
    from espalier.grow import apply
    from espalier.model import build
    from espalier.train.parallel import materialise, whole

    device, parallel = setting.device, setting.parallel
    if parallel.mesh is None:
        return apply.grow_model(old, growths, seed=seed, std_of=std_of)
    weights = old.state_dict()
    plan = apply.plan_weights(
        old.config.to_dict(), growths, lambda name: whole(weights[name]), seed=seed, std_of=std_of
    )
    model = build.skeleton(plan.config)
    model.generation_config = old.generation_config
    device.place(model, parallel)
    materialise(model, device.kind, plan.read)
    return model


def _fit(
    recipe: GrowthRecipe,
    plan: Plan,
    setting: Setting,
    old: PreTrainedModel,
    model: PreTrainedModel,
    growths: Sequence[Growth],
    progress: Progress,
) -> Progress | None:
    """Train the maps of `growths` and put the weights that they make of `old` into `model`: the first steps of stage
    `progress.stage`. The progress after them; None if they were broken off.
    """
    from espalier.grow import learned
    from espalier.model import axes

    run, stage, number = setting.run, plan.stages[progress.stage], progress.stage
    weights = old.state_dict()
    maps = learned.Maps(growths, axes.discover(old.config.to_dict()), weights.__getitem__)
    length = setting.train_stream.sequence_length
    tokens = stage.rows * length
    # A third of training is the forward pass, and so it is for the maps; nothing is recomputed.
    spent = tokens * flops.training_flops(stage.spec, length) + 3 * maps.flops
    update = stage.cost * (1 / stage.steps) + Cost(flops=3 * maps.flops)
    updates = max(round(recipe.stages[number].fit * stage.steps), 1)

    def after(done: int) -> Progress:
        more = {"step": done, "samples": done * stage.rows, "tokens": done * tokens, "flops": done * spent}
        return replace(progress, **{key: getattr(progress, key) + amount for key, amount in more.items()})

    def goes_on() -> bool:
        return run.stop_signal is None and run.affords(setting.reserve + update)

    def count(done: int, loss: float) -> bool:
        run.charge("train", tokens=tokens, flops=spent, stage=number, step=after(done).step)
        return done == updates or goes_on()

    if not goes_on():
        return None
    whole = learned.fit(
        model,
        maps,
        lambda done: setting.train_stream.batch(after(done).samples, stage.rows),
        learned.Fit(updates, recipe.train.per_device_train_batch_size),
        setting.objective,
        setting.device,
        count,
    )
    return after(updates) if whole else None
