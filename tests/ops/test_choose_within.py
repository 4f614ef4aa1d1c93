"""`choose_within` takes what a loop would take, and never more than fits."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from icecache.ops import batched, reference
from tests.helpers import rng

_settings = settings(derandomize=True, deadline=None, max_examples=150)


@st.composite
def _distinct(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Priorities without ties, some negative, and sizes; negative ones may have size 0."""
    rows, n = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    priority, size = torch.empty(rows, n), torch.empty(rows, n, dtype=torch.int64)
    for row in range(rows):
        order = draw(st.permutations(range(n)))
        dead = draw(st.integers(0, n))
        priority[row] = torch.tensor([float(p) if p >= dead else -1.0 for p in order])
        size[row] = torch.tensor(draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)))
        size[row][priority[row] < 0] = 0
    return priority, size


@_settings
@given(_distinct(), st.integers(0, 60))
def test_equals_the_loop(case: tuple[Tensor, Tensor], room: int) -> None:
    ours, truth = (ops.choose_within(*case, room) for ops in (batched, reference))
    assert torch.equal(ours, truth)


def test_equals_the_loop_on_long_rows() -> None:
    for seed in range(20):
        priority = torch.rand(4, 700, generator=rng(seed)).masked_fill(
            torch.rand(4, 700, generator=rng(seed + 100)) < 0.1, -1.0
        )
        size = torch.randint(1, 17, (4, 700), generator=rng(seed + 200))
        for room in (1, 13, 208):
            ours, truth = (m.choose_within(priority, size, room) for m in (batched, reference))
            assert torch.equal(ours, truth)


@_settings
@given(
    st.lists(st.tuples(st.integers(-1, 2), st.integers(1, 8)), min_size=1, max_size=30),
    st.integers(0, 40),
)
def test_with_ties_it_fits_and_leaves_nothing_better(
    items: list[tuple[int, int]], room: int
) -> None:
    priority = torch.tensor([[float(p) for p, _ in items]])
    size = torch.tensor([[s for _, s in items]])
    chosen = batched.choose_within(priority, size, room)
    taken = int((size * chosen).sum())
    assert taken <= room
    assert not bool((chosen & (priority < 0)).any())
    if len(items) <= room:
        could_still_fit = ~chosen & (priority >= 0) & (size <= room - taken)
        assert not bool(could_still_fit.any())


def test_ties_do_not_depend_on_how_far_rows_are_padded() -> None:
    """A row of a batch chooses as it does alone: the first of equals, as the loop takes them."""
    priority, size = torch.ones(1, 40), torch.full((1, 40), 3)
    alone = batched.choose_within(priority, size, 30)
    for padding in (1, 25, 200, 3000):
        wide = torch.nn.functional.pad(priority, (0, padding), value=-1.0)
        wide_size = torch.nn.functional.pad(size, (0, padding))
        assert torch.equal(batched.choose_within(wide, wide_size, 30)[:, :40], alone)


def test_nothing_fits_or_nothing_is_there() -> None:
    size = torch.tensor([[5, 6]])
    assert not bool(batched.choose_within(torch.ones(1, 2), size, 4).any())
    assert not bool(batched.choose_within(torch.ones(1, 2), size, 0).any())
    assert batched.choose_within(torch.ones(2, 0), torch.ones(2, 0), 9).shape == (2, 0)
