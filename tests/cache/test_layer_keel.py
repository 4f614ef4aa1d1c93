"""With room for the whole context a layer gives full attention, in every phase and variant."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from icecache import IceCacheConfig, IceCacheLayer, Phase
from icecache.cache.make import make_layer
from tests.helpers import (
    BACKENDS,
    LAYER_BACKENDS,
    KeysValues,
    PlainRows,
    assert_as_good_as_torch,
    assert_full,
    left_padded,
    make_query,
    make_tokens,
    poison,
    small_layer,
)

SETTINGS: list[dict[str, Any]] = [
    {},
    {"scaling": 0.31},
    {"softcap": 3.0},
    {"sink_logits": torch.tensor([-1.0, 0.0, 1.0, 5.0])},
    {"scaling": 0.07, "softcap": 5.0, "sink_logits": torch.tensor([2.0, 0.0, -3.0, 1.0])},
]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"remainder": False},
    {"unit": "page"},
    {"selection": "exact"},
    {"selection": "paper", "unit": "page"},
]
# the device path chooses pages by their leaves' summaries, and has no other selection
COMBINED = [
    (v, b) for v in VARIANTS for b in [*BACKENDS, "twin"] if b != "twin" or "selection" not in v
]
FAST_COMBINED = [(v, b) for v, b in COMBINED if b != "reference"]


def _layer(budget: int, dim: int = 64, dtype: torch.dtype = torch.float32) -> IceCacheLayer:
    config = IceCacheConfig(budget=budget)
    return IceCacheLayer(config, num_kv_heads=2, head_dim=dim, dtype=dtype)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 256])
@pytest.mark.parametrize("settings", SETTINGS)
def test_dense_phase(tokens: int, settings: dict[str, Any]) -> None:
    layer, prompt = _layer(256), make_tokens(0, 2, tokens, dim=64)
    layer.prefill(*prompt)
    assert_full(layer, PlainRows.of(prompt), make_query(1, 2, 4, dim=64), **settings)
    assert layer.phase is Phase.DENSE
    assert (layer.stats().dense_steps, layer.stats().sparse_steps) == (1, 0)
    assert layer.stats().tokens_attended == tokens


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_phase_in_half_precision(dim: int, dtype: torch.dtype) -> None:
    layer, prompt = _layer(256, dim, dtype), make_tokens(2, 1, 200, dim=dim, dtype=dtype)
    layer.prefill(*prompt)
    query = make_query(3, 1, 4, dim=dim, dtype=dtype)
    sdpa = functional.scaled_dot_product_attention(query, *prompt, enable_gqa=True)
    truth = PlainRows.of(prompt).attend(0, query[0])
    assert_as_good_as_torch(layer.attend(query)[0], sdpa[0], truth)


def _indexed_with_room(
    layer: IceCacheLayer, seed: int, *, tokens: int = 26, crop: int = 6
) -> tuple[PlainRows, KeysValues]:
    """Pass the budget of a layer of 24, then take tokens back: indexed, yet all of it fits."""
    prompt = make_tokens(seed, 2, tokens)
    draft = make_tokens(seed + 2, 2, crop)
    layer.prefill(*prompt)
    layer.append(*draft)
    layer.attend(make_query(seed + 4, 2, 4, crop))
    layer.crop(crop)
    layer.crop(tokens - 24)
    poison(layer)
    rows = PlainRows.of(prompt)
    rows.crop(tokens - 24)
    return rows, prompt


@pytest.mark.parametrize(("variant", "backend"), COMBINED)
@pytest.mark.parametrize("settings", SETTINGS)
def test_indexed_phase(settings: dict[str, Any], variant: dict[str, Any], backend: str) -> None:
    layer = small_layer(**variant, backend=backend)
    rows, _ = _indexed_with_room(layer, 10)
    assert layer.phase is Phase.INDEXED
    assert_full(layer, rows, make_query(5, 2, 4), **settings)
    assert layer.stats().sparse_steps == 1
    assert layer.stats().tokens_attended == 24
    layer.check_integrity()


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_indexed_phase_in_bfloat16(backend: str) -> None:
    config = IceCacheConfig(budget=96, sink=8, window=16, backend=backend)
    layer = make_layer(config, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    prompt = make_tokens(20, 1, 100, dim=64, dtype=torch.bfloat16)
    layer.prefill(*prompt)
    layer.attend(make_query(21, 1, 4, dim=64, dtype=torch.bfloat16))
    layer.crop(4)
    rows = PlainRows.of(prompt)
    rows.crop(4)
    query = make_query(22, 1, 4, dim=64, dtype=torch.bfloat16)
    keys, values = (x[:, :, :96] for x in prompt)
    sdpa = functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    assert_as_good_as_torch(layer.attend(query)[0], sdpa[0], rows.attend(0, query[0]))
    assert layer.phase is Phase.INDEXED


@pytest.mark.parametrize(("variant", "backend"), FAST_COMBINED)
def test_rows_that_fit_are_exact_beside_rows_that_do_not(
    variant: dict[str, Any], backend: str
) -> None:
    """Rows of 1, 5, 8, 20 and 24 tokens in a batch with one of 60."""
    lens = [60, 1, 5, 8, 20, 24]
    layer, prompt = small_layer(**variant, backend=backend), make_tokens(30, 6, 60)
    layer.prefill(*prompt, left_padded(lens))
    rows, query = PlainRows.of(prompt, left_padded(lens)), make_query(31, 6, 4)
    out = layer.attend(query)
    assert layer.phase is Phase.INDEXED
    for row in range(1, 6):
        truth = rows.attend(row, query[row])
        assert float((out[row] - truth).abs().max()) <= 1e-5, f"row of {lens[row]} tokens"
    layer.check_integrity()


@pytest.mark.parametrize(("variant", "backend"), FAST_COMBINED)
def test_a_row_that_grows_up_to_the_budget_stays_exact(
    variant: dict[str, Any], backend: str
) -> None:
    """A row of one token when the index starts fills its sink later, as it would alone."""
    layer = small_layer(sink=8, **variant, backend=backend)
    mask = left_padded([40, 1])
    prompt = make_tokens(40, 2, 40)
    layer.prefill(*prompt, mask)
    rows = PlainRows.of(prompt, mask)
    layer.attend(make_query(41, 2, 4))
    for step in range(23):
        token, query = make_tokens(50 + step, 2, 1), make_query(90 + step, 2, 4)
        layer.append(*token)
        rows.append(token)
        out = layer.attend(query)
        error = float((out[1] - rows.attend(1, query[1])).abs().max())
        assert error <= 1e-5, f"at {rows.lens[1]} tokens"
    assert rows.lens[1] == 24
    layer.check_integrity()


def test_the_budget_is_where_the_sparse_steps_begin() -> None:
    layer = small_layer()
    layer.prefill(*make_tokens(60, 1, 24))
    layer.attend(make_query(61, 1, 4))
    assert layer.phase is Phase.DENSE
    layer.append(*make_tokens(62, 1, 1))
    layer.attend(make_query(63, 1, 4))
    assert layer.phase is Phase.INDEXED
    assert (layer.stats().dense_steps, layer.stats().sparse_steps) == (1, 1)
