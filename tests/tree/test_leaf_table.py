"""The table: what is stored is what the tokens give, and every broken invariant is noticed."""

import dataclasses

import pytest
import torch
from torch import Tensor

from icecache.config import IceCacheConfig
from icecache.errors import IntegrityError
from icecache.ops.reference import quantize_rows, summarize
from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from icecache.tree.insert import cut_in_two, find_path
from icecache.tree.level import NONE, Summaries
from icecache.tree.table import LeafTable
from icecache.tree.tree import Tree
from tests.helpers import clustered

DIM, LEAF_SIZE, PAGE = 24, 4, 8


def _filled(num_leaves: list[int]) -> tuple[LeafTable, Tensor, Tensor, Tensor, Tensor]:
    """Return a table with leaves of 1 to 4 tokens, and each token's row, leaf, key and value."""
    table = LeafTable(len(num_leaves), DIM, LEAF_SIZE, PAGE)
    rows, leaves = [], []
    for row, num in enumerate(num_leaves):
        first = table.add(row, num)
        for leaf in range(first, first + num):
            size = 1 + (row + leaf) % LEAF_SIZE
            table.place(row, leaf, page=100 * row + leaf, slots=list(range(size)))
            rows += [row] * size
            leaves += [leaf] * size
    row, leaf = torch.tensor(rows), torch.tensor(leaves)
    keys, values = clustered(0, row.numel(), DIM), clustered(1, row.numel(), DIM)
    pairs, ids = torch.unique(torch.stack([row, leaf], 1), dim=0, return_inverse=True)
    table.summarize(pairs[:, 0], pairs[:, 1], ids, keys, values)
    return table, row, leaf, keys, values


def test_summaries_equal_recomputed_ones() -> None:
    table, row, leaf, keys, values = _filled([5, 0, 90])
    table.check_integrity()
    view = table.view()
    assert view.count.shape == (3, 90)
    for r, i in {*zip(row.tolist(), leaf.tolist(), strict=True)}:
        mine = (row == r) & (leaf == i)
        zeros = torch.zeros(int(mine.sum()), dtype=torch.int64)
        count, key_mean, value_mean, spread = summarize(keys[mine], values[mine], zeros, 1)
        assert int(view.count[r, i]) == int(count[0])
        for name, mean in (("key", key_mean), ("value", value_mean)):
            codes, scale = quantize_rows(mean)
            kept_codes = getattr(view, f"{name}_mean")[r, i].int()
            assert int((kept_codes - codes[0].int()).abs().max()) <= 1
            assert float(getattr(view, f"{name}_scale")[r, i]) == float(scale[0])
        rounding = DIM * quantize_rows(key_mean)[1][0].float() ** 2 / 12
        torch.testing.assert_close(
            view.spread[r, i].float(), spread[0] + rounding, rtol=2**-8, atol=0.0
        )


def test_tokens_at_gives_the_same_as_tokens() -> None:
    table, *_ = _filled([5, 0, 9])
    tokens, real = table.tokens()
    leaf = torch.tensor([[4, 0], [0, 0], [8, 3]])
    some, some_real = table.tokens_at(leaf)
    for row in (0, 2):
        for i in range(2):
            assert torch.equal(some_real[row, i], real[row, leaf[row, i]])
            assert torch.equal(
                some[row, i][some_real[row, i]], tokens[row, leaf[row, i]][some_real[row, i]]
            )
    assert not bool(some_real[1].any())
    assert table.leaf(2, 8) == (208, [0, 1, 2])
    assert tokens[2, 8][real[2, 8]].tolist() == [208 * PAGE, 208 * PAGE + 1, 208 * PAGE + 2]


def test_growing_keeps_what_is_there() -> None:
    table, *_ = _filled([3])
    names = [field.name for field in dataclasses.fields(Summaries)]
    before = {name: getattr(table.view(), name).clone() for name in names}
    places = [table.leaf(0, i) for i in range(3)]
    centres = 4 * DIM
    bytes_before = table.nbytes - centres
    table.add(0, 500)
    after = table.view()
    assert after.count.shape == (1, 503)
    for name in names:
        assert torch.equal(before[name], getattr(after, name)[:, :3])
    assert bool((after.count[:, 3:] == 0).all())
    assert [table.leaf(0, i) for i in range(3)] == places
    assert table.nbytes == bytes_before * 503 // 3 + centres


