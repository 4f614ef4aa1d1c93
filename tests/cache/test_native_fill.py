"""The compiled fill beside its twin: the same leaves, tokens in the same slots, the same nodes."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from icecache import IceCacheConfig
from icecache.cache import native_fill
from icecache.cache.flat import FlatTokens
from icecache.cache.indexed import IndexedTokens
from icecache.errors import HostMemoryExceeded
from icecache.ops.native import DTYPES
from icecache.tree.build import Leaves, build_leaves, siblings_native, siblings_together
from icecache.tree.cluster import GroupRule
from icecache.tree.native_group import group_native
from tests.helpers import HAS_NATIVE, clustered, rng

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the compiled ops are not installed")

# none of them joins leaves that are there: a chunk of up to 256 tokens would
FIRST, CHUNK = [1500, 0, 37, 300], [900, 1, 0, 257]
_POISONED = 2000  # pages; the pool grows by others, which no build here comes to


def _tokens(
    seed: int, lens: list[int], starts: list[int], dim: int, dtype: torch.dtype
) -> FlatTokens:
    keys = clustered(seed, sum(lens), dim, centres=60).to(dtype)
    values = torch.randn(sum(lens), dim, generator=rng(seed)).to(dtype)
    positions = [torch.arange(s, s + n) for s, n in zip(starts, lens, strict=True)]
    row = torch.arange(len(lens)).repeat_interleave(torch.tensor(lens))
    return FlatTokens(keys, values, row, torch.cat(positions))


def _empty(
    dim: int, dtype: torch.dtype, native: bool, num_rows: int, **settings: int
) -> IndexedTokens:
    """An index of compiled groups; without `native` all behind them is left to the twins."""
    config = IceCacheConfig.from_kwargs(backend="native", **settings)
    indexed = IndexedTokens(config, num_rows, dim, dtype)
    indexed._native = indexed.tree._is_native = native
    indexed.pool.reserve(_POISONED)
    indexed.pool.poison()
    return indexed


def _check_alike(ours: IndexedTokens, theirs: IndexedTokens) -> None:
    assert ours.lens == theirs.lens
    assert np.array_equal(ours.pool._positions, theirs.pool._positions)
    # the slots that nobody wrote are still poisoned
    assert ours.pool.num_pages <= _POISONED
    data = (indexed.pool._data[:_POISONED] for indexed in (ours, theirs))
    torch.testing.assert_close(*data, rtol=0, atol=0, equal_nan=True)
    assert np.array_equal(ours.pages.page_of, theirs.pages.page_of)
    assert np.array_equal(ours.pages.free, theirs.pages.free)
    assert len(ours.tree.levels) == len(theirs.tree.levels) > 1
    for number, (mine, other) in enumerate(zip(ours.tree.levels, theirs.tree.levels, strict=True)):
        assert mine.num.tolist() == other.num.tolist()
        for name in (
            "count",
            "next",
            "first" if number else "page",
            "count" if number else "slots",
        ):
            assert torch.equal(mine.array(name), other.array(name)), (number, name)
        for name in ("key", "value"):
            _check_codes(mine.array(f"{name}_mean"), other.array(f"{name}_mean"))
            scales = (level.array(f"{name}_scale").float() for level in (mine, other))
            torch.testing.assert_close(*scales, rtol=1e-2, atol=1e-30)
        spreads = (level.array("spread").float() for level in (mine, other))
        torch.testing.assert_close(*spreads, rtol=2e-2, atol=1e-5)


def _check_codes(ours: Tensor, theirs: Tensor) -> None:
    """A mean summed in another order may round to the neighbouring code, seldom."""
    apart = (ours.int() - theirs.int()).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 64, 80, 97, 256])
def test_the_same_tokens_in_the_same_slots(dtype: torch.dtype, dim: int) -> None:
    ours, theirs = (_empty(dim, dtype, native, len(FIRST)) for native in (True, False))
    for seed, lens, starts in ((0, FIRST, [0] * 4), (1, CHUNK, FIRST)):
        tokens = _tokens(seed, lens, starts, dim, dtype)
        for indexed in (ours, theirs):
            assert indexed.add(tokens) == 0
            ends = [start + num for start, num in zip(starts, lens, strict=True)]
            indexed.check_integrity([range(end) for end in ends])
    _check_alike(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"leaf_size": 4, "leaf_target": 3, "page_size": 9, "fan_out": 3, "segment_tokens": 64},
        {"leaf_size": 16, "leaf_target": 11, "page_size": 16},
        {"leaf_size": 128, "leaf_target": 100, "page_size": 255, "fan_out": 2},
    ],
    ids=["small", "leaf-is-page", "large"],
)
def test_leaves_and_pages_of_other_sizes(settings: dict[str, int]) -> None:
    tokens = _tokens(2, [12000, 700], [0, 0], 24, torch.float16)
    ours, theirs = (_empty(24, torch.float16, native, 2, **settings) for native in (True, False))
    for indexed in (ours, theirs):
        indexed.add(tokens)
    ours.check_integrity([range(12000), range(700)])
    _check_alike(ours, theirs)


def test_a_row_does_not_depend_on_its_batch() -> None:
    tokens = _tokens(3, FIRST, [0] * 4, 64, torch.bfloat16)
    together = _empty(64, torch.bfloat16, True, 4)
    together.add(tokens)
    for row, num in enumerate(FIRST):
        alone = _empty(64, torch.bfloat16, True, 1)
        if num:
            alone.add(tokens.pick(tokens.row == row)._replace(row=torch.zeros(num).long()))
        for mine, other in zip(alone.tree.levels, together.tree.levels, strict=False):
            leaves = int(other.num[row])
            assert int(mine.num[0]) == leaves
            for name in mine._arrays:
                assert torch.equal(mine.array(name)[0, :leaves], other.array(name)[row, :leaves])


def test_values_that_are_not_contiguous() -> None:
    tokens = _tokens(4, [1500], [0], 64, torch.float32)
    wide = torch.cat([tokens.keys, tokens.values], 1)
    ours, theirs = (_empty(64, torch.float32, True, 1) for _ in range(2))
    ours.add(tokens)
    theirs.add(tokens._replace(keys=wide[:, :64], values=wide[:, 64:]))
    _check_alike(ours, theirs)


def test_the_papers_leaves_are_filled_too() -> None:
    config = IceCacheConfig.paper(backend="native")
    indexed = IndexedTokens(config, 2, 64, torch.bfloat16)
    indexed.add(_tokens(5, [900, 300], [0, 0], 64, torch.bfloat16))
    indexed.check_integrity([range(900), range(300)])


def test_threads_may_build_at_once() -> None:
    def build(seed: int) -> IndexedTokens:
        indexed = _empty(64, torch.float16, True, 2)
        indexed.add(_tokens(seed, [1500, 300], [0, 0], 64, torch.float16))
        return indexed

    alone = [build(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(build, range(6)))
    for one, other in zip(together, alone, strict=True):
        _check_alike(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_models_dtype_is_grouped_as_its_float32_copy(dtype: torch.dtype) -> None:
    keys = clustered(6, 6000, 96).to(dtype)
    keys[::50] *= 1e-4  # float16 has no leading one there
    config = IceCacheConfig(backend="native")
    ours, theirs = (build_leaves(k, [4500, 0, 1500], config) for k in (keys, keys.float()))
    assert ours.per_row == theirs.per_row
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.parents, theirs.parents)


@pytest.mark.parametrize("dim", [1, 33, 64])
def test_means_are_those_of_the_groups(dim: int) -> None:
    points = clustered(7, 5000, dim).bfloat16()
    means = torch.full((5000, dim), torch.nan)
    ids, (num,) = group_native(points, [5000], GroupRule(5, 8, 2, 4, 2048, 0), means)
    centred = points.double() - points.double().mean(0)
    total = torch.zeros(num, dim, dtype=torch.float64).index_add_(0, ids, centred)
    expected = total / torch.bincount(ids)[:, None]
    torch.testing.assert_close(means[:num].double(), expected, rtol=1e-5, atol=1e-5)
    assert bool(means[num:].isnan().all())


@pytest.mark.parametrize("num", [0, 1, 500])
def test_siblings_get_the_twins_numbers(num: int) -> None:
    parents = torch.randint(7, 40, (num,), generator=rng(8))
    ids = torch.randint(max(num, 1), (3 * num,), generator=rng(9))
    expected = siblings_together(Leaves(ids, [num], parents))
    found = siblings_native(Leaves(ids.clone(), [num], parents.clone()))
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.parents, expected.parents)


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        icecache_fill = staticmethod(lambda *_: -1)

    indexed = _empty(64, torch.float32, True, 1)
    monkeypatch.setattr(native_fill, "load", Full)
    with pytest.raises(HostMemoryExceeded):
        indexed.add(_tokens(10, [2000], [0], 64, torch.float32))
