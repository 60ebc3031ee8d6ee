"""Needles: hidden at their depth in as much hay as was asked for, found by who reads, refused where they can't be."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espalier.errors import DataError, RecipeError
from espalier.evaluate import needle
from espalier.evaluate.haystack import LANGUAGES
from espalier.evaluate.items import SAMPLES, read_outcomes
from espalier.evaluate.needle import ANSWER_TOKENS, NeedleRecipe, evaluate_needle, needle_items
from espalier.report import Report
from espalier.run import PAGE, RESULTS


def recipe(**told) -> NeedleRecipe:
    return NeedleRecipe(model="m", url="http://nowhere", **told)


def every(items) -> list:
    return [item for each in items.values() for item in each]


def place_of(prompt: str) -> str:
    """The number in the sentence that begins with the prompt's last line: what a reader would answer."""
    question = prompt.rsplit("\n\n", 1)[1]
    [found] = re.findall(re.escape(question) + r" ?(\d{5})", prompt)
    return found


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([400, 700, 1500]),
    st.floats(0, 1),
    st.integers(1, 8),
    st.sampled_from(sorted(LANGUAGES)),
    st.integers(0, 5),
)
def test_a_prompt_is_as_long_as_asked_for_and_holds_its_answer_once(scripted, length, depth, needles, language, seed):
    told = recipe(lengths=(length + 400,), depths=(depth,), needles=needles, n=2, languages=(language,), seed=seed)
    for item in every(needle_items(told, scripted())):
        longest = max(len(" ".join(each)) for each in zip(*(map(sorted, LANGUAGES[language].hay)), strict=True)) + 40
        assert length + 400 - ANSWER_TOKENS - longest <= len(item.prompt) <= length + 400 - ANSWER_TOKENS
        assert item.gold.strip() == place_of(item.prompt) and item.options.count(item.gold) == 1
        assert len(set(item.options)) == 4 and item.chance == 0.25
        assert item.tags["language"] == language and item.tags["length"] == str(length + 400)


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_the_needle_lies_at_its_depth(scripted, language):
    depths = (0.0, 0.25, 0.5, 1.0)
    told = recipe(lengths=(4000,), depths=depths, n=3, languages=(language,))
    for item in every(needle_items(told, scripted())):
        body = item.prompt.split("\n\n")[1]
        at = body.index(place_of(item.prompt)) / len(body)
        assert at == pytest.approx(float(item.tags["depth"]), abs=0.04)


def test_of_several_needles_one_is_asked_for_and_the_others_are_options(scripted):
    for item in every(needle_items(recipe(lengths=(900,), needles=4, n=3), scripted())):
        hidden = set(re.findall(r"\d{5}", item.prompt))
        assert {option.strip() for option in item.options} == hidden and len(hidden) == 4


def test_items_are_the_same_each_time_and_those_of_one_cell_do_not_depend_on_the_others(scripted):
    long = needle_items(recipe(lengths=(400, 600), depths=(0.0, 0.5), n=4), scripted())
    again = needle_items(recipe(lengths=(600,), depths=(0.5,), n=2), scripted())
    ids = [item.id for item in long["needle_600"] if item.tags["depth"] == "0.5"]
    assert [item.id for item in again["needle_600"]] == ids[:2]
    assert len({item.id for item in every(long)}) == 16
    assert not {item.id for item in every(needle_items(recipe(lengths=(600,), seed=1), scripted()))} & set(ids)


@pytest.fixture
def asked(scripted, make_run, monkeypatch):
    """The report on an engine, and its run."""

    def asked(engine, **told):
        monkeypatch.setattr(needle, "open_engine", lambda recipe, run: engine)
        run = make_run()
        assert evaluate_needle(recipe(**told), run) == run.folder / PAGE
        return Report.load(run.folder / RESULTS), run

    return asked


def test_who_reads_finds_all_and_who_reads_only_the_end_finds_the_deep_ones(scripted, asked):
    report, _ = asked(scripted(lambda prompt: f" {place_of(prompt)}. And"), lengths=(500, 900), scoring="written")
    assert {row.task: row.value for row in report.rows} == {"needle_500": 1.0, "needle_900": 1.0}

    def near(prompt: str, option: str) -> float:
        return float(option.strip() in prompt[-350:])

    report, run = asked(scripted(score=near), lengths=(400, 2000), depths=(0.0, 1.0), n=40)
    assert report.value("needle_400", "acc") == 1.0
    deep, shallow = (
        [each.scores["acc"] for each in read_outcomes(run.folder / SAMPLES) if each.tags == told]
        for told in ({"depth": depth, "length": "2000", "language": "en"} for depth in ("1", "0"))
    )
    assert sum(deep) == 40 and 2 < sum(shallow) < 20, "a quarter by chance"


def test_more_than_the_model_s_context_is_refused(scripted, asked):
    engine = scripted()
    engine.context = 1000
    with pytest.raises(RecipeError, match=r"2,000 tokens.*at most 1,000"):
        asked(engine, lengths=(500, 2000))
    assert not engine.asked


@pytest.mark.parametrize(
    ("wanted", "match"),
    [({"lengths": (60,)}, "for the question and what is hidden"), ({"languages": ("en", "tlh")}, "tlh")],
)
def test_what_cannot_be_is_refused(scripted, asked, wanted, match):
    with pytest.raises(RecipeError, match=match):
        asked(scripted(), **wanted)


def test_the_user_s_own_text_is_hay(scripted, asked, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("\n".join(f"Sentence {number} of a long book. It has a second half!" for number in range(60)))
    found = every(needle_items(recipe(lengths=(800,), n=3, text=text), scripted()))
    assert all("of a long book." in item.prompt and "gardener" not in item.prompt for item in found)
    assert len({item.prompt[:200] for item in found if item.tags["depth"] == "0.5"}) == 3, "from a place of its own"
    with pytest.raises(DataError, match="hay for 9000"):
        asked(scripted(), lengths=(9000,), text=text)
    text.write_text("  \n")
    with pytest.raises(DataError, match="no text"):
        asked(scripted(), text=text)
    with pytest.raises(DataError, match="No such file"):
        asked(scripted(), text=tmp_path / "none.txt")


def test_an_engine_is_closed_whatever_happens(scripted, asked):
    engine, closed = scripted(), []
    engine.close = lambda: closed.append(True)
    with pytest.raises(RecipeError):
        asked(engine, lengths=(60,))
    assert closed == [True]
