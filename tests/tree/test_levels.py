"""The levels above the leaves: every leaf and node below exactly one, summaries true."""

from functools import lru_cache
from pickle import dumps, loads

import pytest
import torch
from torch import Tensor

from icecache.cache.flat import FlatTokens
from icecache.cache.indexed import IndexedTokens
from icecache.config import IceCacheConfig
from icecache.errors import IntegrityError
from icecache.ops.reference import summarize
from icecache.tree.insert import follow
from icecache.tree.level import NONE
from icecache.tree.tree import GROWN_TOP, WIDEST_TOP, Tree
from tests.descent import children_of
from tests.helpers import FAST_BACKENDS, clustered
from tests.trees import TINY_DIM, add_tokens, assert_true_summaries, check, tiny_indexed

# row 0 has levels at once, row 1 with its second chunk, row 2 with its third, row 3 never
CHUNKS = [[600, 0, 120, 2], [300, 600, 0, 3], [260, 1, 290, 0], [257, 260, 1, 0]]
SUMMARIES = ["key_mean", "key_scale", "value_mean", "value_scale", "spread"]


@lru_cache
def _pickled(backend: str, chunks: int) -> bytes:
    indexed = tiny_indexed(4, backend=backend)
    for number, per_row in enumerate(CHUNKS[:chunks]):
        add_tokens(indexed, number, per_row)
    return dumps(indexed)


def _built(backend: str = "torch", chunks: int = len(CHUNKS)) -> IndexedTokens:
    found: IndexedTokens = loads(_pickled(backend, chunks))
    return found


def _assert_sound(tree: Tree) -> None:
    for row in range(tree.num_rows):
        nums = [int(level.num[row]) for level in tree.levels]
        top = tree.top(row)
        assert nums[top + 1 :] == [0] * (len(nums) - top - 1)
        assert nums[top] <= GROWN_TOP
        for number in range(1, top + 1):
            children = children_of(tree, number, row)
            assert sorted(child for each in children for child in each) == [
                *range(nums[number - 1])
            ]
            assert max(map(len, children)) <= tree.most_children
            assert nums[number] < nums[number - 1]


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("chunks", range(1, len(CHUNKS) + 1))
def test_every_leaf_and_node_is_below_exactly_one(chunks: int, backend: str) -> None:
    indexed = _built(backend, chunks)
    check(indexed)
    _assert_sound(indexed.tree)
    assert_true_summaries(indexed)
    for row in range(4):
        top = indexed.tree.top(row)
        assert (top > 0) == (indexed.leaves.num[row] > WIDEST_TOP)
        assert indexed.tree.levels[top].num[row] <= WIDEST_TOP
    assert indexed.tree.num_nodes == sum(level.total for level in indexed.tree.levels[1:])


def test_levels_come_when_a_row_is_wide_and_go_no_more() -> None:
    heights = [[_built(chunks=n + 1).tree.top(row) for row in range(4)] for n in range(4)]
    assert heights[0][0] >= 2 and heights[0][1:] == [0, 0, 0]
    assert heights[1][1] >= 2 and heights[1][2:] == [0, 0]
    assert heights[2][2] >= 1 and [row[3] for row in heights] == [0, 0, 0, 0]
    for row in range(4):
        assert [at[row] for at in heights] == sorted(at[row] for at in heights)


