"""The watch: whichever rank dies, stops, hangs or fails, every rank ends in time and names it; healthy ones don't."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import datasets  # noqa: F401  imported once, here, for every fork
import pytest
from tests.ranks import Fate, fates

from espalier import errors, pipeline, watch
from espalier.errors import DataError, RankError
from espalier.train import loop
from espalier.world import World

DEADLINE = 2.0
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


@pytest.mark.parametrize("culprit", [0, 1])
def test_who_keeps_torch_waiting_too_long_is_named_by_those_who_gave_up(culprit, tmp_path):
    work = steps_until(lambda: time.sleep(60), culprit, tmp_path)
    ended = fates(3 - culprit, work, tmp_path, deadline=10, seconds=1.5)
    pid, _ = (tmp_path / "culprit").read_text().split()
    for fate in ended:
        assert fate.code == RankError.exit_code, fate.said
        assert f"rank {culprit} (pid {pid} on " in fate.said and "no progress at step 6 (forward" in fate.said


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


def test_strangers_are_not_listened_to(ranks):
    def work(world: World) -> int:
        with watch.over(world, deadline=5, patience=60):
            if world.leads:
                place = watch._current._server.getsockname()
                for said in (
                    b"",
                    b'{"key": "guessed", "rank": 1}\n{"ends": {}}\n',
                    b"GET / HTTP/1.0\r\n\r\n",
                    b"[]\n" * 9,
                ):
                    with socket.create_connection(place, timeout=5) as stranger:
                        stranger.sendall(said)
                time.sleep(1.0)  # a verdict would have fallen
                assert set(watch._current.seen) == {0, 1}
            world.gathered(0)
        return 0

    assert ranks(2, work) == [0, 0]


def test_a_process_by_itself_is_watched_by_nobody():
    before = threading.active_count()
    with World().joined(seconds=1):
        watch.at(1, "forward and backward")
        watch.anew()
        assert threading.active_count() == before


@pytest.fixture
def run(recipe_file, shared_home, tmp_path, monkeypatch):
    """How two ranks end that carry out the tiny recipe, of which rank 1 gets a signal at some step."""
    monkeypatch.setenv("ESPALIER_HOME", str(shared_home))

    def run(number: int | None) -> list[Fate]:
        def work(world: World) -> int:
            real = loop.update

            def update(state, *more):
                if number and world.rank == 1 and state.progress.step == 20:
                    os.kill(os.getpid(), number)
                return real(state, *more)

            loop.update = update
            return pipeline.main(recipe_file, [], runs=tmp_path / "runs", dry_run=False, tell=lambda line: None)

        return fates(2, work, tmp_path, deadline=DEADLINE)

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
    assert "rank 1 (pid " in (tmp_path / "runs/tiny/log.txt").read_text()
    assert [fate.code for fate in run(None)] == [0, 0]
    assert (tmp_path / "runs/tiny/final/config.json").exists()
