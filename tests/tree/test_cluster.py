"""Grouping: every point in one group, none too large, the same every time and in every batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from icecache.config import IceCacheConfig
from icecache.tree.build import _rule_above, build_leaves
from icecache.tree.cluster import (
    GroupRule,
    _segment_order,
    bisect_order,
    group,
    sort_within,
    split_oversized,
)
from icecache.tree.native_group import group_native
from tests.helpers import FAST_BACKENDS, HAS_NATIVE, clustered, rng

Group = Callable[[Tensor, list[int], GroupRule], tuple[Tensor, list[int]]]

RULE = GroupRule(target=5, largest=8, rounds=2, cuts=3, segment=256, seed=0)
ROW_LENS = [0, 1, 37, 255, 256, 257, 700, 0]


@pytest.fixture(params=[group, *([group_native] if HAS_NATIVE else [])])
def grouping(request: pytest.FixtureRequest) -> Group:
    """The compiled grouping and its twin keep the same promises."""
    return request.param


def _assert_partition(ids: Tensor, per_row: list[int], row_lens: list[int], largest: int) -> None:
    """Every point has a group, every group 1 to `largest` points, all of one row, rows in order."""
    row = torch.repeat_interleave(torch.tensor(row_lens))
    group_row = torch.repeat_interleave(torch.tensor(per_row))
    assert ids.shape == row.shape
    sizes = torch.bincount(ids, minlength=sum(per_row))
    assert sizes.numel() == sum(per_row)
    assert 1 <= int(sizes.min()) and int(sizes.max()) <= largest
    assert torch.equal(group_row[ids], row)


@pytest.mark.parametrize("dim", [1, 3, 64, 80, 256])
@pytest.mark.parametrize("segment", [16, 256, 2048])
def test_every_point_is_in_one_group_of_its_row(grouping: Group, dim: int, segment: int) -> None:
    rule = RULE._replace(segment=segment)
    ids, per_row = grouping(clustered(0, sum(ROW_LENS), dim), ROW_LENS, rule)
    _assert_partition(ids, per_row, ROW_LENS, RULE.largest)


@pytest.mark.parametrize("target", [1, 4, 9, 40])
@pytest.mark.parametrize("largest", [1, 2, 9])
@pytest.mark.parametrize("rounds", [0, 3])
def test_any_rule(grouping: Group, target: int, largest: int, rounds: int) -> None:
    rule = GroupRule(target, largest, rounds, rounds, 100, seed=7)
    ids, per_row = grouping(clustered(1, sum(ROW_LENS), 16), ROW_LENS, rule)
    _assert_partition(ids, per_row, ROW_LENS, largest)


def _with_lone_points() -> tuple[Tensor, Tensor]:
    """Return points, and the numbers of three among them that are unlike all others."""
    points = clustered(5, 512, 32, centres=100)
    lone = torch.tensor([101, 202, 303])
    points[lone] += points.norm(dim=1).max() * torch.eye(32)[:3]
    return points, lone


def test_a_point_unlike_its_group_is_cut_off(grouping: Group) -> None:
    """Promotion passes it over; in a group's mean it would be hidden from the query it is for."""
    points, lone = _with_lone_points()
    rule = GroupRule(target=8, largest=8, rounds=2, cuts=0, segment=512, seed=0)
    hidden, _ = grouping(points, [512], rule)
    found, _ = grouping(points, [512], rule._replace(cuts=4))
    assert (torch.bincount(hidden)[hidden[lone]] > 1).all()
    assert (torch.bincount(found)[found[lone]] == 1).all()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_build_cuts_leaves_and_keeps_their_number(backend: Any) -> None:
    points, lone = _with_lone_points()
    config = IceCacheConfig(backend=backend)
    plain = build_leaves(points, [512], config.replace(cut_rounds=0))
    cut = build_leaves(points, [512], config)
    assert not (torch.bincount(plain.ids)[plain.ids[lone]] == 1).all()
    assert (torch.bincount(cut.ids)[cut.ids[lone]] == 1).all()
    assert cut.per_row[0] == pytest.approx(plain.per_row[0], rel=0.1)


