"""A sparse step against slow float32 twins: of what it chose, and of what it should choose."""

from typing import Any

import pytest
import torch
from torch import Tensor

from icecache import IceCacheConfig, IceCacheLayer
from tests.helpers import (
    BACKENDS,
    FAST_BACKENDS,
    HAS_NATIVE,
    KeysValues,
    PlainRows,
    Selected,
    fixed_positions,
    largest_error,
    make_query,
    make_tokens,
    poison,
    selected_by_leaves,
    slow_sparse,
)

BUDGET, SINK, WINDOW = 64, 8, 12
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 4.0},
    "sinks": {"sink_logits": True},
    "scaling": {"scaling": 0.3},
    "all": {"softcap": 6.0, "sink_logits": True, "scaling": 0.07},
}


def _layer(
    dim: int = 64, heads: int = 2, dtype: torch.dtype = torch.float32, **settings: Any
) -> IceCacheLayer:
    base = {"budget": BUDGET, "sink": SINK, "window": WINDOW, "segment_tokens": 128}
    config = IceCacheConfig.from_kwargs(**{**base, **settings})
    return IceCacheLayer(config, num_kv_heads=heads, head_dim=dim, dtype=dtype)


def _grown(layer: IceCacheLayer, batch: int = 2, tokens: int = 300, more: int = 40) -> PlainRows:
    """Give a layer a prompt and then tokens one by one; return them."""
    dim, heads, dtype = layer.head_dim, layer.num_kv_heads, layer.dtype
    prompt = make_tokens(0, batch, tokens, heads=heads, dim=dim, dtype=dtype)
    layer.prefill(*prompt)
    rows = PlainRows.of(prompt)
    for i in range(more):
        token = make_tokens(100 + i, batch, 1, heads=heads, dim=dim, dtype=dtype)
        layer.append(*token)
        rows.append(token)
    poison(layer)
    return rows


def _chosen_by_search(layer: IceCacheLayer, query: Tensor) -> Tensor:
    """Return which leaves the layer's own search selects, shape [rows, leaves], bool."""
    indexed = layer._context.indexed
    found = layer.search(query).positions
    chosen = []
    for (tokens, real), positions in zip(zip(*indexed.tokens(), strict=True), found, strict=True):
        held = indexed.pool.positions_of(tokens.flatten()).view(tokens.shape)
        chosen.append((torch.isin(held, positions) & real).any(1))
    return torch.stack(chosen)


def _settings(variant: str, heads: int, dim: int) -> dict[str, Any]:
    settings = {"scaling": dim**-0.5, **VARIANTS[variant]}
    if settings.get("sink_logits"):
        settings["sink_logits"] = torch.linspace(-1, 3, heads)
    return settings


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("remainder", [True, False])
def test_output_equals_a_slow_twin_of_the_chosen_leaves(
    backend: str, variant: str, remainder: bool
) -> None:
    layer = _layer(backend=backend, remainder=remainder)
    rows, query = _grown(layer), make_query(1, 2, 6, dim=64)
    settings = _settings(variant, 6, 64)
    out = layer.attend(query, **settings)
    step = layer.inspect(query, **settings)
    selected = selected_by_leaves(layer, step.chosen)
    truth = slow_sparse(layer, rows, query, selected, **settings)
    assert largest_error(out, truth) <= 1e-5
    assert all(0 < len(s.positions) <= BUDGET - SINK - WINDOW for s in selected)
    assert step.num_attended.tolist() == [SINK + WINDOW + len(s.positions) for s in selected]
    layer.check_integrity()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize(
    ("dim", "kv_heads", "group"),
    [
        *((8, 2, 4), (24, 1, 3), (40, 1, 9), (64, 1, 16)),
        *((80, 3, 1), (96, 2, 7), (128, 2, 4), (256, 1, 2)),
    ],
)
def test_shapes(backend: str, dim: int, kv_heads: int, group: int) -> None:
    layer = _layer(dim, kv_heads, backend=backend)
    rows, query = _grown(layer, batch=1, more=5), make_query(2, 1, kv_heads * group, dim=dim)
    chosen = layer.inspect(query).chosen
    truth = slow_sparse(layer, rows, query, selected_by_leaves(layer, chosen), scaling=dim**-0.5)
    assert largest_error(layer.attend(query), truth) <= 1e-5


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    """Half-precision tokens are attended in float32: only the output is rounded."""
    layer = _layer(dtype=dtype, backend=backend)
    rows, query = _grown(layer), make_query(3, 2, 4, dim=64, dtype=dtype)
    out = layer.attend(query)
    assert out.dtype == dtype
    selected = selected_by_leaves(layer, layer.inspect(query).chosen)
    truth = slow_sparse(layer, rows, query, selected, scaling=64**-0.5)
    rounding = float(truth.abs().max()) * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    assert largest_error(out, truth) <= rounding + 1e-5


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_the_smallest_halves_are_read_right(backend: str) -> None:
    """Values below float16's normal range, to the last step of 2 ** -24."""
    layer = _layer(dtype=torch.float16, backend=backend)
    tokens = make_tokens(12, 1, 200, dim=64)
    values = (tokens.values * 2.0**-17).half()
    assert float(values.abs().mean()) < torch.finfo(torch.float16).smallest_normal
    layer.prefill(tokens.keys.half(), values)
    rows = PlainRows.of(KeysValues(tokens.keys.half(), values))
    query = make_query(13, 1, 4, dim=64, dtype=torch.float16)
    out = layer.attend(query)
    selected = selected_by_leaves(layer, layer.inspect(query).chosen)
    truth = slow_sparse(layer, rows, query, selected, scaling=64**-0.5)
    assert float(truth.abs().max()) > 2e-6
    assert largest_error(out, truth) <= 2.0**-24


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_page_unit_takes_whole_pages_within_the_budget(backend: str) -> None:
    layer = _layer(unit="page", backend=backend)
    rows, query = _grown(layer), make_query(4, 2, 6, dim=64)
    step = layer.inspect(query)
    pages = layer._context.indexed.leaves.pages()
    for row, num in enumerate(layer._context.indexed.leaves.num.tolist()):
        taken = set(pages[row, :num][step.chosen[row, :num]].tolist())
        left = set(pages[row, :num][~step.chosen[row, :num]].tolist())
        assert taken and left and not taken & left
    assert int(step.num_attended.max()) <= BUDGET
    truth = slow_sparse(layer, rows, query, selected_by_leaves(layer, step.chosen), scaling=0.125)
    assert largest_error(layer.attend(query), truth) <= 1e-5


