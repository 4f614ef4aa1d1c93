"""A layer after what it did not expect: interruptions, refusals, copies."""

import copy

import pytest
import torch

from icecache import IceCacheConfig, IceCacheLayer
from icecache.cache.tail import Tail
from icecache.errors import IntegrityError
from icecache.store.pool import PagePool


def test_a_layer_torn_by_an_interruption_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = IceCacheLayer(
        IceCacheConfig(budget=64, backend="torch"), num_kv_heads=2, head_dim=16, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 2, 200, 16, generator=generator)
    layer.prefill(tokens, tokens)
    layer.attend(tokens[:, :, :1])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            layer.append(tokens[:, :, :1], tokens[:, :, :1])
    with pytest.raises(IntegrityError, match="call reset"):
        layer.append(tokens[:, :, :1], tokens[:, :, :1])
    layer.reset()
    layer.prefill(tokens, tokens)
    assert layer.attend(tokens[:, :, :1]).shape == (1, 2, 1, 16)
    layer.check_integrity()


def test_a_refused_first_call_leaves_the_layer_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = IceCacheLayer(IceCacheConfig(), num_kv_heads=2, head_dim=16, dtype=torch.float32)

    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Tail, "append", no_memory)
        with pytest.raises(MemoryError):
            layer.prefill(torch.ones(2, 2, 5, 16), torch.ones(2, 2, 5, 16))
    layer.prefill(torch.ones(1, 2, 5, 16), torch.ones(1, 2, 5, 16))
    assert layer.batch_size == 1


def test_keys_too_large_for_float32_are_told() -> None:
    layer = IceCacheLayer(
        IceCacheConfig(budget=64), num_kv_heads=1, head_dim=16, dtype=torch.float32
    )
    huge = torch.full((1, 1, 200, 16), 1e20)
    layer.prefill(huge, huge)
    with pytest.raises(ValueError, match="too large"):
        layer.attend(huge[:, :, :1])


def test_a_copy_goes_its_own_way() -> None:
    layer = IceCacheLayer(
        IceCacheConfig(budget=64), num_kv_heads=2, head_dim=16, dtype=torch.float32
    )
    tokens = torch.randn(1, 2, 200, 16, generator=torch.Generator().manual_seed(0))
    layer.prefill(tokens, tokens)
    before = layer.attend(tokens[:, :, :1])
    other = copy.deepcopy(layer)
    layer.append(tokens[:, :, :1], tokens[:, :, :1])
    assert (layer.num_tokens, other.num_tokens) == (201, 200)
    assert torch.equal(other.attend(tokens[:, :, :1]), before)
    layer.check_integrity()
    other.check_integrity()
