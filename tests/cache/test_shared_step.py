"""Steps over rows of thousands of leaves, which threads share: the twin's answer, whoever helps."""

import pytest
import torch

from icecache import IceCacheConfig, IceCacheLayer
from icecache.attention.ask import Ask
from icecache.cache.decode import inspect_step
from tests.helpers import HAS_NATIVE, make_query, make_tokens

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the compiled ops are not installed")

_HEADS, _TOKENS, _STEPS = 3, 20_000, 3
_LEAST_LEAVES = 4096


def _make_layer(**settings: object) -> IceCacheLayer:
    config = IceCacheConfig.from_kwargs(backend="native", **settings)
    layer = IceCacheLayer(config, num_kv_heads=_HEADS, head_dim=16, dtype=torch.float32)
    layer.prefill(*make_tokens(3, 1, _TOKENS, heads=_HEADS))
    layer.attend(make_query(5, 1, 2 * _HEADS))
    # fewer, and each row would be one thread's
    assert layer.stats().leaves > _HEADS * _LEAST_LEAVES
    return layer


def _run(layer: IceCacheLayer, threads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Take steps; return their answers, and the twin's in the same contexts."""
    more = make_tokens(7, 1, _STEPS, heads=_HEADS)
    queries = make_query(9, 1, 2 * _HEADS, _STEPS)
    before, outs, truths = torch.get_num_threads(), [], []
    torch.set_num_threads(threads)
    try:
        for at in range(_STEPS):
            query, keys, values = (x[:, :, at : at + 1] for x in (queries, *more))
            ask = Ask.of_layer(query, _HEADS, layer.head_dim**-0.5, None, None, None)
            other = layer.fork()
            other.append(keys, values)
            assert other._context is not None
            truths.append(inspect_step(other._context, layer.config, "torch", ask).out)
            other.release()
            outs.append(layer.step(query, keys, values))
    finally:
        torch.set_num_threads(before)
    return torch.cat(outs).flatten(), torch.cat(truths).flatten()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"crossover": 0, "field_of_view": 200},
        {"crossover": 0, "field_of_view": 1500, "fan_out": 3},
        {"remainder": False},
    ],
    ids=["scan", "descent", "descent over blocks of nodes", "no remainder"],
)
def test_rows_that_threads_share(settings: dict[str, object]) -> None:
    alone, truth = _run(_make_layer(**settings), 1)
    torch.testing.assert_close(alone, truth, rtol=1e-4, atol=1e-5)
    for threads in (2, 3, 5):
        layer = _make_layer(**settings)
        shared, _ = _run(layer, threads)
        assert torch.equal(shared, alone), f"{threads} threads"
        assert (layer.stats().nodes_scored > 0) == ("crossover" in settings)
        layer.check_integrity()
