"""The fault suite: it sees every file call, makes faults happen where it says, and its sheet tells of all its parts."""

import os
import shutil
from pathlib import Path

import pytest
from faults import calls, power, refusals, suite
from faults.sheet import SHEET, Row, Told, parts_of, render
from faults.small import Setting, Small

from espalier import files
from espalier.errors import UserError

pytestmark = pytest.mark.skipif(not calls.available(), reason="needs Linux on x86-64 and leave to trace a child")


def copied(place: Path) -> None:
    """Calls from Python and from the C library: a folder, a file copied by the kernel, a name, a removal."""
    (place / "folder").mkdir()
    (place / "a").write_bytes(b"0123456789")
    shutil.copyfile(place / "a", place / "folder" / "b")
    (place / "a").rename(place / "c")
    (place / "c").unlink()


def test_every_call_is_seen_in_order(tmp_path):
    seen = [call for call in calls.watch(lambda: copied(tmp_path), tmp_path).calls if call.data or call.name != "write"]
    names = [call.name for call in seen]
    assert names == ["mkdir", "open", "write", "close", "open", "write", "close", "rename", "unlink"]
    assert [call.data for call in seen if call.name == "write"] == [b"0123456789"] * 2


def test_what_is_elsewhere_or_only_read_does_not_count(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "below").mkdir()
    work = lambda: (tmp_path / "a").read_text() and (tmp_path / "b").write_text("y")  # noqa: E731
    assert calls.watch(work, tmp_path / "below").calls == []


@pytest.mark.parametrize("fault, left", [("kill", b""), ("torn", b"01234")])
def test_a_kill_comes_before_the_call_or_in_the_middle_of_a_write(tmp_path, fault, left):
    assert calls.watch(lambda: copied(tmp_path), tmp_path, at=3, fault=fault).killed
    assert (tmp_path / "a").read_bytes() == left


def test_an_error_comes_from_the_call_that_it_was_put_at(tmp_path):
    end = calls.watch(lambda: files.write_text(tmp_path / "a", "x"), tmp_path, at=2, fault="ENOSPC")
    assert end.error is not None and end.error["kind"] == "ResourceError" and not list(tmp_path.iterdir())


def test_the_replay_of_a_writer_that_does_not_flush_is_bad(tmp_path):
    (tmp_path / "a").write_text("old")
    before = power.Disk(tmp_path)

    def careless() -> None:
        (tmp_path / ".new").write_text("new")
        os.replace(tmp_path / ".new", tmp_path / "a")  # noqa: PTH105

    for call in calls.watch(careless, tmp_path).calls:
        before.apply(call)
    assert before.early == [str(tmp_path / "a")]


def test_a_refusal_that_lacks_something_is_found(tmp_path):
    (tmp_path / "x.py").write_text('raise DataError("x", found="a", expected="", mend="do")\n')
    [made] = refusals._made(tmp_path / "x.py")
    assert refusals._lacking(made) == ["expected", "a mend that ends as a sentence"]


def test_every_part_runs_in_a_tiny_form(tmp_path):
    """Two trials of each kind; what hangs on chance alone may miss its goal, but nothing breaks off."""
    told = suite.carry_out(["mutations", "refusals"], tmp_path, seed=1, share=0.01)
    assert [part.part for part in told] == ["mutations", "refusals"] and all(part.rows for part in told)


def test_parts_draw_by_the_seed_alone(tmp_path):
    one, other = (Setting(tmp_path, Small(tmp_path), seed) for seed in (1, 2))
    assert (
        one.dice("x").random() == Setting(tmp_path, Small(tmp_path), 1).dice("x").random() != other.dice("x").random()
    )


def test_a_sheet_says_what_fell_short():
    rows = [Row("G1", "a: 3", "0", "0", True), Row("G2", "b", "1", "0", False, "because")]
    text = render([Told("p", rows, 1.0, "2026-01-01")], seed=1, share=1.0, seconds=1.0)
    assert "| G2 | b | 1 | 0 | **no** |" in text and "- G2, b: because" in text and parts_of(text) == ["p"]


def test_the_sheet_is_of_these_parts():
    assert parts_of(SHEET.read_text(encoding="utf-8")) == list(suite.PARTS)


def test_a_refusal_comes_back_as_four_lines(tmp_path):
    def refuse() -> None:
        raise UserError("w", found="f", expected="e", mend="m.")

    assert calls.forked(refuse).error == {
        "kind": "UserError",
        "where": "w",
        "found": "f",
        "expected": "e",
        "mend": "m.",
    }
