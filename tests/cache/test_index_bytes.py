"""The formula of docs/parameters.md is what the layer counts."""

import math

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
    leaf, page, node = 2 * dim + 15 + math.ceil(config.page_size / 8), 13, 2 * dim + 18
    row = 4 * dim + 4 * (config.page_size + 1)
    formula = leaf * stats.leaves + page * stats.pages + node * stats.nodes + 2 * row
    assert stats.index_bytes == formula
    if dim == 64:
        assert formula / tokens <= 40