def test_nodes_are_not_cut() -> None:
    assert _rule_above(IceCacheConfig()).cuts == 0


def test_equal_points_are_not_cut(grouping: Group) -> None:
    """A rounded mean may lie to one side of all of them."""
    rule = GroupRule(target=7, largest=8, rounds=0, cuts=3, segment=2048, seed=0)
    points = torch.rand(100, 3, generator=rng(7)).repeat_interleave(7, 0)
    ids, (num,) = grouping(points, [700], rule)
    assert torch.bincount(ids).tolist() == [7] * 100
    assert num == 100


@pytest.mark.parametrize("segment", [80, 2048])
@pytest.mark.parametrize("cuts", [1, 3])
def test_an_eighth_of_every_segments_groups_is_cut(
    grouping: Group, segment: int, cuts: int
) -> None:
    """Of every segment, so that no part of a context is served at the cost of another."""
    points = clustered(6, 2 * segment, 16)
    points[:segment] *= 100.0
    rule = GroupRule(target=2, largest=2 * segment, rounds=0, cuts=0, segment=segment, seed=0)
    alone = rule._replace(target=segment, largest=segment)
    parts = grouping(points, [2 * segment], alone)[0]
    before = grouping(points, [2 * segment], rule)[0]
    after = grouping(points, [2 * segment], rule._replace(cuts=cuts))[0]
    for part in (0, 1):
        groups = before[parts == part].unique().numel()
        for _ in range(cuts):
            groups += groups // 8
        assert after[parts == part].unique().numel() == groups


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("segment", [64, 2048])
@pytest.mark.parametrize("lens", [ROW_LENS, [1500, 1900, 200, 2100]])
def test_a_row_alone_is_grouped_as_in_a_batch(
    grouping: Group, lens: list[int], dim: int, segment: int
) -> None:
    """Bit for bit: sums of a row's points must not depend on how many points there are in all."""
    points, rule = clustered(2, sum(lens), dim), RULE._replace(segment=segment)
    ids, per_row = grouping(points, lens, rule)
    first_point = first_group = 0
    for length, num_groups in zip(lens, per_row, strict=True):
        if length:
            alone, (num_alone,) = grouping(
                points[first_point : first_point + length], [length], rule
            )
            assert num_alone == num_groups
            in_batch = ids[first_point : first_point + length] - first_group
            assert torch.equal(alone, in_batch)
        first_point, first_group = first_point + length, first_group + num_groups


