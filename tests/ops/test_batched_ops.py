"""Every batched op against its loop in `reference`, at odd shapes."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from icecache.ops import batched, reference
from tests.helpers import assert_as_good_as_torch, full_attention, largest_error, rng

HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = (1, 2, 3, 7, 16)
SHAPES = list(zip(HEAD_DIMS, GROUPS, strict=True))
PAGE = 16
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, 63)
ROWS, LEAVES = 3, 19


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng(seed))


def _leaves(seed: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes, scales, counts (one row has no leaf, the others holes) and spreads."""
    codes, scale = reference.quantize_rows(_normal(seed, ROWS, LEAVES, dim))
    count = torch.randint(0, 9, (ROWS, LEAVES), generator=rng(seed + 1)).to(torch.uint8)
    count[1] = 0
    count[2, 0] = 0
    count[2, -1] = 8
    return codes, scale, count, _normal(seed + 2, ROWS, LEAVES).abs()


@pytest.mark.parametrize("dim", [1, 3, *HEAD_DIMS])
def test_summarize(dim: int) -> None:
    keys, values = _normal(0, 63, dim), _normal(1, 63, dim + 5)
    ids = torch.cat([torch.arange(11), torch.randint(11, (52,), generator=rng(2))])
    ours, truth = (
        batched.summarize(keys, values, ids, 11),
        reference.summarize(keys, values, ids, 11),
    )
    assert torch.equal(ours[0], truth[0])
    for our, true in zip(ours[1:], truth[1:], strict=True):
        torch.testing.assert_close(our, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 7, 64, 129])
@pytest.mark.parametrize("num", [0, 1, 63, 2000])
def test_sum_groups(num: int, dim: int) -> None:
    """Both ways of summing: of a few elements and of many; groups without elements are zero."""
    x, ids = _normal(26, num, dim), torch.randint(5, (num,), generator=rng(27))
    ours, truth = batched.sum_groups(x, ids, 7), reference.sum_groups(x, ids, 7)
    assert ours.shape == (7, dim)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
    assert float(ours[5:].abs().sum()) == 0.0


@pytest.mark.parametrize("dim", [1, 7, 64])
def test_a_groups_sum_does_not_depend_on_the_other_groups(dim: int) -> None:
    """Bit for bit, however many elements there are beside its own: batches must not matter."""
    x, ids = _normal(28, 5000, dim), torch.randint(300, (5000,), generator=rng(29))
    together = batched.sum_groups(x, ids, 300)
    for part in (ids < 3, ids < 100):
        alone = batched.sum_groups(x[part], ids[part], 300)
        mine = ids[part].unique()
        assert torch.equal(alone[mine], together[mine])


def test_summarize_counts_a_group_without_tokens_as_zero() -> None:
    count, mean, _, spread = batched.summarize(
        torch.ones(2, 4), torch.ones(2, 4), torch.tensor([0, 2]), 4
    )
    assert count.tolist() == [1, 0, 1, 0]
    assert mean[1].tolist() == [0.0] * 4
    assert spread.tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (2, 3, 80), (63, 256)])
def test_quantize_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (10 * _normal(3, *shape)).to(dtype)
    x[0] = 0
    codes, scale = batched.quantize_rows(x)
    true_codes, true_scale = reference.quantize_rows(x)
    assert torch.equal(codes, true_codes)
    assert torch.equal(scale, true_scale)
    step = scale.float()[..., None]
    # the scale is rounded to bfloat16, so the largest number may lie half a code behind the last
    assert bool(((codes.float() * step - x.float()).abs() <= 0.5001 * step).all())


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("dim", "group"), SHAPES)
def test_score_leaves(dim: int, group: int, softcap: float | None) -> None:
    query = _normal(4, ROWS, group, dim)
    centre = 3 * _normal(6, ROWS, dim)
    arguments = (query, centre, *_leaves(5, dim), dim**-0.5, softcap)
    logits, correction = batched.score_leaves(*arguments)
    true_logits, true_correction = reference.score_leaves(*arguments)
    torch.testing.assert_close(logits, true_logits, rtol=1e-5, atol=1e-5)
    alive = (arguments[4] > 0)[:, None].expand_as(logits)
    assert bool((logits[~alive] == -math.inf).all())
    torch.testing.assert_close(correction[alive], true_correction[alive], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 3, *HEAD_DIMS])
@pytest.mark.parametrize("num", [1, 15, 16, 300])
def test_nearest(dim: int, num: int) -> None:
    means, point = _normal(6, num, dim), _normal(7, dim)
    found = batched.nearest(point, means, 16)
    assert torch.equal(found, reference.nearest(point, means, 16))
    assert found.numel() == min(num, 16)


def test_of_equally_near_means_the_first_comes_first() -> None:
    means = torch.ones(40, 8)
    for ops in (batched, reference):
        assert ops.nearest(torch.zeros(8), means, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dim", [1, 7, 64, 128])
def test_merge_summaries_is_the_summary_of_all_tokens(dim: int) -> None:
    """Summaries of leaves, merged, say what a summary of their tokens says."""
    keys, values = _normal(20, 90, dim) + 3, _normal(21, 90, dim)
    leaf = torch.cat([torch.arange(20), torch.randint(20, (70,), generator=rng(22))])
    node = torch.arange(20) % 6
    count, *parts = reference.summarize(keys, values, leaf, 20)
    truth = reference.summarize(keys, values, node[leaf], 6)
    for ops in (batched, reference):
        merged = ops.merge_summaries(*parts, count, node, 6)
        assert torch.equal(merged[0], truth[0])
        for ours, true in zip(merged[1:], truth[1:], strict=True):
            torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4)