def test_a_copied_page_moves_one_rows_tokens_only() -> None:
    pool = PagePool(PAGE, DIM, torch.float32)
    pages = PageTable(pool, 1)
    pages.hold(0, pool.allocate(3), [PAGE] * 3)
    table = LeafTable(1, DIM, LEAF_SIZE, PAGE)
    table.add(0, 3)
    for leaf, page in enumerate((1, 2, 1)):
        table.place(0, leaf, page, [leaf])
    table.reorder(torch.tensor([0, 0]))
    pages.reorder([0, 0])
    pages.replace(0, 1, pool.copy_page(1))
    tokens, real = table.tokens()
    rows = torch.tensor([[0] * 3, [1] * 3])
    assert pages.in_pool(rows, tokens[real].view(2, 3)).tolist() == [
        [3 * PAGE, 2 * PAGE + 1, 3 * PAGE + 2],
        [1 * PAGE, 2 * PAGE + 1, 1 * PAGE + 2],
    ]
    pool.check_integrity([pages.pages(0), pages.pages(1)])


def test_reorder_copies_rows() -> None:
    table, *_ = _filled([2, 6, 4])
    kept = table.view().key_mean[1].clone()
    table.reorder(torch.tensor([1, 1, 0]))
    assert table.num.tolist() == [6, 6, 2]
    table.place(0, 0, page=999, slots=[5])
    assert table.leaf(1, 0)[0] == 100
    assert torch.equal(table.view().key_mean[1][:6], kept[:6])


@pytest.mark.parametrize("how", ["empty leaf", "behind the last", "count", "slot lost"])
def test_check_integrity_notices(how: str) -> None:
    table, *_ = _filled([3, 2])
    if how == "empty leaf":
        table.place(0, 1, 0, [])
    elif how == "behind the last":
        table.place(1, 2, 0, [1])
    elif how == "count":
        table.numpy("count")[0, 0] += 1
    else:
        table.numpy("slots")[0, 2, 0] &= 0b1110
    with pytest.raises(IntegrityError):
        table.check_integrity()


def test_a_key_goes_to_the_nearest_leaf_of_its_own_row() -> None:
    tree = Tree(IceCacheConfig(leaf_size=LEAF_SIZE, leaf_target=3, page_size=PAGE), 3, DIM)
    tree.leaves, *_ = _filled([20, 0, 12])
    tree.levels[0] = tree.leaves
    view = tree.leaves.view()
    points, point_row = clustered(5, 40, DIM), [0] * 13 + [1] * 7 + [2] * 20
    for point, r in zip(points, point_row, strict=True):
        path = find_path(tree, r, point)
        assert len(path) == 1
        if r == 1:
            assert path == [NONE]
            continue
        num = int(tree.leaves.num[r])
        distance = (view.keys()[r, :num] - point).square().sum(1)
        assert float(distance[path[0]]) <= float(distance.min()) * (1 + 1e-4)


def test_an_empty_tree_has_no_nearest_leaf() -> None:
    tree = Tree(IceCacheConfig(), 2, DIM)
    assert find_path(tree, 1, torch.ones(DIM)) == [NONE]


@pytest.mark.parametrize("size", [1, 2, 4, 7, 128])
def test_a_cut_halves_what_is_one_too_large(size: int) -> None:
    upper = cut_in_two(clustered(7, size + 1, DIM), size)
    assert upper.shape == (size + 1,) and upper.dtype == torch.bool
    assert int(upper.sum()) == (size + 1) // 2


def test_a_cut_parts_what_is_far_apart() -> None:
    points = 0.1 * clustered(8, 5, DIM, centres=1)
    far = torch.tensor([1, 3])
    points[far] += 10.0
    upper = cut_in_two(points, 4)
    assert int(upper.sum()) == 2
    assert bool(upper[far[0]] == upper[far[1]])


def test_a_cut_of_equal_keys_goes_by_their_order() -> None:
    assert cut_in_two(torch.ones(5, DIM), 4).tolist() == [False, False, False, True, True]
