"""What the tests of the tree share: trees of random tokens, and the truth of their summaries."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from icecache import IceCacheConfig
from icecache.cache.flat import FlatTokens
from icecache.cache.indexed import IndexedTokens
from icecache.ops import batched
from tests.descent import children_of
from tests.helpers import clustered

# leaves of up to three tokens, nodes of two to four: a few hundred tokens reach several levels
TINY = {"leaf_size": 3, "leaf_target": 2, "page_size": 7, "fan_out": 2, "segment_tokens": 64}
TINY_DIM = 16


class Below(NamedTuple):
    """The tokens of one row and what each is below.

    Attributes
    ----------
    keys, values : shape [tokens, dim]
    ids : per level, shape [tokens], int64. The leaf or node of each token.
    """

    keys: Tensor
    values: Tensor
    ids: list[Tensor]


def tiny_indexed(num_rows: int, dim: int = TINY_DIM, **settings: Any) -> IndexedTokens:
    """Return an index of no tokens whose leaves and nodes are tiny."""
    config = IceCacheConfig.from_kwargs(**{**TINY, **settings})
    return IndexedTokens(config, num_rows, dim, torch.float32)


def add_tokens(indexed: IndexedTokens, seed: int, per_row: list[int], dim: int = TINY_DIM) -> None:
    """Add so many clustered tokens to each row."""
    total, lens = sum(per_row), indexed.lens
    positions = [torch.arange(have, have + new) for have, new in zip(lens, per_row, strict=True)]
    rows = torch.repeat_interleave(torch.arange(len(per_row)), torch.tensor(per_row))
    keys, values = clustered(seed, total, dim, centres=30), clustered(seed + 1, total, dim)
    indexed.add(FlatTokens(keys, values, rows, torch.cat(positions)))


def check(indexed: IndexedTokens) -> None:
    """Check an index that holds its rows' first tokens."""
    indexed.check_integrity([range(have) for have in indexed.lens])


def below(indexed: IndexedTokens, row: int) -> Below:
    """Return a row's tokens and the leaf and the nodes that each is below."""
    tokens, real = indexed.tokens()
    leaf, slot = real[row].nonzero(as_tuple=True)
    ids = [leaf]
    for number in range(1, indexed.tree.top(row) + 1):
        children = children_of(indexed.tree, number, row)
        parent = torch.full((int(indexed.tree.levels[number - 1].num[row]),), -1)
        for node, each in enumerate(children):
            parent[torch.tensor(each)] = node
        ids.append(parent[ids[-1]])
    return Below(*indexed.pool.read(tokens[row][leaf, slot]), ids)


def assert_true_summaries(indexed: IndexedTokens) -> None:
    """Assert that every leaf and node says what all of the tokens below it give."""
    for row in range(indexed.tree.num_rows):
        truth = below(indexed, row)
        largest_scale = {"key": 0.0, "value": 0.0}
        for number, ids in enumerate(truth.ids):
            level = indexed.tree.levels[number]
            num = int(level.num[row])
            if num == 0:
                continue
            count, *means, spread = batched.summarize(truth.keys, truth.values, ids, num)
            s = level.at(row, torch.arange(num))
            mean_keys = indexed.leaves.centre[row] + s.keys()
            assert s.count.tolist() == count.tolist(), f"row {row}, level {number}"
            for name, kept, mean in zip(("key", "value"), (mean_keys, s.values()), means):
                scale = float(getattr(s, f"{name}_scale").max())
                largest_scale[name] = max(largest_scale[name], scale)
                # each level rounds once, to half a code and a little more where bfloat16 clips
                off = float((kept - mean).abs().max())
                assert off <= 0.8 * (number + 1) * largest_scale[name] + 1e-5, (
                    f"{row}, {number}, {name}"
                )
            # rounding is counted as spread, once a level; the spreads are bfloat16
            rounding = (number + 1) * level.head_dim * largest_scale["key"] ** 2
            off = (s.spread.float() - spread).abs() - 2**-7 * (number + 1) * spread
            assert float(off.max()) <= rounding + 1e-9, f"row {row}, level {number}"
