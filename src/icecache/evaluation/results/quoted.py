"""Figures quoted from the paper, to be shown beside ours."""

from typing import NamedTuple

__all__ = ["QUOTED", "QUOTED_FULL", "QUOTED_SOURCE", "Quoted"]

QUOTED_SOURCE = "arXiv 2604.10539, LongBench average, Llama-3.1-8B, not measured here"
QUOTED_FULL = 49.5


class Quoted(NamedTuple):
    """A score of the paper, its full cache at `QUOTED_FULL`."""

    method: str
    budget: int
    score: float


QUOTED = (
    Quoted("icecache-paper", 64, 47.8),
    Quoted("icecache-paper", 128, 48.6),
    Quoted("icecache-paper", 256, 49.0),
    Quoted("topk", 256, 49.8),
    Quoted("pqcache", 256, 47.3),
    Quoted("omnikv", 256, 46.3),
    Quoted("magicpig", 256, 44.6),
    Quoted("arkvale", 256, 42.8),
    Quoted("snapkv", 256, 40.8),
    Quoted("streaming", 256, 33.5),
)
