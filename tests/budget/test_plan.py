"""Plans: durations become steps that fit the budget, priced exactly, in order and without a gap."""

import json
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from espalier.budget import flops
from espalier.budget.plan import BudgetRecipe, Duration, Plan, plan
from espalier.errors import BudgetError
from espalier.ledger import RESOURCES, Cap, Cost, Rates
from espalier.spec import ModelSpec

LENGTH = 16
RATES = Rates(usd_per_hour=3.6, watts=100.0, kgco2e_per_kwh=0.5)


def shape(layers: int) -> ModelSpec:
    return ModelSpec(vocab_size=100, hidden_size=32, head_dim=16, num_hidden_layers=layers)


def planned(*durations: str, rows: int = 4, speeds=None, rates: Rates = RATES, **more) -> Plan:
    stages = [(shape(number), Duration.parse(text)) for number, text in enumerate(durations, start=1)]
    told = {"basis": "measured", "cap": Cap()} | more
    speeds = speeds or [1e-4 * number for number in range(1, len(stages) + 1)]
    return plan(stages, rows=rows, sequence_length=LENGTH, seconds_per_token=speeds, rates=rates, **told)


@pytest.mark.parametrize(
    "text, amount, unit",
    [
        ("3M tokens", 3e6, "tokens"),
        ("1_000 tokens", 1000.0, "tokens"),
        ("2.5e12 flops", 2.5e12, "flops"),
        ("2P FLOPs", 2e15, "flops"),
        (" 40 % ", 0.4, "share"),
        ("3m tokens", 3e6, "tokens"),
    ],
)
def test_durations_are_read_as_people_write_them(text, amount, unit):
    found = Duration.parse(text)
    assert (found.amount, found.unit) == (pytest.approx(amount), unit)


@pytest.mark.parametrize(
    "text", ["", "3M", "3 parsecs", "-3 tokens", "0 tokens", "0%", "nan tokens", "inf flops", "1e999 tokens",
             "1e308E flops", "1.2.3 tokens", "_ tokens", "5k%", "1__0e3.5 tokens"],
)  # fmt: skip
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=r"duration|no time"):
        Duration.parse(text)


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=4),
    st.integers(1, 9),
    st.lists(st.floats(1e-6, 1.0), min_size=4, max_size=4),
)
def test_stages_follow_each_other_and_cost_what_their_steps_cost(steps, rows, speeds):
    durations = [f"{count * rows * LENGTH} tokens" for count in steps]
    made = planned(*durations, rows=rows, speeds=speeds[: len(steps)])
    assert [stage.steps for stage in made.stages] == steps
    assert [stage.first_step for stage in made.stages] == [sum(steps[:number]) for number in range(len(steps))]
    assert made.steps == made.stages[-1].last_step == sum(steps)
    for number, stage in enumerate(made.stages):
        tokens = steps[number] * rows * LENGTH
        assert stage.flops_per_token == flops.training_flops(stage.spec, LENGTH)
        assert stage.parameters == flops.parameters(stage.spec)
        assert stage.cost == RATES.cost(tokens * speeds[number], tokens=tokens, flops=tokens * stage.flops_per_token)
    for name in RESOURCES:
        assert getattr(made.total, name) == pytest.approx(sum(getattr(stage.cost, name) for stage in made.stages))


def test_what_is_computed_again_is_planned_and_charged_to_the_budget():
    plain, again = (planned("640 tokens", "50%", cap=Cap(flops=1e10), recompute=which) for which in ("none", "layers"))
    assert again.stages[0].cost.flops == 640 * flops.training_flops(shape(1), LENGTH, "layers")
    assert again.stages[0].cost.flops > 1.1 * plain.stages[0].cost.flops
    assert again.stages[1].steps < 0.9 * plain.stages[1].steps, "the same share of FLOPs buys fewer tokens"


