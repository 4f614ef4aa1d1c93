"""Steps that fail: the token is not taken in, and the next step is right again."""

import ctypes
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from icecache import IceCacheConfig, IceCacheLayer
from icecache.cache.fused import FusedStep
from icecache.errors import HostMemoryExceeded, InputError, IntegrityError
from tests.helpers import HAS_NATIVE, largest_error, make_query, make_tokens, small_layer

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the compiled ops are not installed")

_NO_MEMORY = 3
LENGTHS = {"dense": 12, "indexed": 300}


def _token(seed: int) -> tuple[Tensor, ...]:
    return make_query(seed + 1, 1, 4, 1), *make_tokens(seed, 1, 1)


def _layer(length: int) -> IceCacheLayer:
    layer = small_layer(backend="native")
    layer.prefill(*make_tokens(1, 1, length))
    layer.attend(make_query(2, 1, 4, 1))
    layer.step(*_token(3))
    return layer


@pytest.mark.parametrize("dim", [8, 32])
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_a_query_of_another_head_dim_is_refused(length: int, dim: int) -> None:
    layer, twin = _layer(length), _layer(length)
    _, keys, values = _token(5)
    with pytest.raises(InputError, match="query must be"):
        layer.step(torch.randn(1, 4, 1, dim), keys, values)
    assert layer.row_lens == twin.row_lens
    layer.check_integrity()
    # the window may be a token shorter now, for one has entered the tree
    assert largest_error(layer.step(*_token(6)), twin.step(*_token(6))) < 0.1


@pytest.mark.parametrize("place", range(3))
def test_what_is_no_tensor_is_refused(place: int) -> None:
    layer = _layer(300)
    token: list[Any] = list(_token(5))
    token[place] = token[place].tolist()
    with pytest.raises(InputError, match=r"torch\.Tensor"):
        layer.step(*token)
    assert layer.row_lens == [301]


@pytest.mark.parametrize("error", [KeyboardInterrupt, HostMemoryExceeded])
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_an_error_behind_the_call_leaves_the_next_step_right(
    length: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, twin = _layer(length), _layer(length)
    fused = layer._fused
    assert isinstance(fused, FusedStep)
    call = fused._call

    def failing(*arguments: ctypes.Structure) -> int:
        if error is KeyboardInterrupt:
            call(*arguments)
            raise KeyboardInterrupt
        return _NO_MEMORY

    monkeypatch.setattr(fused, "_call", failing)
    with pytest.raises(error):
        layer.step(*_token(5))
    monkeypatch.setattr(fused, "_call", call)
    if layer._context.is_torn:  # type: ignore[union-attr]
        # it says so from now on, instead of answering from half a token
        with pytest.raises(IntegrityError, match="interrupted"):
            layer.step(*_token(6))
        return
    assert layer.row_lens == twin.row_lens
    for seed in (6, 7):
        torch.testing.assert_close(layer.step(*_token(seed)), twin.step(*_token(seed)))


def test_reset_frees_what_a_step_had_prepared() -> None:
    layer = _layer(300)
    pool = weakref.ref(layer._context.indexed.pool)  # type: ignore[union-attr]
    layer.reset()
    assert pool() is None


@pytest.mark.parametrize("position", [2**31 - 1, 2**31 - 2, 2**32 + 100, -(2**40), 10**9])
def test_positions_far_away_are_passed_over(position: int) -> None:
    config = IceCacheConfig(budget=64, sink=4, window=8, layer_reuse=2)
    layer = IceCacheLayer(config, num_kv_heads=1, head_dim=16, dtype=torch.float32)
    layer.prefill(*torch.randn(2, 1, 1, 300, 16))
    query = torch.randn(1, 2, 1, 16)
    near, far = torch.tensor([[20, 40]]), torch.tensor([[20, position, 40]])
    out = layer.attend(query, positions=far)
    assert torch.equal(out, layer.attend(query, positions=near))
