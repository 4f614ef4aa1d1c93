"""Sink and window in memory of another's pool: the same answers, and nothing of it kept or lost."""

import pytest
import torch
from torch import Tensor

from icecache import IceCacheLayer
from icecache.cache.granted import Granted
from icecache.errors import InputError
from tests.helpers import (
    FAST_BACKENDS,
    SMALL_DIM,
    SMALL_HEADS,
    make_query,
    make_tokens,
    small_layer,
)


def memory(extra: int = 0) -> Tensor:
    """Return a block of a pool, full of what others have left there."""
    tokens = Granted.tokens_of(small_layer().config) + extra
    return torch.full((SMALL_HEADS, tokens, 2 * SMALL_DIM), torch.nan)


def granted_layer(block: Tensor, **settings: object) -> IceCacheLayer:
    layer = small_layer(**settings)
    layer.use_granted(block)
    return layer


def chunk(layer: IceCacheLayer, seed: int, num: int) -> Tensor:
    layer.append(*make_tokens(seed, 1, num))
    return layer.attend(make_query(seed + 1, 1, 4, num))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("extra", [0, 1, 40])
def test_a_granted_block_changes_no_answer(backend: str, extra: int) -> None:
    ours, plain = granted_layer(memory(extra), backend=backend), small_layer(backend=backend)
    for seed, num in enumerate((5, 1, 1, 60, 1, 9, 300, 1)):
        assert torch.equal(chunk(ours, seed, num), chunk(plain, seed, num))
    for seed in range(100, 200):
        token = (make_query(seed + 1, 1, 4, 1), *make_tokens(seed, 1, 1))
        assert torch.equal(ours.step(*token), plain.step(*token))
    ours.check_integrity()
    assert ours.num_tokens == plain.num_tokens == 478


def test_a_short_context_takes_no_memory_of_its_own() -> None:
    block = memory()
    layer = granted_layer(block)
    budget = layer.config.budget
    chunk(layer, 0, budget)
    stats = layer.stats()
    assert (stats.host_bytes, stats.sparse_steps) == (0, 0)
    assert 0 < stats.device_bytes <= block.nbytes
    keys, _ = make_tokens(0, 1, budget)
    window = Granted.carve(block, layer.config, SMALL_HEADS).keys
    assert torch.equal(window[:, :, :budget], keys)


def test_sink_and_window_lie_in_the_block_once_a_prompt_is_settled() -> None:
    block = memory()
    layer = granted_layer(block)
    chunk(layer, 0, 400)
    chunk(layer, 1, 1)
    keys = torch.cat([make_tokens(0, 1, 400).keys, make_tokens(1, 1, 1).keys], 2)
    parts = Granted.carve(block, layer.config, SMALL_HEADS)
    config, stats = layer.config, layer.stats()
    assert torch.equal(parts.sink_keys, keys[:, :, : config.sink])
    tail = layer._context.tail
    assert torch.equal(tail.keys_values()[0], keys[:, :, -config.window :])
    assert tail.keys.data_ptr() == parts.keys.data_ptr()
    assert stats.device_bytes == block.nbytes
    assert stats.host_bytes == stats.kv_bytes + stats.index_bytes - block.nbytes


@pytest.mark.parametrize("num", [40, 60, 90, 150, 400])
def test_a_prompt_that_did_not_fit_keeps_no_memory_beside_pages_and_block(num: int) -> None:
    layer, other = granted_layer(memory()), small_layer()
    chunk(layer, 0, num)
    chunk(other, 0, num)
    chunk(layer, 1, 1)
    chunk(other, 1, 1)
    pages = other._context.indexed.pool.nbytes
    stats = layer.stats()
    assert stats.host_bytes == pages + stats.index_bytes
    assert stats.host_bytes <= layer.estimate_bytes(1, num + 1) + 1024


def test_forks_reordered_and_reset_layers_leave_the_block_alone() -> None:
    block = memory()
    layer = granted_layer(block)
    chunk(layer, 0, 100)
    before = block.clone().view(torch.int32)
    fork = layer.fork()
    fork.reorder(torch.tensor([0, 0]))
    fork.append(*make_tokens(5, 2, 40))
    other = layer.fork()
    chunk(other, 7, 50)
    assert torch.equal(block.view(torch.int32), before)
    layer.reorder(torch.tensor([0, 0]))
    layer.append(*make_tokens(5, 2, 40))
    layer.reset()
    chunk(layer, 9, 30)
    assert torch.equal(block.view(torch.int32), before)
    assert layer.stats().device_bytes == 0


def test_what_cannot_hold_a_layer_is_refused() -> None:
    layer = small_layer()
    for wrong in (
        memory()[:, :-1].contiguous(),
        memory()[:1],
        memory(2)[:, ::2],
        memory().transpose(0, 1).contiguous().transpose(0, 1),
        memory().double(),
        memory()[..., :-1],
    ):
        with pytest.raises(InputError, match="granted memory must"):
            layer.use_granted(wrong)
    chunk(layer, 0, 3)
    with pytest.raises(InputError, match="empty layer"):
        layer.use_granted(memory())
    assert layer.num_tokens == 3
