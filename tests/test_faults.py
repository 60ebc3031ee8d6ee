"""The fault suite: it sees every file call, makes faults happen where it says, and its sheet tells of all its parts."""

import argparse
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from faults import calls, guards, power, refusals, rounds, runs, suite, untrusted
from faults.sheet import SHEET, Row, Told, parts_of, render
from faults.small import NAME, Setting, Small

from espalier import files, pipeline
from espalier.errors import UserError
from espalier.ledger import Cost
from espalier.recipe import Recipe
from espalier.run import Run
from espalier.train import loop

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


@pytest.fixture
def remembered(tmp_path, monkeypatch):
    """The sheet's row of two guards in kept.py, whose trials are what a test writes down of them."""
    for name in ("kept.py", "other.py"):
        (tmp_path / name).write_text("def keep(x):\n    check(x)\n    verify(x)\n")
    (tmp_path / "test_kept.py").write_text("def test():\n    pass\n")
    for name in ("ROOT", "SOURCE", "REMOVED"):
        monkeypatch.setattr(guards, name, tmp_path)
    monkeypatch.setattr(guards, "GUARDED", ("kept.py",))
    monkeypatch.setattr(
        guards, "outcome", lambda file, text: "green" if "verify" in text else "red: test_kept.py::test"
    )
    monkeypatch.setattr(guards, "today", lambda: "2026-01-02")
    return lambda: guards.removed(Setting(tmp_path, Small(tmp_path)))[0]


def test_the_sheet_forgets_guards_that_are_gone_and_names_those_not_tried(remembered):
    green = guards.Trial("green", "2026-01-01")
    guards._write_record("kept.py", {"keep: check(x)": green, "keep: flush()": green})
    row = remembered()
    assert row.figure == "0 of 1 turn a test red (0.0%)" and not row.reached
    unnoticed, elsewhere = "no test noticed: kept.py: keep: check(x)", "2 guards of other files aren't tried"
    assert row.why == f"{unnoticed}. not tried yet: kept.py (1 of 2). {elsewhere}"
    guards.main(["kept.py"])
    row = remembered()
    assert row.figure == "1 of 2 turn a test red (50.0%)" and row.why == f"{unnoticed}. {elsewhere}"
    assert list(json.loads((guards.REMOVED / "kept.py.json").read_text())) == ["keep: check(x)", "keep: verify(x)"]


def test_what_a_test_noticed_is_tried_again_once_that_test_is_gone(remembered):
    red, gone = (guards.Trial(f"red: test_kept.py::{name}", "2026-01-01") for name in ("test", "test_that_was"))
    guards._write_record("kept.py", {"keep: check(x)": gone, "keep: verify(x)": red})
    row = remembered()
    assert row.trials == 1 and "not tried yet: kept.py (1 of 2)" in row.why and "(2026-01-01)" in row.tried
    guards.main(["kept.py"])
    assert remembered().trials == 2 and "(2026-01-01 to 2026-01-02)" in remembered().tried


def test_every_part_runs_in_a_tiny_form(tmp_path):
    """Two trials of each kind; what hangs on chance alone may miss its goal, but nothing breaks off."""
    told = suite.carry_out(["mutations", "refusals"], tmp_path, seed=1, share=0.01)
    assert [part.part for part in told] == ["mutations", "refusals"] and all(part.rows for part in told)


def test_parts_draw_by_the_seed_alone(tmp_path):
    one, other = (Setting(tmp_path, Small(tmp_path), seed) for seed in (1, 2))
    assert (
        one.dice("x").random() == Setting(tmp_path, Small(tmp_path), 1).dice("x").random() != other.dice("x").random()
    )


def row(figure: str = "0", *, reached: bool = True, trials: int = 3, took: str = "", why: str = "") -> Row:
    return Row("G1", "kills: 3", figure, "0", reached, why, trials=trials, of=6, took=took)


def told(*rows: Row, part: str = "p") -> Told:
    return Told(part, rows, 1.0, "2026-01-01")


def test_a_sheet_says_what_fell_short():
    text = render([told(row(), row("1", reached=False, took="2.0 s", why="because"))], seed=1, share=1.0)
    assert "| G1 | kills: 3 | 1; 2.0 s | 0 | **no** |" in text and "- G1, kills: because" in text
    assert parts_of(text) == ["p"] and "2 rows, 1 of them short of their goal, 0 not tried" in text