@given(st.integers(1, 40), st.floats(1e-4, 1))
def test_from_scratch_is_the_same_tokens_at_the_last_size(steps, speed):
    made = planned(f"{steps * 64} tokens", f"{steps * 64} tokens", speeds=[speed / 2, speed])
    scratch, last = made.from_scratch, made.stages[-1].cost
    assert scratch.tokens == made.total.tokens == 2 * last.tokens
    assert scratch.flops == pytest.approx(2 * last.flops)
    assert scratch.seconds == pytest.approx(2 * last.seconds)
    assert scratch.flops > made.total.flops


caps = st.fixed_dictionaries(
    {},
    optional={
        "tokens": st.floats(2e4, 1e7),
        "flops": st.floats(1e10, 1e13),
        "seconds": st.floats(20, 1e5),
        "usd": st.floats(0.1, 100),
        "kwh": st.floats(0.01, 10),
        "kgco2e": st.floats(0.01, 10),
    },
).filter(bool)


@given(caps, st.floats(0, 0.5), st.floats(0, 0.9), st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_shares_that_make_a_whole_pass_no_cap_less_spent_and_reserve_and_use_up_a_single_one(
    amounts, reserve, spent_share, parts
):
    cap = Cap(**amounts)
    spent = Cost(**{name: spent_share * amount for name, amount in amounts.items()})
    durations = [f"{100 * part / sum(parts)} %" for part in parts]
    try:
        made = planned(*durations, cap=cap, spent=spent, reserve=reserve)
    except BudgetError as error:
        assert "at least one step" in error.expected  # the caps may be too small for so fine a part
        assume(False)
    left = {name: amount * (1 - spent_share) * (1 - reserve) for name, amount in amounts.items()}
    used = {name: getattr(made.total, name) / amount for name, amount in left.items()}
    assert max(used.values()) <= 1 + 1e-6
    if len(used) == 1:
        (name,) = used
        one_step_each = sum(getattr(stage.cost, name) / stage.steps for stage in made.stages) / left[name]
        assert used[name] + one_step_each >= 1 - 1e-6


def test_a_share_of_a_budget_without_a_limit_is_refused():
    with pytest.raises(BudgetError, match="no limit") as refusal:
        planned("50%")
    assert refusal.value.exit_code == 8


@pytest.mark.parametrize("durations", [("10 tokens",), ("640 tokens", "1 tokens"), ("3 flops",)])
def test_a_stage_that_is_not_worth_a_step_is_refused_by_number(durations):
    with pytest.raises(BudgetError, match=f"stage {len(durations)}: .*at least one step of 64 tokens"):
        planned(*durations)


def test_a_budget_that_is_already_spent_is_refused():
    with pytest.raises(BudgetError, match="stage 1"):
        planned("100%", cap=Cap(seconds=10), spent=Cost(seconds=11))


@pytest.mark.parametrize("name", ["tokens", "flops", "seconds", "usd", "kwh", "kgco2e"])
def test_stages_beyond_the_cap_are_refused_by_the_name_in_the_recipe(name):
    total = getattr(planned("6400 tokens", "6400 tokens").total, name)
    assert planned("6400 tokens", "6400 tokens", cap=Cap(**{name: total / 0.9}), reserve=0.0)
    with pytest.raises(BudgetError, match="budget.hours" if name == "seconds" else f"budget.{name}"):
        planned("6400 tokens", "6400 tokens", cap=Cap(**{name: total / 0.9}), reserve=0.2)


def test_an_estimate_is_no_ground_for_a_refusal():
    made = planned("6400 tokens", basis="estimated", cap=Cap(seconds=1e-6))
    assert made.total.seconds > 1e-6 and made.basis == "estimated"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from(["measured", "estimated"]))
def test_a_plan_is_read_back_as_it_was_written(steps, basis):
    made = planned(*(f"{count * 64} tokens" for count in steps), basis=basis)
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_budget_s_cap_is_what_it_states_in_the_ledger_s_units():
    stated = BudgetRecipe(usd=2.0, hours=0.5, kwh=1.0, flops=1e12, tokens=1e6)
    assert stated.cap() == Cap(usd=2.0, seconds=1800.0, kwh=1.0, flops=1e12, tokens=1e6)
    assert BudgetRecipe().cap() == Cap()
    assert math.isinf(Cap().seconds)


