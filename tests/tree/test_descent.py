"""The descent: what it looks at, what it leaves far, and the step that attends to both."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from icecache import IceCacheConfig, IceCacheLayer
from icecache.errors import InputError
from icecache.ops import batched, reference
from icecache.tree.search import TreeIndex
from tests.descent import slow_descent
from tests.helpers import (
    FAST_BACKENDS,
    HAS_NATIVE,
    PlainRows,
    fixed_log_sum_exp,
    largest_error,
    left_padded,
    make_query,
    make_tokens,
    poison,
    selected_by_leaves,
    slow_sparse,
)
from tests.trees import TINY, TINY_DIM, add_tokens, below, tiny_indexed

SCALING = TINY_DIM**-0.5
DEEP = {**TINY, "crossover": 0, "field_of_view": 5, "budget": 40, "sink": 3, "window": 8}


def _layer(
    dim: int = TINY_DIM, heads: int = 2, dtype: torch.dtype = torch.float32, **settings: Any
) -> IceCacheLayer:
    config = IceCacheConfig.from_kwargs(**{**DEEP, **settings})
    return IceCacheLayer(config, num_kv_heads=heads, head_dim=dim, dtype=dtype)


def _grown(layer: IceCacheLayer, lens: list[int], more: int = 12) -> PlainRows:
    """Give a layer a ragged prompt and then tokens one by one; return them."""
    shape = {"heads": layer.num_kv_heads, "dim": layer.head_dim, "dtype": layer.dtype}
    prompt, mask = make_tokens(0, len(lens), max(lens), **shape), left_padded(lens)
    layer.prefill(*prompt, mask)
    rows = PlainRows.of(prompt, mask)
    for i in range(more):
        token = make_tokens(100 + i, len(lens), 1, **shape)
        layer.append(*token)
        rows.append(token)
    poison(layer)
    return rows


@pytest.mark.parametrize("ops", [batched, reference], ids=["torch", "reference"])
@pytest.mark.parametrize(
    ("field", "softcap", "remainder"),
    [(1, None, True), (3, 4.0, True), (17, None, False), (100, None, True), (128, 2.0, True)],
)
def test_near_and_far_are_a_slow_twins(
    ops: Any, field: int, softcap: float | None, remainder: bool
) -> None:
    indexed = tiny_indexed(4, budget=64, crossover=0, field_of_view=field, remainder=remainder)
    add_tokens(indexed, 0, [700, 0, 40, 330])
    tree, config = indexed.tree, indexed._config
    query, beside = make_query(1, 4, 3, dim=TINY_DIM)[:, :, 0], torch.tensor([[1.0, -9.0, 3.0]] * 4)
    scores = TreeIndex(tree, config, ops).search(query, beside, SCALING, softcap)
    nodes_scored = leaves_scored = 0
    for row in range(4):
        found = slow_descent(tree, config, row, query[row], beside[row], SCALING, softcap)
        near = (scores.logits[row, 0] > -math.inf).nonzero()[:, 0].tolist()
        assert near == sorted(found.near), f"row {row}"
        nodes_scored += found.nodes_scored
        leaves_scored += len(found.near)
        far = 0 if scores.far is None else int((scores.far.logits[row, 0] > -math.inf).sum())
        assert far == len(found.far)
        # every token is below exactly one of the near leaves and far nodes
        ids = below(indexed, row).ids
        seen = torch.zeros(indexed.lens[row], dtype=torch.int64)
        for number, node in [(0, leaf) for leaf in found.near] + found.far:
            seen += ids[number] == node
            assert int((ids[number] == node).sum()) == tree.levels[number].count(row, node)
        assert bool((seen == 1).all())
    assert (scores.nodes_scored, scores.leaves_scored) == (nodes_scored, leaves_scored)


def test_far_logits_with_near_ones_are_the_log_sum_exp_beside() -> None:
    indexed = tiny_indexed(1, budget=64, crossover=0, field_of_view=4)
    add_tokens(indexed, 0, [700])
    query, beside = make_query(1, 1, 2, dim=TINY_DIM)[:, :, 0], torch.tensor([[0.0, -math.inf]])
    scores = TreeIndex(indexed.tree, indexed._config, batched).search(query, beside, SCALING, None)
    assert scores.far is not None
    far = (scores.far.logits + scores.far.correction).logsumexp(2)
    torch.testing.assert_close(scores.beside, torch.logaddexp(beside, far))
    # without weight and spread all logits are those of counts
    flat = TreeIndex(indexed.tree, indexed._config, batched).search(
        torch.zeros_like(query), beside, SCALING, None
    )
    assert flat.far is not None
    total = torch.cat([flat.logits, flat.far.logits], 2).logsumexp(2).exp()
    torch.testing.assert_close(total, torch.full((1, 2), 700.0))


@pytest.mark.skipif(not HAS_NATIVE, reason="the compiled ops are not installed")
@pytest.mark.parametrize(
    ("dim", "kv_heads", "group", "dtype", "settings", "ask"),
    [
        (16, 2, 3, torch.float32, {}, {}),
        (64, 1, 16, torch.bfloat16, {}, {"softcap": 3.0}),
        (80, 3, 1, torch.float16, {"remainder": False}, {"sink_logits": True}),
        (96, 2, 7, torch.float32, {"field_of_view": 1}, {"softcap": 5.0, "sink_logits": True}),
        (128, 1, 7, torch.bfloat16, {"spread_weight": 0.0}, {"scaling": 0.2}),
        (256, 1, 1, torch.float16, {"field_of_view": 40}, {"sink_logits": True}),
        (16, 1, 16, torch.float32, {"remainder": False, "fan_out": 5}, {"softcap": 2.0}),
        (80, 1, 3, torch.bfloat16, {"fan_out": 7, "spread_weight": 1.0}, {}),
    ],
)
def test_the_compiled_descent_is_its_twins(
    dim: int, kv_heads: int, group: int, dtype: torch.dtype, settings: dict, ask: dict
) -> None:
    layer = _layer(dim, kv_heads, dtype, backend="native", **settings)
    rows = _grown(layer, [420, 9, 170])
    assert layer._context.indexed.tree.top(0) >= 1  # type: ignore[union-attr]
    ask = {"scaling": dim**-0.5, **ask}
    if ask.get("sink_logits"):
        ask["sink_logits"] = torch.linspace(-1, 3, kv_heads * group)
    query = make_query(3, 3, kv_heads * group, dim=dim, dtype=dtype)
    before = layer.stats()
    out = layer.attend(query, **ask)
    after = layer.stats()
    step = layer.inspect(query, **ask)
    selected = selected_by_leaves(layer, step.chosen)
    truth = slow_sparse(layer, rows, query, selected, **ask)
    rounding = float(truth.abs().max()) * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    assert largest_error(out, truth) <= rounding + 2e-5
    assert after.nodes_scored - before.nodes_scored == step.nodes_scored > 0
    assert after.leaves_scored - before.leaves_scored == step.leaves_scored
    found = layer.search(query, **ask)
    _assert_found(found.positions, [s.positions for s in selected])
    assert (found.nodes_scored, found.leaves_scored) == (step.nodes_scored, step.leaves_scored)
    assert layer.stats() == after
    for name in ("torch", "reference"):
        layer._backend = name
        assert largest_error(layer.attend(query, **ask), truth) <= rounding + 2e-5
        _assert_found(layer.search(query, **ask).positions, [s.positions for s in selected])


def _assert_found(positions: Tensor, expected: list[list[int]]) -> None:
    """Assert that rows name these positions, each once, -1 behind."""
    assert positions.dtype == torch.int32
    for row, truth in zip(positions.tolist(), expected, strict=True):
        assert sorted(row[: len(truth)]) == sorted(truth)
        assert row[len(truth) :] == [-1] * (len(row) - len(truth))


@pytest.mark.parametrize("ask", [{}, {"softcap": 4.0}])
def test_pages_below_near_nodes_are_attended(ask: dict) -> None:
    layer = _layer(unit="page")
    rows = _grown(layer, [420, 170], more=3)
    query = make_query(3, 2, 6)
    step = layer.inspect(query, **ask)
    selected = selected_by_leaves(layer, step.chosen)
    truth = slow_sparse(layer, rows, query, selected, scaling=SCALING, **ask)
    assert largest_error(layer.attend(query, **ask), truth) <= 1e-5
    assert int(step.num_attended.max()) <= 40
    _assert_found(layer.search(query, **ask).positions, [s.positions for s in selected])


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_field_of_all_nodes_is_the_flat_scan(backend: str) -> None:
    query, outs = make_query(4, 2, 4), []
    for settings in ({"field_of_view": 10_000}, {"crossover": 10_000}):
        layer = _layer(backend=backend, **settings)
        _grown(layer, [420, 170], more=3)
        outs.append((layer.attend(query), layer.stats(), layer.search(query)))
    (wide, wide_stats, wide_found), (flat, flat_stats, flat_found) = outs
    # leaves come in another order where they are reached through nodes
    assert largest_error(wide, flat) <= (0.0 if backend == "torch" else 1e-6)
    assert wide_stats.nodes_scored == flat_stats.nodes_scored == 0
    assert wide_stats.leaves_scored == flat_stats.leaves_scored
    for mine, other in zip(wide_found.positions.tolist(), flat_found.positions.tolist()):
        assert sorted(mine) == sorted(other)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_work_stays_bounded_as_tokens_grow(backend: str) -> None:
    settings = {"field_of_view": 16, "fan_out": 4, "segment_tokens": 512, "backend": backend}
    work = []
    for tokens in (2000, 16_000):
        layer = _layer(heads=1, **settings)
        layer.prefill(*make_tokens(0, 1, tokens, heads=1))
        layer.attend(make_query(1, 1, 2))
        tree, stats = layer._context.indexed.tree, layer.stats()  # type: ignore[union-attr]
        top = tree.top(0)
        most = int(tree.levels[top].num[0]) + 16 * tree.most_children * top
        work.append(stats.nodes_scored + stats.leaves_scored)
        assert 0 < work[-1] <= most
        assert stats.leaves_scored <= 16 * tree.most_children
    assert work[1] <= 2 * work[0]


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_row_within_the_budget_is_attended_in_full(backend: str) -> None:
    """However narrow the field of view: the longer row beside it does not matter."""
    layer = _layer(backend=backend, budget=400, field_of_view=2)
    rows, query = _grown(layer, [600, 380], more=3), make_query(5, 2, 4)
    assert layer._context.indexed.tree.top(2) >= 1  # type: ignore[union-attr]
    out = layer.attend(query)
    assert largest_error(out[1], rows.attend(1, query[1])) <= 1e-5
    assert layer.inspect(query).num_attended.tolist()[2:] == [383, 383]


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_search_answers_an_indexed_layer_and_one_query_token(backend: str) -> None:
    layer = _layer(backend=backend)
    with pytest.raises(InputError, match="search needs an indexed context, the layer is empty"):
        layer.search(make_query(0, 1, 4))
    layer.prefill(*make_tokens(0, 1, 40))
    with pytest.raises(InputError, match="search needs an indexed context, the layer is dense"):
        layer.search(make_query(0, 1, 4))
    layer.append(*make_tokens(1, 1, 1))
    with pytest.raises(InputError, match="search takes one query token, got 2"):
        layer.search(make_query(0, 1, 4, 2))
    assert layer.search(make_query(0, 1, 4)).positions.shape[0] == 2


def test_what_is_beside_decides_what_a_descent_expands() -> None:
    """Sink, window and far nodes have their part of the shares of the near leaves."""
    layer = _layer(backend="torch")
    rows, query = _grown(layer, [600]), make_query(6, 1, 4)
    step = layer.inspect(query)
    beside = fixed_log_sum_exp(layer, rows, query, SCALING)
    tree = layer._context.indexed.tree  # type: ignore[union-attr]
    for row in range(2):
        own = query[0, 2 * row : 2 * row + 2, 0]
        found = slow_descent(tree, layer.config, row, own, beside[row], SCALING)
        # shares of near leaves are of everything: sink, window, far nodes and themselves
        assert float(step.share[row].sum(1).max()) < 1.0
        assert step.share[row, 0].nonzero()[:, 0].tolist() == sorted(found.near)


@pytest.mark.skipif(not HAS_NATIVE, reason="the compiled ops are not installed")
@pytest.mark.parametrize("crossover", [0, 10_000])
def test_few_of_thousands_of_leaves_are_the_twins(crossover: int) -> None:
    """The compiled choice puts only few candidates in order."""
    layer = _layer(crossover=crossover, field_of_view=900, backend="native")
    layer.prefill(*make_tokens(0, 1, 5000))
    query = make_query(1, 1, 6)
    layer.attend(query)
    step = layer.inspect(query)
    found = layer.search(query)
    assert step.leaves_scored >= 2 * 1100
    selected = selected_by_leaves(layer, step.chosen)
    _assert_found(found.positions, [s.positions for s in selected])
