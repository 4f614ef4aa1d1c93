"""The threads of a cache, made when they are first needed."""

import os
from concurrent.futures import ThreadPoolExecutor

__all__ = ["Threads"]

_MOST = 4


class Threads:
    """A thread pool that a copy of its owner does not share."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_executor": None}

    def executor(self) -> ThreadPoolExecutor:
        """Return the pool; half of the machine's cores are the model's."""
        if self._executor is None:
            workers = max(1, min(_MOST, (os.cpu_count() or 1) // 2))
            self._executor = ThreadPoolExecutor(workers, thread_name_prefix="icecache")
        return self._executor

    def close(self) -> None:
        """End the threads once their work is done."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None
