"""Taking tokens back and taking rows in another order, as assisted decoding and beams do."""

import pytest
import torch

from icecache import IceCacheLayer, Phase
from icecache.errors import InputError
from tests.helpers import (
    FAST_BACKENDS,
    LAYER_BACKENDS,
    PlainRows,
    assert_full,
    largest_error,
    left_padded,
    make_query,
    make_tokens,
    poison,
    small_layer,
)


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
@pytest.mark.parametrize("prompt_len", [10, 20, 60])
def test_assisted_decoding(prompt_len: int, backend: str) -> None:
    """Append a draft, attend all of it, take back what was rejected, append the mend."""
    layer, rows = small_layer(backend=backend), PlainRows.of(make_tokens(0, 1, prompt_len))
    layer.prefill(*make_tokens(0, 1, prompt_len))
    assert_full(layer, rows, make_query(1, 1, 4, prompt_len))
    for step, rejected in enumerate([4, 0, 6, 1, 5, 6, 3]):
        draft = make_tokens(10 * step + 2, 1, 6)
        layer.append(*draft)
        rows.append(draft)
        assert_full(layer, rows, make_query(step, 1, 4, 6))
        layer.crop(rejected)
        rows.crop(rejected)
        assert layer.num_tokens == rows.lens[0]
        mend = make_tokens(10 * step + 4, 1, 1)
        layer.append(*mend)
        rows.append(mend)
        layer.attend(make_query(step + 50, 1, 4))
        layer.check_integrity()
        poison(layer)
    last = make_tokens(500, 1, 2)
    layer.append(*last)
    rows.append(last)
    assert_full(layer, rows, make_query(501, 1, 4, 2))


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_what_was_taken_back_leaves_no_trace(backend: str) -> None:
    """A layer that saw a rejected draft holds the same tokens as one that did not."""
    drafted, plain = small_layer(backend=backend), small_layer(backend=backend)
    for layer in (drafted, plain):
        layer.prefill(*make_tokens(0, 2, 60))
        layer.attend(make_query(1, 2, 4))
    drafted.append(*make_tokens(2, 2, 6))
    drafted.attend(make_query(3, 2, 4, 6))
    drafted.crop(6)
    # the draft pushed tokens from the window into the tree, which stay there: fill it up again
    token, query = make_tokens(4, 2, 8), make_query(5, 2, 4, 8)
    for layer in (drafted, plain):
        layer.append(*token)
    assert largest_error(drafted.attend(query), plain.attend(query)) <= 1e-6
    assert drafted.row_lens == plain.row_lens == [68, 68]
    drafted.check_integrity()


def test_all_of_a_draft_can_be_taken_back_from_every_row() -> None:
    """A short row's draft is not swallowed by its sink when the index starts."""
    layer, mask = small_layer(sink=12, budget=28), left_padded([22, 2])
    prompt, draft = make_tokens(0, 2, 22), make_tokens(1, 2, 8)
    layer.prefill(*prompt, mask)
    layer.append(*draft)
    layer.attend(make_query(2, 2, 4, 8))
    assert layer.phase is Phase.INDEXED
    layer.crop(8)
    rows = PlainRows.of(prompt, mask)
    assert layer.row_lens == rows.lens == [22, 2]
    more = make_tokens(3, 2, 3)
    layer.append(*more)
    rows.append(more)
    assert_full(layer, rows, make_query(4, 2, 4, 3))
    layer.check_integrity()


@pytest.mark.parametrize(
    ("given", "taken_back"), [(8, 8), (9, 4), (30, 4)], ids=["draft", "longer", "prompt"]
)
def test_a_draft_can_be_taken_back_whole_and_a_prompt_as_far_as_the_window(
    given: int, taken_back: int
) -> None:
    layer, rows = small_layer(), PlainRows.of(make_tokens(0, 1, 40))
    layer.prefill(*make_tokens(0, 1, 40))
    tokens = make_tokens(1, 1, given)
    layer.append(*tokens)
    rows.append(tokens)
    assert_full(layer, rows, make_query(2, 1, 4, given))
    if given > 8:
        with pytest.raises(InputError, match="from 0 to the 4 tokens still in the window, got 5"):
            layer.crop(5)
    layer.crop(taken_back)
    rows.crop(taken_back)
    more = make_tokens(3, 1, 2)
    layer.append(*more)
    rows.append(more)
    assert_full(layer, rows, make_query(4, 1, 4, 2))


def test_crop_takes_the_whole_window_and_no_more() -> None:
    layer = small_layer()
    layer.prefill(*make_tokens(0, 1, 60))
    layer.attend(make_query(1, 1, 4))
    with pytest.raises(InputError, match=r"from 0 to the 4 tokens .* got 5"):
        layer.crop(5)
    layer.crop(3)
    layer.crop(1)
    assert layer.num_tokens == 56
    with pytest.raises(InputError, match="from 0 to the 0 tokens"):
        layer.crop(1)
    assert bool(torch.isfinite(layer.attend(make_query(2, 1, 4))).all())
    rows = PlainRows.of(make_tokens(0, 1, 60))
    rows.crop(4)
    tokens = make_tokens(3, 1, 5)
    layer.append(*tokens)
    rows.append(tokens)
    assert_full(layer, rows, make_query(4, 1, 4, 5))
    layer.check_integrity()


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_a_row_that_was_cropped_to_nothing_gives_zero(backend: str) -> None:
    layer = small_layer(backend=backend)
    layer.prefill(*make_tokens(0, 2, 20), left_padded([20, 3]))
    layer.crop(3)
    assert float(layer.attend(make_query(1, 2, 4))[1].abs().max()) == 0.0
    mask = torch.tensor([[True] * 20, [False] * 20])
    layer.append(*make_tokens(2, 2, 20), mask)
    assert layer.row_lens == [37, 0]
    out = layer.attend(make_query(3, 2, 4))
    assert bool(torch.isfinite(out).all())
    assert float(out[1].abs().max()) == 0.0
    # and it can begin anew
    token, query = make_tokens(4, 2, 1), make_query(5, 2, 4)
    layer.append(*token)
    expected = token.values[1].repeat_interleave(2, 0)
    torch.testing.assert_close(layer.attend(query)[1], expected)
    layer.check_integrity()


