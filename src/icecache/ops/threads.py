"""Threads that work beside the model, each by itself.

libgomp counts the threads of all teams in a process. Where they are more than the cores, every
team's members sleep as soon as their part is done, and waking them costs more than a small matrix
product: one thread that once shared a torch op with others makes each op of the model's own thread
slower for as long as it lives. So what works beside the model makes no team.
"""

from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock, Thread
from typing import ClassVar

import torch

__all__ = ["SoloThreads", "work_alone"]


class SoloThreads(ThreadPoolExecutor):
    """A pool whose threads share no torch op among several cores.

    Parameters
    ----------
    workers : int
    name : str
        What the threads' names begin with.
    """

    _lock: ClassVar[Lock] = Lock()

    def __init__(self, workers: int, name: str) -> None:
        super().__init__(workers, thread_name_prefix=name, initializer=self._start)

    @classmethod
    def _start(cls) -> None:
        with cls._lock:
            work_alone()


def work_alone() -> None:
    """Let the calling thread run torch's ops by itself from here on, and other threads as before.

    A thread that asks torch for the first time within these microseconds works alone too.
    """
    # a new thread's number is the one that torch was told last
    threads, is_told = torch.get_num_threads(), Event()

    def take_back() -> None:
        is_told.wait()
        torch.set_num_threads(threads)

    # what is set below holds for all threads to come, until one that ends at once takes it back
    other = Thread(target=take_back, daemon=True)
    other.start()
    try:
        torch.set_num_threads(1)
    finally:
        is_told.set()
        other.join()
