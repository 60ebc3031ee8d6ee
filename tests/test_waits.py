"""Every wait has a deadline: a call that may wait for another thread, process or machine says for how long."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import espalier

ROOT = Path(espalier.__file__).parent
# Calls that wait for ever unless they're given so many arguments, or a time-out by name.
WAITS = {
    "join": 1,
    "wait": 1,
    "wait_for": 2,
    "get": 1,
    "acquire": 2,
    "result": 1,
    "exception": 1,
    "communicate": 2,
    "select": 1,
    "run": None,
    "call": None,
    "check_call": None,
    "check_output": None,
    "urlopen": 3,
    "create_connection": 2,
    "as_completed": 2,
    "init_process_group": None,
    "new_group": 2,
    "barrier": None,
}
OF_SUBPROCESS = ("run", "call", "check_call", "check_output")
# Waits for work that ends by a deadline of its own, and which; (file, call).
BOUNDED = {
    ("infer/background.py", "result"): "every request that the loop runs has deadline_seconds",
    ("infer/background.py", "get"): "the stream ends with its requests",
    ("infer/background.py", "join"): "the loop was told to stop, and all its tasks have ended",
    ("infer/remote.py", "wait"): "every task has deadline_seconds",
    ("infer/remote.py", "result"): "the task is done",
    ("infer/remote.py", "exception"): "the task is done",
    ("model/shards.py", "result"): "writes a piece of a file, or hashes it",
    ("torchrun.py", "wait"): "lasts as long as the run, whose ranks watch each other",
}


def waits(source: str) -> Iterator[tuple[int, str]]:
    """(line, call) of every wait without an end."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "flock" and "LOCK_NB" not in ast.unparse(node) and "LOCK_UN" not in ast.unparse(node):
            yield node.lineno, name
        if name not in WAITS or (name in OF_SUBPROCESS and not ast.unparse(node.func).startswith("subprocess.")):
            continue
        enough, timeout = WAITS[name], named.get("timeout")
        endless = timeout is None or (isinstance(timeout, ast.Constant) and timeout.value is None)
        if endless and (enough is None or len(node.args) < enough or (name == "wait" and _of_asyncio(node))):
            yield node.lineno, name


def _of_asyncio(node: ast.Call) -> bool:
    return ast.unparse(node.func) == "asyncio.wait"


def test_no_wait_is_without_an_end():
    found = [
        f"{path.relative_to(ROOT)}:{line} {call}"
        for path in sorted(ROOT.rglob("*.py"))
        for line, call in waits(path.read_text(encoding="utf-8"))
        if (str(path.relative_to(ROOT)), call) not in BOUNDED
    ]
    assert found == []


def test_what_is_said_to_be_bounded_is_still_there():
    there = {(file, call) for file, _ in BOUNDED for _, call in waits((ROOT / file).read_text(encoding="utf-8"))}
    assert set(BOUNDED) <= there


@pytest.mark.parametrize(
    "endless",
    [
        "thread.join()",
        "event.wait()",
        "process.wait(timeout=None)",
        "queue.get()",
        "lock.acquire()",
        "future.result()",
        "process.communicate()",
        "subprocess.run(['a'], check=True)",
        "subprocess.check_output(['a'])",
        "urlopen(url)",
        "socket.create_connection(place)",
        "selector.select()",
        "distributed.init_process_group('gloo')",
        "distributed.new_group([0, 1])",
        "distributed.barrier()",
        "fcntl.flock(file, fcntl.LOCK_EX)",
        "asyncio.wait(tasks)",
    ],
)
def test_a_planted_wait_is_found(endless):
    assert len(list(waits(endless))) == 1


@pytest.mark.parametrize(
    "bounded",
    [
        "thread.join(1)",
        "', '.join(words)",
        "event.wait(timeout=seconds)",
        "values.get(key)",
        "subprocess.run(['a'], timeout=5)",
        "background.run(work)",
        "selector.select(period)",
        "asyncio.wait(tasks, timeout=3)",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
    ],
)
def test_what_has_an_end_is_let_be(bounded):
    assert list(waits(bounded)) == []
