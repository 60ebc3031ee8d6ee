"""A score is told apart: what cues earn, what they explain of it, and what was learnt."""

from __future__ import annotations

import json

import pytest

from espalier.errors import DataError
from espalier.evaluate import ask as asking
from espalier.evaluate.audits.test_taking import TakingRecipe, evaluate_test_taking
from espalier.evaluate.items import Item, write_items

NAMES = ("bal", "dun", "kit", "mor")


@pytest.fixture
def audit(scripted, make_run, monkeypatch, tmp_path, told):
    """`audit(items, before, after)`: the report when these functions score the options."""

    def audit(items: list[Item], before, after=None, **more):
        write_items(tmp_path / "items.jsonl", items)
        scores = {"before": before, "after": after}
        monkeypatch.setattr(asking, "open_engine", lambda recipe, run: scripted(score=scores[recipe.model]))
        recipe = TakingRecipe(
            model="before", after="after" if after else "", url="http://nowhere", **more, items=tmp_path / "items.jsonl"
        )
        return evaluate_test_taking(recipe, make_run())

    return audit


def items(n: int) -> list[Item]:
    """The right answer is the number's remainder; it is the longer one in half of the items."""
    made = []
    for number in range(n):
        gold = NAMES[number % 4] + " at length" * (number % 8 < 4)
        options = [gold if name == NAMES[number % 4] else name for name in NAMES]
        made.append(Item("sums", f"{number} by four:", gold, tuple(options)))
    return made


def knows(prompt: str, option: str) -> float:
    return float(option.startswith(NAMES[int(prompt.split()[0]) % 4]))


def takes_the_longest(prompt: str, option: str) -> float:
    return float(len(option))


def test_a_gain_is_what_was_learnt_and_its_interval_says_how_sure_it_is(audit, told):
    report = audit(items(80), before=takes_the_longest, after=knows)
    before, after = report.value("sums", "acc"), report.value("sums (after)", "acc")
    assert (before, after) == (pytest.approx(0.625), 1.0)
    [gain] = [row for row in report.rows if row.metric == "gain"]
    low, high = map(float, gain.note.split(" to "))
    assert gain.value == pytest.approx(0.375) and gain.n == 80 and 0.2 < low < gain.value < high < 0.55
    assert "learning gained 37.5 points" in told[-1]


def test_cues_explain_all_of_a_score_that_is_made_of_them(audit):
    report = audit(items(80), before=takes_the_longest)
    assert report.value("sums", "cue: longest") == pytest.approx(0.625)
    assert report.value("sums", "explained") == 1.0


def test_cues_explain_a_part_of_the_score_of_one_who_knows(audit):
    assert audit(items(80), before=knows).value("sums", "explained") == pytest.approx(0.5)


def test_a_score_at_chance_has_nothing_to_be_explained(audit):
    report = audit(items(80), before=lambda prompt, option: float(option.startswith(NAMES[0])))
    assert report.value("sums", "acc") == 0.25
    assert not {row.metric for row in report.rows} & {"explained", "gain"}


def test_a_sample_is_the_same_one_for_both(audit):
    report = audit(items(80), before=takes_the_longest, after=knows, limit=30)
    assert [row.n for row in report.rows if row.metric in ("acc", "gain")] == [30, 30, 30]


def test_items_without_options_are_refused(audit):
    with pytest.raises(DataError) as refused:
        audit([*items(4), Item("sums", "2 + 2 =", "4")], before=knows)
    assert refused.value.found == "an item without options: '2 + 2 ='"


def test_a_file_that_holds_no_items_is_refused(audit, tmp_path):
    with pytest.raises(DataError, match="no item"):
        audit([], before=knows)
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "a book"}) + "\n")
    with pytest.raises(DataError, match=r"other\.jsonl:1"):
        evaluate_test_taking(TakingRecipe(model="m", items=tmp_path / "other.jsonl"), None)
