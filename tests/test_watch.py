"""The watch: whichever rank dies, stops, hangs or fails, every rank ends in time and names it; healthy ones don't."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import datasets  # noqa: F401  imported once, here, for every fork
import pytest
import torch
from tests.ranks import Fate, fates
from torch import distributed

from espalier import errors, pipeline, records, watch
from espalier.errors import DataError, RankError
from espalier.run import STATE, status, why
from espalier.train import loop
from espalier.world import World

DEADLINE = 2.0
OF_A_RUN = 6.0  # a busy machine may keep a process waiting for some seconds while it imports
LATEST = DEADLINE + 2.0
LAST = 6


def fail() -> None:
    raise DataError("rows.jsonl:7", found="nothing", expected="a text", mend="Leave it out.")


def divide_by_zero() -> float:
    return 1 / 0


FAULTS = {
    "killed": (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        -signal.SIGKILL,
        RankError.exit_code,
        "ended without a word",
    ),
    "stopped": (lambda: os.kill(os.getpid(), signal.SIGSTOP), -signal.SIGKILL, RankError.exit_code, "silence for 2 s"),
    "hung": (lambda: time.sleep(60), RankError.exit_code, RankError.exit_code, "no progress for 2 s"),
    "gone": (lambda: os._exit(0), 0, RankError.exit_code, "ended without a word"),
    "refusing": (fail, DataError.exit_code, DataError.exit_code, "rows.jsonl:7"),
    "broken": (divide_by_zero, 1, 1, "ZeroDivisionError"),
}


def steps_until(fault, culprit: int, folder):
    """Steps in which every rank waits for every other, up to the last one's forward pass, in which one is at fault."""

    def work(world: World) -> None:
        for step in range(1, LAST + 1):
            watch.at(step, "reading data")
            watch.at(step, "forward and backward")
            if step == LAST and world.rank == culprit:
                (folder / "culprit").write_text(f"{os.getpid()} {time.monotonic()}")
                fault()
            world.gathered(step)

    return work


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
def test_every_rank_ends_in_time_and_names_the_one_at_fault(name, culprit, size, tmp_path):
    fault, own_code, code, told = FAULTS[name]
    ended = fates(size, steps_until(fault, culprit, tmp_path), tmp_path, deadline=DEADLINE)
    pid, began = (tmp_path / "culprit").read_text().split()
    assert max(fate.time for fate in ended) - float(began) <= LATEST
    for rank, fate in enumerate(ended):
        assert fate.code == (own_code if rank == culprit else code), fate.said
        if rank == culprit and name != "hung":
            continue
        assert told in fate.said
        if code == RankError.exit_code:
            assert f"rank {culprit} (pid {pid} on " in fate.said
            assert f"at step {LAST} (forward and backward, in " in fate.said
        elif culprit:
            assert f"rank {culprit}: " in fate.said


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_are_all_paused_for_a_while_go_on(first, tmp_path):
    """As a scheduler does it, for longer than the deadline; one of them wakes a moment before the other."""

    def work(world: World) -> None:
        pids = world.gathered(os.getpid())
        wakes, later = pids[first], pids[1 - first]
        pause = f"sleep 0.5; kill -STOP {wakes} {later}; sleep 4; kill -CONT {wakes}; sleep 0.4; kill -CONT {later}"
        begin, step = time.monotonic(), 0
        if world.leads:
            subprocess.Popen(["sh", "-c", pause])
        while world.told(time.monotonic() - begin < 4.5 + DEADLINE):
            step += 1
            watch.at(step, "forward and backward")
            time.sleep(0.01)

    assert [(fate.code, fate.said) for fate in fates(2, work, tmp_path, deadline=DEADLINE)] == [(0, "")] * 2


