"""Entries of the remainder that hardly weigh: their values are not read, their weight stays."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from icecache import IceCacheConfig, IceCacheLayer
from icecache.ops import batched, reference
from icecache.ops.native import pointer
from icecache.tree.level import Level
from tests.helpers import (
    FAST_BACKENDS,
    PlainRows,
    largest_error,
    make_query,
    make_tokens,
    selected_by_leaves,
    slow_sparse,
)

OPS = pytest.mark.parametrize("ops", [batched, reference], ids=["torch", "reference"])


def _attend(ops: ModuleType, shares: Tensor, exact: float) -> Tensor:
    """Attend to a token without value and to entries, each with a value of its own.

    shares: [heads, entries], their parts of all attention; exact: the token's, the same for every
    head. Returns what each entry weighs in the output.
    """
    heads, entries = shares.shape
    query = torch.ones(1, heads, 1)
    key = torch.full((1, 1, 1), float(torch.tensor(exact).log()))
    codes, scale = torch.eye(entries, dtype=torch.int8)[None], torch.ones(1, entries)
    value = torch.zeros(1, 1, entries)
    valid = torch.ones(1, 1, dtype=torch.bool)
    logits = shares.log()[None]
    return ops.attend_parts(query, key, value, valid, logits, codes, scale, None, 1.0, None)[0]


@OPS
def test_light_entries_give_their_weight_to_the_others(ops: ModuleType) -> None:
    # of four entries, those below 0.03 / 4 for both heads are light
    shares = torch.tensor([[0.3, 0.1, 0.007, 0.003], [0.4, 0.0, 0.01, 0.002]])
    out = _attend(ops, shares, 0.59) * (0.59 + shares.sum(1, keepdim=True))
    heard = torch.tensor([[0.3, 0.1, 0.007, 0.0], [0.4, 0.0, 0.01, 0.0]])
    more = torch.tensor([[0.41 / 0.407], [0.412 / 0.41]])
    torch.testing.assert_close(out, heard * more, rtol=1e-4, atol=1e-7)


@OPS
def test_entries_that_are_all_light_are_dropped(ops: ModuleType) -> None:
    out = _attend(ops, torch.full((2, 4), 1e-4), 1.0)
    assert float(out.abs().max()) == 0.0


@OPS
def test_entries_of_one_weight_are_all_heard(ops: ModuleType) -> None:
    out = _attend(ops, torch.full((2, 50), 0.01), 0.5)
    torch.testing.assert_close(out, torch.full((2, 50), 0.01))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("settings", [{}, {"crossover": 0, "field_of_view": 20}])
def test_sharp_queries_hear_few_entries(backend: str, settings: dict[str, int]) -> None:
    config = IceCacheConfig.from_kwargs(
        **{"budget": 64, "sink": 8, "window": 12, "backend": backend, **settings}
    )
    layer = IceCacheLayer(config, num_kv_heads=2, head_dim=64, dtype=torch.float32)
    prompt = make_tokens(0, 1, 2000, heads=2, dim=64)
    layer.prefill(*prompt)
    query = 4 * make_query(1, 1, 6, dim=64)
    out = layer.attend(query, scaling=0.125)
    selected = selected_by_leaves(layer, layer.inspect(query, scaling=0.125).chosen)
    rows = PlainRows.of(prompt)
    truth = slow_sparse(layer, rows, query, selected, scaling=0.125)
    assert largest_error(out, truth) <= 1e-5
    everything = slow_sparse(layer, rows, query, selected, scaling=0.125, least=0.0)
    # the light ones are what makes the difference, and it is small
    assert 2e-5 < largest_error(truth, everything) < 0.03


@pytest.mark.parametrize("capacity", [1, 64, 97])
def test_summaries_begin_with_a_cache_line(capacity: int) -> None:
    level = Level(3, 80)
    level.reserve(capacity)
    for name in ("count", "spread", "key_mean", "key_scale", "value_mean", "value_scale", "next"):
        assert pointer(level.array(name)) % 64 == 0, name  # type: ignore[operator]
        assert not level.array(name).any()
