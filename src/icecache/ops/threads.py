"""Threads that work beside the model, each by itself.

libgomp counts the threads of all teams in a process. Where they are more than the cores, every
team's members sleep as soon as their part is done, and waking them costs more than a small matrix
product: one thread that once shared a torch op with others makes each op of the model's own thread
slower for as long as it lives. So what works beside the model makes no team.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from icecache.errors import BackendUnavailable
from icecache.ops import native

__all__ = ["SoloThreads", "work_alone"]


class SoloThreads(ThreadPoolExecutor):
    """A pool whose threads share no op among several cores.

    Parameters
    ----------
    workers : int
    name : str
        What the threads' names begin with.
    """

    def __init__(self, workers: int, name: str) -> None:
        super().__init__(workers, thread_name_prefix=name, initializer=work_alone)


def work_alone() -> None:
    """Let the calling thread run its ops by itself, without a team of threads.

    Does nothing where the compiled ops are not installed, or torch's threads are not OpenMP's.
    """
    # a thread's first look at torch's setting overwrites what was set before
    torch.get_num_threads()
    try:
        library = native.load()
    except BackendUnavailable:
        return
    library.icecache_work_alone()
