"""The growth run: what it learned survives each growth and each interruption, on one data order, within the budget."""

import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espalier import files, records
from espalier import run as run_module
from espalier.budget import flops
from espalier.budget.plan import Plan, plan
from espalier.errors import BudgetError, ModelError
from espalier.folder import ModelFolder
from espalier.grow import apply
from espalier.grow.progressive import GrowthRecipe, Outcome, Setting, grow_run
from espalier.ledger import Cap, Cost, Rates
from espalier.model import build
from espalier.run import METRICS, STAGE, Run
from espalier.train import checkpoint, loop
from espalier.train.device import Device
from espalier.train.objectives import NextToken
from espalier.train.optim import UNMASKED, Optimizer
from espalier.train.parallel import ALONE
from espalier.train.validate import validate

VOCABULARY = 300
TOKENS = 64  # of an update
MASKED = {"depth": "masked", "width": "masked", "ramp": 0.5}
SMALL, LARGE = {"num_hidden_layers": 1, "hidden_size": 32}, {"num_hidden_layers": 2, "hidden_size": 48}


def recipe_of(*stages: dict, steps: int = 6, family: str = "granite", recompute: str = "none", **more) -> GrowthRecipe:
    """Stages of `steps` updates each, saved every fourth update."""
    duration = f"{steps * TOKENS} tokens"
    return GrowthRecipe(
        model={"family": family, "head_dim": 16, "max_position_embeddings": 64},
        stages=[{"duration": duration, **stage} for stage in stages],
        train={"per_device_train_batch_size": 4, "logging_steps": 1, "evaluations": 2, "save_steps": 4}
        | {"recompute": recompute},
        **more,
    )


def plan_of(recipe: GrowthRecipe) -> Plan:
    return plan(
        [(stage.spec, duration) for stage, duration in zip(recipe.path(VOCABULARY), recipe.durations(), strict=True)],
        rows=4,
        sequence_length=16,
        seconds_per_token=[1e-9] * len(recipe.stages),
        basis="measured",
        rates=Rates(),
        cap=Cap(),
        recompute=recipe.train.recompute,
    )


