"""Packing of leaves into pages, and the rows' hold on pages, against plain models."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from icecache.config import IceCacheConfig
from icecache.store.packing import pack, pack_native
from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from icecache.tree.build import build_leaves
from tests.helpers import HAS_NATIVE, clustered

_settings = settings(derandomize=True, deadline=None, max_examples=100)
FILLS = [pack, *([pack_native] if HAS_NATIVE else [])]


def _loads(sizes: list[int], page: list[int], num_pages: int) -> list[int]:
    loads = [0] * num_pages
    for leaf, at in enumerate(page):
        loads[at] += sizes[leaf]
    return loads


_leaves = st.integers(1, 20).flatmap(
    lambda size: st.tuples(
        st.just(size), st.lists(st.tuples(st.integers(1, size), st.integers(3, 12)), max_size=60)
    )
)


@_settings
@given(_leaves)
def test_pack_keeps_leaves_whole_and_pages_within_their_size(
    case: tuple[int, list[tuple[int, int]]],
) -> None:
    page_size, leaves = case
    sizes, parents = torch.tensor(leaves, dtype=torch.int64).view(-1, 2).unbind(1)
    page, num_pages = pack(sizes, parents, page_size)
    loads = _loads(sizes.tolist(), page.tolist(), num_pages)
    assert page.numel() == len(leaves)
    assert all(1 <= load <= page_size for load in loads)
    # two pages that fit in one would mean that something was not filled up
    if len(loads) > 1:
        assert sum(sorted(loads)[:2]) > page_size


@pytest.mark.skipif(not HAS_NATIVE, reason="the compiled ops are not installed")
@_settings
@given(_leaves)
def test_the_compiled_pack_is_its_twin(case: tuple[int, list[tuple[int, int]]]) -> None:
    page_size, leaves = case
    sizes, parents = torch.tensor(leaves, dtype=torch.int64).view(-1, 2).unbind(1)
    page, num_pages = pack_native(sizes, parents, page_size)
    expected, num_expected = pack(sizes, parents, page_size)
    assert torch.equal(page, expected)
    assert num_pages == num_expected


@pytest.mark.parametrize(
    ("page_size", "leaf_size", "leaf_target"), [(16, 8, 5), (32, 8, 5), (8, 4, 3)]
)
@pytest.mark.parametrize("tokens", [500, 2000, 6000])
def test_pages_of_a_built_tree_are_full(
    tokens: int, page_size: int, leaf_size: int, leaf_target: int
) -> None:
    config = IceCacheConfig(leaf_size=leaf_size, leaf_target=leaf_target, page_size=page_size)
    leaves = build_leaves(clustered(0, tokens, 64, centres=60), [tokens], config)
    sizes = torch.bincount(leaves.ids)
    page, num_pages = pack(sizes, leaves.parents, page_size)
    assert tokens / (num_pages * page_size) >= 0.9
    assert max(_loads(sizes.tolist(), page.tolist(), num_pages)) <= page_size


@pytest.mark.parametrize("fill", FILLS)
def test_siblings_share_pages(fill: Callable[..., tuple[Tensor, int]]) -> None:
    parents = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    page, num_pages = fill(torch.full((8,), 4), parents, 16)
    assert num_pages == 2
    for parent in (0, 1):
        assert len(page[parents == parent].unique()) == 1


@pytest.mark.parametrize("fill", FILLS)
def test_pack_nothing(fill: Callable[..., tuple[Tensor, int]]) -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    page, num_pages = fill(nothing, nothing, 16)
    assert page.numel() == num_pages == 0


def _open(table: PageTable, pool: PagePool, row: int = 0) -> int:
    return table.hold(row, pool.allocate(1), [pool.page_size])


@_settings
@given(
    st.lists(st.tuples(st.sampled_from(["take", "give", "open"]), st.integers(0, 30)), max_size=40)
)
def test_row_pages_find_the_fullest_page_with_room(trace: list[tuple[str, int]]) -> None:
    pool = PagePool(8, 2, torch.float32)
    table, model = PageTable(pool, 1), dict[int, int]()
    for op, number in trace:
        if op == "open":
            more = [number % 9, 8, number % 3]
            first = table.hold(0, pool.allocate(3), more)
            assert first == len(model)
            model.update(enumerate(more, first))
        elif op == "take":
            room = 1 + number % 8
            fitting = [free for free in model.values() if free >= room]
            found = table.fullest_with(0, room)
            if not fitting:
                assert found == -1
                continue
            assert model[found] == min(fitting)
            model[found] -= room
            table.change_free(0, found, -room)
        elif model:
            page = sorted(model)[number % len(model)]
            more = min(8 - model[page], 1 + number % 3)
            model[page] += more
            table.change_free(0, page, more)
        assert dict(enumerate(table.free[0, : len(model)].tolist())) == model
        pool.check_integrity([table.pages(0)])


def test_a_full_page_is_never_found() -> None:
    pool = PagePool(4, 2, torch.float32)
    table = PageTable(pool, 1)
    table.change_free(0, _open(table, pool), -4)
    assert table.fullest_with(0, 1) == -1


def test_the_unwanted_page_is_not_found() -> None:
    pool = PagePool(4, 2, torch.float32)
    table = PageTable(pool, 1)
    first = _open(table, pool)
    assert table.fullest_with(0, 1) == first
    assert table.fullest_with(0, 1, besides=first) == -1
    second = _open(table, pool)
    assert table.fullest_with(0, 1, besides=second) == first
    assert table.fullest_with(0, 1, besides=first) == second


def test_repeated_rows_share_their_pages_until_one_writes() -> None:
    pool = PagePool(4, 2, torch.float32)
    table = PageTable(pool, 2)
    for free in (2, 0, 3):
        table.change_free(0, _open(table, pool), free - 4)
    _open(table, pool, row=1)
    table.reorder([0, 0])
    assert pool.num_pages == 3
    assert table.pages(1) == table.pages(0)
    assert all(pool.is_shared(page) for page in table.pages(0))
    pool.check_integrity([table.pages(0), table.pages(1)])
    shared = table.pages(0)[1]
    table.replace(0, 1, pool.copy_page(shared))
    assert not pool.is_shared(shared)
    assert table.pages(1)[1] == shared != table.pages(0)[1]
    pool.check_integrity([table.pages(0), table.pages(1)])
    assert pool.num_pages == 4


def test_a_pool_that_grew_where_it_was_is_noticed() -> None:
    """Memory that was given back may come again: the first address alone says nothing."""
    pool = PagePool(4, 8, torch.float32)
    table = PageTable(pool, 1)
    table.hold(0, pool.allocate(2), [4, 4])
    assert table.native() is table.native()
    pool._positions = pool._positions.copy()
    assert table.native().positions == pool.positions_address
    pool._holders = pool._holders.copy()
    assert table.native().holders == pool.holders_address
