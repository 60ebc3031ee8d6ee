"""Items and outcomes come back from their files as they were, and a line that isn't one is named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import DataError
from espalier.evaluate.items import (
    Item,
    Outcome,
    fingerprint,
    read_items,
    read_outcomes,
    write_items,
    write_outcomes,
)

ITEM = {"task": "sums", "prompt": "1 + 1 =", "gold": "2"}
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
items = st.builds(Item, task=texts, prompt=texts, gold=texts, tags=st.dictionaries(texts, texts, max_size=2))


@given(st.lists(items, max_size=4))
def test_items_come_back_as_they_were(tmp_path_factory, some):
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    write_items(path, some)
    again = read_items(path)
    assert again == some and fingerprint(again) == fingerprint(some)


def test_outcomes_come_back_as_they_were(tmp_path):
    outcome = Outcome("sums", "ab", {"acc": 1.0}, "2\u2028", "2", 0.5, 4, 1, (-0.5, -1.0), {"size": "1"})
    write_outcomes(tmp_path / "samples.jsonl", [outcome, outcome])
    assert read_outcomes(tmp_path / "samples.jsonl") == [outcome, outcome]


def test_an_item_is_told_by_what_is_asked_and_what_is_right():
    base = Item(**ITEM)
    assert base.id == Item(**ITEM, max_new_tokens=7, tags={"any": "thing"}).id
    others = [Item(**ITEM | change) for change in ({"task": "more"}, {"prompt": "1 + 2 ="}, {"gold": "3"})]
    others.append(Item(**ITEM, options=("2", "3")))
    assert len({base.id, *(other.id for other in others)}) == 5


def test_the_order_of_items_is_part_of_a_task():
    one, other = Item(**ITEM), Item(**ITEM | {"gold": "3"})
    assert fingerprint([one, other]) != fingerprint([other, one])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("not JSON", "Invalid JSON"),
        ("[1]", "object"),
        (json.dumps({"task": "sums", "prompt": "1"}), "gold"),
        (json.dumps(ITEM | {"options": ["3", "4"]}), "isn't one of the options"),
        (json.dumps(ITEM | {"max_new_tokens": "many"}), "max_new_tokens"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path, line, told):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(ITEM) + "\n\n" + line + "\n")
    with pytest.raises(DataError) as error:
        read_items(path)
    assert error.value.where.startswith(f"{path}:3") and told in f"{error.value.where} {error.value.found}"


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_items(tmp_path / "none.jsonl")
