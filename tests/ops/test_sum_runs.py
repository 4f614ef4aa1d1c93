"""Sums of groups as other devices add them: the same as on a CPU."""

import pytest
import torch

from icecache.ops.batched import sum_groups, sum_runs


@pytest.mark.parametrize("num", [1, 7, 300])
def test_runs_are_groups_in_order(num: int) -> None:
    points, ids = torch.randn(1000, 5), torch.randint(num, (1000,))
    order = torch.argsort(ids, stable=True)
    runs = sum_runs(points[order], torch.bincount(ids, minlength=num))
    torch.testing.assert_close(runs, sum_groups(points, ids, num))


def test_an_empty_run_is_zero() -> None:
    assert sum_runs(torch.ones(3, 2), torch.tensor([2, 0, 1])).tolist() == [[2, 2], [0, 0], [1, 1]]