def test_a_sheet_says_how_many_of_all_trials_a_part_made():
    assert "| p | 50% | 6 of 12 | 1.0 | 2026-01-01 |" in render([told(row(), row())], seed=1, share=0.5)


def test_what_was_not_tried_is_not_reached():
    """Whatever its part thinks of it."""
    text = render([told(row(trials=0, why="no such tool"))], seed=1, share=1.0)
    assert row(trials=0).verdict == "not tried" and "| G1 | kills: 3 | - | 0 | **not tried** |" in text
    assert "- G1, kills: no such tool" in text and "0 of them short of their goal, 1 not tried" in text


def test_a_kind_of_which_no_artefact_was_opened_says_so():
    none = untrusted._row("pickles", "F20", [])
    assert none.verdict == "not tried" and none.why and none.of > 0


def test_the_sheet_is_of_these_parts():
    assert parts_of(SHEET.read_text(encoding="utf-8")) == [*suite.PARTS, suite.ALL]


class Brief:
    """Writes as a run does, in milliseconds; what it ends with are its files."""

    run = Path()

    def carry_out(self, runs: Path) -> int:
        (runs / NAME).mkdir(exist_ok=True)
        for step in range(8):
            with (runs / NAME / "metrics.jsonl").open("a") as log:
                log.write(f"{step}\n")
            (runs / NAME / f"step{step}").write_text("weights")
        return 0


@pytest.fixture
def brief(tmp_path, monkeypatch):
    """A setting whose run is brief, by seed, and all that was killed in it."""
    asked = []
    watch = calls.watch

    def watched(work, below, *, at=0, fault="kill"):
        asked.append((below.name, at, fault))
        return watch(work, below, at=at, fault=fault)

    monkeypatch.setattr(runs, "ends_with", lambda run: ["calm"])
    monkeypatch.setattr(calls, "watch", watched)
    return lambda seed: Setting(tmp_path, Brief(), seed, 0.05), asked


