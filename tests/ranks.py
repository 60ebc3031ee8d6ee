"""Ranks for tests: processes forked from this one that form a world, each under torchrun's variables."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.errors import UserError
from espalier.world import World

SECONDS = 60.0


def run_ranks(size: int, work: Callable[[World], Any], folder: Path, *, seconds: float = SECONDS) -> list[Any]:
    """What `work` returns (JSON) on each of `size` ranks that are connected; an error on any is an `AssertionError`."""
    port = _free_port()
    running = [_fork(rank, size, port, work, folder, seconds) for rank in range(size)]
    end = time.monotonic() + seconds + 30
    while running := [pid for pid in running if os.waitpid(pid, os.WNOHANG)[0] == 0]:
        if time.monotonic() > end:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    files = [folder / f"rank{rank}-{port}.json" for rank in range(size)]
    results = [json.loads(file.read_text()) if file.exists() else {"error": "killed"} for file in files]
    failed = [f"rank {rank}: {result['error']}" for rank, result in enumerate(results) if "error" in result]
    assert not failed, "\n".join(failed)
    return [result["value"] for result in results]


@dataclass(frozen=True)
class Fate:
    """How a rank ended: its exit code (negative: the signal that killed it), when, and what it said on stderr."""

    code: int
    time: float
    said: str


def fates(
    size: int, work: Callable[[World], Any], folder: Path, *, deadline: float, seconds: float = SECONDS
) -> list[Fate]:
    """How `size` connected ranks end that do `work` as a command does.

    The exit code is what `work` returns, or that of a refusal, which is said.
    """
    port, files = _free_port(), [folder / f"rank{rank}.err" for rank in range(size)]
    running = {_command(rank, size, port, work, files[rank], deadline, seconds): rank for rank in range(size)}
    ended: dict[int, tuple[int, float]] = {}
    end = time.monotonic() + deadline + 30
    while running:
        for pid, rank in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
                del running[pid]
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [Fate(*ended[rank], files[rank].read_text()) for rank in range(size)]


def _command(
    rank: int, size: int, port: int, work: Callable[[World], Any], said: Path, deadline: float, seconds: float
) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        _be(rank, size, port)
        world = World.here()
        with world.joined(seconds=seconds, deadline=deadline):
            code = work(world) or 0
    except UserError as error:
        print(*(text for _, text in error.lines()), sep="\n", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _be(rank: int, size: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _fork(rank: int, size: int, port: int, work: Callable[[World], Any], folder: Path, seconds: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    code = 1
    try:
        _be(rank, size, port)
        world = World.here()
        try:
            with world.joined(seconds=seconds):
                result = {"value": work(world)}
            code = 0
        except BaseException:
            result = {"error": traceback.format_exc()}
        (folder / f"rank{rank}-{port}.json").write_text(json.dumps(result))
    finally:
        os._exit(code)
