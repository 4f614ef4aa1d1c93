"""Queries of several tokens: exact and causal over everything, indexed or not."""

from typing import Any

import pytest
import torch

from icecache import Phase
from icecache.errors import InputError
from tests.helpers import (
    BACKENDS,
    PlainRows,
    assert_full,
    left_padded,
    make_query,
    make_tokens,
    poison,
    small_layer,
)

SETTINGS: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0},
    {"scaling": 0.4, "sink_logits": torch.tensor([-1.0, 0.0, 1.0, 5.0])},
]


@pytest.mark.parametrize("backend", [*BACKENDS, "twin"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_chunked_prefill(settings: dict[str, Any], backend: str) -> None:
    """Chunks around the page size and beyond the draft, each attended as it comes."""
    layer, rows = small_layer(backend=backend), None
    for chunk, size in enumerate([7, 8, 9, 1, 2, 30, 17]):
        tokens = make_tokens(10 * chunk, 2, size)
        if rows is None:
            rows = PlainRows.of(tokens)
            layer.prefill(*tokens)
        else:
            rows.append(tokens)
            layer.append(*tokens)
        if size > 1:
            assert_full(layer, rows, make_query(chunk, 2, 4, size), **settings)
        layer.check_integrity()
        poison(layer)
    assert layer.phase is Phase.INDEXED
    assert layer.num_tokens == 74


def test_chunks_between_which_nobody_attends() -> None:
    layer, rows = small_layer(), PlainRows.of(make_tokens(0, 1, 40))
    layer.prefill(*make_tokens(0, 1, 40))
    for seed, size in ((10, 20), (20, 1), (30, 3)):
        tokens = make_tokens(seed, 1, size)
        layer.append(*tokens)
        rows.append(tokens)
        layer.check_integrity()
    assert_full(layer, rows, make_query(40, 1, 4, 3))


def test_a_chat_of_turns_and_answers() -> None:
    layer, rows = small_layer(), PlainRows.of(make_tokens(0, 2, 50))
    layer.prefill(*make_tokens(0, 2, 50))
    assert_full(layer, rows, make_query(1, 2, 4, 50))
    for turn in range(3):
        for step in range(7):
            token = make_tokens(100 * turn + 10 * step, 2, 1)
            layer.append(*token)
            rows.append(token)
            layer.attend(make_query(step, 2, 4))
        question = make_tokens(1000 + turn, 2, 11)
        layer.append(*question)
        rows.append(question)
        poison(layer)
        assert_full(layer, rows, make_query(2000 + turn, 2, 4, 11))
        layer.check_integrity()
    assert layer.stats().sparse_steps == 21
    assert layer.row_lens == rows.lens


@pytest.mark.parametrize("queries", [2, 5, 19, 20])
@pytest.mark.parametrize("lens", [[60, 60], [60, 12], [3, 60]])
def test_one_query_first_then_several(lens: list[int], queries: int) -> None:
    """The sparse step in between has moved the tokens into the tree; they are still the last."""
    layer, prompt, mask = small_layer(), make_tokens(0, 2, 60), left_padded(lens)
    rows = PlainRows.of(prompt, mask)
    layer.prefill(*prompt, mask)
    tokens = make_tokens(2, 2, 20)
    layer.append(*tokens)
    rows.append(tokens)
    layer.attend(make_query(3, 2, 4))
    assert layer.phase is Phase.INDEXED
    assert_full(layer, rows, make_query(4, 2, 4, queries))


@pytest.mark.parametrize("tokens", [20, 60])
def test_queries_of_pads_are_finite(tokens: int) -> None:
    layer, mask = small_layer(), left_padded([tokens, 3])
    layer.prefill(*make_tokens(0, 2, tokens), mask)
    out = layer.attend(make_query(1, 2, 4, tokens))
    assert bool(torch.isfinite(out).all())
    assert float(out[1, :, : tokens - 3].abs().max()) == 0.0


def test_fewer_queries_than_tokens_given_are_the_last_ones() -> None:
    layer, prompt = small_layer(), make_tokens(0, 1, 60)
    layer.prefill(*prompt)
    rows, query = PlainRows.of(prompt), make_query(1, 1, 4, 5)
    assert_full(layer, rows, query)
    assert_full(layer, rows, query[:, :, -3:])


def test_an_old_token_cannot_ask_again() -> None:
    layer = small_layer()
    layer.prefill(*make_tokens(0, 1, 60))
    layer.append(*make_tokens(1, 1, 3))
    with pytest.raises(InputError, match="query has 4 tokens, the latest call gave 3"):
        layer.attend(make_query(2, 1, 4, 4))
    assert layer.attend(make_query(3, 1, 4, 3)).shape == (1, 4, 3, 16)


def test_tokens_that_were_taken_back_cannot_ask() -> None:
    layer = small_layer()
    layer.prefill(*make_tokens(0, 1, 60))
    layer.append(*make_tokens(1, 1, 6))
    layer.crop(4)
    with pytest.raises(InputError, match="query has 3 tokens, the latest call gave 2"):
        layer.attend(make_query(2, 1, 4, 3))
    assert layer.attend(make_query(3, 1, 4, 2)).shape == (1, 4, 2, 16)