def _exact_top(
    layer: IceCacheLayer, rows: PlainRows, query: Tensor, scaling: float
) -> list[Selected]:
    """Choose the tokens of largest summed softmax share, by hand."""
    group = query.shape[1] // layer.num_kv_heads
    result = []
    for b, length in enumerate(rows.lens):
        fixed = fixed_positions(layer, b, length)
        middle = [p for p in range(length) if p not in set(fixed)]
        for kv_head in range(layer.num_kv_heads):
            q = query[b, kv_head * group : (kv_head + 1) * group, 0].double()
            share = torch.softmax(scaling * q @ rows.keys[b][kv_head].double().T, 1).sum(0)
            best = share[middle].argsort(descending=True)[: layer.config.budget - len(fixed)]
            result.append(Selected([middle[i] for i in best.tolist()], []))
    return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_selection_is_the_top_k_of_the_heads_vote(backend: str) -> None:
    layer = _layer(selection="exact", backend=backend)
    rows, query = _grown(layer), make_query(5, 2, 6, dim=64)
    truth = slow_sparse(layer, rows, query, _exact_top(layer, rows, query, 0.2), scaling=0.2)
    assert largest_error(layer.attend(query, scaling=0.2), truth) <= 1e-5
    assert layer.stats().tokens_attended == BUDGET


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_the_papers_variant_attends_whole_pages_alone(backend: str) -> None:
    config = IceCacheConfig.paper(budget=96, sink=8, window=12, backend=backend)
    layer = IceCacheLayer(config, num_kv_heads=2, head_dim=64, dtype=torch.float32)
    rows, query = _grown(layer), make_query(6, 2, 6, dim=64)
    step = layer.inspect(query)
    tokens, real = layer._context.indexed.tokens()
    tokens, real = tokens.flatten(1), real.flatten(1)
    selected = []
    for row in range(4):
        taken = tokens[row][step.chosen[row]]
        in_taken_pages = real[row] & torch.isin(tokens[row] // 16, taken // 16)
        assert torch.equal(step.chosen[row], in_taken_pages)
        assert len((taken // 16).unique()) == (96 - 8 - 12) // 16
        selected.append(Selected(layer._context.indexed.pool.positions_of(taken).tolist(), []))
    truth = slow_sparse(layer, rows, query, selected, scaling=0.125)
    assert largest_error(layer.attend(query), truth) <= 1e-5


def test_backends_agree() -> None:
    """The same tokens, queries and steps: the same leaves in each, outputs within rounding."""
    outs, leaves = [], []
    query = make_query(7, 2, 6, dim=64)
    for backend in FAST_BACKENDS:
        layer = _layer(backend=backend)
        _grown(layer)
        outs.append(layer.attend(query))
        leaves.append(layer.stats().leaves)
        assert layer.stats().backend == backend
    assert all(largest_error(out, outs[0]) <= 1e-5 for out in outs)
    assert len(set(leaves)) == 1


def test_auto_takes_the_compiled_ops_where_they_are() -> None:
    assert _layer(backend="auto").stats().backend == ("native" if HAS_NATIVE else "torch")


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_the_remainder_brings_the_output_nearer_to_full_attention(backend: str) -> None:
    errors = {}
    for remainder in (True, False):
        layer = _layer(remainder=remainder, backend=backend)
        rows, query = _grown(layer, tokens=600), make_query(8, 2, 6, dim=64)
        out = layer.attend(query)
        truth = torch.stack([rows.attend(row, query[row]) for row in range(2)])
        errors[remainder] = float((out - truth).norm() / truth.norm())
    assert errors[True] < 0.7 * errors[False]


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_large_logits_do_not_overflow(backend: str) -> None:
    layer = _layer(backend=backend)
    rows = _grown(layer)
    query = 300 * make_query(9, 2, 6, dim=64)
    out = layer.attend(query)
    assert bool(torch.isfinite(out).all())
    # most shares underflow and rounding ranks them, so the twin's choice may be another
    selected = selected_by_leaves(layer, _chosen_by_search(layer, query))
    assert all(0 < len(row.positions) <= BUDGET - SINK - WINDOW for row in selected)
    assert largest_error(out, slow_sparse(layer, rows, query, selected, scaling=0.125)) <= 1e-3


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_five_hundred_equal_keys(backend: str) -> None:
    """All leaves weigh the same: the output is the mean value, however they are chosen."""
    layer = _layer(backend=backend)
    keys, values = torch.ones(1, 2, 500, 64), make_tokens(10, 1, 500, dim=64).values
    layer.prefill(keys, values)
    out = layer.attend(make_query(11, 1, 4, dim=64))
    # each summary's value is rounded to 8 bits
    expected = values.mean(2).repeat_interleave(2, 1)[:, :, None]
    assert largest_error(out, expected) <= 0.01
    layer.check_integrity()