@pytest.fixture
def setting_of(stream, tmp_path):
    """What a growth run works with, in a given run."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    byte_lengths = np.ones(VOCABULARY, np.int64)

    def setting_of(run: Run, rows: int = 8, reserve: Cost | None = None, **device) -> Setting:
        def held_out(state):
            more = {"rows": rows, "micro_rows": 4}
            return validate(state.model, stream, byte_lengths, NextToken(), Device(), **more)

        told = {"peak_flops": 1e9, "terminal": False, "objective": NextToken(), "device": Device(**device)}
        told |= {
            "evaluation": Cost(),
            "end": reserve or Cost(),
            "share": 0.0,
            "keep": lambda plan: None,
            "parallel": ALONE,
        }
        return Setting(run, stream, held_out, tokenizer=tokenizer, **told)

    return setting_of


@pytest.fixture
def carry_out(make_run, setting_of):
    """Carry out a recipe in a new run."""

    def carry_out(recipe: GrowthRecipe, run: Run | None = None) -> Outcome:
        return grow_run(recipe, plan_of(recipe), setting_of(run or make_run(), recompute=recipe.train.recompute))

    return carry_out


@pytest.mark.parametrize("family", ["granite", "qwen3"])
@pytest.mark.parametrize(
    "after",
    [
        {"num_hidden_layers": 3, "hidden_size": 32, "depth": "identity"},
        {"num_hidden_layers": 1, "hidden_size": 64},
        {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 160, "depth": "identity"},
        {"num_hidden_layers": 3, "hidden_size": 48, "depth": "masked", "width": "masked"},
    ],
    ids=["deeper", "wider", "both", "masked"],
)
def test_an_exact_growth_keeps_the_held_out_loss(carry_out, make_run, family, after):
    run = make_run()
    kind = "mup" if family == "granite" else "standard"
    recipe = recipe_of(SMALL, after, family=family, parametrization={"kind": kind})
    outcome = carry_out(recipe, run)
    (growth,) = (line for line in records.read_lines(run.folder / METRICS) if "growth" in line)
    assert growth["loss_after"] == pytest.approx(growth["loss_before"], abs=1e-3)
    assert growth["relative_difference"] < 1e-4
    assert (growth["step"], growth["stage"]) == (6, 1)
    assert (outcome.state.progress.step, outcome.state.progress.stage) == (12, 1)
    last = recipe.path(VOCABULARY)[-1].spec
    assert outcome.state.model.config.num_hidden_layers == last.num_hidden_layers
    assert sum(weight.numel() for weight in outcome.state.model.parameters()) == flops.parameters(last)


def test_stacking_changes_the_depth_and_says_what_it_did_to_the_loss(carry_out, make_run):
    run = make_run()
    outcome = carry_out(recipe_of(SMALL, SMALL | {"num_hidden_layers": 3, "depth": "stack"}), run)
    (growth,) = (line for line in records.read_lines(run.folder / METRICS) if "growth" in line)
    assert len(outcome.state.model.base_model.layers) == 3
    assert growth["growth"][0]["operator"] == "stack" and not growth["growth"][0]["exact"]
    assert growth["relative_difference"] > 1e-4
    assert np.isfinite(growth["loss_after"])


@pytest.fixture
def clock(monkeypatch):
    """Time that passes in backward passes alone, `clock.step(number)` seconds in each."""
    clock = SimpleNamespace(now=0.0, passes=0, step=lambda number: 1.0)
    backward = loop.backward

    def slow(*arguments):
        clock.now += clock.step(clock.passes)
        clock.passes += 1
        return backward(*arguments)

    now = lambda: clock.now  # noqa: E731
    monkeypatch.setattr(loop, "backward", slow)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=now))
    monkeypatch.setattr(run_module, "time", SimpleNamespace(time=now, monotonic=now))
    return clock


def timed(recipe: GrowthRecipe, cap: Cap) -> Plan:
    """A plan of a second a step in both stages."""
    stages = [(stage.spec, length) for stage, length in zip(recipe.path(VOCABULARY), recipe.durations(), strict=True)]
    told = {"rows": 4, "sequence_length": 16, "basis": "measured", "rates": Rates(), "reserve": 0.05}
    return plan(stages, seconds_per_token=[1 / TOKENS] * 2, cap=cap, **told)


SHARES = ({**SMALL, "duration": "40%"}, {**LARGE, "duration": "60%", "depth": "identity"})


@pytest.mark.parametrize(
    "step, steps",
    [
        (lambda number: 2.0, (40, 70)),
        (lambda number: 0.5, (160, 250)),
        (lambda number: 3.0 if number > 30 else 1.0, (45, 75)),
        (lambda number: 40.0 if number == 20 else 1.0, (60, 95)),
    ],
    ids=["twice as slow", "twice as fast", "slower later", "away for a while"],
)
def test_whatever_the_pace_a_run_grows_and_ends_within_its_budget(make_run, setting_of, clock, step, steps):
    recipe, run, kept = recipe_of(*SHARES), make_run(seconds=120.0), []
    clock.step = step
    made = timed(recipe, run.ledger.cap)
    told = replace(setting_of(run), keep=kept.append, share=0.05, evaluation=Cost(seconds=1.0), end=Cost(seconds=2.0))
    outcome = grow_run(recipe, made, told)
    assert (outcome.ending, outcome.state.progress.stage) == ("done", 1)
    assert run.ledger.total.seconds <= 120.0
    assert steps[0] <= outcome.state.progress.step <= steps[1]
    assert outcome.state.progress.step == kept[-1].steps != made.steps
    rates = [line["learning_rate"] for line in records.read_lines(run.folder / METRICS) if "learning_rate" in line]
    assert rates[-1] < 0.1 * max(rates), "it has decayed to its end"


def test_masks_rise_to_the_weights_that_are_trained(carry_out, make_run, monkeypatch):
    levels = []
    original = Optimizer.set_level
    monkeypatch.setattr(Optimizer, "set_level", lambda self, level: levels.append(level) or original(self, level))
    run = make_run()
    outcome = carry_out(recipe_of(SMALL, LARGE | MASKED, steps=8), run)
    assert levels[8:] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert outcome.state.optimizer.masks is None
    assert not any(UNMASKED in quantities for quantities in outcome.state.optimizer.state().values())
    (growth,) = (line for line in records.read_lines(run.folder / METRICS) if "growth" in line)
    assert [step["operator"] for step in growth["growth"]] == ["masked", "masked"]
    new_channels = outcome.state.model.get_input_embeddings().weight[:, 32:]
    assert new_channels.std().item() == pytest.approx(1.0, abs=0.1), (
        "drawn with the embedding's deviation, not grown from 0"
    )


def test_a_run_that_ends_inside_a_ramp_leaves_the_masked_model(carry_out, make_run, stop_after, reopened):
    run = make_run()
    stop_after(run, 7)
    stopped = carry_out(recipe_of(SMALL, LARGE | MASKED), run).state
    saved = build.load(ModelFolder(checkpoint.newest(run.folder, print))).state_dict()
    shown = stopped.model.state_dict()
    assert all(torch.equal(value, shown[name]) for name, value in saved.items())
    unmasked = stopped.optimizer.masks.unmasked["model.embed_tokens.weight"]
    torch.testing.assert_close(shown["model.embed_tokens.weight"][:, 32:], unmasked[:, 32:] / 3)


LEARNED = {"depth": "learned", "width": "learned", "fit": 0.5}


def test_learned_maps_take_the_first_steps_of_their_stage(carry_out, make_run, stream, monkeypatch):
    asked = []
    original = type(stream).batch
    monkeypatch.setattr(type(stream), "batch", lambda *args, **more: asked.append(args[1:]) or original(*args, **more))
    run, recipe = make_run(), recipe_of(SMALL, LARGE | LEARNED)
    outcome = carry_out(recipe, run)
    assert asked == [(4 * step, 4) for step in range(12)]
    assert outcome.state.progress.step == 12
    spent = run.ledger.spent(kind="train", stage=1)
    assert spent.tokens == 6 * TOKENS and spent.flops > plan_of(recipe).stages[1].cost.flops, "the maps cost as well"
    assert outcome.state.progress.flops == pytest.approx(run.ledger.spent(kind="train").flops)
    lines = list(records.read_lines(run.folder / METRICS))
    assert [line["step"] for line in lines if "growth" in line] == [9]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 10, 11, 12]


def test_a_signal_while_maps_are_trained_keeps_the_model_before(carry_out, make_run, reopened, monkeypatch):
    from espalier.grow import learned

    recipe = recipe_of(SMALL, LARGE | LEARNED)
    whole, run = carry_out(recipe), make_run()
    original = learned.fit

    def fit(*args):
        *others, after_update = args
        return original(*others, lambda done, loss: after_update(done, loss) and signalled(done))

    def signalled(done):
        run.stop_signal = signal.SIGTERM if done == 2 else None
        return done < 2

    with monkeypatch.context() as patch:
        patch.setattr(learned, "fit", fit)
        stopped = carry_out(recipe, run)
    assert (stopped.ending, stopped.state.progress.step, stopped.state.progress.stage) == ("signal", 6, 0)
    resumed = carry_out(recipe, reopened(run))
    expected = whole.state.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state.model.state_dict().items())


@pytest.mark.parametrize("updates", [0, 1, 2])
def test_learned_maps_never_pass_the_budget(carry_out, make_run, setting_of, updates):
    recipe = recipe_of(SMALL, LARGE | LEARNED)
    free = make_run()
    carry_out(recipe, free)
    kinds = [(entry.kind, entry.stage) for entry in free.ledger.entries]
    grows_at = kinds.index(("train", 1))
    before = sum(entry.cost.flops for entry in free.ledger.entries[:grows_at])
    update = free.ledger.entries[grows_at].cost.flops
    per_token = plan_of(recipe).stages[-1].flops_per_token
    reserve, maps = 3 * 128 * per_token / 3, update - TOKENS * per_token
    run = make_run(flops=before + reserve + (updates + 1) * update - maps / 2)
    outcome = grow_run(recipe, plan_of(recipe), setting_of(run, reserve=Cost(flops=reserve)))
    assert outcome.ending == "budget" and outcome.held_out is not None
    assert (outcome.state.progress.stage, outcome.state.progress.step) == (0, 6)
    assert run.ledger.spent(kind="train", stage=1).flops == pytest.approx(updates * update)


def test_moments_are_not_carried_through_learned_maps(carry_out):
    with pytest.raises(ModelError, match=r"stage 2: optimizer_state: .* learned"):
        recipe_of(SMALL, LARGE | LEARNED | {"optimizer_state": "carried"}).path(VOCABULARY)


def test_each_stage_has_its_share_of_the_rate(carry_out, make_run):
    run = make_run()
    flat = {"warmup_ratio": 0.0, "decay_ratio": 0.0, "rewarm_ratio": 0.0}
    stages = (SMALL, SMALL | {"num_hidden_layers": 2, "rate": 0.5}, SMALL | {"num_hidden_layers": 2, "rate": 0.25})
    carry_out(recipe_of(*stages, steps=2, schedule=flat, optimizer={"learning_rate": 0.01}), run)
    rates = [line["learning_rate"] for line in records.read_lines(run.folder / METRICS) if "loss" in line]
    assert rates == pytest.approx([0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025])


def test_all_stages_read_one_data_order_once(carry_out, stream, monkeypatch):
    asked = []
    original = type(stream).batch
    monkeypatch.setattr(type(stream), "batch", lambda *args, **more: asked.append(args[1:]) or original(*args, **more))
    carry_out(recipe_of(SMALL, LARGE))
    assert asked == [(4 * step, 4) for step in range(12)]


def test_every_token_and_flop_is_charged_to_its_stage(carry_out, make_run):
    run = make_run()
    recipe = recipe_of(SMALL, LARGE)
    outcome = carry_out(recipe, run)
    for number, stage in enumerate(plan_of(recipe).stages):
        spent = run.ledger.spent(kind="train", stage=number)
        assert (spent.tokens, spent.flops) == (stage.cost.tokens, pytest.approx(stage.cost.flops))
        evaluated = run.ledger.spent(kind="evaluate", stage=number)
        per_evaluation = 128 * stage.flops_per_token / 3
        assert evaluated.flops == pytest.approx(per_evaluation * (1 if number == 0 else 2))
    assert outcome.state.progress.flops == pytest.approx(run.ledger.spent(kind="train").flops)


def test_recomputation_changes_the_flops_and_not_the_model(carry_out, make_run):
    plain, run = carry_out(recipe_of(SMALL, LARGE)), make_run()
    recipe = recipe_of(SMALL, LARGE, recompute="layers")
    outcome = carry_out(recipe, run)
    assert outcome.held_out.loss == pytest.approx(plain.held_out.loss, rel=5e-3), "Muon makes much of rounding"
    for number, stage in enumerate(plan_of(recipe).stages):
        assert stage.flops_per_token == flops.training_flops(stage.spec, 16, "layers")
        assert run.ledger.spent(kind="train", stage=number).flops == pytest.approx(stage.cost.flops)
        evaluated = run.ledger.spent(kind="evaluate", stage=number).flops / (1 if number == 0 else 2)
        assert evaluated == pytest.approx(128 * flops.forward_flops(stage.spec, 16)), "nothing is recomputed there"
    logged = [line["total_flos"] for line in records.read_lines(run.folder / METRICS) if "loss" in line]
    assert logged[-1] == pytest.approx(plan_of(recipe).total.flops)


def test_maps_are_learned_without_recomputation(carry_out, make_run):
    """Their weights are stated for the call alone, and would be other ones when the backward pass computes again."""
    runs = [make_run(), make_run()]
    outcomes = [
        carry_out(recipe_of(SMALL, LARGE | LEARNED, recompute=recompute), run)
        for recompute, run in zip(("none", "layers"), runs, strict=True)
    ]
    assert outcomes[1].held_out.loss == pytest.approx(outcomes[0].held_out.loss, rel=5e-3)
    fits = [next(e.cost.flops for e in run.ledger.entries if (e.kind, e.stage) == ("train", 1)) for run in runs]
    assert fits[0] == fits[1]


@pytest.fixture
def stop_after(monkeypatch):
    """Send a run its stop signal at the end of one update."""

    def stop_after(run: Run, step: int) -> None:
        original = loop.update

        def update(state, *more):
            done = original(state, *more)
            if state.progress.step == step:
                run.stop_signal = signal.SIGTERM
            return done

        monkeypatch.setattr(loop, "update", update)

    return stop_after


@pytest.fixture
def reopened(make_run, tmp_path):
    """The run folder, as a new process opens it."""

    def reopened(run: Run) -> Run:
        run.close()
        again = make_run()
        again.folder = run.folder
        return again

    return reopened


@pytest.mark.parametrize("step", [1, 4, 5, 6, 7, 11])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(
    "growth, recompute",
    [({"depth": "identity"}, "none"), (MASKED, "none"), ({"depth": "identity"}, "layers")],
    ids=["padded", "masked", "recomputed"],
)
def test_a_run_that_was_stopped_anywhere_ends_with_the_same_bits(
    carry_out, make_run, reopened, stop_after, step, optimizer, growth, recompute, told
):
    recipe = recipe_of(SMALL, LARGE | growth, optimizer={"name": optimizer}, recompute=recompute)
    whole = carry_out(recipe)
    run = make_run()
    stop_after(run, step)
    torch.manual_seed(step)
    stopped = carry_out(recipe, run)
    assert stopped.ending == "signal" and stopped.state.progress.step == step
    again = reopened(run)
    resumed = carry_out(recipe, again)
    assert any(line.startswith(f"Resumed at step {step} ") for line in told)
    assert resumed.ending == whole.ending == "done"
    assert resumed.held_out == whole.held_out
    expected = whole.state.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state.model.state_dict().items())
    moments = whole.state.optimizer.state()
    for name, quantities in resumed.state.optimizer.state().items():
        assert all(torch.equal(value, moments[name][key]) for key, value in quantities.items())
    lines = list(records.read_lines(again.folder / METRICS))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert sum("growth" in line for line in lines) == 1
    assert len({(line["step"], line["stage"]) for line in lines if "eval_loss" in line}) == sum(
        "eval_loss" in line for line in lines
    )


@pytest.mark.parametrize("step", [5, 7, 9])
def test_a_run_that_crashed_does_its_work_again_and_tells_it_once(carry_out, make_run, reopened, monkeypatch, step):
    recipe = recipe_of(SMALL, LARGE | {"depth": "identity"})
    whole, run = carry_out(recipe), make_run()

    def update(state, *more):
        if state.progress.step == step:
            raise ZeroDivisionError
        return original(state, *more)

    original = loop.update
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop, "update", update)
        carry_out(recipe, run)
    again = reopened(run)
    resumed = carry_out(recipe, again)
    expected = whole.state.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state.model.state_dict().items())
    lines = list(records.read_lines(again.folder / METRICS))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "growth" in line] == [6]


def test_a_run_draws_by_its_seed_whatever_was_drawn_before_it_began(carry_out):
    states = []
    for drawn in (1, 5):
        torch.rand(drawn)
        carry_out(recipe_of(SMALL, steps=1))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def kept(recipe: GrowthRecipe) -> GrowthRecipe:
    """The recipe, with the model at the end of each stage kept."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"keep": "stages"})})


