"""Inserts below several levels: compiled beside its twin, and a hundred thousand of them."""

import pytest
import torch

from icecache import IceCacheConfig, IceCacheLayer
from icecache.cache.flat import FlatTokens
from icecache.cache.indexed import IndexedTokens
from icecache.errors import InputError
from icecache.tree.tree import GROWN_TOP
from tests.descent import children_of
from tests.helpers import HAS_NATIVE, clustered, make_query, make_tokens
from tests.trees import TINY, add_tokens, assert_true_summaries, check, tiny_indexed

# lists of pages that broke can go round in circles
pytestmark = [
    pytest.mark.skipif(not HAS_NATIVE, reason="the compiled ops are not installed"),
    pytest.mark.timeout(120),
]


def _assert_same(ours: IndexedTokens, theirs: IndexedTokens) -> None:
    """Assert the same leaves, slots, children and lists of pages, in the same order."""
    assert len(ours.tree.levels) == len(theirs.tree.levels)
    for number, (mine, other) in enumerate(zip(ours.tree.levels, theirs.tree.levels)):
        assert mine.num.tolist() == other.num.tolist(), f"level {number}"
        for row, num in enumerate(mine.num.tolist()):
            if number and ours.tree.top(row) >= number:
                mine_below = children_of(ours.tree, number, row)
                assert mine_below == children_of(theirs.tree, number, row), f"level {number}"
            for name in ("count", "page", "slots") if number == 0 else ("count",):
                assert torch.equal(mine.array(name)[row, :num], other.array(name)[row, :num])
            codes = mine.array("key_mean")[row, :num].int() - other.array("key_mean")[row, :num]
            # a mean summed in another order may round to the neighbouring code
            assert int(codes.abs().max()) <= 1 if num else True
            spreads = (level.array("spread")[row, :num].float() for level in (mine, other))
            torch.testing.assert_close(*spreads, rtol=2e-2, atol=1e-5)
    assert ours.pages.num_pages.tolist() == theirs.pages.num_pages.tolist()
    for row, num in enumerate(ours.pages.num_pages.tolist()):
        for name in ("page_of", "free", "_before", "_after"):
            mine, other = (getattr(x.pages, name)[row, :num] for x in (ours, theirs))
            assert mine.tolist() == other.tolist(), name
    assert ours.pages._head.tolist() == theirs.pages._head.tolist()
    held = ours.pool._holders > 0
    assert held.sum() == (theirs.pool._holders > 0).sum()
    for row in range(ours.tree.num_rows):
        for mine, other in zip(ours.pages.pages(row), theirs.pages.pages(row), strict=True):
            assert ours.pool._positions[mine].tolist() == theirs.pool._positions[other].tolist()


def test_the_same_tree_below_several_levels() -> None:
    """Leaves and nodes are cut, shared pages copied when written, tops raised; row 2 is flat."""
    pair = [tiny_indexed(3, backend=name) for name in ("native", "torch")]
    built = [3000, 0, 230]
    for indexed in pair:
        add_tokens(indexed, 0, built)
    _assert_same(*pair)
    assert int(pair[0].leaves.num[0]) >= 1500 and pair[0].tree.top(0) >= 3
    nodes = pair[0].tree.num_nodes
    for step, more in enumerate([[60, 1, 3], [1, 40, 60], [90, 10, 0]]):
        for indexed in pair:
            add_tokens(indexed, 10 + step, more)
        _assert_same(*pair)
        if step == 0:
            for indexed in pair:
                indexed.reorder(torch.tensor([0, 2, 0]))
    assert pair[0].tree.num_nodes > 1.5 * nodes
    for indexed in pair:
        check(indexed)
        assert_true_summaries(indexed)
        # the two rows of one origin have parted
        assert indexed.pages.pages(0) != indexed.pages.pages(2)


def test_a_row_without_leaves_is_begun_by_the_insert() -> None:
    pair = [tiny_indexed(2, backend=name) for name in ("native", "torch")]
    keys, rows = clustered(0, 60, 16), torch.tensor([0] * 35 + [1] * 25)
    positions = torch.cat([torch.arange(35), torch.arange(25)])
    for indexed in pair:
        indexed._join(FlatTokens(keys, keys.flip(1), rows, positions))
        indexed.lens = [35, 25]
        check(indexed)
    _assert_same(*pair)