def test_a_pause_is_no_part_of_a_silence_or_of_what_lasts():
    leader = watch._Leader(watch._listening(1), "secret", 2, deadline=DEADLINE, patience=60)
    seen = leader.seen[0]
    then, leader._turn = leader._turn, leader._turn - 100.0
    seen.heard, seen.moved, leader._first_sign = then - 101.0, then - 102.0, then - 100.5
    now = leader._begin_turn([seen])
    since = [now - seen.heard, now - seen.moved, now - leader._first_sign]
    leader._thread.start()
    leader.end()
    assert since == pytest.approx([1.0, 2.0, 0.5])


def test_stopped_ranks_of_several_machines_are_killed_each_on_its_own(tmp_path, monkeypatch):
    """Two machines, of two ranks each, one of which stops; on one of them a little later."""

    real = os.kill

    def work(world: World) -> None:
        pids = world.gathered(os.getpid())

        def kill(pid, number):
            (tmp_path / f"{world.rank} kills {pids.index(pid)}").touch()
            real(pid, number)

        os.kill = kill
        if world.rank in (1, 2):
            time.sleep(0.6 * (world.rank - 1))
            real(os.getpid(), signal.SIGSTOP)
        world.gathered(1)

    monkeypatch.setattr(socket, "gethostname", lambda: f"machine-{int(os.environ['RANK']) % 2}")
    begin = time.monotonic()
    ended = fates(4, work, tmp_path, deadline=DEADLINE)
    assert [fate.code for fate in ended] == [RankError.exit_code, -signal.SIGKILL, -signal.SIGKILL, RankError.exit_code]
    assert max(fate.time for fate in ended) - begin < 2 * LATEST
    assert sorted(path.name for path in tmp_path.glob("* kills *")) == ["0 kills 2", "3 kills 1"]
    for fate in (ended[0], ended[3]):
        assert re.search(r"rank 1 \(pid \d+ on machine-1\)", fate.said)
        assert re.search(r"rank 2 \(pid \d+ on machine-0\)", fate.said)


def test_a_rank_that_has_done_well_ends_as_the_others_do_that_have_not(tmp_path):
    def work(world: World) -> None:
        world.gathered(0)
        if world.leads:
            fail()
        watch._current._judged.wait(10)

    assert [fate.code for fate in fates(2, work, tmp_path, deadline=DEADLINE)] == [DataError.exit_code] * 2


@pytest.mark.parametrize("culprit", [0, 1])
def test_who_keeps_torch_waiting_too_long_is_named_by_those_who_gave_up(culprit, tmp_path):
    work = steps_until(lambda: time.sleep(60), culprit, tmp_path)
    ended = fates(3 - culprit, work, tmp_path, deadline=10, seconds=1.5)
    pid, _ = (tmp_path / "culprit").read_text().split()
    for fate in ended:
        assert fate.code == RankError.exit_code, fate.said
        assert f"rank {culprit} (pid {pid} on " in fate.said and "no progress at step 6 (forward" in fate.said


