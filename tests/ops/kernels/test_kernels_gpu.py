"""What only a GPU can show: pinned memory read in place, and a step recorded in one CUDA graph."""

import pytest
import torch
from kernel_cases import SCALING, assert_same, copy_of

from icecache.ops import triton as kernels
from icecache.ops.device.check import check_device_tree
from icecache.ops.device.records import DevicePages
from icecache.ops.device.testing import Case, CaseShape, random_case
from icecache.store.pinned import PinnedBlock

pytestmark = pytest.mark.gpu

SHAPE = CaseShape(
    group=4,
    head_dim=128,
    dtype=torch.bfloat16,
    leaves=300,
    pages=90,
    slots=9,
    sink=4,
    window=20,
)


def pinned(pages: DevicePages, device: torch.device) -> tuple[DevicePages, PinnedBlock]:
    """Return pages whose host part is pinned host memory, and who holds it."""
    fields = (pages.host, pages.positions)
    size = sum(PinnedBlock.bytes_for(tuple(field.shape), field.dtype) for field in fields)
    block = PinnedBlock(size, device)
    host, positions = (
        block.take(tuple(f.shape), f.dtype).copy_(f.to(torch.device("cpu"))) for f in fields
    )
    return pages.to(device)._replace(host=host, positions=positions), block


def decode_step(case: Case, new: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """One whole step on the current stream."""
    query, fixed, tree, pages = case
    leaving = kernels.push(fixed, *new)
    near = kernels.attend_fixed(query, fixed, leaving, SCALING, None)
    scores = kernels.score(query, tree, leaving, SCALING, None, 0.0)
    selected = kernels.select_leaves(kernels.vote(scores, near, tree), tree, 60, 8)
    slots, missing = kernels.resolve(selected.pages, pages, step)
    kernels.gather(pages, slots, missing)
    exact = kernels.attend_pages(query, pages, selected, slots, SCALING, None)
    rest = kernels.attend_rest(scores, tree, selected)
    out = kernels.combine([near, exact, rest], None)
    kernels.insert(tree, pages, leaving, scores, SHAPE.leaf_size)
    step.add_(1)
    return out


def test_a_recorded_step_gives_the_bits_of_an_eager_one(device: torch.device) -> None:
    case = random_case(SHAPE)
    new = torch.randn(2, SHAPE.rows, SHAPE.head_dim).to(device, SHAPE.dtype)
    layers = [copy_of(case, device) for _ in range(2)]
    held = [pinned(layer.pages, device) for layer in layers]
    layers = [layer._replace(pages=pages) for layer, (pages, _) in zip(layers, held)]
    steps = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)]
    for layer, step in zip(layers, steps):
        decode_step(layer, new, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = decode_step(layers[1], new, steps[1])
    for _ in range(30):
        new.normal_()
        eager = decode_step(layers[0], new, steps[0])
        graph.replay()
        assert_same(recorded, eager)
    torch.cuda.synchronize(device)
    for mine, theirs in zip(layers[1].tree, layers[0].tree):
        assert_same(mine, theirs)
    for layer, (_, block) in zip(layers, held):
        check_device_tree(layer.tree, layer.pages, SHAPE.leaf_size)
        block.close()
