"""A world of ranks: what one knows all know, and a failure of one is everybody's."""

import pytest
import torch

from espalier.errors import DataError, ResourceError, UserError
from espalier.world import World


def refusal(rank: int):
    raise (DataError if rank == 1 else ResourceError)("here", found=str(rank), expected="nothing", mend="Nothing.")


def outcome(work) -> list[str]:
    try:
        return ["", str(work())]
    except UserError as error:
        return [type(error).__name__, str(error)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_ranks_know_what_each_says(size, ranks):
    def work(world: World) -> list:
        return [
            world.gathered({"é": [world.rank] * world.rank}),
            world.told(world.rank + 7),
            world.largest(world.rank, -world.rank),
            world.numbers(world.rank / 3, 2**53),
        ]

    answers = ranks(size, work)
    expected = [
        [{"é": [rank] * rank} for rank in range(size)],
        7,
        [size - 1, 0],
        [[rank / 3, 2**53] for rank in range(size)],
    ]
    assert answers == [expected] * size


def test_a_failure_of_one_rank_is_raised_by_all(ranks):
    def work(world: World) -> list:
        alone = outcome(lambda: world.together(lambda: refusal(1) if world.rank == 1 else world.rank))
        led = outcome(lambda: world.led(lambda: refusal(0)))
        well = outcome(lambda: world.together(lambda: world.rank))
        return [alone, led, well]

    for rank, (alone, led, well) in enumerate(ranks(3, work)):
        assert alone == ["DataError", "rank 1: here: found 1; expected nothing. Nothing."]
        assert led == ["ResourceError", "here: found 0; expected nothing. Nothing."]
        assert well == ["", str(rank)]


def test_a_bug_of_one_rank_is_raised_there_as_it_is_and_told_to_the_others(ranks):
    def work(world: World) -> list[str]:
        try:
            world.together(lambda: {}["mine"] if world.rank == 1 else world.rank)
        except Exception as error:
            return [type(error).__name__, str(error)]
        return []

    assert ranks(2, work) == [["RuntimeError", "rank 1: KeyError: 'mine'"], ["KeyError", "'mine'"]]


def test_more_processes_than_gpus_are_refused_before_they_join(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ResourceError) as refused, World(0, 3, 0, 3).joined(seconds=1):
        pytest.fail("joined")
    assert (refused.value.where, refused.value.found) == ("processes", "3 of them for 2 GPUs")
    assert refused.value.mend == "Start 2 processes on this machine."


def test_what_leaves_files_is_done_by_the_leader_first(ranks, tmp_path):
    def work(world: World) -> str:
        def write() -> str:
            place = tmp_path / "made"
            if not place.exists():
                place.write_text(str(world.rank))
            return place.read_text()

        return world.in_turn(write)

    assert ranks(3, work) == ["0"] * 3


def test_a_process_by_itself_is_a_world(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.here()
    assert world == World() and world.leads and world.machines == 1
    assert world.in_turn(lambda: "done") == "done" and world.gathered(3) == [3]