def stage_weights(run: Run, name: str = "stage-1") -> dict:
    return build.load(ModelFolder.open(run.folder / name)).state_dict()


def test_the_model_is_kept_as_each_stage_left_it(carry_out, make_run):
    deeper = LARGE | {"num_hidden_layers": 3}
    recipe, run, plain = recipe_of(SMALL, LARGE, deeper), make_run(), make_run()
    outcome = carry_out(kept(recipe), run)
    assert sorted(path.name for path in run.folder.glob(f"{STAGE}*")) == ["stage-1", "stage-2"]
    for number in (1, 2):
        folder = ModelFolder.open(run.folder / f"{STAGE}{number}")
        assert folder.spec.num_hidden_layers == number
        made = folder.made
        assert (made["progress"]["step"], made["progress"]["stage"]) == (6 * number, number - 1)
        assert made["cost"]["tokens"] == made["progress"]["tokens"] == 6 * number * TOKENS
    again = carry_out(recipe, plain)
    assert not list(plain.folder.glob(f"{STAGE}*"))
    expected = again.state.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in outcome.state.model.state_dict().items())


@pytest.mark.parametrize("step", [4, 5, 6, 7])
def test_stages_are_kept_the_same_wherever_a_run_was_stopped(carry_out, make_run, reopened, stop_after, step):
    recipe, whole, run = kept(recipe_of(SMALL, LARGE)), make_run(), make_run()
    carry_out(recipe, whole)
    stop_after(run, step)
    assert carry_out(recipe, run).ending == "signal"
    again = reopened(run)
    carry_out(recipe, again)
    expected = stage_weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in stage_weights(again).items())


