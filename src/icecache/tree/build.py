"""Build: keys to leaves, leaves to parents, for all rows at once.

Each KV head's mean key is subtracted first: distances between keys with a large common offset
lose their digits in low precision, and lengths stop meaning anything.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from icecache.config import IceCacheConfig
from icecache.ops.batched import summarize
from icecache.tree.cluster import GroupRule, group

__all__ = ["Leaves", "build_leaves"]


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
    row = torch.repeat_interleave(torch.tensor(row_lens))
    _, mean, _, _ = summarize(keys, keys[:, :0], row, len(row_lens))
    centred = keys - mean[row]
    rule = GroupRule(
        config.leaf_target,
        config.leaf_size,
        config.refine_rounds,
        config.segment_tokens,
        config.seed,
    )
    ids, per_row = group(centred, row_lens, rule)
    _, leaf_mean, _, _ = summarize(centred, centred[:, :0], ids, sum(per_row))
    above = rule._replace(target=config.fan_out, largest=2 * config.fan_out, rounds=1)
    parents, _ = group(leaf_mean, per_row, above)
    return Leaves(ids, per_row, parents)
