"""Combine: the pieces of up to three parts into one attention, by their log-sum-exps."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from icecache.ops.device.records import Part
from icecache.ops.device.twin import check_parts
from icecache.ops.triton.arithmetic import divisor
from icecache.ops.triton.launch import on_device_of, tile

__all__ = ["combine"]

_MOST_PARTS = 3
_DIM_TILE = 64


def combine(parts: Sequence[Part], sink_logits: Tensor | None) -> Tensor:
    """As `twin.combine`."""
    check_parts(parts)
    num_rows, _, group, dim = parts[0].out.shape
    result = parts[0].out.new_empty(num_rows, group, dim)
    pieces = [part.lse.shape[1] for part in parts]
    # a part that is not given has no pieces
    pieces += [0] * (_MOST_PARTS - len(parts))
    given = [*parts, *[parts[0]] * (_MOST_PARTS - len(parts))]
    sinks = None if sink_logits is None else sink_logits.float().contiguous()
    dim_tile = min(_DIM_TILE, tile(dim))
    with on_device_of(result):
        _combine_kernel[(num_rows * group, triton.cdiv(dim, dim_tile))](
            *(tensor for part in given for tensor in part),
            result if sinks is None else sinks,
            result,
            *pieces,
            G=group,
            D=dim,
            SINKS=sinks is not None,
            BD=dim_tile,
            BA=tile(pieces[0]),
            BB=tile(pieces[1]),
            BC=tile(pieces[2]),
        )
    return result


@triton.jit
def _load_lse(lse, N, i_row, i_group, G: tl.constexpr, BN: tl.constexpr):
    o_piece = tl.arange(0, BN)
    p_lse = lse + (i_row * N + o_piece) * G + i_group
    return tl.load(p_lse, o_piece < N, other=-float("inf"))


@triton.jit
def _weigh(out, b_lse, total, N, i_row, i_group, G: tl.constexpr, D: tl.constexpr, o_dim):
    o_piece = tl.arange(0, b_lse.shape[0])
    p_out = ((i_row * N + o_piece) * G + i_group)[:, None] * D + o_dim[None, :]
    b_out = tl.load(out + p_out, (o_piece < N)[:, None] & (o_dim < D)[None, :], other=0.0)
    return tl.sum(tl.exp(b_lse - total)[:, None] * b_out, 0)


@triton.jit(do_not_specialize=["A", "B", "C"])
def _combine_kernel(
    out_a,
    lse_a,
    out_b,
    lse_b,
    out_c,
    lse_c,
    sinks,
    result,
    A,
    B,
    C,
    G: tl.constexpr,
    D: tl.constexpr,
    SINKS: tl.constexpr,
    BD: tl.constexpr,
    BA: tl.constexpr,
    BB: tl.constexpr,
    BC: tl.constexpr,
):
    i_head = tl.program_id(0).to(tl.int64)
    i_row, i_group = i_head // G, i_head % G
    o_dim = tl.program_id(1) * BD + tl.arange(0, BD)
    b_a = _load_lse(lse_a, A, i_row, i_group, G, BA)
    b_b = _load_lse(lse_b, B, i_row, i_group, G, BB)
    b_c = _load_lse(lse_c, C, i_row, i_group, G, BC)
    largest = tl.maximum(tl.maximum(tl.max(b_a, 0), tl.max(b_b, 0)), tl.max(b_c, 0))
    if SINKS:
        sink = tl.load(sinks + i_head)
        largest = tl.maximum(largest, sink)
    largest = tl.maximum(largest, -1e30)
    total = tl.sum(tl.exp(b_a - largest), 0) + tl.sum(tl.exp(b_b - largest), 0)
    total += tl.sum(tl.exp(b_c - largest), 0)
    if SINKS:
        total += tl.exp(sink - largest)
    total = largest + tl.log(divisor(total))
    b_out = _weigh(out_a, b_a, total, A, i_row, i_group, G, D, o_dim)
    b_out += _weigh(out_b, b_b, total, B, i_row, i_group, G, D, o_dim)
    b_out += _weigh(out_c, b_c, total, C, i_row, i_group, G, D, o_dim)
    tl.store(result + i_head * D + o_dim, b_out, o_dim < D)