def test_a_stage_that_was_lost_to_a_crash_is_kept_when_the_run_goes_on(carry_out, make_run, reopened, monkeypatch):
    recipe, whole, run = kept(recipe_of(SMALL, LARGE)), make_run(), make_run()
    carry_out(recipe, whole)
    original = build.save_config

    def save(model, path, *more):
        original(model, path, *more)
        if path.name.startswith(f"{files.PARTIAL}stage"):
            raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(build, "save_config", save)
        carry_out(recipe, run)
    assert not list(run.folder.glob(f"{STAGE}*")), "whole or not at all"
    again = reopened(run)
    carry_out(recipe, again)
    expected = stage_weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in stage_weights(again).items())


@pytest.fixture
def broken_growth(monkeypatch):
    """A growth that promises to be exact and isn't."""
    original = apply.grow_model

    def grow_model(*args, **more):
        model = original(*args, **more)
        with torch.no_grad():
            model.base_model.norm.weight *= 1.01
        return model

    monkeypatch.setattr(apply, "grow_model", grow_model)


def test_a_growth_that_breaks_its_promise_is_refused_and_the_model_before_it_kept(
    carry_out, make_run, broken_growth, tmp_path
):
    run = make_run()
    with pytest.raises(ModelError, match=r"growth into stage 2: found logits that differ by .* identity") as refusal:
        carry_out(recipe_of(SMALL, LARGE | {"depth": "identity"}), run)
    assert refusal.value.exit_code == 4
    path = checkpoint.newest(run.folder, print)
    _, moments, progress = checkpoint.load(path, Device())
    assert (progress.step, progress.stage) == (6, 0) and moments
    assert not any("growth" in line for line in records.read_lines(run.folder / METRICS))


