"""The fault suite: it sees every file call, makes faults happen where it says, and its sheet tells of all its parts."""

import os
import shutil
from pathlib import Path

import pytest
from faults import calls, guards, power, refusals, suite
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


GUARDED = """
class Kept:
    def read(self, path):
        try:
            text = path.read_text()  # "ä" moves the columns of bytes
        except (OSError, ValueError) as error:
            raise DataError("ä") from error
        if not text:
            raise DataError("no text")
        elif text == "?":
            raise DataError("a question")
        _require_plain(text)
        return damage(path) is None and sha256(text) == self.sha256

def keep(file):
    os.fsync(file.fileno())
    os.fsync(file.fileno())
    return math.isfinite(1.0)
"""


def test_each_guard_is_found_by_its_function_and_text_and_taken_away_alone():
    expected = {
        "Kept.read: except (OSError, ValueError): raise DataError": 'raise DataError("ä") from error -> raise',
        "Kept.read: if not text: raise DataError": 'raise DataError("no text") -> pass',
        "Kept.read: if text == '?': raise DataError": 'raise DataError("a question") -> pass',
        "Kept.read: _require_plain(text)": "_require_plain(text) -> pass",
        "Kept.read: damage(path)": "damage(path) -> None",
        "Kept.read: sha256(text) == self.sha256": "sha256(text) == self.sha256 -> True",
        "keep: os.fsync(file.fileno())": "os.fsync(file.fileno()) -> pass",
        "keep: os.fsync(file.fileno()) (2)": "os.fsync(file.fileno()) -> pass",
        "keep: math.isfinite(1.0)": "math.isfinite(1.0) -> True",
    }
    found = {guard.name: guard.without for guard in guards.guards(GUARDED)}
    assert list(found) == list(expected)
    for name, change in expected.items():
        old, new = change.split(" -> ")
        again = 2 if name.endswith("(2)") else 1
        before, after = GUARDED.split(old)[:again], GUARDED.split(old)[again:]
        assert found[name] == old.join(before) + new + old.join(after)


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """`tried(test, without)` is what a test says of a source file that lacks its guard."""
    source, test_file = tmp_path / "src" / "espalier", tmp_path / "tests" / "test_kept.py"
    for path, text in {source / "__init__.py": "", source / "kept.py": "x = 1\n", test_file: ""}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(guards, "SOURCE", source)
    monkeypatch.setattr(guards, "ROOT", tmp_path)
    monkeypatch.setattr(guards, "SHRINKING_SECONDS", 0)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # it starts faster
    guards._calm_seconds.cache_clear()

    def tried(test: str, without: str) -> str:
        test_file.write_text(f"from espalier.kept import x\n\ndef test():\n    {test}\n")
        return guards.outcome("kept.py", without)

    yield tried
    assert (source / "kept.py").read_text() == "x = 1\n", "the sources stay as they are"


def test_only_a_test_that_fails_is_red(tried):
    outcomes = {
        "x = 2": "red: tests/test_kept.py::test",
        "x = 1.0": "green",
        "y = 1": "void: exit code 2 of tests/test_kept.py",
        "import os; os._exit(3)": "void: exit code 3 of tests/test_kept.py",
    }
    assert {without: tried("assert x == 1", without) for without in outcomes} == outcomes


def test_tests_that_never_end_are_told_of_as_such(tried, monkeypatch):
    monkeypatch.setattr(guards, "_calm_seconds", lambda tests, file: 0.2)
    assert tried("assert x == 1", "import time; time.sleep(60)") == "no end of tests/test_kept.py"


def test_a_guard_is_not_tried_with_tests_that_are_red_anyway(tried):
    with pytest.raises(SystemExit, match=r"exit code 1 with all guards in place tests/test_kept\.py::test"):
        tried("assert x == 3", "x = 2")


def test_the_sheet_forgets_guards_that_are_gone_and_names_those_not_tried(tmp_path, monkeypatch):
    for name in ("kept.py", "other.py"):
        (tmp_path / name).write_text("def keep(x):\n    check(x)\n    verify(x)\n")
    monkeypatch.setattr(guards, "SOURCE", tmp_path)
    monkeypatch.setattr(guards, "REMOVED", tmp_path)
    monkeypatch.setattr(guards, "GUARDED", ("kept.py",))
    monkeypatch.setattr(guards, "outcome", lambda file, text: "green" if "verify" in text else "red: tests/x.py::test")
    guards._write_record("kept.py", {"keep: check(x)": "green", "keep: flush()": "green"})
    [row] = guards.removed(Setting(tmp_path, Small(tmp_path)))
    assert row.figure == "0 of 1 turn a test red (0.0%)" and not row.reached
    unnoticed, elsewhere = "no test noticed: kept.py: keep: check(x)", "2 guards of other files aren't tried"
    assert row.why == f"{unnoticed}. not tried yet: kept.py (1 of 2). {elsewhere}"
    guards.main(["kept.py"])
    [row] = guards.removed(Setting(tmp_path, Small(tmp_path)))
    assert row.figure == "1 of 2 turn a test red (50.0%)" and row.why == f"{unnoticed}. {elsewhere}"
    assert list(guards._record("kept.py")["guards"]) == ["keep: check(x)", "keep: verify(x)"]


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
