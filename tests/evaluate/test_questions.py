"""Questions are read with their faults told, shown as they are, and shuffled without losing the right answer."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import DataError
from espalier.evaluate.questions import CLOZE, LETTERED, LETTERS, Question, as_item, read_questions, render

ASKED = Question("Which is red?", ("the sky", "a rose", "snow"), 1, tags={"kind": "colour"})

texts = st.text("ab {}\n.:", min_size=1).filter(str.strip)
options = st.lists(texts, min_size=2, max_size=24, unique_by=str.strip).map(tuple)


@st.composite
def questions(draw) -> Question:
    made = draw(options)
    return Question(draw(texts), made, draw(st.integers(0, len(made) - 1)), draw(st.just("") | texts))


def test_a_question_with_letters_reads_as_people_write_it():
    assert render(ASKED, LETTERED).text == (
        "Question: Which is red?\nOptions:\nA. the sky\nB. a rose\nC. snow\nAnswer:"
    )
    told = Question("Which?", ("one", "two"), 0, context="Some {question}")
    assert render(told, LETTERED).text == (
        "Context: Some {question}\nQuestion: Which?\nOptions:\nA. one\nB. two\nAnswer:"
    )
    assert render(told, CLOZE).text == "Context: Some {question}\nQuestion: Which?\nAnswer:"


@given(questions())
def test_every_option_is_where_the_prompt_says(question):
    prompt = render(question, LETTERED)
    assert len(prompt.lines) == len(prompt.texts) == len(question.options)
    for letter, option, line, text in zip(LETTERS, question.options, prompt.lines, prompt.texts, strict=False):
        assert prompt.text[slice(*line)] == f"{letter}. {option.strip()}\n"
        assert prompt.text[slice(*text)] == option.strip()
    assert question.question in prompt.text and question.context in prompt.text
    assert ("Context: " in prompt.text) >= bool(question.context)
    assert render(question, CLOZE).lines == ()


@given(questions(), st.integers(0, 9))
def test_another_order_has_the_same_options_and_the_same_answer(question, seed):
    shuffled = question.shuffled(random.Random(seed))
    assert sorted(shuffled.options) == sorted(question.options) and shuffled.options != question.options
    assert shuffled.options[shuffled.gold] == question.options[question.gold]
    extra = question.with_options(("neither",)[: 24 - len(question.options)])
    again = extra.shuffled(random.Random(seed), fixed=len(extra.options) - len(question.options))
    assert again.options[: len(question.options)] == shuffled.options
    assert again.options[len(question.options) :] == extra.options[len(question.options) :]


def test_every_other_order_comes_up():
    draw = random.Random(0)
    found = {ASKED.shuffled(draw).options for _ in range(200)}
    assert len(found) == 5


def test_an_item_asks_for_the_letter_or_for_the_text():
    letters = as_item(ASKED, "reds", "letters", LETTERED)
    assert (letters.options, letters.gold) == ((" A", " B", " C"), " B")
    assert letters.prompt == render(ASKED, LETTERED).text and letters.tags == {"kind": "colour"}
    cloze = as_item(ASKED, "reds", "cloze", CLOZE)
    assert (cloze.options, cloze.gold) == ((" the sky", " a rose", " snow"), " a rose")
    assert cloze.prompt == "Question: Which is red?\nAnswer:" and cloze.chance == pytest.approx(1 / 3)


@pytest.fixture
def written(tmp_path):
    """A file of these rows, after a good one and an empty line."""

    def written(*rows: object):
        good = {"question": "q", "options": ["a", "b"], "answer": 0}
        lines = [json.dumps(good), "", *(row if isinstance(row, str) else json.dumps(good | row) for row in rows)]
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return path

    return written


def test_an_answer_is_a_place_or_a_text(written):
    found = read_questions(written({"answer": "b"}, {"options": ["1", "0"], "answer": "0"}, {"answer": 1}))
    assert [question.gold for question in found] == [0, 1, 1, 1]
    assert found[0].context == "" and found[0].tags == {}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"answer": 2}, "answer"),
        ({"answer": -1}, "answer"),
        ({"answer": "c"}, "answer"),
        ({"options": ["a"]}, "2 to 24"),
        ({"options": [str(number) for number in range(25)]}, "2 to 24"),
        ({"options": ["a", "a "]}, "twice"),
        ({"options": ["a", " "]}, "without text"),
        ({"options": "ab"}, "options"),
        ({"tags": {"level": 1}}, "tags.level"),
        ("{", "JSON"),
        ('{"question": "q"}', "options"),
    ],
)
def test_a_bad_line_is_told_with_its_number(written, row, told):
    with pytest.raises(DataError) as refused:
        read_questions(written(row))
    assert "questions.jsonl:3" in refused.value.where
    assert told in f"{refused.value.where} {refused.value.found}"


def test_a_file_without_questions_is_refused(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no questions"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="No such file"):
        read_questions(tmp_path / "nowhere.jsonl")
