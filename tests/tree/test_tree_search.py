"""Search by summaries against the truth: leaves of one key are scored exactly, others nearly."""

import math

import pytest
import torch
from torch import Tensor

from icecache.config import IceCacheConfig
from icecache.ops import batched
from icecache.tree.build import build_leaves
from icecache.tree.exact import ExactIndex
from icecache.tree.search import LeafScores, TreeIndex
from icecache.tree.tree import Tree
from tests.helpers import clustered, make_query

DIM, TOKENS = 64, 600
SCALING = DIM**-0.5


def _index(keys: Tensor, config: IceCacheConfig) -> tuple[TreeIndex, Tensor]:
    """Return the index of one row's keys, all leaves flat, and each token's leaf."""
    leaves = build_leaves(keys, [keys.shape[0]], config)
    tree = Tree(config, 1, DIM)
    tree.leaves.add(0, leaves.per_row[0])
    for leaf in range(leaves.per_row[0]):
        tree.leaves.place(0, leaf, leaf, list(range(int((leaves.ids == leaf).sum()))))
    numbers = torch.arange(leaves.per_row[0])
    tree.leaves.summarize(torch.zeros_like(numbers), numbers, leaves.ids, keys, keys)
    return TreeIndex(tree, config, batched), leaves.ids


def _exact(keys: Tensor, query: Tensor, softcap: float | None) -> LeafScores:
    valid = torch.ones(1, keys.shape[0], dtype=torch.bool)
    return ExactIndex(keys[None], valid).search(query, _nothing(query), SCALING, softcap)


def _nothing(query: Tensor) -> Tensor:
    """Return the log-sum-exp of nothing beside the leaves."""
    return query.new_full(query.shape[:2], -math.inf)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_leaf_of_one_key_is_scored_as_the_key(softcap: float | None) -> None:
    keys = clustered(0, TOKENS, DIM)
    index, ids = _index(keys, IceCacheConfig(leaf_size=1, leaf_target=1))
    query = make_query(1, 1, 3, dim=DIM)[:, :, 0]
    scores = index.search(query, _nothing(query), SCALING, softcap)
    exact = _exact(keys, query, softcap)
    # a code is off by half a scale at most, a 254th of the key's largest number
    rounding = float(keys.abs().max()) / 254 * float(query.abs().sum(-1).max()) * SCALING
    assert float((scores.logits[:, :, ids] - exact.logits).abs().max()) <= rounding
    assert float(scores.correction.max()) <= 1e-2


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_leafs_score_is_nearly_its_keys_log_sum_exp(softcap: float | None) -> None:
    keys = clustered(2, TOKENS, DIM)
    index, ids = _index(keys, IceCacheConfig())
    query = make_query(3, 1, 4, dim=DIM)[:, :, 0]
    scores = index.search(query, _nothing(query), SCALING, softcap)
    exact = _exact(keys, query, softcap).logits[0]
    truth = torch.stack(
        [exact[:, ids == leaf].logsumexp(1) for leaf in range(int(ids.max()) + 1)], 1
    )
    # Jensen: the mean key alone never says too much (but for its rounding), the whole too little
    assert bool((scores.logits[0] <= truth + 0.05).all())
    error = (scores.logits[0] + 0.5 * scores.correction[0] - truth).abs().mean()
    assert float(error) < float((scores.logits[0] - truth).abs().mean()) < 0.3
    assert float(scores.correction.max()) <= 2.0


def test_the_best_leaves_hold_most_of_the_best_keys() -> None:
    keys = clustered(4, TOKENS, DIM)
    index, ids = _index(keys, IceCacheConfig())
    query = make_query(5, 1, 1, dim=DIM)[:, :, 0]
    scores = index.search(query, _nothing(query), SCALING, None)
    best_leaves = (scores.logits + scores.correction)[0, 0].topk(40).indices
    best_keys = _exact(keys, query, None).logits[0, 0].topk(50).indices
    recall = torch.isin(ids[best_keys], best_leaves).float().mean()
    assert float(recall) >= 0.8


def test_exact_search_is_the_plain_product() -> None:
    keys, query = clustered(6, 2, 9, DIM), make_query(7, 2, 3, dim=DIM)[:, :, 0]
    valid = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    scores = ExactIndex(keys, valid).search(query, _nothing(query), 0.2, 3.0)
    truth = 3.0 * torch.tanh(torch.einsum("rhd,rtd->rht", query, keys) * 0.2 / 3.0)
    torch.testing.assert_close(scores.logits[0], truth[0])
    torch.testing.assert_close(scores.logits[1, :, :4], truth[1, :, :4])
    assert bool((scores.logits[1, :, 4:] == -math.inf).all())
    assert not bool(scores.correction.any())
    assert (scores.nodes_scored, scores.leaves_scored) == (0, 13)


def test_a_short_row_is_scanned_flat() -> None:
    index, ids = _index(clustered(8, TOKENS, DIM), IceCacheConfig())
    query = make_query(9, 1, 2, dim=DIM)[:, :, 0]
    beside = torch.tensor([[0.5, -3.0]])
    scores = index.search(query, beside, SCALING, None)
    assert scores.far is None
    assert torch.equal(scores.beside, beside)
    assert (scores.nodes_scored, scores.leaves_scored) == (0, int(ids.max()) + 1)