NCCL = "NCCL error in: /src/ProcessGroupNCCL.cpp:3690, "
OWN = {
    "nccl memory": lambda: distributed.DistBackendError(
        f"{NCCL}unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    "nccl launch": lambda: distributed.DistBackendError(
        f"{NCCL}unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
        "Cuda failure 702 'the launch timed out and was terminated'"
    ),
    "nccl watchdog": lambda: distributed.DistBackendError(
        "[Rank 0] Process group watchdog thread terminated with exception: CUDA error: the launch timed out and was "
        "terminated"
    ),
    "nccl usage": lambda: distributed.DistBackendError(
        f"{NCCL}invalid usage, NCCL version 2.27.3\nncclInvalidUsage: This usually reflects invalid usage of NCCL "
        "library.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
    ),
    "nccl malloc": lambda: distributed.DistBackendError(
        f"{NCCL}unhandled system error, NCCL version 2.27.3\nncclSystemError: System call (e.g. socket, malloc) or "
        "external library call failed or device error. It can be also caused by unexpected exit of a remote peer.\n"
        "Last error:\nError while creating shared memory segment /dev/shm/nccl-x: No space left on device"
    ),
    "gloo sizes": lambda: RuntimeError(
        "[enforce fail at /src/third_party/gloo/gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 8 vs 4"
    ),
    "gloo arguments": lambda: RuntimeError("ProcessGroupGloo::allgather: invalid tensor size at index 0"),
    "cpu memory": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. can't allocate memory"),
    "gpu memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "no tensor": lambda: ValueError("gloo"),
}
LOST = {
    "nccl peer": lambda: distributed.DistBackendError(
        f"{NCCL}remote process exited or there was a network error, NCCL version 2.27.3\nncclRemoteError: A call "
        "failed possibly due to a network error or a remote process exiting prematurely.\nLast error:\n"
        "socketProgress: Connection closed by remote peer host-b<40000>"
    ),
    "nccl socket": lambda: distributed.DistBackendError(
        f"{NCCL}unhandled system error\nncclSystemError: System call (e.g. socket, malloc) or external library call "
        "failed or device error.\nLast error:\nCall to recv from 10.0.0.2<40000> failed : Connection reset by peer"
    ),
    "nccl watchdog": lambda: distributed.DistBackendError(
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600003 "
        "milliseconds before timing out."
    ),
    "gloo peer": lambda: RuntimeError("[/src/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:9."),
    "gloo late": lambda: RuntimeError("[/src/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms"),
    "gloo meeting": lambda: RuntimeError("Gloo connectFullMesh failed with [/src/gloo/gloo/transport/tcp/pair.cc:9] x"),
    "store": lambda: distributed.DistStoreError("wait timeout after 300000ms"),
    "network": lambda: distributed.DistNetworkError("failed to recv, got 0 bytes"),
}


def test_an_error_of_a_rank_s_own_is_told_from_one_of_another_s():
    assert [name for name, error in OWN.items() if watch._is_lost_contact(error())] == []
    assert [name for name, error in LOST.items() if not watch._is_lost_contact(error())] == []


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("name", ["nccl memory", "gpu memory"])
def test_an_error_of_its_own_in_a_collective_is_blamed_on_nobody_else(name, culprit, late, tmp_path):
    """Whether the others wait for it in the collective or, slower, are still on their way to it."""

    def work(world: World) -> None:
        for step in range(1, LAST + 1):
            watch.at(step, "forward and backward")
            if step == LAST and world.rank == culprit:
                raise OWN[name]()
            if step == LAST and late:
                time.sleep(1.0)
            world.gathered(step)

    ended = fates(3, work, tmp_path, deadline=DEADLINE)
    for rank, fate in enumerate(ended):
        assert fate.code == 1 and "out of memory" in fate.said and "no progress" not in fate.said
        assert rank == culprit or not culprit or f"rank {culprit}: " in fate.said


@pytest.mark.parametrize("culprit", [0, 1])
def test_who_alone_cannot_reach_the_others_is_named_and_not_they(culprit, tmp_path):
    """Everybody lives and nobody is behind: a connection of one rank was lost, whose others wait for it."""

    def work(world: World) -> None:
        for step in range(1, LAST + 1):
            watch.at(step, "forward and backward")
            if step == LAST and world.rank == culprit:
                raise LOST["gloo peer"]()
            world.gathered(step)

    begin = time.monotonic()
    ended = fates(3, work, tmp_path, deadline=DEADLINE)
    assert max(fate.time for fate in ended) - begin < LATEST + 2.0
    for fate in ended:
        assert fate.code == RankError.exit_code, fate.said
        assert f"rank {culprit} (pid " in fate.said and "an error of this rank alone at step 6" in fate.said
        assert "Connection closed by peer" in fate.said


def test_of_several_errors_the_first_is_everybody_s(tmp_path):
    """The others' are of what the first one left behind, in words that nobody knows."""

    def work(world: World) -> None:
        world.gathered(0)
        if world.rank == 2:
            fail()
        time.sleep(0.1 + 0.2 * world.rank)
        raise RuntimeError("something of a kind not seen before")

    ended = fates(4, work, tmp_path, deadline=DEADLINE)
    assert "rank 2: rows.jsonl:7" in ended[3].said + ended[1].said