def test_a_build_leaves_no_level_without_a_row() -> None:
    indexed = tiny_indexed(2)
    add_tokens(indexed, 0, [60, 0])
    assert len(indexed.tree.levels) == 1 and indexed.tree.num_nodes == 0
    assert [indexed.tree.top(row) for row in range(2)] == [0, 0]
    check(indexed)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_rows_levels_do_not_depend_on_its_batch(backend: str) -> None:
    lens = [400, 0, 31, 330]
    keys = [clustered(row, num, TINY_DIM, centres=30) for row, num in enumerate(lens)]

    def built(rows: list[int]) -> IndexedTokens:
        indexed = tiny_indexed(len(rows), backend=backend)
        for half in (0, 1):
            parts = [keys[r][: lens[r] // 2] if not half else keys[r][lens[r] // 2 :] for r in rows]
            at = [torch.arange(len(part)) + half * (lens[r] // 2) for r, part in zip(rows, parts)]
            row = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
            tokens = torch.cat(parts)
            indexed.add(FlatTokens(tokens, tokens.flip(1), row, torch.cat(at)))
        check(indexed)
        return indexed

    together = built([0, 1, 2, 3])
    for row in (0, 2, 3):
        alone = built([row])
        top = alone.tree.top(0)
        assert together.tree.top(row) == top
        for number in range(top + 1):
            mine, other = alone.tree.levels[number], together.tree.levels[number]
            num = int(mine.num[0])
            assert other.num[row] == num
            for name in ("count", "next", *SUMMARIES, *(["first"] if number else [])):
                same = torch.equal(mine.array(name)[0, :num], other.array(name)[row, :num])
                assert same, f"row {row}, level {number}, {name}"


def test_a_nodes_summary_is_its_tokens() -> None:
    """Against the reference on a tree by hand: keys that int8 stores exactly, so nothing is off."""
    keys = torch.randint(-127, 128, (6, TINY_DIM)).float()
    keys[:, 0] = 127.0
    tree = _tree_of_leaves(keys, fan_out=2)
    children = torch.tensor([4, 1, 5, 0])
    zeros = torch.zeros(4, dtype=torch.int64)
    tree._make_nodes(1, zeros, children, torch.tensor([3, 3, 3, 8]))
    level = tree.levels[1]
    assert children_of(tree, 1, 0) == [[4, 1, 5], [0]]
    assert level.children(0, 0, tree.leaves) == [4, 1, 5]
    ids = torch.tensor([0, 0, 0, 1])
    count, key_mean, _, spread = summarize(keys[children], keys[children], ids, 2)
    s = level.at(0, torch.tensor([0, 1]))
    assert s.count.tolist() == count.tolist() == [3, 1]
    scale = s.key_scale.float()
    assert bool(((s.keys() - key_mean).abs() <= 0.5 * scale[:, None] + 1e-4).all())
    # leaves and nodes each count their rounding, of scale 1 and of the node's, as spread
    rounded = spread + (1.0 + scale**2) * TINY_DIM / 12
    torch.testing.assert_close(s.spread.float(), rounded, rtol=2**-8, atol=0.0)


def _tree_of_leaves(keys: Tensor, **settings: int) -> Tree:
    """Return a tree of one row with a leaf for every key."""
    num, dim = keys.shape
    config = IceCacheConfig.from_kwargs(leaf_size=1, leaf_target=1, page_size=1, **settings)
    tree = Tree(config, 1, dim)
    tree.leaves.add(0, num)
    leaf = torch.arange(num)
    tree.leaves.place_many(torch.zeros_like(leaf), leaf, leaf, torch.ones(num, 1, dtype=torch.bool))
    tree.leaves.summarize(torch.zeros_like(leaf), leaf, leaf, keys, keys)
    return tree


@pytest.mark.parametrize("num", [GROWN_TOP, GROWN_TOP + 1])
def test_raise_top_puts_a_level_above_a_top_that_grew_too_wide(num: int) -> None:
    tree = _tree_of_leaves(clustered(0, num, TINY_DIM))
    tree.raise_top(0)
    assert len(tree.levels) == (2 if num > GROWN_TOP else 1)
    assert tree.top(0) == (1 if num > GROWN_TOP else 0)
    _assert_sound(tree)
    tree.check_integrity()


def test_raise_top_raises_a_top_of_nodes() -> None:
    tree = _tree_of_leaves(clustered(1, 2 * GROWN_TOP + 2, TINY_DIM), fan_out=2)
    leaf = torch.arange(2 * GROWN_TOP + 2)
    tree._make_nodes(1, torch.zeros_like(leaf), leaf, leaf // 2)
    assert int(tree.levels[1].num[0]) == GROWN_TOP + 1
    tree.raise_top(0)
    assert tree.top(0) == 2
    _assert_sound(tree)
    tree.check_integrity()


def test_a_node_with_a_child_too_many_is_split() -> None:
    """Children in two heaps far apart: each node gets one, in the order that they had."""
    keys = clustered(2, 10, TINY_DIM, centres=1)
    keys[::2] += 50.0
    tree = _tree_of_leaves(keys, fan_out=2)
    leaf = torch.arange(9)
    tree._make_nodes(1, torch.zeros(9, dtype=torch.int64), leaf, (leaf == 8).long())
    tree.levels[1].numpy("first")[0, 0] = NONE
    for child in (3, 2, 1, 0):
        tree.levels[1].adopt(0, 0, child, tree.leaves)
    for child in (4, 5, 6, 7):
        tree.levels[1].adopt(0, 1, child, tree.leaves)
    for node in (0, 1):
        tree.summarize_node(1, 0, node)
    follow(tree, 0, [3, 0], 9)
    assert children_of(tree, 1, 0)[1] == [7, 6, 5, 4, 8]
    # five children, of which the two of one heap are parted from the three of the other
    assert sorted(map(len, children_of(tree, 1, 0))) == [2, 3, 5]
    assert {tuple(each) for each in (children_of(tree, 1, 0)[i] for i in (0, 2))} == {
        (9, 1, 3),
        (0, 2),
    }
    tree.levels[1].num[0] = 3
    with pytest.raises(IntegrityError, match="too many children"):
        tree.check_integrity()
    follow(tree, 0, [8, 1], NONE)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_reorder_makes_rows_independent(backend: str) -> None:
    indexed = _built(backend, 3)
    indexed.reorder(torch.tensor([1, 0, 0, 3, 0]))
    before = [
        {n: level.array(n)[2].clone() for n in level._arrays} for level in indexed.tree.levels
    ]
    check(indexed)
    add_tokens(indexed, 50, [20, 60, 0, 0, 0])
    assert int(indexed.leaves.num[1]) > int(indexed.leaves.num[2])
    for level, kept in zip(indexed.tree.levels, before, strict=True):
        for name, array in kept.items():
            assert torch.equal(array, level.array(name)[2, : array.shape[0]]), name
    add_tokens(indexed, 60, [0, 0, 30, 1, 300])
    check(indexed)
    _assert_sound(indexed.tree)
    assert_true_summaries(indexed)
    indexed.reorder(torch.tensor([3]))
    check(indexed)
    assert indexed.tree.top(0) == 0 and indexed.lens == [6]


def _spoil_list(indexed: IndexedTokens, number: int, how: str) -> None:
    level, below = indexed.tree.levels[number], indexed.tree.levels[number - 1]
    first, following = level.numpy("first")[0], below.numpy("next")[0]
    children = children_of(indexed.tree, number, 0)
    node = next(i for i, each in enumerate(children) if i and len(each) > 1)
    if how == "a child twice":
        first[node] = children[node - 1][0]
    elif how == "a node without children":
        first[node] = NONE
    elif how == "a list cut":
        following[children[node][0]] = NONE
    elif how == "two lists joined":
        following[children[node][-1]] = children[node - 1][0]
    elif how == "a list without an end":
        following[children[node][-1]] = children[node][0]
    elif how == "no such child":
        first[node] = below.capacity + 7
    elif how == "a child of another node":
        following[children[node][-1]], first[node - 1] = children[node - 1][0], NONE
    elif how == "a node too many":
        level.num[0] += 1
    else:
        level.num[0] -= 1


@pytest.mark.parametrize("number", [1, 2, -1])
@pytest.mark.parametrize(
    "how",
    [
        "a child twice",
        "a node without children",
        "a list cut",
        "two lists joined",
        "a list without an end",
        "no such child",
        "a child of another node",
        "a node too many",
        "a node lost",
    ],
)
def test_check_integrity_notices_broken_lists(how: str, number: int) -> None:
    indexed = _built()
    _spoil_list(indexed, number % len(indexed.tree.levels), how)
    with pytest.raises(IntegrityError, match="row 0: "):
        indexed.tree.check_integrity()


@pytest.mark.parametrize("number", [0, 1, 2, -1])
@pytest.mark.parametrize("name", ["count", *SUMMARIES])
def test_check_integrity_notices_wrong_summaries(name: str, number: int) -> None:
    indexed = _built()
    array = indexed.tree.levels[number].array(name)
    at = array[0, 3]
    if name == "count":
        at += 1
    elif name.endswith("mean"):
        at[5] += 40 if int(at[5]) < 0 else -40
    else:
        at *= 1.5
    with pytest.raises(IntegrityError):
        check(indexed)


@pytest.mark.parametrize(
    "how",
    ["page", "slots", "other page", "free", "list", "head", "neighbour", "position", "holders"],
)
def test_check_integrity_notices_wrong_places(how: str) -> None:
    indexed = _built()
    leaves, pages, pool = indexed.leaves, indexed.pages, indexed.pool
    if how == "page":
        leaves.numpy("page")[0, 3] += 1
    elif how == "slots":
        bits = leaves.numpy("slots")
        bits[0, 3], bits[0, 4] = bits[0, 4].copy(), bits[0, 3].copy()
    elif how == "other page":
        pages.page_of[0, [3, 4]] = pages.page_of[0, [4, 3]]
    elif how == "free":
        pages.free[0, 3] += 1
    elif how == "list":
        pages.change_free(0, 3, 1)
        pages.free[0, 3] -= 1
    elif how == "head":
        slots = int(pages.free[0, 3])
        pages._head[0, slots] = pages._after[0, pages._head[0, slots]]
    elif how == "neighbour":
        pages._before[0, int((pages._after[0] == NONE).argmin())] += 1
    elif how == "position":
        pool._positions[pages.page_of[0, 3]][pool._positions[pages.page_of[0, 3]] >= 0] += 1
    else:
        pool._holders[pages.page_of[0, 3]] += 1
    with pytest.raises(IntegrityError):
        check(indexed)
