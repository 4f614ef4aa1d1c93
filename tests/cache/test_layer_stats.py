"""What a layer says of itself agrees with what it holds and did."""

import dataclasses

import pytest
import torch

from icecache import IceCacheConfig, IceCacheLayer, Phase
from tests.helpers import FAST_BACKENDS, left_padded, make_query, make_tokens, small_layer


def _default_layer(dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> IceCacheLayer:
    return IceCacheLayer(IceCacheConfig(), num_kv_heads=2, head_dim=dim, dtype=dtype)


def _prefilled(tokens: int) -> IceCacheLayer:
    layer = _default_layer()
    layer.prefill(*make_tokens(0, 1, tokens, dim=64, dtype=torch.bfloat16))
    layer.attend(make_query(1, 1, 6, dim=64, dtype=torch.bfloat16))
    return layer


def test_an_empty_layer() -> None:
    stats = small_layer().stats()
    assert stats.phase is Phase.EMPTY
    numbers = dataclasses.asdict(stats)
    for name in ("phase", "backend", "offload", "fill"):
        del numbers[name]
    assert set(numbers.values()) == {0}
    assert stats.fill == 1.0


def test_a_short_context() -> None:
    layer = small_layer()
    layer.prefill(*make_tokens(0, 3, 20), left_padded([20, 7, 1]))
    layer.attend(make_query(1, 3, 4))
    stats = layer.stats()
    assert (stats.phase, stats.tokens, stats.pages, stats.leaves) == (Phase.DENSE, 20, 0, 0)
    assert stats.full_cache_bytes == 28 * 2 * 2 * 16 * 4
    assert stats.index_bytes == 0
    assert stats.host_bytes == stats.kv_bytes >= stats.full_cache_bytes


@pytest.mark.parametrize("tokens", [1000, 4000])
def test_pages_are_full_after_a_build_and_the_index_is_small(tokens: int) -> None:
    stats = _prefilled(tokens).stats()
    indexed = 2 * (tokens - 16 - 32)
    assert stats.fill >= 0.9
    assert stats.fill == indexed / (stats.pages * 16)
    # per token of a head, at head_dim 64, where keys and values take 256
    centres = 2 * 4 * 64
    assert (stats.index_bytes - centres) / indexed < 42
    assert (stats.built, stats.inserted) == (indexed, 0)
    assert stats.host_bytes == stats.kv_bytes + stats.index_bytes
    assert stats.full_cache_bytes == 2 * tokens * 256
    pages = stats.pages * 16 * (256 + 4)
    sink_and_window = stats.kv_bytes - pages
    assert 2 * 48 * 256 <= sink_and_window <= 2 * (48 + 600) * 256


def test_pages_stay_full_while_two_thousand_tokens_are_generated() -> None:
    layer = _prefilled(600)
    tokens = make_tokens(5, 1, 2000, dim=64, dtype=torch.bfloat16)
    for start in range(0, 2000, 4):
        layer.append(*tokens[:, :, start : start + 4])
    layer.attend(make_query(6, 1, 6, dim=64, dtype=torch.bfloat16))
    stats = layer.stats()
    assert stats.tokens == 2600
    assert stats.fill >= 0.75
    assert stats.index_bytes / (2 * (2600 - 48)) < 40
    assert stats.inserted == 2 * 2000
    assert stats.host_bytes < 1.5 * stats.full_cache_bytes
    layer.check_integrity()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_steps_are_counted(backend: str) -> None:
    layer = small_layer(backend=backend)
    layer.prefill(*make_tokens(0, 2, 40))
    layer.attend(make_query(1, 2, 4, 40))
    assert (layer.stats().dense_steps, layer.stats().sparse_steps) == (1, 0)
    layer.append(*make_tokens(2, 2, 1))
    for step in range(3):
        layer.attend(make_query(3 + step, 2, 4))
    stats = layer.stats()
    assert (stats.dense_steps, stats.sparse_steps) == (1, 3)
    assert stats.leaves_scored == 3 * stats.leaves
    assert stats.inserted + stats.built == 4 * (41 - 2 - 4)
    # the budget is filled but for the last leaf that did not fit
    assert 24 - 4 < stats.tokens_attended <= 24
    assert stats.device_bytes == 0


def test_looking_changes_nothing() -> None:
    layer = small_layer()
    layer.prefill(*make_tokens(0, 2, 60))
    layer.append(*make_tokens(1, 2, 8))
    for _ in range(2):
        before = layer.stats()
        layer.check_integrity()
        assert layer.stats() == before
    layer.crop(8)
    assert layer.num_tokens == 60
    layer.attend(make_query(2, 2, 4))
    before = layer.stats()
    layer.inspect(make_query(3, 2, 4))
    layer.check_integrity()
    assert layer.stats() == before


def test_inspect_says_what_attend_does() -> None:
    layer = small_layer()
    layer.prefill(*make_tokens(0, 2, 60))
    query = make_query(1, 2, 4)
    out, step = layer.attend(query), layer.inspect(query)
    torch.testing.assert_close(step.out.view_as(out), out, rtol=0, atol=1e-5)
    assert float(step.num_attended.double().mean()) == layer.stats().tokens_attended
    assert step.leaves_scored == layer.stats().leaves
    assert step.share.shape == (4, 2, step.chosen.shape[1])
    assert bool((step.share.sum(2) <= 1.0001).all())


def test_a_long_prompt_leaves_a_small_window_buffer() -> None:
    """What the prompt took before it went to pages is given back."""
    layer = _prefilled(4000)
    assert layer._context.tail.nbytes < 2 * 700 * 256
