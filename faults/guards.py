"""Guard removal: take one guard away, run the tests that reach its file, and see whether one turns red (FAULTS G12).

    python -m faults.guards FILE [FILE ...]     such as data/pack.py

Too slow for the suite; what was found stands in removed/, a file for each source file, and the sheet shows it. A guard
that a test has noticed isn't tried again while it reads the same and that test is there: delete its file in removed/ to
try all of it anew.

A guard is one of these:
    a `raise` of an error: without it work goes on, in an `except` clause with the error that was caught
    a call, as a statement, of what requires, checks, flushes or cuts a torn line: without it work goes on
    a call that asks whether something is whole, finite or inside its folder: without it the answer is the good one
    a comparison of a SHA-256: without it both are equal
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from faults.refusals import SOURCE
from faults.sheet import Row, today
from faults.small import Setting

ROOT = Path(__file__).parent.parent
REMOVED = Path(__file__).with_name("removed")
GUARDED = (
    *("changes.py", "dataset.py", "files.py", "folder.py", "ledger.py", "planner.py", "records.py", "run.py"),
    *("template.py", "untrusted.py", "world.py"),
    *(f"data/{name}.py" for name in ("origin", "pack", "prepare", "sources", "stream", "tokenizer")),
    *(f"train/{name}.py" for name in ("checkpoint", "guards", "loop")),
)
# The tests of a file are those that mirror it; these too, once the former stay green.
ALSO = {"train/loop.py": ("tests/train/test_guards.py",)}
CALLS = {"check", "cut_torn_line", "flush", "fsync", "sync", "validate", "verify"}
GOOD = {"damage": "None", "_is": "True", "is_whole": "True", "isfinite": "True", "leads_outside": "False"}
HASH = "sha256"
RED, GREEN, ENDLESS, VOID = "red", "green", "no end", "void"
TOLD = {GREEN: "no test noticed", ENDLESS: "the tests came to no end", VOID: "no verdict"}
SHARE = 0.95
# At most for the tests with all guards in place; without one ten times as long as they took, and the time in which
# hypothesis looks for a simpler example.
CALM_SECONDS, SHRINKING_SECONDS = 600, 300


@dataclass(frozen=True)
class Guard:
    """A guard by its function and what it says, and the text of its file without it."""

    name: str
    without: str


@dataclass(frozen=True)
class Trial:
    """What the tests said without a guard, and when."""

    outcome: str
    date: str


def removed(setting: Setting) -> list[Row]:
    """What the latest removals of guards found, as far as those guards are still there."""
    outcomes: dict[str, str] = {}
    untried, dates, possible = [], set(), 0
    for file in GUARDED:
        there = _guards_of(SOURCE / file)
        known = _known(file, there)
        possible += len(there)
        outcomes |= {f"{file}: {name}": trial.outcome for name, trial in known.items()}
        dates |= {trial.date for trial in known.values()}
        if len(known) < len(there):
            untried.append(f"{file} ({len(there) - len(known)} of {len(there)})")
    red = _among(outcomes, RED)
    share = len(red) / max(1, len(outcomes))
    files, when = len(GUARDED) - len(untried), " to ".join(sorted({min(dates), max(dates)})) if dates else "never"
    why = [f"{said}: {'; '.join(names)}" for kind, said in TOLD.items() if (names := _among(outcomes, kind))]
    why += [f"not tried yet: {', '.join(untried)}"] * bool(untried)
    others = [path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).as_posix() not in GUARDED]
    why += [f"{sum(len(_guards_of(path)) for path in others)} guards of other files aren't tried"]
    return [
        Row(
            "G12",
            f"guards removed one at a time: {len(outcomes)} in {files} of {len(GUARDED)} files ({when})",
            f"{len(red)} of {len(outcomes)} turn a test red ({share:.1%})",
            f">= {SHARE:.0%}",
            share >= SHARE and not untried,
            ". ".join(why),
            trials=len(outcomes),
            of=possible,
        )
    ]


def _among(outcomes: dict[str, str], kind: str) -> list[str]:
    return [name for name, outcome in outcomes.items() if outcome.startswith(kind)]


def main(files: list[str]) -> None:
    """Try the guards of some files that no test is known to notice, and write down what was found."""
    for file in files:
        there = _guards_of(SOURCE / file)
        trials = {name: trial for name, trial in _known(file, there).items() if trial.outcome.startswith(RED)}
        for guard in there:
            if guard.name not in trials:
                trials[guard.name] = Trial(outcome(file, guard.without), today())
                print(f"{file}: {guard.name}: {trials[guard.name].outcome}", flush=True)
                _write_record(file, {guard.name: trials[guard.name] for guard in there if guard.name in trials})


def _known(file: str, there: Iterable[Guard]) -> dict[str, Trial]:
    """What is known of the guards that are there, by their names."""
    path = REMOVED / f"{file}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    trials = {guard.name: Trial(**record[guard.name]) for guard in there if guard.name in record}
    return {name: trial for name, trial in trials.items() if _stands(trial)}


def _stands(trial: Trial) -> bool:
    """Whether a trial still says something: not if the test that turned red is gone."""
    file, _, test = trial.outcome.removeprefix(f"{RED}: ").partition("::")
    return not trial.outcome.startswith(RED) or f"def {test}(" in _text(ROOT / file)


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _write_record(file: str, trials: dict[str, Trial]) -> None:
    path = REMOVED / f"{file}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: asdict(trial) for name, trial in trials.items()}, indent=2) + "\n")


def _guards_of(path: Path) -> list[Guard]:
    return guards(path.read_text(encoding="utf-8"))


def guards(text: str) -> list[Guard]:
    """The guards of a Python file, in order; of those that read the same in one function later ones are numbered."""
    seen: Counter[str] = Counter()
    found = []
    for says, node, instead in _guards([ast.parse(text)]):
        seen[says] += 1
        name = says if seen[says] == 1 else f"{says} ({seen[says]})"
        found.append(Guard(name, _replaced(text, node, instead)))
    return found


def _guards(
    nodes: Iterable[ast.AST], place: str = "", when: str = "", *, caught: bool = False
) -> Iterator[tuple[str, Any, str]]:
    """(name, node, what takes its place) of the guards among nodes and inside them.

    place   the class and function that they're in
    when    the condition or clause that they're in
    caught  whether an error was caught
    """
    for node in nodes:
        inside = ast.iter_child_nodes(node)
        match node:
            case ast.ClassDef() | ast.FunctionDef():
                yield from _guards(inside, f"{place}.{node.name}".lstrip("."))
            case ast.If():
                condition = ast.unparse(node.test)
                yield from _guards([node.test], place, when, caught=caught)
                yield from _guards(node.body, place, f"if {condition}: ", caught=caught)
                yield from _guards(node.orelse, place, f"if not ({condition}): ", caught=caught)
            case ast.ExceptHandler(type=ast.expr() as error):
                yield from _guards(inside, place, f"except {ast.unparse(error)}: ", caught=True)
            case ast.Raise(exc=ast.Call(func=error)) | ast.Raise(exc=ast.Name() as error):
                yield f"{place}: {when}raise {ast.unparse(error)}", node, "raise" if caught else "pass"
            case ast.Expr(value=ast.Call() as call) if _requires(call):
                yield f"{place}: {ast.unparse(call)}", node, "pass"
            case ast.Call() if answer := GOOD.get(_called(node)):
                yield f"{place}: {ast.unparse(node)}", node, answer
            case ast.Compare(ops=[ast.Eq() | ast.NotEq() as same]) if HASH in ast.unparse(node):
                yield f"{place}: {ast.unparse(node)}", node, str(isinstance(same, ast.Eq))
            case _:
                yield from _guards(inside, place, when, caught=caught)


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _requires(call: ast.Call) -> bool:
    """Whether a call, which gives nothing back, may refuse what is there, or keeps what was written."""
    return _called(call) in CALLS or _called(call).lstrip("_").startswith("require_")


def _replaced(text: str, node: Any, instead: str) -> str:
    """A text with something else in a node's place; columns are counted in bytes."""
    lines = text.encode().splitlines(keepends=True)
    begin = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    return (text.encode()[:begin] + instead.encode() + text.encode()[end:]).decode()