def _ragged(lens: tuple[int, ...], width: int) -> Tensor:
    """Return a mask of scattered tokens: as many a row as asked, never in a block."""
    valid = torch.zeros(len(lens), width, dtype=torch.bool)
    for row, length in enumerate(lens):
        valid[row, torch.randperm(width, generator=rng(row))[:length]] = True
    return valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("softcap", "sinks"), [(None, False), (3.0, False), (None, True), (3.0, True)]
)
@pytest.mark.parametrize(("dim", "group"), SHAPES)
def test_attend_parts(
    dim: int, group: int, softcap: float | None, sinks: bool, dtype: torch.dtype
) -> None:
    query = _normal(8, ROWS, group, dim)
    keys, values = _normal(9, ROWS, 63, dim).to(dtype), _normal(10, ROWS, 63, dim).to(dtype)
    codes, scale, count, spread = _leaves(11, dim)
    centre, rest = _normal(14, ROWS, dim), (codes, scale, count, spread, dim**-0.5, softcap)
    logits, _ = reference.score_leaves(query, centre, *rest)
    logits[0, :, 3] = -math.inf
    value_codes, value_scale = reference.quantize_rows(_normal(12, ROWS, LEAVES, dim))
    sink_logits = _normal(13, ROWS, group) if sinks else None
    valid = _ragged((63, 1, 17), 63)
    arguments = (query, keys, values, valid, logits, value_codes, value_scale, sink_logits)
    ours = batched.attend_parts(*arguments, dim**-0.5, softcap)
    truth = reference.attend_parts(*arguments, dim**-0.5, softcap)
    assert largest_error(ours, truth) <= 1e-5
    without = (query, keys, values, valid, None, None, None, sink_logits, dim**-0.5, softcap)
    error = largest_error(batched.attend_parts(*without), reference.attend_parts(*without))
    assert error <= 1e-5


def test_attend_parts_with_sinks_alone_gives_zero() -> None:
    """A row without tokens puts all of its weight on the learned sink, which has no value."""
    query, keys = _normal(14, 2, 3, 64), torch.zeros(2, 4, 64)
    valid = torch.tensor([[True] * 4, [False] * 4])
    sink = torch.zeros(2, 3)
    out = batched.attend_parts(query, keys, keys + 1, valid, None, None, None, sink, 0.1, None)
    assert float(out[1].abs().max()) == 0.0
    torch.testing.assert_close(out[0], torch.full((3, 64), 0.8))


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("queries", [1, 5, PAGE + 1, 63])
@pytest.mark.parametrize(
    ("softcap", "sinks"), [(None, False), (3.0, False), (None, True), (3.0, True)]
)
def test_attend_dense(tokens: int, queries: int, softcap: float | None, sinks: bool) -> None:
    queries = min(queries, tokens)
    query, keys, values = _normal(15, 2, 6, queries, 80), _normal(16, 2, 3, tokens, 80), None
    values = _normal(17, 2, 3, tokens, 80)
    sink_logits = _normal(18, 6) if sinks else None
    # the second row sees fewer tokens, its first queries none
    ragged = torch.arange(tokens)[None] >= torch.tensor([[0], [tokens // 2]])
    for valid in (None, ragged):
        arguments = (query, keys, values, valid, 0.1, softcap, sink_logits)
        ours, truth = batched.attend_dense(*arguments), reference.attend_dense(*arguments)
        assert largest_error(ours, truth) <= 1e-5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (3.0, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "group"), SHAPES)
def test_attend_dense_in_half_precision(
    dim: int, group: int, dtype: torch.dtype, softcap: float | None, sinks: bool, masked: bool
) -> None:
    query, keys = _normal(19, 1, 2 * group, 17, dim).to(dtype), _normal(20, 1, 2, 63, dim).to(dtype)
    values = _normal(21, 1, 2, 63, dim).to(dtype)
    sink_logits = _normal(22, 2 * group) if sinks else None
    valid = torch.ones(1, 63, dtype=torch.bool) if masked else None
    ours = batched.attend_dense(query, keys, values, valid, dim**-0.5, softcap, sink_logits)
    assert ours.dtype == dtype
    truth = full_attention(query[0], keys[0], values[0], softcap=softcap, sink_logits=sink_logits)
    seen = torch.arange(63)[None] <= torch.arange(46, 63)[:, None]
    plain = functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=seen, enable_gqa=True
    )
    plain_truth = full_attention(query[0], keys[0], values[0])
    # softcap and sinks have no SDPA to compare with: its error without them is the measure
    own = truth + (plain[0].double() - plain_truth)
    assert_as_good_as_torch(ours[0], own, truth)


def test_attend_dense_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "_BLOCK_ELEMENTS", 7 * 2 * 40)
    monkeypatch.setattr(batched, "_MASK_ELEMENTS", 7 * 40)
    query, keys, values = (_normal(s, 1, 2, 40, 64) for s in (23, 24, 25))
    padding = torch.arange(40)[None] >= 3
    for softcap, valid in itertools.product((None, 4.0), (None, padding)):
        arguments = (query[:, :, 10:], keys, values, valid, 0.125, softcap, None)
        ours, truth = batched.attend_dense(*arguments), reference.attend_dense(*arguments)
        assert largest_error(ours, truth) <= 1e-5


def test_both_modules_offer_the_same_ops() -> None:
    assert batched.__all__ == reference.__all__
