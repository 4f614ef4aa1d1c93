"""The paper's variant: its lifted space and its pages."""

import pytest
import torch

from icecache import IceCacheConfig, IceCacheLayer
from icecache.tree.paper import lift, paper_leaves
from tests.helpers import clustered, make_query


@pytest.mark.parametrize("dim", [3, 64, 80])
def test_the_nearest_neighbour_in_lifted_space_has_the_largest_inner_product(dim: int) -> None:
    keys = clustered(0, 300, dim)
    lifted = lift(keys)
    assert lifted.shape == (300, dim + 1)
    torch.testing.assert_close(lifted.norm(dim=1), torch.ones(300))
    for query in make_query(1, 1, 1, 20, dim=dim)[0, 0]:
        point = torch.cat([query / query.norm(), torch.zeros(1)])
        distance = (lifted - point).double().square().sum(1)
        assert int(distance.argmin()) == int((keys.double() @ query.double()).argmax())
        # not only the nearest: the whole order is the inner product's
        falling = (keys @ query)[distance.argsort()]
        assert bool((falling.diff() <= 1e-3).all())


def test_lift_of_zero_keys_is_finite() -> None:
    lifted = lift(torch.zeros(4, 8))
    torch.testing.assert_close(lifted.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("lens", [[1], [33, 0, 500], [16, 1000]])
def test_pages_hold_every_key_once_and_at_most_the_target(lens: list[int]) -> None:
    config = IceCacheConfig.paper()
    leaves = paper_leaves(clustered(2, sum(lens), 64), lens, config)
    row = torch.repeat_interleave(torch.tensor(lens))
    leaf_row = torch.repeat_interleave(torch.tensor(leaves.per_row))
    sizes = torch.bincount(leaves.ids)
    assert sizes.numel() == sum(leaves.per_row) == leaves.parents.numel()
    assert 1 <= int(sizes.min()) and int(sizes.max()) <= config.leaf_target
    assert torch.equal(leaf_row[leaves.ids], row)


def test_a_row_alone_has_the_pages_it_has_in_a_batch() -> None:
    keys, config = clustered(3, 700, 64), IceCacheConfig.paper()
    both = paper_leaves(keys, [200, 500], config)
    alone = paper_leaves(keys[200:], [500], config)
    assert torch.equal(both.ids[200:] - both.per_row[0], alone.ids)
    assert both.per_row[1:] == alone.per_row


def test_the_seed_is_the_direction() -> None:
    keys = clustered(4, 400, 64)
    first, again, other = (
        paper_leaves(keys, [400], IceCacheConfig.paper(seed=seed)).ids for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_cell_of_equal_keys_is_cut_into_parents_of_bounded_size() -> None:
    """A parent of the build becomes a node of the tree, which holds so many leaves at most."""
    config = IceCacheConfig.paper(budget=128)
    layer = IceCacheLayer(config, num_kv_heads=1, head_dim=16, dtype=torch.float32)
    same = torch.ones(1, 1, 5000, 16)
    layer.prefill(same, same)
    layer.attend(same[:, :, :1])
    layer.check_integrity()
    for _ in range(60):
        layer.append(same[:, :, :1], same[:, :, :1])
    layer.check_integrity()
