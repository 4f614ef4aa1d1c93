"""Time on a device without the host in it: calls recorded in one CUDA graph and replayed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

REPLAYS = 7


def time_calls(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Seconds a call takes, the best of some replays; off a GPU, run one after the other.

    The calls must not synchronise, and be the same work on different data, so that no cache holds
    what they read.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)
    for call in calls:
        call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(REPLAYS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return best / len(calls)
