"""Threads that work beside the model, each by itself.

libgomp counts the threads of all teams in a process. Where they are more than the cores, every
team's members sleep as soon as their part is done, and waking them costs more than a small matrix
product: one thread that once shared a torch op with others makes each op of the model's own thread
slower for as long as it lives. So what works beside the model makes no team.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, Thread
from typing import ClassVar, TypeVar

import torch

__all__ = ["SoloThreads", "in_solo_thread"]

T = TypeVar("T")


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
        super().__init__(workers, thread_name_prefix=name, initializer=self._work_alone)

    @classmethod
    def _work_alone(cls) -> None:
        with cls._lock:
            # a new thread's number is the one that torch was told last
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            # that was also said for all threads to come: a thread that ends at once takes it back
            other = Thread(target=torch.set_num_threads, args=(threads,))
            other.start()
            other.join()


def in_solo_thread(task: Callable[[], T]) -> T:
    """Run a task in a thread of its own, which makes no team and ends with it.

    For work before the model's own thread begins, which would leave a team behind.
    """
    with SoloThreads(1, "icecache-once") as pool:
        return pool.submit(task).result()
