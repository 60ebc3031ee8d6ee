"""Items are asked for what they cost, kept as they are answered, and no more of them than precision asks for."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest

from espalier.errors import BudgetError, RunError
from espalier.evaluate.ask import AskRecipe, ask, items_needed
from espalier.evaluate.items import SAMPLES, Item, Outcome, read_outcomes
from espalier.infer.engine import Generate
from espalier.ledger import Cap, Cost


def sums(n: int) -> list[Item]:
    return [Item("sums", f"{a} + {a} =", f"{2 * a}", tags={"size": str(len(str(a)))}) for a in range(n)]


def choices(n: int) -> list[Item]:
    return [Item("choices", f"{a} of a kind:", " yes" if a % 3 else " no", (" yes", " no")) for a in range(n)]


def add(prompt: str) -> str:
    return f" {2 * int(prompt.split()[0])}\nand more"


def recipe(**told) -> AskRecipe:
    return AskRecipe(model="scripted", url="http://nowhere", **told)


def test_what_is_written_is_compared_by_its_first_line(scripted, make_run):
    run = make_run()
    report = ask({"sums": sums(40)}, recipe(), run, scripted(add))
    assert report.value("sums", "exact_match") == 1.0
    assert len(read_outcomes(run.folder / SAMPLES)) == 40
    wrong = ask({"sums": sums(40)}, recipe(), make_run(), scripted(lambda prompt: add(prompt) + "7"))
    assert wrong.value("sums", "exact_match") == 1.0, "what follows the first line doesn't count"
    wrong = ask({"sums": sums(40)}, recipe(), make_run(), scripted(lambda prompt: "7" + add(prompt).strip()))
    assert wrong.value("sums", "exact_match") == 0.0


def test_options_are_compared_by_their_probability_and_by_that_of_a_character(scripted, make_run):
    # " yes" is always the more probable; a character of " no" is, where its own are.
    engine = scripted(score=lambda prompt, text: {" yes": -2.0, " no": -2.2}[text])
    report = ask({"choices": choices(30)}, recipe(), make_run(), engine)
    assert report.value("choices", "acc") == pytest.approx(20 / 30)
    assert report.value("choices", "acc_norm") == pytest.approx(20 / 30)
    engine = scripted(score=lambda prompt, text: {" yes": -2.0, " no": -1.99}[text])
    report = ask({"choices": choices(30)}, recipe(), make_run(), engine)
    assert report.value("choices", "acc") == pytest.approx(10 / 30)
    assert report.value("choices", "acc_norm") == pytest.approx(20 / 30), "-2 / 3 is more than -1.99 / 2"
    assert report.context["tasks"]["choices"]["chance"] == 0.5


def test_money_that_answers_cost_is_in_the_ledger(scripted, make_run):
    run = make_run()
    ask({"choices": choices(30)}, recipe(), run, scripted())
    assert run.ledger.spent(kind="evaluate").usd == pytest.approx(0.60)


def test_what_the_budget_cannot_pay_is_refused_before_anything_is_asked(scripted, make_run):
    engine = scripted(add)
    with pytest.raises(BudgetError) as error:
        ask({"sums": sums(200)}, recipe(budget={"usd": 1.5}), make_run(), engine)
    assert (error.value.found, error.value.expected) == ("$1.50", "$2.00 for 200 items") and not engine.asked


def test_a_budget_that_turns_out_too_small_ends_the_asking_with_what_was_answered(scripted, make_run, told):
    run, engine = make_run(), scripted(add)
    engine.estimate = lambda requests: scripted.estimate(engine, requests[:1])
    report = ask({"sums": sums(200)}, recipe(budget={"usd": 1.0}), run, engine)
    assert 98 <= report.rows[0].n == len(read_outcomes(run.folder / SAMPLES)) <= 100
    assert run.ledger.total.usd <= 1.0
    assert (
        report.context["tasks"]["sums"]["answered"] == report.rows[0].n and report.context["tasks"]["sums"]["of"] == 200
    )
    assert "The budget is spent" in told[-1]
    assert run.ledger.cap == Cap(usd=1.0)


class Ending:
    """An engine that ends with an error after some answers."""

    def __init__(self, engine, after: int, error: Exception) -> None:
        self.engine, self.after, self.error = engine, after, error

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def answers(self, requests):
        yield from itertools.islice(self.engine.answers(requests), self.after)
        raise self.error


def test_an_engine_that_stops_at_the_cap_ends_the_asking_with_what_was_answered(scripted, make_run, told):
    spent = BudgetError("budget: usd", found="$0", expected="$1", mend="")
    run = make_run()
    report = ask({"sums": sums(20)}, recipe(), run, Ending(scripted(add), 7, spent))
    assert report.rows[0].n == 7 and "The budget is spent" in told[-1]
    assert run.ledger.spent(kind="evaluate").usd == pytest.approx(0.07)


def test_what_was_spent_before_a_failure_is_in_the_ledger(scripted, make_run):
    run = make_run()
    with pytest.raises(RunError):
        ask({"sums": sums(20)}, recipe(), run, Ending(scripted(add), 7, RunError("", found="", expected="", mend="")))
    assert run.ledger.spent(kind="evaluate").usd == pytest.approx(0.07)


def test_what_was_answered_before_a_kill_is_not_asked_again(scripted, make_run):
    run, engine = make_run(), scripted(add)

    def killed(prompt: str) -> str:
        if len(engine.asked) > 17:
            raise KeyboardInterrupt
        return add(prompt)

    engine.write = killed
    with pytest.raises(KeyboardInterrupt):
        ask({"sums": sums(40)}, recipe(), run, engine)
    with (run.folder / SAMPLES).open("a") as file:
        file.write('{"task": "sums", "id')  # a line that a crash cut short
    again = scripted(add)
    report = ask({"sums": sums(40)}, recipe(), run, again)
    assert len(again.asked) == 40 - 17 and report.rows[0].n == 40
    assert len({outcome.id for outcome in read_outcomes(run.folder / SAMPLES)}) == 40


def test_a_limit_takes_the_same_fair_sample_each_time(scripted, make_run):
    one, other = scripted(add), scripted(add)
    ask({"sums": sums(400)}, recipe(limit=30), make_run(), one)
    ask({"sums": sums(400)}, recipe(limit=30), make_run(), other)
    assert {request.prompt for request in one.asked} == {request.prompt for request in other.asked}
    numbers = [int(request.prompt.split()[0]) for request in one.asked]
    assert len(numbers) == 30 and 100 < sum(numbers) / 30 < 300


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_items_are_asked_until_the_score_is_as_sure_as_was_asked_for(scripted, make_run, share):
    draw = random.Random(1)
    right = {item.prompt: draw.random() < share for item in sums(3000)}
    engine = scripted(lambda prompt: add(prompt) if right[prompt] else "no")
    report = ask({"sums": sums(3000)}, recipe(stderr=0.02), make_run(), engine)
    [row] = report.rows
    assert row.stderr <= 0.02 and row.n < {0.0: 100, 0.1: 500, 0.5: 900}[share]
    assert row.n == len(engine.asked)


def test_fewer_items_than_precision_needs_are_all_asked(scripted, make_run):
    report = ask({"sums": sums(70)}, recipe(stderr=0.001), make_run(), scripted(lambda prompt: "no"))
    assert report.rows[0].n == 70


def test_the_first_items_say_how_many_more_are_needed():
    assert items_needed([], 0.05) == 50


@dataclass(frozen=True)
class Graded:
    """What has scores of its own, by its number."""

    number: int
    scores: dict[str, float]
    task: str = "graded"

    @property
    def id(self) -> str:
        return str(self.number)

    def requests(self, scoring: str) -> list[Generate]:
        return [Generate("x" * (1 + self.number % 50))]

    def judge(self, answers) -> Outcome:
        return Outcome(self.task, self.id, self.scores, "", "", 0.0, answers[0].prompt_tokens, 1)


def test_scores_beyond_one_are_asked_until_they_are_sure_too(scripted, make_run):
    draw = random.Random(0)
    graded = [Graded(number, {"rouge": draw.uniform(0, 100)}) for number in range(9000)]
    [row] = ask({"graded": graded}, recipe(stderr=0.5), make_run(), scripted()).rows
    assert 0.4 < row.stderr <= 0.5


def test_documents_may_have_metrics_of_their_own(scripted, make_run):
    graded = [Graded(number, {"f1": 0.5} if number % 3 else {"em": 1.0}) for number in range(90)]
    rows = ask({"graded": graded}, recipe(), make_run(), scripted()).rows
    assert {(row.metric, row.n, row.value) for row in rows} == {("f1", 60, 0.5), ("em", 30, 1.0)}


def test_an_item_that_comes_twice_is_asked_and_counted_once(scripted, make_run):
    engine = scripted(add)
    [row] = ask({"sums": sums(40) + sums(40)}, recipe(), make_run(), engine).rows
    assert row.n == len(engine.asked) == 40


def test_what_a_budget_leaves_is_a_fair_sample_whatever_order_an_engine_answers_in(scripted, make_run):
    engine = scripted()
    longest_first, cost = engine.answers, Cost(usd=0.01)

    def answers(requests):
        order = sorted(range(len(requests)), key=lambda number: -len(requests[number].prompt))
        for place, answer in longest_first([requests[number] for number in reversed(order)]):
            yield order[len(order) - 1 - place], answer

    engine.answers, engine.estimate = answers, lambda requests: cost
    run = make_run()
    graded = [Graded(number, {"acc": 1.0}) for number in range(600)]
    ask({"graded": graded}, recipe(budget={"usd": 3.2}), run, engine)
    lengths = [outcome.prompt_tokens for outcome in read_outcomes(run.folder / SAMPLES)]
    assert 300 <= len(lengths) <= 320 and 22 < sum(lengths) / len(lengths) < 29, "25.5 on average of all"
