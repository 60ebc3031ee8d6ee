"""What is asked, how it is summed up, and what a recipe can't ask for."""

from __future__ import annotations

import json
import random

import pytest

from espalier import method, recipe
from espalier.errors import RecipeError
from espalier.evaluate.ask import ask
from espalier.evaluate.iq.tasks import GROUPS, TASKS
from espalier.evaluate.iq.verb import IqRecipe, add_scores, balanced_accuracies, chosen_items, table
from espalier.evaluate.items import SAMPLES, Outcome, read_outcomes
from espalier.report import Report


def told(**more) -> IqRecipe:
    return IqRecipe(model="scripted", url="http://nowhere", **more)


@pytest.fixture
def evaluated(scripted, make_run):
    """The report of an answerer on a recipe's items."""

    def evaluated(resolved: IqRecipe, answer) -> Report:
        items, run = chosen_items(resolved), make_run()
        answers = {item.prompt: answer(item) for each in items.values() for item in each}
        engine = scripted(answers.get, lambda prompt, text: 0.0 if text == answers[prompt] else -1.0)
        report = ask(items, resolved, run, engine)
        add_scores(report, read_outcomes(run.folder / SAMPLES))
        return report

    return evaluated


@pytest.mark.parametrize("scoring", ["options", "written"])
def test_whoever_is_right_has_everything_and_the_table_says_so(evaluated, solve, scoring):
    resolved = told(n=4, languages=("en", "zh"), scoring=scoring)
    report = evaluated(resolved, lambda item: f" {solve(item.task, item.prompt, item.tags['language'])}")
    assert [row.task for row in report.rows if row.metric == "score"] == [*GROUPS, "iq"]
    assert {row.value for row in report.rows} == {1.0}
    assert report.context["groups"] == {
        group: [name for name, task in TASKS.items() if task.group == group] for group in GROUPS
    }
    assert table(report).count("100.0%") == 2 * len(TASKS) + len(GROUPS) + 1, "of each score, and of each interval"
    assert len({len(line) for line in table(report).split("\n") if line.startswith("  ")}) == 1, (
        "in columns, with a head"
    )


def test_a_score_has_its_interval_and_what_guessing_brings(evaluated):
    draw = random.Random(1)
    guess = evaluated(told(tasks=("symbolic mapping",)), lambda item: draw.choice(item.options))
    for name in guess.context["groups"]["symbolic mapping"]:
        about = guess.context["tasks"][name]
        low, high = about["interval"]
        assert about["chance"] == 0.5 and low < 0.5 < high and low < guess.value(name, "acc") < high
        assert high - low == pytest.approx(2 * 0.057, abs=0.004), "300 items: 5.7 points to either side"


def test_a_group_is_the_mean_of_its_tasks_and_all_that_of_all_tasks(evaluated):
    right = {"topic", "sentiment", "counting"}
    resolved = told(tasks=("symbolic mapping", "counting"), n=8, scoring="written")
    report = evaluated(resolved, lambda item: item.gold if item.task in right else "?")
    assert report.value("symbolic mapping", "score") == pytest.approx(2 / 3)
    assert report.value("rule understanding", "score") == 1.0
    assert report.value("iq", "score") == pytest.approx(3 / 4)
    [overall] = [row for row in report.rows if row.task == "iq"]
    assert overall.n == 32


def test_variances_of_independent_tasks_add(evaluated):
    numbers = iter(range(10**6))
    report = evaluated(
        told(tasks=("pattern mining",), n=40), lambda item: item.gold if next(numbers) % 4 else "never right"
    )
    [group] = [row for row in report.rows if row.task == "pattern mining"]
    each = [row.stderr for row in report.rows if row.metric == "exact_match"]
    assert group.stderr == pytest.approx(each[0] / 3**0.5, rel=0.1)


def test_classes_count_alike_however_many_items_they_have():
    def outcome(number: int, label: str, score: float) -> Outcome:
        return Outcome("topic", f"{number}", {"acc": score, "acc_norm": 0.0}, "", "", 0.5, 1, 1, tags={"label": label})

    outcomes = [outcome(number, "same", 1.0) for number in range(9)] + [outcome(9, "different", 0.0)]
    assert balanced_accuracies(outcomes) == {"topic": 0.5}


def test_what_is_asked_is_what_the_recipe_says():
    items = chosen_items(told(tasks=("head_slicing", "rule understanding"), n=3, shots=2, lengths={"counting": (1, 1)}))
    assert list(items) == ["counting", "replace_lowercase", "replace_word", "head_slicing"]
    assert all(len(each) == 3 for each in items.values())
    assert all(item.gold.strip().isdecimal() for item in items["counting"])
    assert all(item.prompt.count("Input:") == 3 for item in items["head_slicing"])
    by_default = chosen_items(told())
    assert {name: len(each) for name, each in by_default.items()} == {name: task.n for name, task in TASKS.items()}


def test_a_language_without_sentences_has_the_tasks_that_need_none():
    items = chosen_items(told(languages=("ru", "en"), n=4))
    assert {name: [item.tags["language"] for item in each][:2] for name, each in items.items()} == {
        name: ["ru", "en"] if "ru" in task.languages else ["en", "en"] for name, task in TASKS.items()
    }
    assert list(chosen_items(told(languages=("ru",), n=1))) == ["head_and_tail", "full_repeating", "head_slicing"]


def test_a_file_that_is_named_belongs_to_its_group(tmp_path):
    rows = [
        {"premise": f"{k}", "hypothesis": "b", "label": "entailment" if k % 2 else "not_entailment"} for k in range(9)
    ]
    (tmp_path / "rte").write_text("\n".join(map(json.dumps, rows)))
    everything = list(chosen_items(told(files={"rte": tmp_path / "rte"}, n=2)))
    assert everything[:5] == ["topic", "entailment", "sentiment", "rte", "counting"]
    assert list(chosen_items(told(files={"rte": tmp_path / "rte"}, n=2, tasks=("rte",)))) == ["rte"]


@pytest.mark.parametrize(
    ("wrong", "found", "mend"),
    [
        ({"tasks": ("full_repeat",)}, "'full_repeat'", "'full_repeating'"),
        ({"tasks": ("patern mining",)}, "'patern mining'", "'pattern mining'"),
        ({"languages": ("xx",)}, "'xx'", ""),
        ({"files": {"bool": "x"}}, "'bool'", "'boolq'"),
        ({"tasks": ("rte",)}, "no file", "files.rte=PATH"),
        ({"tasks": ("counting",), "languages": ("ru",)}, "languages ru", "languages"),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest(wrong, found, mend):
    with pytest.raises(RecipeError) as refused:
        chosen_items(told(**wrong))
    assert refused.value.found == found and mend in refused.value.mend


@pytest.mark.parametrize(
    "wrong",
    [
        "n=0",
        "shots=0",
        "shots=9",
        "languages=[]",
        "split=validation",
        "lengths.full_repeating=[4, 3]",
        "lengths.head_slicing=[1, 3]",
        "lengths.two_supporting_facts=[3, 9]",
        "lengths.topic=[1, 2]",
        "lengths.nothing=[1, 2]",
    ],
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(RecipeError):
        recipe.load(IqRecipe, overrides=["model=a", wrong])


def test_the_method_is_listed():
    card = method.find("evaluate.iq")
    assert card.recipe() is IqRecipe and card.paper == "arXiv 2309.03852"
