"""Rows of a batch do not know of each other: each gives what it gives alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from icecache import IceCacheLayer, Phase
from tests.helpers import (
    LAYER_BACKENDS,
    KeysValues,
    PlainRows,
    assert_full,
    left_padded,
    make_query,
    make_tokens,
    poison,
    small_layer,
)

VARIANTS: list[dict[str, Any]] = [
    {},
    {"remainder": False},
    {"unit": "page"},
    {"selection": "exact"},
    {"selection": "paper", "unit": "page"},
]
# the device path chooses pages by their leaves' summaries, and has no other selection
COMBINED = [(v, b) for v in VARIANTS for b in LAYER_BACKENDS if b != "twin" or "selection" not in v]
LENS = [90, 57, 30]


class _Apart:
    """The same rows, each in a layer of its own."""

    def __init__(self, num: int, **settings: Any) -> None:
        self.layers = [small_layer(**settings) for _ in range(num)]

    def append(self, tokens: KeysValues, mask: Tensor | None = None) -> None:
        for row, layer in enumerate(self.layers):
            kept = slice(None) if mask is None else mask[row]
            mine = KeysValues(tokens.keys[row : row + 1], tokens.values[row : row + 1])
            if mask is None or bool(mask[row].any()):
                layer.append(mine.keys[:, :, kept], mine.values[:, :, kept])

    def attend(self, query: Tensor) -> Tensor:
        return torch.cat([layer.attend(query[i : i + 1]) for i, layer in enumerate(self.layers)])


def _assert_alike(layer: IceCacheLayer, apart: _Apart, query: Tensor) -> None:
    poison(layer)
    torch.testing.assert_close(layer.attend(query), apart.attend(query), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("variant", "backend"), COMBINED)
def test_each_row_is_as_it_is_alone(variant: dict[str, Any], backend: str) -> None:
    layer = small_layer(**variant, backend=backend)
    apart = _Apart(3, **variant, backend=backend)
    prompt, mask = make_tokens(0, 3, 90), left_padded(LENS)
    layer.prefill(*prompt, mask)
    apart.append(prompt, mask)
    _assert_alike(layer, apart, make_query(1, 3, 4))
    for step in range(30):
        token = make_tokens(10 + step, 3, 1)
        layer.append(*token)
        apart.append(token)
        _assert_alike(layer, apart, make_query(100 + step, 3, 4))
    assert layer.phase is Phase.INDEXED
    assert layer.row_lens == [length + 30 for length in LENS]
    layer.check_integrity()


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_a_second_ragged_turn(backend: str) -> None:
    """Pads in the middle of the conversation are no tokens: a chat of unequal turns."""
    layer, apart = small_layer(backend=backend), _Apart(3, backend=backend)
    prompt, mask = make_tokens(2, 3, 90), left_padded(LENS)
    rows = PlainRows.of(prompt, mask)
    layer.prefill(*prompt, mask)
    apart.append(prompt, mask)
    _assert_alike(layer, apart, make_query(3, 3, 4))
    for turn, lens in enumerate([[7, 1, 12], [40, 3, 1], [1, 2, 2]]):
        tokens, mask = make_tokens(20 + turn, 3, max(lens)), left_padded(lens)
        layer.append(*tokens, mask)
        apart.append(tokens, mask)
        rows.append(tokens, mask)
        query = make_query(30 + turn, 3, 4, max(lens))
        out = layer.attend(query)
        for row, length in enumerate(lens):
            truth = rows.attend(row, query[row, :, max(lens) - length :])
            assert float((out[row, :, max(lens) - length :] - truth).abs().max()) <= 1e-5
            apart.layers[row].attend(query[row : row + 1, :, max(lens) - length :])
        _assert_alike(layer, apart, make_query(40 + turn, 3, 4))
    assert layer.row_lens == rows.lens
    layer.check_integrity()


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_a_row_may_rest_while_others_go_on(backend: str) -> None:
    layer, apart = small_layer(backend=backend), _Apart(2, backend=backend)
    prompt = make_tokens(4, 2, 60)
    layer.prefill(*prompt)
    apart.append(prompt)
    _assert_alike(layer, apart, make_query(5, 2, 4))
    mask = torch.tensor([[True] * 5, [False] * 5])
    tokens = make_tokens(6, 2, 5)
    layer.append(*tokens, mask)
    apart.append(tokens, mask)
    assert layer.row_lens == [65, 60]
    _assert_alike(layer, apart, make_query(7, 2, 4))
    layer.check_integrity()


@pytest.mark.parametrize("tokens", [10, 60])
def test_what_the_mask_leaves_out_does_not_matter(tokens: int) -> None:
    """NaN, infinity or anything else in a pad changes no bit."""
    mask, query = left_padded([tokens, tokens - 5]), make_query(8, 2, 4)
    outs = []
    for filling in (0.0, 7.0, torch.nan, torch.inf):
        layer, prompt = small_layer(), make_tokens(9, 2, tokens)
        for x in prompt:
            x[1, :, :5] = filling
        layer.prefill(*prompt, mask)
        outs.append(layer.attend(query))
        layer.check_integrity()
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_mask_of_ones_is_no_mask() -> None:
    layers, prompt, query = (
        [small_layer(), small_layer()],
        make_tokens(11, 2, 60),
        make_query(12, 2, 4),
    )
    layers[0].prefill(*prompt)
    layers[1].prefill(*prompt, torch.ones(2, 60, dtype=torch.bool))
    assert torch.equal(layers[0].attend(query), layers[1].attend(query))


def test_the_same_calls_give_the_same_bits() -> None:
    """Deterministic: pages, leaves and outputs."""
    runs = []
    for _ in range(2):
        layer = small_layer()
        layer.prefill(*make_tokens(13, 2, 80))
        outs = [layer.attend(make_query(14, 2, 4))]
        for step in range(20):
            layer.append(*make_tokens(15 + step, 2, 1))
            outs.append(layer.attend(make_query(50 + step, 2, 4)))
        table = layer._context.indexed.leaves
        runs.append((torch.cat(outs), table.pages(), table.counts(), layer.stats()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1]) and torch.equal(runs[0][2], runs[1][2])
    assert runs[0][3] == runs[1][3]


def test_inputs_are_copied_and_not_changed() -> None:
    layer, prompt, query = small_layer(), make_tokens(16, 1, 60), make_query(17, 1, 4)
    kept = [x.clone() for x in prompt]
    layer.prefill(*prompt)
    before = layer.attend(query)
    assert all(torch.equal(x, k) for x, k in zip(prompt, kept, strict=True))
    for x in prompt:
        x.fill_(9.0)
    assert torch.equal(layer.attend(query), before)


def test_transposed_inputs() -> None:
    """Keys as models give them, [batch, tokens, heads, dim] transposed."""
    prompt = make_tokens(18, 2, 60)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in prompt]
    assert not strided[0].is_contiguous()
    query = make_query(19, 2, 4, 60)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    strides, plain = small_layer(), small_layer()
    strides.prefill(*strided)
    plain.prefill(*prompt)
    one = query[:, :, -1:]
    assert torch.equal(strides.attend(one), plain.attend(one.contiguous()))
    assert_full(strides, PlainRows.of(prompt), query)


def test_no_gradients_are_kept() -> None:
    layer, prompt = small_layer(), make_tokens(20, 1, 60)
    for x in prompt:
        x.requires_grad_()
    layer.prefill(*prompt)
    query = make_query(21, 1, 4).requires_grad_()
    outs = [layer.attend(query)]
    token = KeysValues(*(x.detach().clone().requires_grad_() for x in make_tokens(22, 1, 1)))
    layer.append(*token)
    outs.append(layer.attend(query))
    assert not any(out.requires_grad for out in outs)
    assert not layer._context.tail._keys.requires_grad
    layer.check_integrity()


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_a_long_turn_beside_short_ones(backend: str) -> None:
    """One row's turn is built, the others' are inserted: each as it would be alone."""
    layer, apart = small_layer(backend=backend), _Apart(3, backend=backend)
    prompt, mask = make_tokens(30, 3, 90), left_padded(LENS)
    layer.prefill(*prompt, mask)
    apart.append(prompt, mask)
    _assert_alike(layer, apart, make_query(31, 3, 4))
    turn, mask = make_tokens(32, 3, 400), left_padded([3, 400, 40])
    layer.append(*turn, mask)
    apart.append(turn, mask)
    _assert_alike(layer, apart, make_query(33, 3, 4))
    counted = layer.stats().inserted, layer.stats().built
    alone = [one.stats() for one in apart.layers]
    assert counted == (sum(s.inserted for s in alone), sum(s.built for s in alone))
    layer.check_integrity()


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
@pytest.mark.parametrize("tokens", [10, 60])
def test_a_row_may_be_empty_at_first(tokens: int, backend: str) -> None:
    layer, mask = small_layer(backend=backend), left_padded([tokens, 0])
    prompt = make_tokens(34, 2, tokens)
    layer.prefill(*prompt, mask)
    rows = PlainRows.of(prompt, mask)
    assert float(layer.attend(make_query(35, 2, 4))[1].abs().max()) == 0.0
    assert layer.row_lens == [tokens, 0]
    for step in range(40):
        token, query = make_tokens(40 + step, 2, 1), make_query(90 + step, 2, 4)
        layer.append(*token)
        rows.append(token)
        poison(layer)
        out = layer.attend(query)
        assert bool(torch.isfinite(out).all())
        if rows.lens[1] <= layer.config.budget:
            assert float((out[1] - rows.attend(1, query[1])).abs().max()) <= 1e-5
    assert layer.row_lens == rows.lens
    layer.check_integrity()