def test_a_growth_that_promises_nothing_may_change_the_function(carry_out, broken_growth):
    outcome = carry_out(recipe_of(SMALL, SMALL | {"num_hidden_layers": 2, "depth": "stack"}))
    assert outcome.ending == "done"


@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
@given(share=st.floats(0.05, 1.3), rows=st.sampled_from([1, 8, 40]))
def test_a_budget_of_flops_is_never_passed_even_by_growth_and_evaluation(make_run, setting_of, share, rows):
    recipe = recipe_of(SMALL, LARGE, steps=3)
    made = plan_of(recipe)
    evaluation = 16 * rows * made.stages[-1].flops_per_token / 3
    cap = share * (made.total.flops + 6 * evaluation) + 3 * evaluation
    run = make_run(flops=cap)
    setting = setting_of(run, rows=rows, reserve=Cost(flops=3 * evaluation))
    if cap < 3 * evaluation + TOKENS * made.stages[0].flops_per_token:
        with pytest.raises(BudgetError, match="before training"):
            grow_run(recipe, made, setting)
        assert run.ledger.total.flops == 0
        return
    outcome = grow_run(recipe, made, setting)
    assert run.ledger.total.flops <= cap
    assert outcome.held_out is not None and outcome.ending in ("budget", "done")
    if outcome.ending == "budget":
        number = outcome.state.progress.stage
        assert run.ledger.total.flops + TOKENS * made.stages[number].flops_per_token + 3 * evaluation > cap


