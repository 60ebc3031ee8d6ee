"""The user's own files become items, and a line that is wrong is told with its number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from espalier.errors import DataError
from espalier.evaluate.iq.files import FILES, Rows, items_of

SPAN = {"span1_index": 0, "span1_text": "Mark", "span2_index": 9, "span2_text": "he"}


def row(task: str, number: int, label) -> dict:
    text = f"{task} {number}"
    return {
        "boolq": {"question": f"is it {text}", "passage": f"A passage\nof {text}."},
        "wic": {"word": "bed", "sentence1": f"a {text}", "sentence2": f"b {text}", "start1": 1, "version": 1.1},
        "rte": {"premise": f"P {text}", "hypothesis": f"H {text}"},
        "wsc": {"text": f"Mark says he is {text}", "target": SPAN},
        "afqmc": {"sentence1": f"甲{text}", "sentence2": f"乙{text}"},
        "csl": {"id": number, "abst": f"摘要{text}", "keyword": ["词", f"{number}"]},
        "ocnli": {"level": "easy", "sentence1": f"甲{text}", "sentence2": f"乙{text}", "genre": "gov"},
        "cluewsc2020": {"text": f"马克说他{text}", "target": SPAN},
    }[task] | {"label": label, "idx": number}


LABELS = {
    **dict.fromkeys(("boolq", "wic", "wsc"), (True, False)),
    "rte": ("entailment", "not_entailment"),
    **dict.fromkeys(("afqmc", "csl"), ("0", "1")),
    "ocnli": ("entailment", "neutral", "contradiction"),
    "cluewsc2020": ("true", "false"),
}


@pytest.fixture
def file(tmp_path):
    """A file of 30 rows of a task, with `more` lines after them."""

    def write(task: str, *more: str) -> Path:
        rows = [json.dumps(row(task, k, LABELS[task][k % len(LABELS[task])]), ensure_ascii=False) for k in range(30)]
        path = tmp_path / f"{task}.jsonl"
        path.write_text("\n".join([*rows, *more]) + "\n")
        return path

    return write


@pytest.mark.parametrize("task", LABELS)
def test_each_row_is_asked_about_with_others_of_each_label_before_it(file, task):
    kind = FILES[task]
    assert isinstance(kind, Rows)
    items = items_of(task, file(task), 100, shots=2)
    assert len(items) == 30 and len({item.id for item in items}) == 30
    for item in items:
        blocks = item.prompt.split("\n\n")[1:]
        assert len(blocks) == 2 * len(LABELS[task]) + 1 and len(item.options) == len(LABELS[task])
        texts = [block.rsplit("\n", 1)[0] for block in blocks]
        assert len(set(texts)) == len(texts), "the question isn't among the examples"
        assert all(len(text.split("\n")) == len(kind.fields) for text in texts)
        shown = [block.rsplit(" ", 1)[1] for block in blocks[:-1]]
        assert all(shown.count(option.strip()) == 2 for option in item.options)
        assert item.prompt.count(item.gold) == 2 + item.prompt.split("\n\n")[0].count(item.gold)
    assert {item.tags["label"] for item in items} == {str(label).lower() for label in LABELS[task]}


def test_the_symbol_of_a_row_is_that_of_its_label(file):
    for item in items_of("rte", file("rte"), 30, instruction="guided"):
        number = int(item.prompt.rsplit("rte ", 1)[1].split("\n")[0])
        meaning = list(FILES["rte"].meanings.values())[number % 2]
        assert f"{item.gold} ({meaning})" in item.prompt


def test_the_first_items_are_the_same_however_many_are_asked_for(file):
    path = file("boolq")
    assert items_of("boolq", path, 7) == items_of("boolq", path, 100)[:7]
    assert items_of("boolq", path, 7) != items_of("boolq", path, 7, seed=1)


def test_rows_on_which_no_one_agreed_are_left_out(file):
    assert len(items_of("ocnli", file("ocnli", json.dumps(row("ocnli", 31, "-"))), 100)) == 30


@pytest.mark.parametrize(
    ("line", "where", "found"),
    [
        ("{", "rte.jsonl:31", "no JSON"),
        ("[]", "rte.jsonl:31: label", "nothing"),
        ('{"premise": "a", "hypothesis": "b"}', "rte.jsonl:31: label", "nothing"),
        ('{"premise": "a", "hypothesis": "b", "label": "maybe"}', "rte.jsonl:31: label", "'maybe'"),
        ('{"premise": "a", "label": "entailment"}', "rte.jsonl:31: hypothesis", "nothing"),
        ('{"premise": "a", "hypothesis": " ", "label": "entailment"}', "rte.jsonl:31: hypothesis", "' '"),
        ('{"premise": 7, "hypothesis": "b", "label": "entailment"}', "rte.jsonl:31: premise", "7"),
    ],
)
def test_a_row_that_is_none_is_refused_with_its_line(file, line, where, found):
    with pytest.raises(DataError) as refused:
        items_of("rte", file("rte", line), 10)
    assert refused.value.where.endswith(where) and refused.value.found == found


BABI = """\
1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary went to the garden.
5 Where is Mary? \tgarden\t4
1 Sandra journeyed to the hallway.
2 Where is Sandra? \thallway\t1
"""


def test_a_story_is_told_up_to_its_question_and_ends_where_numbers_begin_anew(tmp_path):
    (tmp_path / "qa1.txt").write_text(BABI)
    items = {item.prompt: item for item in items_of("babi_1", tmp_path / "qa1.txt", 100)}
    both = "Mary moved to the bathroom. John went to the hallway."
    assert {prompt: item.gold for prompt, item in items.items()} == {
        f"{both}\nWhere is Mary?\nAnswer:": " bathroom",
        f"{both} Mary went to the garden.\nWhere is Mary?\nAnswer:": " garden",
        "Sandra journeyed to the hallway.\nWhere is Sandra?\nAnswer:": " hallway",
    }
    assert all(item.options == (" bathroom", " garden", " hallway") for item in items.values())


@pytest.mark.parametrize(
    ("line", "found"),
    [("Mary moved.", "'Mary moved.'"), ("8", "'8'"), ("8 Where is Mary?\t\t1", "a question without an answer")],
)
def test_a_line_that_belongs_to_no_story_is_refused(tmp_path, line, found):
    (tmp_path / "qa1.txt").write_text(BABI + line)
    with pytest.raises(DataError) as refused:
        items_of("babi_1", tmp_path / "qa1.txt", 10)
    assert refused.value.where.endswith("qa1.txt:8") and refused.value.found == found


@pytest.mark.parametrize("task", ["rte", "babi_1"])
def test_a_file_that_is_not_there_or_says_nothing_is_refused(tmp_path, task):
    with pytest.raises(DataError):
        items_of(task, tmp_path / "none", 10)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DataError) as refused:
        items_of(task, tmp_path / "empty", 10)
    assert refused.value.found == "no questions"
