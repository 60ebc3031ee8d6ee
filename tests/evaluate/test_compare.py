"""Compare: what is the same shows no difference, what differs is found, and what can't be paired is said or refused."""

import json
import random
from dataclasses import replace

import pytest

from espalier.errors import RecipeError, RunError
from espalier.evaluate.ask import AskRecipe, ask
from espalier.evaluate.compare import OVERALL, CompareRecipe, compare, cost_per_point, evaluate_compare
from espalier.evaluate.evaluation import Evaluation, training_cost
from espalier.evaluate.intervals import holm
from espalier.evaluate.items import SAMPLES, Item, Outcome, write_outcomes
from espalier.evaluate.told import tell_and_save
from espalier.folder import MADE
from espalier.ledger import Cost
from espalier.recipe import parse
from espalier.report import Report
from espalier.run import PAGE, RESULTS, Run

N = 120
TASKS = ("copy", "sums", "choice")


def items(task: str, n: int = N, first: int = 0) -> list[Item]:
    if task == "choice":
        return [Item(task, f"{a}?", " yes" if a % 2 else " no", (" yes", " no")) for a in range(first, first + n)]
    return [Item(task, f"{task} {a}:", str(a)) for a in range(first, first + n)]


@pytest.fixture
def evaluated(tmp_path, scripted):
    """The run folder of a model that is right with a probability, on items of these tasks."""

    def evaluated(name: str, skill: float, tasks=TASKS, seed: int = 0, **more):
        draw = random.Random(seed)
        right = {item.prompt: draw.random() for task in TASKS for item in items(task, 400)}
        knows = {prompt for prompt, luck in right.items() if luck < skill}

        def write(prompt: str) -> str:
            return prompt.split()[1][:-1] if prompt in knows else "?"

        def score(prompt: str, option: str) -> float:
            truth = " yes" if int(prompt[:-1]) % 2 else " no"
            return float((option == truth) == (prompt in knows))

        recipe = AskRecipe(model=str(tmp_path / f"model-{name}"), url="http://nowhere")
        asked = {task: items(task, **more) for task in tasks}
        with Run.start(tmp_path / name, recipe, tell=lambda line: None) as run:
            tell_and_save(ask(asked, recipe, run, scripted(write, score)), run)
        return tmp_path / name

    return evaluated


@pytest.fixture
def compared(tmp_path):
    """The results of a comparison, and what was told."""

    def compared(*runs, **told):
        recipe, lines = CompareRecipe(runs=runs, **told), []
        folder = tmp_path / f"compared{len(list(tmp_path.glob('compared*')))}"
        with Run.start(folder, recipe, tell=lines.append) as run:
            assert evaluate_compare(recipe, run) == folder / PAGE
        return json.loads((folder / RESULTS).read_text())["context"], lines

    return compared


def by_task(context: dict, run: str) -> dict[tuple[str, str], dict]:
    return {(each["task"], each["metric"]): each for each in context["differences"] if each["run"] == run}


def test_a_model_does_not_differ_from_itself(evaluated, compared):
    context, _ = compared(evaluated("one", 0.6), evaluated("again", 0.6))
    for each in context["differences"]:
        assert each["before"] == each["after"] and each["low"] == 0 == each["high"]
        assert each["chance"] == each["corrected"] == 1.0 or each["task"] == OVERALL


def test_a_planted_difference_is_found_with_its_size(evaluated, compared):
    context, lines = compared(evaluated("weak", 0.5), evaluated("strong", 0.75))
    found = by_task(context, "strong")
    assert set(found) == {
        (OVERALL, "score"),
        ("copy", "exact_match"),
        ("sums", "exact_match"),
        ("choice", "acc"),
        ("choice", "acc_norm"),
    }
    for (task, _), each in found.items():
        assert each["low"] < each["after"] - each["before"] < each["high"]
        assert 0 < each["low"] < 0.25 < each["high"], "who knows more, knows all that the other does"
        assert each["n"] == (3 if task == OVERALL else 1) * N
        assert task == OVERALL or each["chance"] <= each["corrected"] < 0.001
    assert any(line.startswith("strong: overall score 0.4") for line in lines)


def test_all_tests_of_a_comparison_are_corrected_together(evaluated, compared):
    context, _ = compared(*(evaluated(name, 0.55, seed=seed) for seed, name in enumerate("abc")))
    tested = [each for each in context["differences"] if each["chance"] is not None]
    assert len(tested) == 2 * 4
    assert [each["corrected"] for each in tested] == holm([each["chance"] for each in tested])
    assert any(each["corrected"] > each["chance"] for each in tested)


