"""Shapes that the kernels are tried on, and one step of the twins to compare them with."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.ops.device import twin
from icecache.ops.device.records import Leaving, Part, Scores, Selected
from icecache.ops.device.testing import Case, CaseShape, random_case

SCALING = 0.15
SHAPES = [
    CaseShape(kv_heads=3, group=1, head_dim=64, page_size=8, leaf_size=4, leaves=131, pages=37),
    CaseShape(kv_heads=2, group=2, head_dim=80, batch=2, window=70, leaves=47, pages=23),
    CaseShape(kv_heads=1, batch=3, group=3, head_dim=96, page_size=32, leaf_size=16, pages=5),
    CaseShape(kv_heads=2, group=7, head_dim=128, page_size=64, leaf_size=32, int8_pages=True),
    CaseShape(kv_heads=2, group=8, head_dim=256, offload=False, sink=0, pages=5, leaves=17),
    CaseShape(kv_heads=1, group=16, head_dim=64, sink=9, window=1, leaves=1, pages=1, slots=4),
    CaseShape(kv_heads=2, group=4, head_dim=80, int8_pages=True, leaf_size=5, leaves=290, pages=71),
]
SOFTCAPS = [None, 4.0, None, 30.0, 0.5, None, None]


class Step(NamedTuple):
    """A layer as one op finds it, and what the twins made before."""

    case: Case
    shape: CaseShape
    softcap: float | None
    new: Tensor
    leaving: Leaving
    fixed: Part
    scores: Scores
    votes: Tensor
    selected: Selected
    slots: Tensor
    missing: Tensor


def copy_of(case: Case, device: torch.device) -> Case:
    """Return a copy of a layer on a device."""
    query, fixed, tree, pages = case
    return Case(query.to(device, copy=True), fixed.to(device), tree.to(device), pages.to(device))


def step_of(
    shape: CaseShape, softcap: float | None, device: torch.device, by_pages: bool = False
) -> Step:
    """Return one step of the twins as far as `gather`, after which a layer is ready to attend."""
    case = copy_of(random_case(shape), device)
    most = min(shape.slots, 2 * math.ceil(20 / shape.page_size) + 2)
    warm = torch.full((shape.rows, most), -1, dtype=torch.int32, device=device)
    # a page of each row is there already
    warm[:, 0] = case.tree.num_pages - 1
    pages = case.pages
    slots, missing = twin.resolve(warm, pages, torch.zeros(1, dtype=torch.int64))
    twin.gather(pages, slots, missing)
    new = torch.randn(2, shape.rows, shape.head_dim).to(device, shape.dtype)
    leaving = twin.push(case.fixed, *new)
    fixed = twin.attend_fixed(case.query, case.fixed, leaving, SCALING, softcap)
    scores = twin.score(case.query, case.tree, leaving, SCALING, softcap, 0.3)
    votes = twin.vote(scores, fixed, case.tree)
    select = twin.select_pages if by_pages else twin.select_leaves
    selected = select(votes, case.tree, 20, most)
    slots, missing = twin.resolve(selected.pages, pages, torch.ones(1, dtype=torch.int64))
    twin.gather(pages, slots, missing)
    made = (leaving, fixed, scores, votes, selected, slots, missing)
    return Step(case, shape, softcap, new, *made)


def assert_same(got: Tensor | None, expected: Tensor | None) -> None:
    """Compare bit for bit, NaN to NaN."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Compare two float32 results of the same sums in another order, or on tensor cores."""
    rtol, atol = (2e-3, 1e-3) if got.is_cuda else (1e-4, 2e-5)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
