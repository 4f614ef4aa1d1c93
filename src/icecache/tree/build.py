"""Build: keys to leaves, leaves to parents, for all rows at once."""

from typing import NamedTuple

import torch
from torch import Tensor

from icecache.config import IceCacheConfig
from icecache.ops.batched import sum_groups
from icecache.ops.dispatch import resolve_backend
from icecache.tree.cluster import GroupRule, group
from icecache.tree.native_group import group_native

__all__ = ["Leaves", "build_leaves", "group_nodes"]


class Leaves(NamedTuple):
    """Leaves over flat tokens, row after row.

    Attributes
    ----------
    ids : shape [tokens], int64. Each token's leaf, numbered over all rows.
    per_row : leaves of each row.
    parents : shape [leaves], int64. Each leaf's parent node, numbered over all rows.
    """

    ids: Tensor
    per_row: list[int]
    parents: Tensor


def build_leaves(keys: Tensor, row_lens: list[int], config: IceCacheConfig) -> Leaves:
    """Cluster keys into leaves and leaves into parents.

    Parameters
    ----------
    keys : Tensor, shape [tokens, head_dim], float32
        The rows' keys, one row after the other.
    row_lens : list of int
        Tokens per row; may be 0.
    config : IceCacheConfig
        `leaf_target`, `leaf_size`, `refine_rounds`, `segment_tokens`, `fan_out`, `seed`.
    """
    ids, per_row = _group(keys, row_lens, _rule(config), config)
    num = sum(per_row)
    leaf_mean = sum_groups(keys, ids, num) / torch.bincount(ids, minlength=num)[:, None]
    parents, _ = group_nodes(leaf_mean, per_row, config)
    return Leaves(ids, per_row, parents)


def group_nodes(
    means: Tensor, row_lens: list[int], config: IceCacheConfig
) -> tuple[Tensor, list[int]]:
    """Group leaves or nodes by their mean keys; arguments and result as `cluster.group`."""
    above = _rule(config)._replace(target=config.fan_out, largest=2 * config.fan_out, rounds=1)
    return _group(means, row_lens, above, config)


def _group(
    points: Tensor, row_lens: list[int], rule: GroupRule, config: IceCacheConfig
) -> tuple[Tensor, list[int]]:
    by_nearness = group_native if resolve_backend(config.backend) == "native" else group
    return by_nearness(points, row_lens, rule)


def _rule(config: IceCacheConfig) -> GroupRule:
    return GroupRule(
        config.leaf_target,
        config.leaf_size,
        config.refine_rounds,
        config.segment_tokens,
        config.seed,
    )
