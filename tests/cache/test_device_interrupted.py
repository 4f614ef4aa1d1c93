"""The device path after what it did not expect: interruptions, limits of memory, copies."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from icecache.cache.device.index import DeviceIndex
from icecache.cache.stats import Phase
from icecache.errors import HostMemoryExceeded, IntegrityError
from tests.helpers import full_attention, make_query, make_tokens, small_layer


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def _grown(**settings: Any) -> Any:
    layer = small_layer(backend="twin", **settings)
    layer.prefill(*make_tokens(0, 1, 60))
    layer.attend(make_query(1, 1, 4))
    return layer


CALLS: list[Callable[[Any], object]] = [
    lambda layer: layer.attend(make_query(1, 1, 4)),
    lambda layer: layer.append(*make_tokens(2, 1, 1)),
    lambda layer: layer.crop(1),
    lambda layer: layer.reorder(torch.tensor([0, 0])),
    lambda layer: layer.settle(),
]


@pytest.mark.parametrize("call", CALLS)
def test_a_torn_layer_says_so_whatever_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Any], object]
) -> None:
    layer = _grown()
    layer.append(*make_tokens(3, 1, 40))
    with monkeypatch.context() as patch:
        patch.setattr("icecache.cache.device.index.store", _interrupted)
        patch.setattr(DeviceIndex, "_join", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            layer.settle()
    with pytest.raises(IntegrityError, match="call reset"):
        call(layer)
    layer.reset()
    layer.prefill(*make_tokens(0, 1, 60))
    assert layer.attend(make_query(1, 1, 4)).isfinite().all()


def test_a_first_build_that_fails_leaves_the_short_context(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = small_layer(backend="twin")
    keys, values = make_tokens(0, 1, 24)
    layer.prefill(keys, values)
    with monkeypatch.context() as patch:
        patch.setattr(DeviceIndex, "enter", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            layer.append(*make_tokens(1, 1, 30))
    assert layer.phase is Phase.DENSE
    query = make_query(2, 1, 4)
    truth = full_attention(query[0], keys[0], values[0])
    torch.testing.assert_close(layer.attend(query)[0].double(), truth, atol=1e-5, rtol=1e-5)
    layer.append(*make_tokens(1, 1, 30))
    assert layer.row_lens == [54]


def test_the_host_limit_is_of_what_is_taken_not_of_what_is_stored() -> None:
    with pytest.raises(HostMemoryExceeded):
        _grown(max_host_memory=20_000, max_context=4096, offload="host")
    layer = _grown(max_host_memory=10_000_000, max_context=200, offload="host")
    assert layer.stats().host_bytes <= 10_000_000
    for number in range(30):
        layer.step(make_query(number, 1, 4), *make_tokens(number, 1, 1))
    layer.check_integrity()


def test_a_fork_after_a_token_that_nobody_attended() -> None:
    layer = _grown()
    layer.append(*make_tokens(5, 1, 1))
    other = layer.fork()
    query = make_query(6, 1, 4)
    assert torch.equal(layer.attend(query), other.attend(query))
    other.check_integrity()
