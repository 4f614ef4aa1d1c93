"""Compile every kernel for a GPU that need not be there; prints each one's name and shared bytes.

Run in a process of its own: `python compile_kernels.py DTYPE HEAD_DIM GROUP PAGE_SIZE INT8`.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from icecache.ops import triton as kernels
from icecache.ops.device.testing import CaseShape, empty_case


class CompileOnly:
    """A driver that knows its target and nothing else."""

    def get_current_target(self) -> GPUTarget:
        """Return a Hopper GPU."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return the first device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0


def compile_all(shape: CaseShape) -> dict[str, int]:
    """Return the shared memory of every kernel that a step launches, bytes."""
    shared: dict[str, int] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        shared[self.fn.__name__] = compiled.metadata.shared

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(CompileOnly())
    query, fixed, tree, pages = empty_case(shape)
    leaving = kernels.push(fixed, fixed.keys[:, 0], fixed.values[:, 0])
    near = kernels.attend_fixed(query, fixed, leaving, 0.1, 30.0)
    scores = kernels.score(query, tree, leaving, 0.1, 30.0, 0.0)
    votes = kernels.vote(scores, near, tree)
    kernels.select_pages(votes, tree, 200, shape.slots)
    selected = kernels.select_leaves(votes, tree, 200, shape.slots)
    slots, missing = kernels.resolve(selected.pages, pages, torch.zeros(1, dtype=torch.int64))
    kernels.gather(pages, slots, missing)
    exact = kernels.attend_pages(query, pages, selected, slots, 0.1, 30.0)
    rest = kernels.attend_rest(scores, tree, selected)
    kernels.combine([near, exact, rest], query[..., 0].float())
    kernels.insert(tree, pages, leaving, scores, shape.leaf_size)
    return shared


def main() -> None:
    """Compile the shape of the arguments."""
    dtype, head_dim, group, page_size, int8 = sys.argv[1:]
    shape = CaseShape(
        head_dim=int(head_dim),
        group=int(group),
        dtype=getattr(torch, dtype),
        page_size=int(page_size),
        leaf_size=int(page_size) // 2,
        int8_pages=int8 == "int8",
        window=130,
        leaves=2050,
        pages=1030,
        slots=40,
    )
    for name, size in compile_all(shape).items():
        sys.stdout.write(f"{name} {size}\n")


if __name__ == "__main__":
    main()