@pytest.mark.parametrize(
    "stages, where",
    [
        ((LARGE, SMALL), "stage 2: hidden_size|stage 2: num_hidden_layers"),
        ((SMALL, SMALL | {"hidden_size": 40}), "stage 2"),
        ((SMALL, SMALL | {"num_attention_heads": 3, "num_key_value_heads": 2}), "stage 2"),
        ((SMALL, LARGE, LARGE | {"intermediate_size": 96}), "stage 3: intermediate_size"),
    ],
    ids=["shrinks", "heads", "groups", "narrower"],
)
def test_a_path_that_cannot_be_grown_is_refused_before_anything_is_trained(stages, where):
    with pytest.raises(ModelError, match=where):
        recipe_of(*stages).path(VOCABULARY)


def test_the_model_ends_its_texts_with_the_tokenizer_s_token(carry_out, stream, setting_of, make_run):
    recipe = recipe_of(SMALL, LARGE, steps=1)
    setting = setting_of(make_run())
    setting = replace(setting, train_stream=replace(stream, eos_id=7))
    model = grow_run(recipe, plan_of(recipe), setting).state.model
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 7


@pytest.fixture
def spiked(make_run, setting_of, stream):
    """Carry out a recipe on a stream in which the updates of some steps, counted without rewinds, have a hundred times
    the loss; saved every ten steps if not stated.
    """

    def spiked(recipe: GrowthRecipe, *steps: int, run: Run, save_steps: int = 10, on_spike: str = "rewind") -> Outcome:
        poisoned = [torch.from_numpy(stream.batch(4 * (step - 1), 4).input_ids) for step in steps]

        def objective(model, inputs, *more):
            loss = NextToken()(model, inputs, *more)
            return loss * 100 if any(torch.equal(inputs, bad) for bad in poisoned) else loss

        told = recipe.train.model_copy(update={"save_steps": save_steps, "on_spike": on_spike})
        recipe = recipe.model_copy(update={"train": told})
        return grow_run(recipe, plan_of(recipe), replace(setting_of(run), objective=objective))

    return spiked


