"""One attention layer without an engine, beside attention written out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import cpu_attn

from icecache import IceCacheConfig
from icecache.cache.granted import Granted
from icecache.cache.granting import GrantedLayers, Row
from icecache.errors import UnsupportedModel
from icecache_vllm.backend import IceImpl, IceMetadata

CACHE = IceCacheConfig(budget=64, sink=4, window=8)
HEADS, KV_HEADS, DIM = 4, 2, 32


@pytest.fixture
def impl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that returns the attention of a layer, of half the usual scale."""
    engine = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
    monkeypatch.setattr(cpu_attn, "get_current_vllm_config", lambda: engine)

    def made(**more: Any) -> IceImpl:
        usual = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
        return IceImpl(HEADS, DIM, 0.5 * DIM**-0.5, KV_HEADS, **{**usual, **more})

    return made


def plain(query: Tensor, keys: Tensor, values: Tensor, impl: IceImpl) -> Tensor:
    """Attend the last queries causally; tensors are [tokens, heads, head_dim]."""
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
    logits = torch.einsum("qhd,khd->hqk", query, keys) * impl.scale
    if impl.logits_soft_cap:
        logits = impl.logits_soft_cap * (logits / impl.logits_soft_cap).tanh()
    causal = torch.ones(logits.shape[1:], dtype=torch.bool).tril(len(keys) - len(query))
    logits = logits.masked_fill(~causal, -torch.inf)
    if impl.sinks is not None:
        extra = impl.sinks.float()[:, None, None].expand(-1, len(query), 1)
        logits = torch.cat([logits, extra], -1)
    weights = logits.softmax(-1)[..., : len(keys)]
    return torch.einsum("hqk,khd->qhd", weights, values)


@pytest.mark.parametrize(
    "more",
    [{}, {"logits_soft_cap": 0.5}, {"sinks": torch.tensor([0.0, 3.0, 1.0, 5.0]).bfloat16()}],
    ids=["plain", "softcap", "sinks"],
)
def test_requests_of_a_batch_are_attended_as_if_alone(impl: Any, more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made, layers = impl(**more), GrantedLayers(CACHE)
    kv_cache = torch.full((4, KV_HEADS, Granted.tokens_of(CACHE) + 3, 2 * DIM), torch.nan)
    layer = SimpleNamespace(layer_name="layer")
    layers.begin("a", [2])
    layers.begin("b", [0])
    # chunks within and past the budget, and single tokens within it
    steps = [{2: 30, 0: 5}, {0: 1, 2: 100}, {0: 1, 2: 7}]
    given: dict[int, list[Tensor]] = {
        block: [torch.empty(0, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        for block in (2, 0)
    }
    for step in steps:
        rows, parts, start = [], [], 0
        for block, count in step.items():
            new = [3 * torch.randn(count, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
            rows.append(Row(block, start, start + count, len(given[block][0])))
            given[block] = [torch.cat(pair) for pair in zip(given[block], new, strict=True)]
            parts.append(new)
            start += count
        query, key, value = (torch.cat(each) for each in zip(*parts, strict=True))
        output = torch.full((start + 2, HEADS, DIM), 7.0)
        metadata = IceMetadata(layers, rows)
        assert made.forward(layer, query, key, value, kv_cache, metadata, output=output) is output
        for row in rows:
            queries, keys, values = given[row.block]
            expected = plain(queries[row.num_past :], keys, values, made)
            torch.testing.assert_close(output[row.start : row.stop], expected)
        assert bool((output[start:] == 7).all())
    assert bool(kv_cache[1].isnan().all() and kv_cache[3].isnan().all())
    assert not kv_cache[0].isnan().all() and not kv_cache[2].isnan().all()
    layers.close()


def test_warming_up_and_writing_touch_no_block_of_ours(impl: Any) -> None:
    made = impl()
    kv_cache = torch.full((2, KV_HEADS, 96, 2 * DIM), torch.nan)
    query, key = torch.randn(5, HEADS, DIM), torch.randn(5, KV_HEADS, DIM)
    output = torch.full((5, HEADS, DIM), 7.0)
    layer = SimpleNamespace(layer_name="layer", isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)
    assert bool((made.forward(layer, query, key, key, kv_cache, None, output=output) == 7).all())
    slots = torch.arange(5)
    made.do_kv_cache_update(layer, key, key, kv_cache, slots)
    assert bool(kv_cache.isnan().all())
    impl(sliding_window=64).do_kv_cache_update(layer, key, key, kv_cache, slots)
    assert not kv_cache.isnan().all()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"alibi_slopes": [0.5] * HEADS}, "ALiBi"),
        ({"kv_sharing_target_layer_name": "model.layers.1.attn"}, "another's keys"),
    ],
)
def test_layers_that_attend_otherwise_are_refused(
    impl: Any, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedModel, match=f"a layer with {said}; start this model without"):
        impl(**more)
    # those stay with vLLM
    impl(**more, sliding_window=64)
    impl(**more, attn_type=AttentionType.ENCODER_ONLY)