def test_a_flat_row_that_grows_gets_levels() -> None:
    """A top of more than 256 gets a level above it, again and again."""
    pair = [tiny_indexed(1, backend=name) for name in ("native", "torch")]
    for indexed in pair:
        add_tokens(indexed, 0, [200])
        assert indexed.tree.top(0) == 0
        for step in range(2):
            add_tokens(indexed, 1 + step, [256])
    _assert_same(*pair)
    native = pair[0]
    assert native.tree.top(0) == 1
    for step in range(12):
        add_tokens(native, 20 + step, [256])
    check(native)
    assert_true_summaries(native)
    assert native.tree.top(0) >= 2
    assert int(native.tree.levels[native.tree.top(0)].num[0]) <= GROWN_TOP


def test_a_hundred_thousand_inserts_leave_nothing_behind() -> None:
    """One token at a time: summaries do not drift, pages stay full, no token is lost."""
    config = IceCacheConfig.from_kwargs(budget=64, sink=4, window=8, fan_out=4)
    layer = IceCacheLayer(config, num_kv_heads=1, head_dim=16, dtype=torch.float32)
    tokens = make_tokens(0, 1, 100_000, heads=1)
    layer.prefill(*tokens[:, :, :100])
    layer.attend(make_query(1, 1, 2))
    for i in range(100, 100_000):
        layer.append(tokens.keys[:, :, i : i + 1], tokens.values[:, :, i : i + 1])
    layer.check_integrity()
    indexed = layer._context.indexed  # type: ignore[union-attr]
    assert_true_summaries(indexed)
    stats = layer.stats()
    assert stats.inserted == 100_000 - 100 and layer.row_lens == [100_000]
    assert indexed.lens == [100_000 - 4 - 8]
    assert indexed.lens[0] >= 0.75 * indexed.pool.num_pages * config.page_size
    assert int(indexed.tree.levels[indexed.tree.top(0)].num[0]) <= GROWN_TOP


@pytest.mark.parametrize("different", [1, 3])
def test_equal_keys(different: int) -> None:
    """Leaves that no direction parts are halved by their order; nothing is lost or divided by 0."""
    config = IceCacheConfig.from_kwargs(**TINY, budget=24, sink=2, window=4, crossover=0)
    layer = IceCacheLayer(config, num_kv_heads=1, head_dim=16, dtype=torch.float32)
    keys = make_tokens(0, 1, different, heads=1).keys[:, :, [i % different for i in range(5000)]]
    values = make_tokens(3, 1, 5000, heads=1).values
    layer.prefill(keys[:, :, :1000], values[:, :, :1000])
    layer.attend(make_query(1, 1, 2))
    for i in range(1000, 5000, 200):
        layer.append(keys[:, :, i : i + 200], values[:, :, i : i + 200])
    query = make_query(1, 1, 2)
    out = layer.attend(query)
    layer.check_integrity()
    assert_true_summaries(layer._context.indexed)  # type: ignore[union-attr]
    if different == 1:
        # every token weighs the same, so the output is the mean value, but for the rounding
        assert float((out - values.mean(2)).abs().max()) <= 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_changes_nothing(bad: float) -> None:
    layer = IceCacheLayer(
        IceCacheConfig.from_kwargs(
            **TINY, budget=24, sink=2, window=4, crossover=0, field_of_view=3
        ),
        num_kv_heads=1,
        head_dim=16,
        dtype=torch.float32,
    )
    layer.prefill(*make_tokens(0, 1, 500, heads=1))
    query = make_query(1, 1, 2)
    before = layer.attend(query)
    for num in (1, 20, 300):
        for which in (0, 1):
            tokens = make_tokens(5, 1, num, heads=1)
            (tokens.values if which else tokens.keys)[0, 0, num // 2, 3] = bad
            with pytest.raises(InputError, match=r"^(keys|values) must"):
                layer.append(*tokens)
    layer.check_integrity()
    assert layer.row_lens == [500]
    assert torch.equal(layer.attend(query), before)


def test_threads_change_no_bit() -> None:
    outs, threads = [], torch.get_num_threads()
    try:
        for num in (1, 2):
            torch.set_num_threads(num)
            settings = {**TINY, "budget": 40, "sink": 2, "window": 4}
            config = IceCacheConfig.from_kwargs(**settings, crossover=0, field_of_view=9)
            layer = IceCacheLayer(config, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
            layer.prefill(*make_tokens(0, 2, 3000, dim=64, dtype=torch.bfloat16))
            query = make_query(1, 2, 6, dim=64, dtype=torch.bfloat16)
            layer.attend(query)
            for step, more in enumerate([1, 30, 300, 1]):
                layer.append(*make_tokens(9 + step, 2, more, dim=64, dtype=torch.bfloat16))
            outs.append((layer.attend(query), layer.search(query).positions))
    finally:
        torch.set_num_threads(threads)
    for mine, other in zip(*outs, strict=True):
        assert torch.equal(mine, other)