def test_a_spike_leads_back_to_before_it_and_past_its_batches(spiked, make_run, stream, told, monkeypatch):
    asked = []
    original = type(stream).batch
    run = make_run()
    monkeypatch.setattr(type(stream), "batch", lambda *args, **more: asked.append(args[1]) or original(*args, **more))
    outcome = spiked(recipe_of(SMALL, steps=60), 51, run=run)
    expected = [*range(51), 40, *range(56, 75)]
    assert asked[1:] == [4 * batch for batch in expected], "what led to it isn't seen again"
    assert any(line.endswith("sigma at step 51: rewound to 40, skipping batches 42-56") for line in told)
    progress = outcome.state.progress
    assert (outcome.ending, progress.step, progress.samples, progress.tokens) == ("done", 60, 4 * 75, 60 * TOKENS)
    assert (progress.guards.rewinds, progress.guards.skipped) == (1, ((4 * 41, 4 * 56),))
    assert run.ledger.spent(kind="train").tokens == (51 + 20) * TOKENS, "what was in vain was paid for"
    lines = list(records.read_lines(run.folder / METRICS))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 61))
    assert [line["rewound_from"] for line in lines if "rewound_from" in line] == [51]


@pytest.mark.parametrize("at", [45, 51, 53, 58, 70])
def test_a_run_that_crashed_around_a_rewind_ends_with_the_same_bits(spiked, make_run, reopened, monkeypatch, at):
    recipe, run = recipe_of(SMALL, steps=60), make_run()
    whole = spiked(recipe, 51, run=make_run())
    updates = iter(range(1, 1000))
    original = loop.update

    def update(*arguments):
        if next(updates) == at:
            raise ZeroDivisionError
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop, "update", update)
        spiked(recipe, 51, run=run)
    resumed = spiked(recipe, 51, run=reopened(run))
    assert resumed.state.progress == whole.state.progress and resumed.held_out == whole.held_out
    expected = whole.state.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state.model.state_dict().items())