def test_the_seed_alone_says_when_a_run_is_killed(brief):
    setting, asked = brief
    rows = [runs.random_kills(setting(seed)) for seed in (1, 1, 2)]
    kills, each = [kill for kill in asked if kill[1]], len(asked) // 3
    assert rows[0] == rows[1] and asked[:each] == asked[each : 2 * each] and rows[0][0].trials == 25
    assert kills[: len(kills) // 2] != kills[-(len(kills) // 2) :]
    assert {name for name, _, _ in kills} == {"killed", "metrics.jsonl"} and {kind for *_, kind in kills} == {
        "kill",
        "torn",
    }


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_the_file_calls_of_a_run_do_not_hang_on_the_clock(tmp_path, monkeypatch, seconds):
    """It charges its time after each step, however long that took, and as others do elsewhere."""
    charged = []
    monkeypatch.setattr(Run, "uncharged_seconds", seconds)

    def run(*_, **__):
        meter = loop.Meter(Run(tmp_path, Recipe(), tell=print), Cost())
        monkeypatch.setattr(meter, "flush", charged.append)
        meter.count("state", loop.Step(1.0, 1.0, 1.0, 1, 1.0, 0.1))
        return 0

    monkeypatch.setattr(pipeline, "main", run)
    assert Small(tmp_path).carry_out(tmp_path) == 0 and charged == ["state"]
    assert run() == 0 and len(charged) == 1 + int(seconds)


def test_rounds_that_differ_in_times_alone_are_the_same():
    assert rounds.flakes([[told(row(took="1.0 s"))], [told(row(took="2.0 s"))], [told(row())]]) == []


@pytest.mark.parametrize(
    "other, said",
    [
        (row("1 lost"), "figure '1 lost', at first '0'"),
        (row(reached=False), "reached False, at first True"),
        (row(reached=False, took="9 s"), "reached False, at first True, took '9 s', at first ''"),
        (row(trials=2), "trials 2, at first 3"),
        (row(why="bits"), "why 'bits', at first ''"),
    ],
)
def test_a_row_that_differs_is_told_once_with_both_values(other, said):
    calm = [told(row(), part="a"), told(row(), row(), part="b")]
    odd = [told(row(), part="a"), told(row(), other, part="b")]
    assert rounds.flakes([calm, odd, odd, calm]) == [f"b, round 2: G1, kills: {said}"]


def test_a_row_that_comes_or_goes_is_a_flake():
    one, two = [told(row())], [told(row(), row())]
    assert rounds.flakes([one, two]) == ["p, round 2: kills: 3 is new"]
    assert rounds.flakes([two, one]) == ["p, round 2: kills: 3 is missing"]


@pytest.mark.parametrize(
    "count, flakes, verdict", [(50, [], "yes"), (49, [], "no"), (50, ["x"], "no"), (0, [], "not tried")]
)
def test_fifty_rounds_without_a_flake_are_wanted(tmp_path, monkeypatch, count, flakes, verdict):
    found = {"rounds": count, "seed": 1, "share": 0.02, "rows": 33, "flakes": flakes, "date": "2026-01-01"}
    monkeypatch.setattr(rounds, "FOUND", tmp_path / "rounds.json")
    rounds.FOUND.write_text(json.dumps(found))
    [said] = rounds.compared(Setting(tmp_path, Small(tmp_path)))
    assert said.verdict == verdict and said.trials == count and said.of == 50


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A suite of other parts, which has no run to make, its record and its sheet."""
    monkeypatch.setattr(Small, "make", classmethod(lambda cls, place: place.mkdir(parents=True) or cls(place)))
    monkeypatch.setattr(calls, "share_memory", lambda: None)
    monkeypatch.setattr(suite, "SHEET", tmp_path / "sheet.md")
    monkeypatch.setattr(rounds, "FOUND", tmp_path / "rounds.json")
    found = {}
    monkeypatch.setattr(suite, "PARTS", found)
    return found


def carry_out(repeat: int = 1) -> int:
    return suite.main(argparse.Namespace(only=None, repeat=repeat, seed=1, share=0.5))


def test_rounds_are_compared_and_written_down(parts, tmp_path, capsys):
    count = tmp_path / "count"

    def counting(setting: Setting) -> list[Row]:
        count.write_text(count.read_text() + "x" if count.exists() else "x")
        return [row(str(min(3, len(count.read_text()))))]

    parts |= {"calm": lambda setting: [row(took=str(time.monotonic()))], "odd": counting, "rounds compared": None}
    assert carry_out(repeat=3) == 1 and not (tmp_path / "sheet.md").exists()
    found = json.loads((tmp_path / "rounds.json").read_text())
    assert found["rounds"] == 3 and found["rows"] == 2 and found["share"] == 0.5
    assert found["flakes"] == ["odd, round 2: G1, kills: figure '2', at first '1'"]
    assert found["flakes"][0] in capsys.readouterr().out
    assert carry_out(repeat=2) == 0  # three from now on
    assert json.loads((tmp_path / "rounds.json").read_text())["flakes"] == []


def test_a_suite_in_which_nothing_was_tried_fails(parts, tmp_path):
    parts["p"] = lambda setting: [row()]
    assert carry_out() == 0 and parts_of((tmp_path / "sheet.md").read_text()) == ["p", suite.ALL]
    parts["q"] = lambda setting: [row(trials=0)]
    assert carry_out() == 1


def test_a_part_that_breaks_off_says_of_what(parts, tmp_path):
    parts["p"] = lambda setting: [row("1" * (1 // 0))]
    parts["q"] = lambda setting: os._exit(3)
    assert carry_out() == 1
    sheet = (tmp_path / "sheet.md").read_text()
    assert "ZeroDivisionError" in sheet and "ended without a word" in sheet and sheet.count("broke off") == 2


def test_what_the_others_met_is_looked_at_when_they_have_ended(parts, tmp_path, monkeypatch):
    def slow(setting: Setting) -> list[Row]:
        time.sleep(0.5)
        setting.seen(calls.End(error={"kind": "x", "where": "w", "found": "f", "expected": "e", "mend": "m"}))
        return [row()]

    monkeypatch.setattr(refusals, "SOURCE", tmp_path / "empty")
    parts |= {"refusals": lambda setting: refusals.refusals(setting)[1:], "slow": slow, "slower": slow}
    assert carry_out() == 0


def test_the_share_of_few_trials_is_one(tmp_path):
    setting = Setting(tmp_path, Small(tmp_path), share=0.01)
    assert setting.some("abcde") == ["c"] and replace(setting, share=1.0).some("abcde") == list("abcde")


def test_a_result_that_is_not_json_is_a_bug_of_the_work(tmp_path):
    for work in (lambda: tmp_path, lambda: 1 // 0):
        assert "bug" in (calls.forked(work).error or {}) and "bug" in (calls.watch(work, tmp_path).error or {})


def test_a_process_with_large_pages_is_the_same():
    assert calls.forked(lambda: (calls.share_memory(), sum(range(10)))[1]).result == 45


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
