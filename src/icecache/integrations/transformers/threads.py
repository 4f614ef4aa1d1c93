"""The threads of a cache, made when they are first needed."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from threading import BoundedSemaphore
from typing import Any

from icecache.ops.threads import SoloThreads

__all__ = ["Threads", "most_unfinished"]

_MOST_WORKERS = 4


class Threads:
    """A thread pool that a copy of its owner does not share."""

    def __init__(self) -> None:
        self._executor: SoloThreads | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_executor": None}

    def executor(self) -> SoloThreads:
        """Return the pool; half of the cores are the model's."""
        if self._executor is None:
            self._executor = _BoundedExecutor(_num_workers())
        return self._executor

    def close(self) -> None:
        """End the threads once their work is done."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None


class _BoundedExecutor(SoloThreads):
    """A pool whose `submit` waits while a task more than there are workers is unfinished.

    Each unfinished build holds its layer's prompt; a model that is faster than its builders
    must not collect them all.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(workers, "icecache")
        self._room = BoundedSemaphore(most_unfinished())

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._room.acquire()
        try:
            future = super().submit(task, *args, **kwargs)
        except BaseException:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return future


def most_unfinished() -> int:
    """Return how many builds of a cache can be under way or waiting at once."""
    return _num_workers() + 1


def _num_workers() -> int:
    # what this process may use, which containers restrict
    can_ask = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1
    return max(1, min(_MOST_WORKERS, cores // 2))
