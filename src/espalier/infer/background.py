"""Asynchronous work for callers that aren't: an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator
from queue import SimpleQueue
from typing import Any, TypeVar, cast

T = TypeVar("T")
_END = object()


class Background:
    """Runs coroutines and asynchronous generators until it is closed."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="espalier-background", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine returns."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def iterate(self, stream: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """What a stream yields. It goes on while the caller is busy; closing the iterator waits until it has ended."""
        found: SimpleQueue[object] = SimpleQueue()

        async def drain() -> None:
            try:
                async with contextlib.aclosing(stream):
                    async for item in stream:
                        found.put(item)
            finally:
                found.put(_END)

        future, item = asyncio.run_coroutine_threadsafe(drain(), self._loop), None
        try:
            while (item := found.get()) is not _END:
                yield cast(T, item)
            future.result()
        finally:
            future.cancel()
            while item is not _END:
                item = found.get()

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def close(self, last: Coroutine[Any, Any, object]) -> None:
        """End what still runs, do what comes last, and end the thread."""
        self.run(_end_all())
        self.run(last)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _end_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
