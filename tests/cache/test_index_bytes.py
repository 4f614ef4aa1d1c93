"""The formula of docs/parameters.md is what the layer counts."""

import pytest
import torch

from icecache import IceCacheConfig, IceCacheLayer
from tests.helpers import clustered


@pytest.mark.parametrize(("dim", "leaf_size", "leaf_target"), [(64, 8, 5), (128, 8, 5), (80, 4, 3)])
def test_index_bytes_follow_the_formula(dim: int, leaf_size: int, leaf_target: int) -> None:
    config = IceCacheConfig(leaf_size=leaf_size, leaf_target=leaf_target)
    layer = IceCacheLayer(config, num_kv_heads=2, head_dim=dim, dtype=torch.bfloat16)
    keys = clustered(0, 2 * 4000, dim, centres=80).view(1, 2, -1, dim).bfloat16()
    layer.prefill(keys, keys)
    layer.attend(keys[:, :, :1])
    stats = layer.stats()
    tokens = 2 * (4000 - config.sink - config.window)
    mean_leaf, per_page = tokens / stats.leaves, tokens / stats.pages
    formula = (2 * dim + 17 + leaf_size) / mean_leaf + 5 / per_page
    assert stats.index_bytes / tokens == pytest.approx(formula)
    if dim == 64:
        assert formula <= 40
