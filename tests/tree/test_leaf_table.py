"""The table: what is stored is what the tokens give, and every broken invariant is noticed."""

import dataclasses

import pytest
import torch
from torch import Tensor

from icecache.errors import IntegrityError
from icecache.ops.reference import quantize_rows, summarize
from icecache.tree.insert import NO_LEAF, assign, cut
from icecache.tree.table import NO_SLOT, LeafTable, LeafView
from tests.helpers import HAS_NATIVE, clustered, rng

DIM, LEAF_SIZE, PAGE = 24, 4, 8
NATIVE = [False, True] if HAS_NATIVE else [False]


def _filled(num_leaves: list[int]) -> tuple[LeafTable, Tensor, Tensor, Tensor, Tensor]:
    """Return a table with leaves of 1 to 4 tokens, and each token's row, leaf, key and value."""
    table = LeafTable(len(num_leaves), DIM, LEAF_SIZE)
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
            torch.testing.assert_close(getattr(view, f"{name}_scale")[r, i], scale[0])
        rounding = DIM * quantize_rows(key_mean)[1][0] ** 2 / 12
        torch.testing.assert_close(view.spread[r, i], spread[0] + rounding)


def test_tokens_at_gives_the_same_as_tokens() -> None:
    table, *_ = _filled([5, 0, 9])
    tokens, real = table.tokens(PAGE)
    leaf = torch.tensor([[4, 0], [0, 0], [8, 3]])
    some, some_real = table.tokens_at(leaf, PAGE)
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
    names = [field.name for field in dataclasses.fields(LeafView)]
    before = {name: getattr(table.view(), name).clone() for name in names}
    bytes_before = table.nbytes
    table.add(0, 500)
    after = table.view()
    assert after.count.shape == (1, 503)
    for name in names:
        assert torch.equal(before[name], getattr(after, name)[:, :3])
    assert bool((after.count[:, 3:] == 0).all())
    assert table.nbytes == bytes_before * 503 // 3


def test_move_page_moves_one_rows_leaves_only() -> None:
    table = LeafTable(2, DIM, LEAF_SIZE)
    for row in (0, 1):
        table.add(row, 3)
        for leaf, page in enumerate((7, 8, 7)):
            table.place(row, leaf, page, [leaf])
    table.move_page(0, 7, 9)
    assert table.pages().tolist() == [[9, 8, 9], [7, 8, 7]]


def test_reorder_copies_rows() -> None:
    table, *_ = _filled([2, 6, 4])
    kept = table.view().key_mean[1].clone()
    table.reorder(torch.tensor([1, 1, 0]))
    assert table.num_leaves == [6, 6, 2]
    table.place(0, 0, page=999, slots=[5])
    assert table.leaf(1, 0)[0] == 100
    assert torch.equal(table.view().key_mean[1][:6], kept[:6])


@pytest.mark.parametrize("how", ["empty leaf", "behind the last", "count", "slot lost"])
def test_check_integrity_notices(how: str) -> None:
    table, *_ = _filled([3, 2])
    arrays = table._arrays
    if how == "empty leaf":
        table.place(0, 1, 0, [])
    elif how == "behind the last":
        table.place(1, 2, 0, [1])
    elif how == "count":
        arrays["count"][0, 0] += 1
    else:
        arrays["slots"][0, 2, 0] = NO_SLOT
    with pytest.raises(IntegrityError):
        table.check_integrity()


@pytest.mark.parametrize("native", NATIVE)
def test_assign_takes_the_nearest_leaf_of_the_own_row(native: bool) -> None:
    table, row, leaf, keys, _ = _filled([20, 0, 12])
    view = table.view()
    points, point_row = clustered(5, 40, DIM), torch.tensor([0] * 13 + [1] * 7 + [2] * 20)
    nearest = assign(table, points, point_row, native)
    for i in range(40):
        r = int(point_row[i])
        if r == 1:
            assert int(nearest[i]) == NO_LEAF
            continue
        num = table.num_leaves[r]
        mean = view.key_mean[r, :num].float() * view.key_scale[r, :num, None]
        distance = (mean - points[i]).square().sum(1)
        assert float(distance[nearest[i]]) <= float(distance.min()) * (1 + 1e-4)


@pytest.mark.parametrize("native", NATIVE)
def test_assign_to_an_empty_table(native: bool) -> None:
    table = LeafTable(2, DIM, LEAF_SIZE)
    nearest = assign(table, torch.ones(3, DIM), torch.tensor([0, 1, 1]), native)
    assert nearest.tolist() == [NO_LEAF] * 3


def test_cut_leaves_no_piece_larger_than_a_leaf() -> None:
    leaf = torch.randint(3, (50,), generator=rng(6))
    pieces = cut(clustered(7, 50, DIM), leaf, 3, LEAF_SIZE)
    assert int(torch.bincount(pieces.ids).max()) <= LEAF_SIZE
    assert pieces.leaf[:3].tolist() == [0, 1, 2]
    assert torch.equal(pieces.leaf[pieces.ids], leaf)