def _beams(layer: IceCacheLayer, rows: PlainRows, order: list[int]) -> None:
    layer.reorder(torch.tensor(order))
    rows.reorder(order)
    assert layer.row_lens == rows.lens
    layer.check_integrity()
    poison(layer)


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
@pytest.mark.parametrize("prompt_len", [12, 60])
def test_beams_diverge(prompt_len: int, backend: str) -> None:
    """Rows that share pages get copies when they write; none sees another's tokens."""
    layer, prompt = small_layer(backend=backend), make_tokens(0, 3, prompt_len)
    layer.prefill(*prompt)
    rows = PlainRows.of(prompt)
    layer.attend(make_query(1, 3, 4))
    orders = [[0, 0, 0], [2, 1, 0], [1, 1, 2], [0, 2, 2, 1], [3, 3, 0, 1, 2], [4, 0], [1]]
    for step, order in enumerate(orders):
        _beams(layer, rows, order)
        for i in range(6):
            token = make_tokens(100 * step + 10 * i, len(order), 1)
            layer.append(*token)
            rows.append(token)
            layer.attend(make_query(i, len(order), 4))
            layer.check_integrity()
            poison(layer)
        pair = make_tokens(2000 + step, len(order), 2)
        layer.append(*pair)
        rows.append(pair)
        assert_full(layer, rows, make_query(step, len(order), 4, 2))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_duplicate_gives_the_same_and_costs_no_pages(backend: str) -> None:
    layer = small_layer(backend=backend)
    layer.prefill(*make_tokens(0, 2, 80))
    query = make_query(1, 2, 4)
    before, pages = layer.attend(query), layer.stats().pages
    layer.reorder(torch.tensor([1, 0, 1, 1]))
    assert layer.stats().pages == pages
    assert layer.batch_size == 4
    out = layer.attend(query[[1, 0, 1, 1]])
    assert torch.equal(out, before[[1, 0, 1, 1]])


def test_a_write_copies_the_pages_it_touches_and_no_others() -> None:
    layer = small_layer()
    layer.prefill(*make_tokens(0, 1, 200))
    layer.attend(make_query(1, 1, 4))
    layer.reorder(torch.tensor([0, 0]))
    pages = layer.stats().pages
    layer.append(*make_tokens(2, 2, 1))
    # two rows, two heads, one token each: at most the leaf's page and one to move to
    assert pages < layer.stats().pages <= pages + 8
    layer.check_integrity()


def test_dropped_rows_free_their_pages() -> None:
    layer = small_layer()
    layer.prefill(*make_tokens(0, 3, 80))
    layer.attend(make_query(1, 3, 4))
    pool, all_pages = layer._context.indexed.pool, layer.stats().pages
    layer.reorder(torch.tensor([2]))
    one_row = layer.stats().pages
    assert 0 < one_row < all_pages / 2
    layer.check_integrity()
    freed = pool._holders.shape[0] - one_row
    assert len(pool._free) == freed
    # and what is freed is used again: two more rows fit without growing
    capacity = pool._holders.shape[0]
    layer.append(*make_tokens(2, 1, 100))
    layer.attend(make_query(3, 1, 4))
    assert layer._context.indexed.pool._holders.shape[0] == capacity
    layer.check_integrity()


def test_the_same_order_changes_nothing() -> None:
    layer = small_layer()
    layer.prefill(*make_tokens(0, 2, 60))
    before, stats = layer.attend(make_query(1, 2, 4)), layer.stats()
    layer.reorder(torch.tensor([0, 1], dtype=torch.int32))
    assert layer.stats() == stats
    assert torch.equal(layer.attend(make_query(1, 2, 4)), before)


def test_reset_forgets_everything() -> None:
    layer = small_layer()
    layer.prefill(*make_tokens(0, 3, 60))
    layer.attend(make_query(1, 3, 4))
    layer.reset()
    assert layer.phase is Phase.EMPTY
    assert layer.stats() == small_layer().stats()
    assert (layer.batch_size, layer.num_tokens, layer.row_lens) == (0, 0, [])
    with pytest.raises(InputError, match="attend needs tokens"):
        layer.attend(make_query(1, 3, 4))
    fresh = small_layer()
    for one in (layer, fresh):
        one.prefill(*make_tokens(2, 2, 60))
    query = make_query(3, 2, 4)
    assert torch.equal(layer.attend(query), fresh.attend(query))
    assert layer.stats() == fresh.stats()
