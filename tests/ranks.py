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
from pathlib import Path
from typing import Any

from espalier.world import World

SECONDS = 60.0


def run_ranks(size: int, work: Callable[[World], Any], folder: Path, *, seconds: float = SECONDS) -> list[Any]:
    """What `work` returns (JSON) on each of `size` ranks that are connected; an error on any is an `AssertionError`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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


def _fork(rank: int, size: int, port: int, work: Callable[[World], Any], folder: Path, seconds: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    code = 1
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
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
