"""Attending to another layer's selection."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from icecache import IceCacheConfig, IceCacheLayer
from icecache.errors import ConfigError, InputError
from tests.descent import heard
from tests.helpers import FAST_BACKENDS, clustered, largest_error, poison

HEADS, GROUP, DIM, TOKENS = 2, 3, 16, 300
SCALING = DIM**-0.5
SETTINGS = {
    **{"budget": 48, "sink": 4, "window": 8, "leaf_size": 6, "leaf_target": 4, "page_size": 8},
    "layer_reuse": 2,
}


def _layer(seed: int, backend: str = "auto", **settings: Any) -> tuple[IceCacheLayer, Tensor]:
    """Return an indexed layer of two rows, one shorter, and its keys and values."""
    config = IceCacheConfig.from_kwargs(**{**SETTINGS, "backend": backend, **settings})
    layer = IceCacheLayer(config, num_kv_heads=HEADS, head_dim=DIM, dtype=torch.float32)
    tokens = torch.stack([clustered(seed + i, 2, HEADS, TOKENS, DIM) for i in range(2)])
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, :90] = False
    layer.prefill(*tokens[:, :, :, :-20], mask[:, :-20])
    for i in range(TOKENS - 20, TOKENS):
        layer.append(*tokens[:, :, :, i : i + 1])
    poison(layer)
    return layer, tokens


def _query(seed: int) -> Tensor:
    return clustered(seed, 2, HEADS * GROUP, 1, DIM)


def _expected(
    layer: IceCacheLayer, tokens: Tensor, query: Tensor, positions: Tensor, softcap: float | None
) -> Tensor:
    """Return the output, token by token: given ones exactly, the others of a leaf by its mean."""
    context = layer._context
    assert context is not None and context.indexed is not None
    leaves, config = context.indexed.leaves, layer.config
    places, own = context.indexed.tokens()
    out = torch.empty(2 * HEADS, GROUP, DIM)
    for row in range(2 * HEADS):
        pad = 90 if row >= HEADS else 0
        keys, values = tokens[:, row // HEADS, row % HEADS, pad:].double()
        num = keys.shape[0]
        exact = {*range(config.sink), *range(num - config.window, num)}
        exact |= {p for p in positions[row].tolist() if config.sink <= p < num - config.window}
        s = leaves.at(row, torch.arange(int(leaves.num[row])))
        shares: list[Tensor] = []
        parts: list[Tensor] = []
        for head in range(GROUP):
            q = query[row // HEADS, row % HEADS * GROUP + head, 0].double()
            logits = [SCALING * float(q @ keys[p]) for p in sorted(exact)]
            parts = [values[p] for p in sorted(exact)]
            if softcap is not None:
                logits = [softcap * math.tanh(x / softcap) for x in logits]
            for leaf in range(int(leaves.num[row])):
                at = context.indexed.pool.positions_of(places[row, leaf][own[row, leaf]])
                left = [p for p in at.tolist() if p not in exact]
                if not left:
                    continue
                mean = (leaves.centre[row] + s.keys()[leaf]).double()
                logit, spread = SCALING * float(q @ mean), float(s.spread[leaf]) / DIM
                second = 0.5 * SCALING**2 * float(q @ q) * spread
                if softcap is not None:
                    slope = 1 - math.tanh(logit / softcap) ** 2
                    logit, second = softcap * math.tanh(logit / softcap), second * slope**2
                logits.append(logit + math.log(len(left)) + config.spread_weight * min(second, 2.0))
                parts.append(s.values()[leaf].double())
            shares.append(torch.softmax(torch.tensor(logits, dtype=torch.float64), 0))
        share, value, num = torch.stack(shares), torch.stack(parts), len(exact)
        out[row] = share[:, :num] @ value[:num] + heard(share[:, num:], 0.03) @ value[num:]
    return out.view(2, HEADS * GROUP, 1, DIM)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("crossover", [0, 16384])
@pytest.mark.parametrize("backend", [*FAST_BACKENDS, "reference"])
def test_given_tokens_are_exact_and_the_rest_is_what_leaves_have_left(
    backend: str, crossover: int, softcap: float | None
) -> None:
    leader, _ = _layer(0, backend, crossover=crossover)
    layer, tokens = _layer(10, backend, crossover=crossover)
    leader.attend(_query(3))
    positions = leader.selection
    assert positions is not None
    query = _query(4)
    out = layer.attend(query, positions=positions, softcap=softcap)
    assert largest_error(out, _expected(layer, tokens, query, positions, softcap)) < 2e-5
    stats = layer.stats()
    assert (stats.sparse_steps, stats.reused_steps) == (1, 1)
    assert leader.stats().reused_steps == 0
    assert layer.selection is positions
    # every leaf is scored: what is not given needs an estimate
    assert stats.leaves_scored == stats.leaves and stats.nodes_scored == 0


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_layers_own_selection_of_whole_leaves_changes_nothing(backend: str) -> None:
    layer, _ = _layer(0, backend)
    query = _query(5)
    own = layer.attend(query)
    assert layer.selection is not None
    assert torch.equal(layer.selection.sort(1).values, layer.search(query).positions.sort(1).values)
    again = layer.attend(query, positions=layer.selection)
    assert largest_error(again, own) < 1e-6


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_tokens_elsewhere_are_passed_over(backend: str) -> None:
    layer, tokens = _layer(0, backend)
    query = _query(6)
    positions = torch.tensor([[0, 3, TOKENS - 1, TOKENS + 500, -1, 40]] * 4)
    out = layer.attend(query, positions=positions)
    assert largest_error(out, _expected(layer, tokens, query, positions, None)) < 2e-5
    nothing = layer.attend(query, positions=positions[:, :0])
    assert largest_error(nothing, _expected(layer, tokens, query, positions[:, :0], None)) < 2e-5
    assert layer.stats().tokens_attended == 12.0


def test_bad_positions_change_nothing() -> None:
    layer, _ = _layer(0)
    query, good = _query(7), torch.full((4, 2), 50)
    room = 48 - 12
    for positions, query_tokens, message in (
        (good.float(), query, "must be integers"),
        (good[0], query, "must be integers"),
        (good[:3], query, "of 4 rows"),
        (torch.zeros(4, room + 1, dtype=torch.int32), query, f"at most {room} tokens"),
    ):
        with pytest.raises(InputError, match=message):
            layer.attend(query_tokens, positions=positions)
    with pytest.raises(InputError, match=r"torch\.Tensor"):
        layer.attend(query, positions=[1])  # type: ignore[arg-type]
    assert layer.stats().sparse_steps == 0
    layer.append(*torch.randn(2, 2, HEADS, 3, DIM))
    with pytest.raises(InputError, match="one query token"):
        layer.attend(query.expand(-1, -1, 3, -1), positions=good)


def test_a_context_within_the_budget_needs_no_selection() -> None:
    config = IceCacheConfig.from_kwargs(**SETTINGS)
    layer = IceCacheLayer(config, num_kv_heads=1, head_dim=DIM, dtype=torch.float32)
    tokens = clustered(0, 2, 1, 1, 30, DIM)
    layer.prefill(*tokens)
    query = clustered(1, 1, 2, 1, DIM)
    full = layer.attend(query)
    assert layer.selection is None
    positions = torch.tensor([[5]], dtype=torch.int32)
    assert torch.equal(layer.attend(query, positions=positions), full)
    assert layer.stats().reused_steps == 0


def test_no_selection_is_kept_where_none_is_reused() -> None:
    layer, _ = _layer(0, layer_reuse=1)
    layer.attend(_query(8))
    assert layer.selection is None


def test_only_the_tree_shares_selections() -> None:
    with pytest.raises(ConfigError, match="layer_reuse must be 1"):
        IceCacheConfig(selection="exact", layer_reuse=2)