def test_one_thread_and_two_give_the_same_groups(grouping: Group) -> None:
    points, before = clustered(3, 4000, 64), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            results.append(grouping(points, [3000, 1000], RULE._replace(segment=2048)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert torch.equal(results[0][0], results[2][0]) and results[0][1] == results[2][1]


def test_the_seed_decides_which_keys_are_promoted(grouping: Group) -> None:
    points = clustered(4, 500, 16)
    first, _ = grouping(points, [500], RULE)
    other, per_row = grouping(points, [500], RULE._replace(seed=3))
    assert not torch.equal(first, other)
    _assert_partition(other, per_row, [500], RULE.largest)
    assert torch.equal(first, grouping(points, [500], RULE)[0])


@pytest.mark.parametrize("num", [1, 2, 8, 9, 5000])
def test_equal_points(grouping: Group, num: int) -> None:
    ids, per_row = grouping(torch.ones(num, 16), [num], RULE)
    _assert_partition(ids, per_row, [num], RULE.largest)
    # halving 5,000 again and again ends between 4 and 8
    assert per_row[0] <= max(1, num / (RULE.largest / 2))


def test_a_few_points_among_many_equal_ones_keep_apart(grouping: Group) -> None:
    points = torch.zeros(600, 16)
    points[::100] = 50 + torch.arange(6.0)[:, None]
    ids, per_row = grouping(points, [600], RULE)
    _assert_partition(ids, per_row, [600], RULE.largest)
    far = ids[::100]
    assert not bool(torch.isin(ids[points[:, 0] == 0], far).any())


def test_the_number_of_segments_grows_with_the_points_and_their_length_does_not() -> None:
    """What makes a build linear: ten times the points, ten times the segments, none longer."""
    for num in (2_000, 20_000):
        order, (segments,) = _segment_order(clustered(5, num, 8), [num], RULE)
        assert order.shape == (segments, -(-num // segments))
        assert order.shape[1] <= RULE.segment
        assert segments == -(-num // RULE.segment)
        assert order[order >= 0].sort().values.tolist() == list(range(num))


def test_segments_hold_near_points() -> None:
    """Points of a segment are nearer to each other than to points at large."""
    points = clustered(6, 4096, 16, centres=8)
    order, _ = _segment_order(points, [4096], RULE)
    within = torch.stack([points[segment].var(0).sum() for segment in order]).mean()
    assert float(within) < 0.5 * float(points.var(0).sum())


def test_groups_are_tight(grouping: Group) -> None:
    """The mean squared distance within groups is far below that of groups by position."""
    points = clustered(7, 2000, 32, centres=100)
    ids, per_row = grouping(points, [2000], RULE)
    by_position = torch.arange(2000) // 5
    assert _scatter(points, ids, per_row[0]) < 0.6 * _scatter(points, by_position, 400)


def _scatter(points: Tensor, ids: Tensor, num: int) -> float:
    counts = torch.bincount(ids, minlength=num).clamp(min=1)[:, None]
    mean = torch.zeros(num, points.shape[1]).index_add_(0, ids, points) / counts
    return float((points - mean[ids]).square().sum(1).mean())


def test_split_oversized_halves_along_the_main_direction() -> None:
    points = torch.zeros(10, 3)
    points[:, 1] = torch.tensor([3.0, -4, 1, -2, 5, -1, 2, -3, 4, -5])
    ids, owner = split_oversized(
        points, torch.zeros(10, dtype=torch.int64), 1, 5, torch.tensor([7])
    )
    assert owner.tolist() == [7, 7]
    assert len(set(ids[points[:, 1] > 0].tolist())) == 1
    assert len(set(ids[points[:, 1] < 0].tolist())) == 1
    assert ids.unique().tolist() == [0, 1]


def test_split_oversized_leaves_small_groups_alone() -> None:
    ids = torch.arange(20) // 4
    after, owner = split_oversized(clustered(8, 20, 4), ids, 5, 4, torch.arange(5))
    assert torch.equal(after, ids)
    assert owner.tolist() == list(range(5))


@pytest.mark.parametrize("num", [0, 1, 2, 3, 100, 129])
def test_bisect_order_is_a_permutation_of_near_points(num: int) -> None:
    points = torch.rand(num, 1, generator=rng(9))
    order = bisect_order(points)
    assert order.sort().values.tolist() == list(range(num))
    if num >= 100:
        step = points[order, 0].diff().abs().mean()
        assert float(step) < 5.0 / num


def test_sort_within_is_stable() -> None:
    ids, key = torch.tensor([1, 0, 1, 0, 1]), torch.tensor([2.0, 1.0, 1.0, 1.0, 2.0])
    assert sort_within(ids, key).tolist() == [1, 3, 2, 0, 4]


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_build_leaves_ignores_a_common_offset(backend: Any) -> None:
    """Keys with a large common offset are clustered as without it: they are centred first."""
    config = IceCacheConfig(backend=backend)
    keys = clustered(10, 600, 64).mul(1024).round() / 1024
    plain, shifted = (build_leaves(k, [400, 200], config) for k in (keys, keys + 4096.0))
    same = plain.ids == shifted.ids
    assert plain.per_row == shifted.per_row
    assert float(same.float().mean()) > 0.95


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_parents_hold_near_leaves_of_one_row(backend: Any) -> None:
    config, lens = IceCacheConfig(fan_out=4, backend=backend), [300, 0, 41]
    leaves = build_leaves(clustered(11, 341, 64), lens, config)
    _assert_partition(leaves.ids, leaves.per_row, lens, config.leaf_size)
    leaf_row = torch.repeat_interleave(torch.tensor(leaves.per_row))
    children = torch.bincount(leaves.parents)
    assert 1 <= int(children.min()) and int(children.max()) <= 2 * config.fan_out
    for parent in range(children.numel()):
        assert len(leaf_row[leaves.parents == parent].unique()) == 1