def test_luck_is_told_from_skill(evaluated, compared):
    """Two models of one skill that know other things: no test is believed."""
    context, _ = compared(evaluated("one", 0.6, seed=1), evaluated("other", 0.6, seed=2))
    assert all(each["low"] <= 0 <= each["high"] for each in context["differences"])
    assert all(each["corrected"] > 0.05 for each in context["differences"] if each["corrected"] is not None)


def test_overall_is_the_mean_of_the_tasks_main_metrics(evaluated, compared):
    found = by_task(compared(evaluated("a", 0.4), evaluated("b", 0.6, seed=3))[0], "b")
    main = [found["copy", "exact_match"], found["sums", "exact_match"], found["choice", "acc"]]
    for end in ("before", "after"):
        assert found[OVERALL, "score"][end] == pytest.approx(sum(each[end] for each in main) / 3)


def test_the_order_of_runs_turns_the_signs(evaluated, compared):
    one, other = evaluated("one", 0.5), evaluated("other", 0.6, seed=4)
    forth, back = (by_task(compared(*runs)[0], name) for runs, name in (((one, other), "other"), ((other, one), "one")))
    same = by_task(compared(one, other, baseline=other)[0], "one")
    for key, each in forth.items():
        assert (back[key]["before"], back[key]["after"]) == (each["after"], each["before"])
        assert back[key]["low"] == pytest.approx(-each["high"], abs=0.03)
        assert back[key]["chance"] == each["chance"] and same[key] == back[key]


def test_only_items_that_both_answered_are_compared_and_the_rest_is_named(evaluated, compared):
    short = evaluated("short", 0.5, n=50)
    context, lines = compared(evaluated("long", 0.5), short)
    assert {each["n"] for each in context["differences"] if each["task"] != OVERALL} == {50}
    assert all(each["before"] == each["after"] for each in context["differences"])
    assert "short: of copy, 50 of 120 items were answered in both runs." in lines
    context, lines = compared(evaluated("all", 0.5), evaluated("some", 0.5, tasks=("copy",)))
    assert set(by_task(context, "some")) == {("copy", "exact_match")}
    assert "some: sums is left out, since no item of it was answered in both runs." in lines


def test_runs_without_an_item_in_common_are_refused(evaluated, compared):
    with pytest.raises(RunError, match="no item and no figure that the baseline has too"):
        compared(evaluated("these", 0.5), evaluated("those", 0.5, first=200))


def test_means_over_different_tasks_are_not_compared(evaluated):
    one, other = (Evaluation.read(evaluated(name, 0.5, tasks=(name,))) for name in ("copy", "sums"))
    for each in (one, other):
        each.report.add("all", "score", 0.5, stderr=0.01, n=N)
    with pytest.raises(RunError, match="no item"):
        compare({"one": one, "other": other}, "one")


def test_a_task_of_one_item_leaves_the_overall_difference_without_an_interval(evaluated):
    folders = [evaluated(name, skill, n=1) for name, skill in (("none", 0.0), ("all", 1.0))]
    found, _ = compare({folder.name: Evaluation.read(folder) for folder in folders}, "none")
    [overall] = [each for each in found if each.task == OVERALL]
    assert (overall.change, overall.low, overall.sure) == (1.0, None, False)


@pytest.mark.parametrize("broken", ["missing", "unfinished"])
def test_what_is_no_finished_evaluation_is_refused(evaluated, compared, tmp_path, broken):
    one, other = evaluated("one", 0.5), tmp_path / "missing"
    if broken == "unfinished":
        other = evaluated("unfinished", 0.5)
        (other / RESULTS).unlink()
    with pytest.raises(RunError, match=f"no {RESULTS}"):
        compared(one, other)


def test_a_baseline_must_be_one_of_the_runs_and_each_run_is_named_once(evaluated, compared, tmp_path):
    one, other = evaluated("one", 0.5), evaluated("other", 0.5)
    with pytest.raises(RecipeError, match=r"one of .*one, .*other"):
        compared(one, other, baseline=tmp_path / "third")
    with pytest.raises(RecipeError, match="a run that is named twice"):
        parse(CompareRecipe, "", [f"runs=[{one},{one}]"], where="command line")


def test_runs_of_one_name_are_told_apart(evaluated, compared, tmp_path):
    one, other = evaluated("one", 0.5), evaluated("other", 0.7)
    for folder, parent in ((one, "a"), (other, "b")):
        (tmp_path / parent).mkdir()
        folder.rename(tmp_path / parent / "same")
    context, _ = compared(tmp_path / "a" / "same", tmp_path / "b" / "same")
    assert {each["run"] for each in context["differences"]} == {str(tmp_path / "b" / "same")}


