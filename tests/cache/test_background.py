"""Trees built in another thread: the same trees, waited for; errors come at the next use."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from icecache import IceCacheConfig, IceCacheLayer, Phase
from icecache.cache.context import Context
from icecache.errors import IntegrityError
from tests.helpers import FAST_BACKENDS, SMALL, make_query, make_tokens


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def _layer(executor: ThreadPoolExecutor | None, **settings: Any) -> IceCacheLayer:
    config = IceCacheConfig.from_kwargs(**{**SMALL, **settings})
    return IceCacheLayer(
        config, num_kv_heads=2, head_dim=16, dtype=torch.float32, executor=executor
    )


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_the_same_tree_bit_for_bit(executor: ThreadPoolExecutor, backend: str) -> None:
    outs = []
    for pool in (None, executor):
        layer = _layer(pool, backend=backend)
        layer.prefill(*make_tokens(0, 2, 300))
        outs.append([layer.attend(make_query(1, 2, 4))])
        layer.append(*make_tokens(2, 2, 40))
        outs[-1].append(layer.attend(make_query(3, 2, 4, 40)))
        for step in range(5):
            layer.append(*make_tokens(4 + step, 2, 1))
            outs[-1].append(layer.attend(make_query(20 + step, 2, 4)))
        layer.check_integrity()
        assert layer.stats().built + layer.stats().inserted == 4 * (345 - 2 - 4)
    assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))


def _hold(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Let `act` run in the thread before a context settles."""
    settle = Context.settle

    def held(self: Context, keep: int) -> tuple[int, int]:
        if threading.current_thread() is not threading.main_thread():
            act()
        return settle(self, keep)

    monkeypatch.setattr(Context, "settle", held)


def test_prefill_returns_first_and_the_next_use_waits(
    executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, begun = threading.Event(), threading.Event()

    def act() -> None:
        begun.set()
        assert go.wait(30)

    _hold(monkeypatch, act)
    layer = _layer(executor)
    layer.prefill(*make_tokens(0, 1, 300))
    assert begun.wait(30), "the build has begun"
    phase: list[Phase] = []
    reader = threading.Thread(target=lambda: phase.append(layer.phase))
    reader.start()
    reader.join(0.2)
    assert not phase, "the reader waits while the tree is built"
    go.set()
    reader.join(30)
    assert phase == [Phase.INDEXED]


def test_an_error_in_the_thread_is_raised_at_the_next_use(
    executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise MemoryError("no room")

    layer = _layer(executor)
    with monkeypatch.context() as patch:
        _hold(patch, fail)
        layer.prefill(*make_tokens(0, 1, 300))
        with pytest.raises(MemoryError, match="no room"):
            layer.stats()
    # nothing had moved yet, so the layer goes on as if the build had not been tried
    assert layer.num_tokens == 300
    layer.attend(make_query(1, 1, 4))
    layer.check_integrity()


def test_a_build_that_fails_half_way_leaves_a_layer_that_says_so(
    executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from icecache.cache.indexed import IndexedTokens

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    layer = _layer(executor)
    with monkeypatch.context() as patch:
        patch.setattr(IndexedTokens, "add", fail)
        layer.prefill(*make_tokens(0, 1, 300))
        with pytest.raises(MemoryError):
            layer.attend(make_query(1, 1, 4))
    with pytest.raises(IntegrityError, match="reset"):
        layer.attend(make_query(1, 1, 4))
    layer.reset()
    layer.prefill(*make_tokens(0, 1, 300))
    layer.attend(make_query(1, 1, 4))


def test_reset_forgets_a_build_that_failed(
    executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise MemoryError("no room")

    layer = _layer(executor)
    with monkeypatch.context() as patch:
        _hold(patch, fail)
        layer.prefill(*make_tokens(0, 1, 300))
        layer.reset()
    assert layer.stats() == _layer(None).stats()


def test_a_copy_has_no_threads_and_goes_its_own_way(executor: ThreadPoolExecutor) -> None:
    layer = _layer(executor)
    layer.prefill(*make_tokens(0, 1, 300))
    other = copy.deepcopy(layer)
    query = make_query(1, 1, 4)
    assert torch.equal(layer.attend(query), other.attend(query))
    other.append(*make_tokens(2, 1, 100))
    assert (layer.num_tokens, other.num_tokens) == (300, 400)
    other.check_integrity()


def test_a_prompt_in_inference_mode(executor: ThreadPoolExecutor) -> None:
    layer = _layer(executor)
    with torch.inference_mode():
        layer.prefill(*make_tokens(0, 1, 300))
        out = layer.attend(make_query(1, 1, 4))
        layer.append(*make_tokens(2, 1, 1))
        layer.check_integrity()
    assert bool(out.isfinite().all())


def test_after_the_threads_ended_builds_run_at_once() -> None:
    """Nothing that was taken in is lost, and nothing is taken in twice."""
    pool = ThreadPoolExecutor(1)
    layer = _layer(pool)
    pool.shutdown()
    layer.prefill(*make_tokens(0, 1, 300))
    assert (layer.num_tokens, layer.phase) == (300, Phase.INDEXED)
    layer.check_integrity()


def test_a_build_in_a_thread_runs_without_gradients(
    executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    _hold(monkeypatch, lambda: seen.append(torch.is_grad_enabled()))
    layer = _layer(executor)
    layer.prefill(*make_tokens(0, 1, 300))
    assert layer.num_tokens == 300
    assert seen == [False]