def test_healthy_ranks_are_left_alone_and_leave_nothing_behind(ranks):
    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    def work(world: World) -> list[list[int]]:
        """Twenty worlds one after the other, in which one rank is slower, but within what its phases may last."""
        time.sleep(0.2)  # the watch of this world itself has met
        before = held()
        for _ in range(20):
            with watch.over(world, deadline=0.4, patience=60):
                for step in range(3):
                    watch.at(step, "forward and backward")
                    time.sleep(0.02 * world.rank)
                    world.gathered(step)
        with watch.over(world, deadline=0.4, patience=60):
            watch.at(1, "forward and backward")
            watch.at(1, "compiling")  # never seen before: longer than the deadline
            time.sleep(1.6 * world.rank)
            world.gathered(1)
        return world.gathered([now - then for now, then in zip(held(), before, strict=True)])

    assert ranks(2, work) == [[[0, 0], [0, 0]]] * 2


def test_a_phase_may_last_many_times_what_it_lasted_before(ranks):
    def work(world: World) -> int:
        with watch.over(world, deadline=0.2, patience=60):
            for seconds in (0.1, 1.0):  # five times the deadline, ten times the first
                watch.at(1, "saving")
                world.led(lambda seconds=seconds: time.sleep(seconds))
        return 0

    assert ranks(2, work) == [0, 0]


def test_the_growth_of_a_model_makes_every_phase_a_new_one(ranks):
    def work(world: World) -> int:
        with watch.over(world, deadline=0.2, patience=60):
            for _ in range(3):
                watch.at(1, "forward and backward")
                watch.at(1, "optimizer")
            watch.anew()
            watch.at(2, "forward and backward")
            world.led(lambda: time.sleep(1.0))
        return 0

    assert ranks(2, work) == [0, 0]


def test_what_is_done_beside_the_steps_may_last_longer_than_ever_before(ranks):
    def work(world: World) -> int:
        with watch.over(world, deadline=0.2, patience=60):
            for seconds in (0.0, 1.0):
                watch.beside(1, "saving")
                world.led(lambda seconds=seconds: time.sleep(seconds))
        return 0

    assert ranks(2, work) == [0, 0]


def reads_for(seconds: float):
    """Steps that read at once, but for the last, in which rank 1's disk says nothing for so long."""

    def work(world: World) -> int:
        for step in range(1, LAST + 1):
            watch.at(step, "reading data", least=watch.DISK)
            if step == LAST and world.rank == 1:
                time.sleep(seconds)
            watch.at(step, "forward and backward")
            world.gathered(step)
        return 0

    return work


def test_a_disk_may_be_silent_for_longer_than_a_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "DISK", 30.0)
    assert [fate.code for fate in fates(2, reads_for(2.0), tmp_path, deadline=0.5)] == [0, 0]


def test_who_never_ends_reading_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "DISK", 1.5)
    begin = time.monotonic()
    for fate in fates(2, reads_for(60.0), tmp_path, deadline=0.5):
        assert fate.code == RankError.exit_code and fate.time - begin < 1.5 + LATEST
        assert "rank 1 (pid " in fate.said and "at step 6 (reading data, " in fate.said
        assert "an end of reading data within 2 s" in fate.said


@pytest.mark.parametrize("beside", [False, True])
def test_what_is_new_or_beside_the_steps_has_a_deadline_too(beside, tmp_path, monkeypatch):
    """Long before torch itself would give up, and every rank ends two seconds after it at the latest."""
    monkeypatch.setattr(watch, "FIRST", 1.5)

    def work(world: World) -> None:
        world.gathered(0)
        (watch.beside if beside else watch.at)(0, "growing")
        if world.rank:
            (tmp_path / "began").write_text(str(time.monotonic()))
            time.sleep(60)
        world.gathered(1)

    ended = fates(2, work, tmp_path, deadline=0.5)
    assert max(fate.time for fate in ended) - float((tmp_path / "began").read_text()) <= 1.5 + 2.0
    for fate in ended:
        assert fate.code == RankError.exit_code and "rank 1 (pid " in fate.said
        assert "an end of growing within 2 s" in fate.said


