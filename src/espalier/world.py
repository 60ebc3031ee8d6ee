"""World: the processes that carry out one run together, as torchrun starts them.

A process by itself is a world too, in which nothing is sent. Rank 0 leads: it decides, tells, and writes what there is
one of. Only JSON goes between ranks, and every rank makes the same calls in the same order.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from espalier import errors, watch
from espalier.errors import ResourceError, UserError

T = TypeVar("T")
# The variables in which torchrun tells a process who it is.
RANK, SIZE, LOCAL_RANK, LOCAL_SIZE = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes, and the place among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def here(cls) -> World:
        """The world that torchrun started this process in; a process by itself where it didn't."""
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(_NAMES, (0, 1, 0, 1), strict=True)))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def machines(self) -> int:
        """How many, each with as many ranks."""
        return self.size // self.local_size

    @contextlib.contextmanager
    def joined(self, *, seconds: float, deadline: float = watch.DEADLINE) -> Iterator[None]:
        """Connected with the others while the block lasts; nothing waits longer than `seconds` for another rank.

        One that gives no sign of life for `deadline` seconds, or hangs, ends all: `RankError` names it (`watch`).
        """
        if self.size == 1:
            yield
            return
        import torch
        from torch import distributed

        if distributed.is_initialized():
            yield
            return
        backend = "gloo"
        if torch.cuda.is_available():
            self._require_devices(torch.cuda.device_count())
            torch.cuda.set_device(self.local_rank)
            backend = "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, timeout=timedelta(seconds=seconds))
        try:
            with watch.over(self, deadline=deadline, patience=seconds):
                yield
        finally:
            distributed.destroy_process_group()

    def _require_devices(self, count: int) -> None:
        if self.local_size > count:
            raise ResourceError(
                "processes",
                found=f"{self.local_size} of them for {count} GPUs",
                expected="a GPU for each",
                mend=f"Start {count} processes on this machine.",
            )

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, in their order."""
        if self.size == 1:
            return [value]
        import torch
        from torch import distributed

        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [length for (length,) in self._all(torch.tensor([len(text)]))]
        padded = torch.nn.functional.pad(text, (0, max(lengths) - len(text)))
        texts = [torch.empty_like(padded) for _ in range(self.size)]
        distributed.all_gather(texts, padded)
        return [json.loads(bytes(text[:length].tolist())) for text, length in zip(texts, lengths, strict=True)]

    def told(self, value: Any) -> Any:
        """The leader's value, on every rank."""
        return self.gathered(value if self.leads else None)[0]

    def numbers(self, *numbers: float) -> list[list[float]]:
        """Every rank's few numbers, in float64."""
        if self.size == 1:
            return [list(numbers)]
        import torch

        return self._all(torch.tensor(numbers, dtype=torch.float64))

    def largest(self, *numbers: int) -> list[int]:
        """The largest of all ranks' numbers, one by one."""
        return [int(max(column)) for column in zip(*self.numbers(*numbers), strict=True)]

    def together(self, work: Callable[[], T]) -> T:
        """Every rank's own result of `work`; where one of them fails all raise the first one's refusal."""
        if self.size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        failures = self.gathered(errors.to_json(error) if error else None)
        first = next((rank for rank, failure in enumerate(failures) if failure), None)
        if first is None:
            return result  # type: ignore[return-value]
        if error and not isinstance(error, UserError):
            raise error
        told = errors.from_json(failures[first], rank=first)
        told.told_by_leader = True  # type: ignore[attr-defined]
        raise told

    def led(self, work: Callable[[], T]) -> T | None:
        """What the leader makes of `work`, there; None on the others, which fail if it does."""
        return self.together(lambda: work() if self.leads else None)

    def in_turn(self, work: Callable[[], T]) -> T:
        """Every rank's result of `work` that leaves something on a disk: the leader first, then a rank of each machine,
        then the rest, so that nobody writes what another is writing, on shared disks and others."""
        turn = 0 if self.leads else 1 if self.local_rank == 0 else 2
        result = None
        for now in range(3 if self.size > 1 else 1):
            mine = self.together(work if now == turn else _nothing)
            result = mine if now == turn else result
        return result  # type: ignore[return-value]

    def _all(self, numbers: Any) -> list[list[Any]]:
        """Every rank's few numbers."""
        import torch
        from torch import distributed

        everyone = torch.empty(self.size * len(numbers), dtype=numbers.dtype)
        distributed.all_gather_single(everyone, numbers)
        return everyone.view(self.size, -1).tolist()


SINGLE = World()


def _nothing() -> Any:
    """What a rank does while it is another's turn."""


_NAMES = (RANK, SIZE, LOCAL_RANK, LOCAL_SIZE)