def test_the_table_of_flm_101b_comes_out():
    """Tokens, speeds, GPUs and power as published (arXiv 2309.03852); inner shapes are ours, of the printed sizes."""
    gpus, day = 192, 86_400
    stages = [  # layers, width, parameters; tokens in all and a day, in billions
        (49, 5120, 16e9, 245.37, 25.48),
        (80, 7232, 51e9, 39.64, 7.38),
        (80, 10_240, 101e9, 26.54, 4.06),
    ]
    specs = [
        ModelSpec(
            family="llama", vocab_size=100_256, hidden_size=width, intermediate_size=width * 8 // 3,
            num_hidden_layers=layers, num_attention_heads=width // 64, tie_word_embeddings=True,
        )
        for layers, width, *_ in stages
    ]  # fmt: skip
    for spec, (*_, parameters, _, _) in zip(specs, stages, strict=True):
        assert flops.parameters(spec) == pytest.approx(parameters, rel=0.02)
    made = plan(
        [(spec, Duration(tokens * 1e9, "tokens")) for spec, (*_, tokens, _) in zip(specs, stages, strict=True)],
        rows=2304,
        sequence_length=2048,
        seconds_per_token=[day / (daily * 1e9) for *_, daily in stages],
        basis="estimated",
        rates=Rates(usd_per_hour=1.0 * gpus, watts=400.0 * gpus, kgco2e_per_kwh=0.64),
        cap=Cap(),
    )
    total, days = made.total, made.total.seconds / day
    assert [stage.cost.seconds / day for stage in made.stages] == pytest.approx([9.63, 5.37, 6.54], rel=0.01)
    assert days == pytest.approx(21.54, rel=0.01)
    assert made.from_scratch.seconds / day == pytest.approx(76.74, rel=0.01)
    assert made.from_scratch.seconds / total.seconds == pytest.approx(3.56, rel=0.01)
    assert days * 24 * gpus == pytest.approx(99_256, rel=0.01)
    assert total.usd == pytest.approx(100_000, rel=0.03)
    assert total.kwh == pytest.approx(40e3, rel=0.03)
    assert total.kgco2e == pytest.approx(26e3, rel=0.03)
    six_n = sum(6 * stage.parameters * stage.cost.tokens for stage in made.stages)
    assert six_n == pytest.approx(51.8e21, rel=0.03)
    published = sum(
        flops.narayanan_flops(spec, 2048) * stage.cost.tokens for spec, stage in zip(specs, made.stages, strict=True)
    )
    assert published == pytest.approx(52.76e21, rel=0.03)
    assert total.flops == pytest.approx(52.3e21, rel=0.06)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 300), st.floats(0.0, 5.0, allow_nan=False))
def test_what_is_left_is_stretched_and_what_is_done_stays(steps, step, factor):
    made = planned(*(f"{64 * count} tokens" for count in steps))
    step = min(step, made.steps)
    changed = made.stretched(factor, step)
    first = 0
    for before, after in zip(made.stages, changed.stages, strict=True):
        done = before.steps - before.left(step)
        assert after.first_step == first and after.steps >= max(done, 1)
        assert after.steps == max(done + math.floor(factor * before.left(step)), 1)
        assert after.cost.flops == pytest.approx(after.steps * before.cost.flops / before.steps)
        first = after.last_step
    assert changed.total.tokens == pytest.approx(64 * changed.steps)
    assert changed.from_scratch.flops == pytest.approx(made.from_scratch.flops * changed.steps / made.steps)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.data())
def test_what_is_left_is_what_comes_after_a_step(steps, data):
    made = planned(*(f"{64 * count} tokens" for count in steps))
    step = data.draw(st.integers(0, made.steps))
    assert made.left(step).tokens == pytest.approx(64 * (made.steps - step))
    assert made.left(0).seconds == pytest.approx(made.total.seconds) and made.left(made.steps) == Cost()
    assert made.stretched(1.0, step).total.tokens == made.total.tokens