def test_many_bytes_have_more_time(ranks, monkeypatch):
    monkeypatch.setattr(watch, "FIRST", 0.1)

    def work(world: World) -> int:
        with watch.over(world, deadline=0.2, patience=60):
            watch.beside(1, "saving", more=watch.moving(2 * watch.SLOW_DISK))
            world.led(lambda: time.sleep(1.0))
        return 0

    assert ranks(2, work) == [0, 0]


def test_strangers_are_not_listened_to_and_none_stays(ranks):
    def work(world: World) -> int:
        leader = watch._Leader(watch._listening(1), "secret", 2, deadline=20, patience=60)
        place = leader._server.getsockname()
        leader._thread.start()
        before = len(list(Path("/proc/self/fd").iterdir()))
        socket.create_connection(place).close()
        guess = b'{"key": "guessed", "rank": 1}\n{"ends": {}}\n'
        for said in (guess, b"GET / HTTP/1.0\r\n\r\n", b"[]\n" * 9, b" " * 2**22):
            with socket.create_connection(place, timeout=5) as stranger, contextlib.suppress(ConnectionError):
                stranger.sendall(said)
                assert stranger.recv(1) == b""
        with socket.create_connection(place, timeout=5) as rank:
            me = {"rank": 1, "pid": 1, "host": "elsewhere", "post": leader._post()}
            rank.sendall(json.dumps({"key": "secret", **me}).encode() + b"\n")
            assert rank.recv(1)
            time.sleep(1.0)  # a verdict would have fallen
            assert set(leader.seen) == {0, 1}
            both_ends_less_server = 2 - 1
            assert len(list(Path("/proc/self/fd").iterdir())) == before + both_ends_less_server
            with pytest.raises(ConnectionError):
                socket.create_connection(place, timeout=5)
            rank.sendall(b'{"ends": null}\n')
        leader.end()
        assert leader._verdict is None
        return 0

    assert ranks(1, work) == [0]


@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_a_message_may_come_in_any_pieces(size):
    said = [{"post": "x" * length} for length in (0, 1, 50, 3000)] + [{}]
    data = b"".join(json.dumps(message).encode() + b"\n" for message in said)
    here, there = socket.socketpair()
    with here, there:
        line, heard = watch._Line(there), []
        for start in range(0, len(data), size):
            here.sendall(data[start : start + size])
            heard += line.read()
    assert heard == said


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_phase_of_a_run_has_a_deadline(run, tmp_path, monkeypatch):
    """That of bytes, of an hour at most here; but of preparing data nobody knows how long it takes."""
    real = watch._Watch._enter

    def enter(self, step, phase, limit):
        with (tmp_path / "phases").open("a") as file:
            file.write(f"{phase}\t{limit}\n")
        real(self, step, phase, limit)

    monkeypatch.setattr(watch._Watch, "_enter", enter)
    assert [fate.code for fate in run(None, "train.keep=stages")] == [0, 0]
    limits: dict[str, set[float]] = {}
    for line in (tmp_path / "phases").read_text().splitlines():
        phase, limit = line.split("\t")
        limits.setdefault(phase, set()).add(float(limit))
    patient = {phase for phase, of_phase in limits.items() if max(of_phase) > 2 * watch.FIRST}
    assert patient == {"preparing data"}
    assert min(limits["reading data"]) == watch.DISK and min(limits["forward and backward"]) == OF_A_RUN
    assert set(limits) > {"planning", "taking up the run", "growing", "saving", "writing samples", "exporting"}


def test_a_process_by_itself_is_watched_by_nobody():
    before = threading.active_count()
    with World().joined(seconds=1):
        watch.at(1, "forward and backward")
        watch.anew()
        assert threading.active_count() == before


