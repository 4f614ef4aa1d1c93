"""Build: keys to leaves, leaves to parents, for all rows at once."""

from typing import NamedTuple

import torch
from torch import Tensor

from icecache.config import IceCacheConfig
from icecache.errors import HostMemoryExceeded
from icecache.ops.batched import sum_groups
from icecache.ops.dispatch import resolve_backend
from icecache.ops.native import load, pointer
from icecache.tree.cluster import WIDEST_SHARE, GroupRule, group
from icecache.tree.native_group import group_native

__all__ = ["Leaves", "build_leaves", "group_nodes", "siblings_native", "siblings_together"]


class Leaves(NamedTuple):
    """Leaves over flat tokens, row after row.

    Attributes
    ----------
    ids : shape [tokens], int64. Each token's leaf, numbered over all rows.
    per_row : leaves of each row.
    parents : shape [leaves], int64. Each leaf's parent node, numbered over all rows, rising: the
        leaves of a parent follow each other.
    """

    ids: Tensor
    per_row: list[int]
    parents: Tensor


def build_leaves(keys: Tensor, row_lens: list[int], config: IceCacheConfig) -> Leaves:
    """Cluster keys into leaves and leaves into parents.

    Parameters
    ----------
    keys : Tensor, shape [tokens, head_dim]
        The rows' keys, one row after the other.
    row_lens : list of int
        Tokens per row; may be 0.
    config : IceCacheConfig
        `leaf_target`, `leaf_size`, `refine_rounds`, `cut_rounds`, `segment_tokens`, `fan_out`,
        `seed`.
    """
    if keys.device.type == "cpu" and resolve_backend(config.backend) == "native":
        return _build_native(keys, row_lens, config)
    keys = keys.float()
    ids, per_row = group(keys, row_lens, _rule(config))
    num = sum(per_row)
    leaf_mean = sum_groups(keys, ids, num) / torch.bincount(ids, minlength=num)[:, None]
    parents, _ = group_nodes(leaf_mean, per_row, config)
    return siblings_together(Leaves(ids, per_row, parents))


def group_nodes(
    means: Tensor, row_lens: list[int], config: IceCacheConfig
) -> tuple[Tensor, list[int]]:
    """Group leaves or nodes by their mean keys; arguments and result as `cluster.group`."""
    on_cpu = means.device.type == "cpu"
    by_nearness = group_native if on_cpu and resolve_backend(config.backend) == "native" else group
    return by_nearness(means, row_lens, _rule_above(config))


def siblings_together(leaves: Leaves) -> Leaves:
    """Return the same leaves, numbered so that those of one parent follow each other."""
    order = torch.argsort(leaves.parents, stable=True)
    number = torch.empty_like(order)
    number[order] = torch.arange(order.numel(), device=order.device)
    return Leaves(number[leaves.ids], leaves.per_row, leaves.parents[order])


def _build_native(keys: Tensor, row_lens: list[int], config: IceCacheConfig) -> Leaves:
    """Build row by row: beside the keys there are never more than one row's means in float32."""
    ids = torch.empty(keys.shape[0], dtype=torch.int64)
    per_row: list[int] = []
    parents: list[Tensor] = []
    first = num_parents = 0
    for row_keys in torch.split(keys, row_lens):
        means = torch.empty(row_keys.shape)
        row_ids, (num,) = group_native(row_keys, [row_keys.shape[0]], _rule(config), means)
        row_parents, (more,) = group_native(means[:num], [num], _rule_above(config))
        torch.add(row_ids, sum(per_row), out=ids[first : first + row_ids.numel()])
        parents.append(row_parents.add_(num_parents))
        per_row.append(num)
        first, num_parents = first + row_ids.numel(), num_parents + more
    return siblings_native(Leaves(ids, per_row, torch.cat(parents)))


def siblings_native(leaves: Leaves) -> Leaves:
    """Number leaves in place, by the compiled op; argument and result as `siblings_together`."""
    ids, parents = leaves.ids, leaves.parents
    if load().icecache_siblings(pointer(parents), parents.numel(), pointer(ids), ids.numel()):
        raise HostMemoryExceeded(12 * parents.numel(), 0)
    return leaves


def _rule_above(config: IceCacheConfig) -> GroupRule:
    largest = 2 * config.fan_out
    return _rule(config)._replace(target=config.fan_out, largest=largest, rounds=1, cuts=0)


def _rule(config: IceCacheConfig) -> GroupRule:
    # every round of cuts makes an eighth more leaves of what was promoted
    grown = (1 + 1 / WIDEST_SHARE) ** config.cut_rounds
    return GroupRule(
        round(config.leaf_target * grown),
        config.leaf_size,
        config.refine_rounds,
        config.cut_rounds,
        config.segment_tokens,
        config.seed,
    )