def test_a_spike_that_is_only_told_changes_nothing(spiked, make_run, told):
    outcomes = [spiked(recipe_of(SMALL, steps=60), 51, run=make_run(), on_spike=way) for way in ("tell", "off")]
    expected = outcomes[1].state.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in outcomes[0].state.model.state_dict().items())
    assert [line.endswith("at step 51; training goes on.") for line in told if "Spike" in line] == [True]


def test_a_run_without_a_checkpoint_from_before_goes_on(spiked, make_run, told):
    outcome = spiked(recipe_of(SMALL, steps=60), 51, run=make_run(), save_steps=50)
    assert outcome.state.progress.step == 60 and outcome.state.progress.guards.rewinds == 0
    assert any(line.endswith("at step 51; training goes on.") for line in told)


def test_a_run_goes_back_a_few_times_only(spiked, make_run, told):
    outcome = spiked(recipe_of(SMALL, steps=220), 51, 101, 151, 201, run=make_run())
    assert [line.split(" at step ")[1].split(",")[0] for line in told if "Spike" in line] == [
        "51: rewound to 40",
        "86: rewound to 70",
        "121: rewound to 110",
        "156; training goes on.",
    ]
    assert (outcome.state.progress.step, outcome.state.progress.guards.rewinds) == (220, 3)


def test_a_growth_begins_a_new_window(carry_out):
    outcome = carry_out(recipe_of(SMALL, LARGE | {"depth": "identity"}))
    remembered = outcome.state.progress.guards
    assert (len(remembered.losses), len(remembered.surprises)) == (6, 5)


def test_a_spike_after_a_growth_may_lead_back_to_before_it(spiked, make_run, told):
    run = make_run()
    outcome = spiked(recipe_of(SMALL, LARGE | {"depth": "identity"}, steps=60), 100, run=run, save_steps=1000)
    assert any("at step 100: rewound to 60, skipping batches 91-105" in line for line in told)
    assert (outcome.state.progress.step, outcome.state.progress.stage) == (120, 1)
    assert sum("growth" in line for line in records.read_lines(run.folder / METRICS)) == 1


def test_what_a_rewind_costs_is_missing_at_the_end_of_a_budget(spiked, make_run):
    recipe = recipe_of(SMALL, steps=60)
    run = make_run(tokens=66 * TOKENS)
    outcome = spiked(recipe, 51, run=run)
    assert outcome.ending == "done" and 50 <= outcome.state.progress.step <= 55
    assert run.ledger.total.tokens <= 66 * TOKENS
    rates = [line["learning_rate"] for line in records.read_lines(run.folder / METRICS) if "learning_rate" in line]
    assert rates[-1] < 0.1 * max(rates), "it has decayed to its end"
