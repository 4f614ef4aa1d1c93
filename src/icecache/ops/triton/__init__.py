"""The ops of a device's decode step as Triton kernels; `icecache.ops.device.twin` is their truth.

Same names, arguments and results. Nothing synchronises with the host, launches and shapes depend on
no data, and sums are in a fixed order or of integers, so that a step can be captured in a CUDA
graph and gives the same bits each time. Importing this imports triton.
"""

from icecache.ops.triton.attend import attend_fixed, attend_pages
from icecache.ops.triton.combine import combine
from icecache.ops.triton.gather import gather
from icecache.ops.triton.insert import insert
from icecache.ops.triton.push import push
from icecache.ops.triton.resolve import resolve
from icecache.ops.triton.rest import attend_rest
from icecache.ops.triton.score import score
from icecache.ops.triton.select_leaves import select_leaves
from icecache.ops.triton.select_pages import select_pages
from icecache.ops.triton.vote import vote

__all__ = [
    "attend_fixed",
    "attend_pages",
    "attend_rest",
    "combine",
    "gather",
    "insert",
    "push",
    "resolve",
    "score",
    "select_leaves",
    "select_pages",
    "vote",
]
