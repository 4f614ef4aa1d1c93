"""The compiled grouping against its twin, and what only it could get wrong."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from icecache.errors import HostMemoryExceeded
from icecache.tree import native_group
from icecache.tree.cluster import GroupRule, group
from icecache.tree.native_group import group_native
from tests.helpers import HAS_NATIVE, clustered, rng

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the compiled ops are not installed")

RULE = GroupRule(target=5, largest=8, rounds=2, cuts=3, segment=256, seed=0)
DIMS = [1, 3, 16, 64, 80, 96, 128, 256]
SIZES = [0, 1, 2, 3, 5, 6, 7, 8, 9, 255, 256]


def _share_in_same_group(a: Tensor, b: Tensor) -> float:
    """Return the share of points whose group is the same set of points in both."""
    pairs, together = torch.stack([a, b], 1).unique(dim=0, return_inverse=True)
    both = torch.bincount(together, minlength=pairs.shape[0])[together]
    same = (both == torch.bincount(a)[a]) & (both == torch.bincount(b)[b])
    return float(same.float().mean())


def _error(points: Tensor, ids: Tensor) -> float:
    """Return the mean squared distance of points from their group's mean."""
    points, counts = points.double(), torch.bincount(ids)[:, None]
    total = torch.zeros(counts.shape[0], points.shape[1], dtype=torch.float64)
    mean = total.index_add_(0, ids, points) / counts
    return float((points - mean[ids]).square().sum(1).mean())


@pytest.mark.parametrize("dim", DIMS)
def test_small_rows_are_grouped_as_by_the_twin(dim: int) -> None:
    """Rows of one segment; float sums in another order may decide a near tie the other way."""
    points = clustered(0, sum(SIZES), dim)
    ids, per_row = group_native(points, SIZES, RULE)
    expected, groups = group(points, SIZES, RULE)
    assert per_row == groups
    assert float((ids == expected).float().mean()) > 0.98


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("num", [1, 6, 7, 31, 32, 33, 500, 2048])
def test_whole_numbers_are_grouped_exactly_as_by_the_twin(dim: int, num: int) -> None:
    """Without refinement nothing is rounded, and ties abound: the first of equals must win."""
    points = torch.randint(-2, 3, (num, dim), generator=rng(num)).float()
    both = torch.cat([points, -points.flip(0)])
    rule = GroupRule(4, 8192, 0, 0, 4096, seed=1)
    ids, per_row = group_native(both, [2 * num], rule)
    expected, groups = group(both, [2 * num], rule)
    assert per_row == groups
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("segment", [256, 4096])
def test_equals_are_told_apart_by_their_number(dim: int, segment: int) -> None:
    """Groups of many equal points, cut: the twin's order of equals holds in every segment."""
    points = torch.randint(-2, 3, (2000, dim), generator=rng(dim)).float()
    both = torch.cat([points, -points.flip(0)])
    rule = RULE._replace(segment=segment, rounds=0)
    ids, per_row = group_native(both, [4000], rule)
    expected, groups = group(both, [4000], rule)
    assert per_row == groups
    assert float((ids == expected).float().mean()) > 0.99


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("segment", [256, 2048])
def test_segments_are_those_of_the_twin(dim: int, segment: int) -> None:
    """With one parent a segment, the groups are the segments."""
    rule, lens = GroupRule(segment, segment, 0, 0, segment, 0), [5000, 0, segment + 1, segment]
    points = clustered(1, sum(lens), dim)
    ids, per_row = group_native(points, lens, rule)
    expected, groups = group(points, lens, rule)
    assert per_row == groups
    assert float((ids == expected).float().mean()) > 0.995


@pytest.mark.parametrize("dim", DIMS)
def test_groups_are_as_tight_as_the_twins(dim: int) -> None:
    lens = [5000, 2047, 0, 2049, 1]
    points = clustered(2, sum(lens), dim, centres=100)
    rule = RULE._replace(segment=2048)
    ids, _ = group_native(points, lens, rule)
    expected, _ = group(points, lens, rule)
    assert _error(points, ids) == pytest.approx(_error(points, expected), rel=5e-3)
    if dim > 1:
        assert _share_in_same_group(ids, expected) > 0.9


@pytest.mark.parametrize("num", [9, 17, 33, 2048])
def test_one_group_is_cut_as_by_the_twin(num: int) -> None:
    """From one group down to eight points, through every length of sort."""
    points = torch.randn(num, 16, generator=rng(3))
    rule = GroupRule(num, 8, 0, 0, 4096, 0)
    ids, per_row = group_native(points, [num], rule)
    expected, groups = group(points, [num], rule)
    assert per_row == groups
    assert _share_in_same_group(ids, expected) > 0.98


def test_five_thousand_equal_points() -> None:
    points = torch.ones(5000, 64)
    for rule in (RULE, RULE._replace(segment=2048)):
        ids, per_row = group_native(points, [5000], rule)
        expected, groups = group(points, [5000], rule)
        assert per_row == groups
        assert torch.equal(ids, expected)


def test_a_large_common_offset_changes_little() -> None:
    points = clustered(4, 600, 64).mul(1024).round() / 1024
    plain, _ = group_native(points, [400, 200], RULE)
    shifted, _ = group_native(points + 4096.0, [400, 200], RULE)
    assert _share_in_same_group(plain, shifted) > 0.95


def test_points_that_are_not_contiguous() -> None:
    wide = clustered(5, 300, 32)
    ids, _ = group_native(wide[:, ::2], [300], RULE)
    assert torch.equal(ids, group_native(wide[:, ::2].contiguous(), [300], RULE)[0])


@pytest.mark.parametrize("value", [3e19, torch.inf, torch.nan])
def test_points_that_overflow_still_get_groups(value: float) -> None:
    points = clustered(6, 700, 16)
    points[::7] = value
    ids, per_row = group_native(points, [700], RULE)
    sizes = torch.bincount(ids, minlength=per_row[0])
    assert sizes.numel() == per_row[0]
    assert 1 <= int(sizes.min()) and int(sizes.max()) <= RULE.largest


def test_threads_may_group_at_once() -> None:
    points = [clustered(seed, 3000, 64) for seed in range(8)]
    alone = [group_native(p, [3000], RULE)[0] for p in points]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda p: group_native(p, [3000], RULE)[0], points))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        @staticmethod
        def icecache_group(*_: object) -> int:
            return -1

    monkeypatch.setattr(native_group, "load", Full)
    with pytest.raises(HostMemoryExceeded):
        group_native(clustered(7, 10, 16), [10], RULE)