def made(folder, cost: Cost, parent: dict | None = None) -> dict:
    folder.mkdir(exist_ok=True)
    value = {"cost": vars(cost), "parents": [{"made": parent}] if parent else []}
    (folder / MADE).write_text(json.dumps(value))
    return value


def test_a_point_costs_what_model_and_ancestors_did_and_what_asking_did(evaluated, compared, tmp_path):
    parent = made(tmp_path / "parent", Cost(flops=1e12, usd=3.0))
    made(tmp_path / "model-good", Cost(flops=2e12, usd=1.0), parent)
    good, none = evaluated("good", 0.7), evaluated("none", 0.0)
    context, _ = compared(good, none)
    found, evaluation = context["cost"]["good"], Evaluation.read(good)
    score, chance = evaluation.overall
    assert chance == pytest.approx(0.5 / 3) and found["points"] == pytest.approx(100 * (score - chance))
    assert (found["training"]["flops"], found["training"]["usd"]) == (3e12, 4.0)
    assert found["training a point"]["usd"] == pytest.approx(4.0 / found["points"])
    assert found["evaluation"]["usd"] == pytest.approx(0.01 * 4 * N), "two requests of each choice"
    assert found["evaluation a point"]["usd"] == pytest.approx(0.01 * 4 * N / found["points"])
    nothing = context["cost"]["none"]
    assert nothing["training"] is None and nothing["evaluation a point"] is None, "no points, no price of one"


def test_a_model_that_nobody_priced_has_no_cost(tmp_path):
    assert training_cost("gpt-x") is None
    (tmp_path / MADE).write_text("{}")
    assert training_cost(str(tmp_path)) is None


def losses(name: str, loss: float, *, noise: int = 0, data: str = "d", outcomes: bool = True, tmp_path=None):
    """An evaluation of a loss over thirty batches."""
    draw, shared = random.Random(noise), random.Random(7)
    values = [loss + shared.gauss(0, 0.3) + draw.gauss(0, 0.01) for _ in range(30)]
    report = Report(name, context={"data": data})
    report.add("held-out", "loss", sum(values) / 30, stderr=0.3 / 30**0.5, n=3000)
    told = [Outcome("held-out", f"{data}{i}", {"loss": each}, "", "", 0.0, 100, 0) for i, each in enumerate(values)]
    return Evaluation(tmp_path, report, tuple(told) if outcomes else (), Cost(), "")


def test_losses_are_paired_batch_by_batch_and_lower_is_better(tmp_path):
    one, other = losses("a", 3.0, tmp_path=tmp_path), losses("b", 2.9, noise=1, tmp_path=tmp_path)
    [found], _ = compare({"a": one, "b": other}, "a")
    assert found.low < found.change < found.high < 0 and found.high - found.low < 0.02 and found.sure
    assert found.n == 30 and found.lower_is_better and cost_per_point(other)["points"] == 0


def test_without_answers_figures_of_the_same_data_are_compared_as_independent(tmp_path):
    one, other = (
        losses(name, 3.0 - 0.1 * at, noise=at, outcomes=False, tmp_path=tmp_path) for at, name in enumerate("ab")
    )
    [found], _ = compare({"a": one, "b": other}, "a")
    assert found.n is None and found.chance is None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 0.3 / 30**0.5 * 2**0.5)
    assert found.low < found.change < found.high and not found.sure
    with pytest.raises(RunError):
        compare({"a": one, "b": losses("b", 2.9, data="e", outcomes=False, tmp_path=tmp_path)}, "a")


def test_bits_a_byte_are_compared_between_vocabularies_and_nats_a_token_are_not(tmp_path):
    one, other = losses("a", 3.0, tmp_path=tmp_path), losses("b", 2.0, noise=1, tmp_path=tmp_path)
    for at, each in enumerate((one, other)):
        each.report.add("held-out", "bpb", 1.0 - 0.2 * at, n=3000)
    told = tuple(
        replace(outcome, id=f"x{outcome.id}", scores={**outcome.scores, "bpb": 0.8}) for outcome in other.outcomes
    )
    found, notes = compare({"a": one, "b": replace(other, outcomes=told)}, "a")
    assert [(each.metric, round(each.change, 6)) for each in found] == [("bpb", -0.2)]
    assert notes == ["b: held-out is left out, since no item of it was answered in both runs."]


def test_answers_of_a_file_are_read_back(evaluated, tmp_path):
    folder = evaluated("one", 0.5)
    evaluation = Evaluation.read(folder)
    write_outcomes(folder / SAMPLES, evaluation.outcomes)
    assert Evaluation.read(folder) == evaluation