@pytest.fixture
def run(recipe_file, shared_home, tmp_path, monkeypatch):
    """How two ranks end that carry out the tiny recipe, of which one gets a signal, or does something, at some step."""
    monkeypatch.setenv("ESPALIER_HOME", str(shared_home))

    def run(fault, *overrides: str, culprit: int = 1, tell: Path = Path(os.devnull)) -> list[Fate]:
        def work(world: World) -> int:
            real = loop.update

            def update(state, *more):
                if fault and world.rank == culprit and state.progress.step == 20:
                    fault() if callable(fault) else os.kill(os.getpid(), fault)
                return real(state, *more)

            loop.update = update
            with tell.open("a") as file:
                told = partial(print, file=file, flush=True) if world.leads else lambda line: None
                return pipeline.main(recipe_file, [*overrides], runs=tmp_path / "runs", dry_run=False, tell=told)

        return fates(2, work, tmp_path, deadline=OF_A_RUN)

    return run


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_signal_to_one_rank_makes_all_save_and_end(run, tmp_path):
    assert [fate.code for fate in run(signal.SIGTERM)] == [errors.EXIT_TERMINATED] * 2
    assert (tmp_path / "runs/tiny/checkpoint-21").is_dir()
    assert [fate.code for fate in run(None)] == [0, 0]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_goes_on_after_one_of_its_ranks_was_killed(run, tmp_path):
    killed = run(signal.SIGKILL)
    assert [fate.code for fate in killed] == [RankError.exit_code, -signal.SIGKILL]
    assert "ended without a word, missed at step 21 (forward and backward" in killed[0].said
    folder = tmp_path / "runs/tiny"
    assert "rank 1 (pid " in (folder / "log.txt").read_text()
    assert why(folder).startswith("failed: rank 1 (pid ")
    assert [fate.code for fate in run(None, tell=tmp_path / "told")] == [0, 0]
    assert (folder / "final/config.json").exists()
    assert (tmp_path / "told").read_text().startswith("The run before failed: rank 1 (pid ")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_leader_records_how_it_was_ended_while_its_work_was_stuck(run, tmp_path):
    """Nothing but the watch's thread can say so."""

    def hang() -> None:
        watch._current._enter(21, "optimizer", DEADLINE)
        time.sleep(60)

    assert [fate.code for fate in run(hang, culprit=0)] == [RankError.exit_code] * 2
    folder = tmp_path / "runs/tiny"
    state = records.read(folder / STATE, {})
    assert state["status"] == status(folder) == "failed"
    assert state["error"]["kind"] == "RankError" and state["error"]["where"].startswith("rank 0 (pid ")
    assert "no progress for 2 s" in why(folder)
    log = (folder / "log.txt").read_text()
    assert "The work of rank 0 was stuck at" in log and "in hang" in log
    assert [fate.code for fate in run(None)] == [0, 0]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_leader_that_is_gone_is_missed_by_the_next_start(run, tmp_path):
    ended = run(signal.SIGKILL, culprit=0)
    assert [fate.code for fate in ended] == [-signal.SIGKILL, RankError.exit_code]
    folder = tmp_path / "runs/tiny"
    assert status(folder) == "unfinished" and " is gone" in why(folder)
    assert [fate.code for fate in run(None, tell=tmp_path / "told")] == [0, 0]
    first = (tmp_path / "told").read_text().splitlines()[0]
    assert re.fullmatch(r"The run before ended without a word: process \d+ on \S+ is gone\.", first)
    assert status(folder) == "finished" and why(folder) == ""


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_traceback_of_any_rank_is_kept_in_the_log(run, tmp_path):
    ended = run(divide_by_zero)
    assert [fate.code for fate in ended] == [1, 1]
    log = (tmp_path / "runs/tiny/log.txt").read_text()
    own = log[log.index("ERROR rank 1: division by zero") :]
    assert "in divide_by_zero" in own and log.count("in divide_by_zero") == 1
    assert "RuntimeError: rank 1: ZeroDivisionError" in log