def outcome(file: str, text: str) -> str:
    """What the tests of a file say to another text of it: red, by which test, or green, unless they give no verdict.

    Only exit code 1 is red: with any other pytest says that it couldn't test.
    """
    path = Path(file)
    for tests in (f"tests/{path.parent / f'test_{path.name}'}", *ALSO.get(file, ())):
        code, failed = _tested(tests, file, text, seconds=10 * _calm_seconds(tests, file) + SHRINKING_SECONDS)
        if code is None:
            return f"{ENDLESS} of {tests}"
        if code != 0:
            return f"{RED}: {failed}" if code == 1 else f"{VOID}: exit code {code} of {tests}"
    return GREEN


@cache
def _calm_seconds(tests: str, file: str) -> float:
    """How long tests take with all guards in place; unless they're green then there's nothing to try."""
    begin = time.monotonic()
    code, failed = _tested(tests, file, (SOURCE / file).read_text(encoding="utf-8"), seconds=CALM_SECONDS)
    if code != 0:
        sys.exit(f"{tests}: exit code {code} with all guards in place {failed}")
    return time.monotonic() - begin


def _tested(tests: str, file: str, text: str, *, seconds: float) -> tuple[int | None, str]:
    """What pytest ends with on a copy of the sources in which a file has this text, None if it doesn't in time; and the
    test that failed, if one did.
    """
    with tempfile.TemporaryDirectory() as name:
        place, said = Path(name), Path(name) / "said"
        shutil.copytree(SOURCE, place / SOURCE.name)
        (place / SOURCE.name / file).write_text(text, encoding="utf-8")
        own = {"PYTHONPATH": name, "TMPDIR": name, "HYPOTHESIS_STORAGE_DIRECTORY": f"{name}/examples"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", tests]
        with (
            said.open("wb") as out,
            subprocess.Popen(
                command, cwd=ROOT, env=os.environ | own, stdout=out, stderr=out, start_new_session=True
            ) as pytest,
        ):
            try:
                code = pytest.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pytest.pid, signal.SIGKILL)  # with all that a broken test left running
        failed = re.search(r"^(?:FAILED|ERROR) ([^\s[]+)", said.read_text(errors="replace"), re.MULTILINE)
        return code, failed[1] if failed else ""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"stopped; what was found is in {REMOVED}"))
    main(sys.argv[1:] or sys.exit(__doc__))
