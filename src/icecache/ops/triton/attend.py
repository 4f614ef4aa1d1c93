"""Attention over tokens: sink, window and the leaving one, and the tokens of selected pages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from icecache.ops.device.records import DevicePages, Fixed, Leaving, Part, Selected
from icecache.ops.triton.arithmetic import divisor, everywhere, safe, squash
from icecache.ops.triton.launch import check_contiguous, num_warps, on_device_of, tile

__all__ = ["attend_fixed", "attend_pages"]


def attend_fixed(
    query: Tensor, fixed: Fixed, leaving: Leaving, scaling: float, softcap: float | None
) -> Part:
    """As `twin.attend_fixed`, a piece a tile of tokens."""
    check_contiguous(keys=fixed.keys, values=fixed.values)
    num_rows, size, dim = fixed.keys.shape
    # tiles of float32 at head_dim 256 must fit in shared memory
    token_tile = min(64 if dim <= 128 else 32, tile(size + 1))
    pieces = triton.cdiv(size + 1, token_tile)
    part = _empty_part(query, pieces)
    with on_device_of(query):
        _fixed_kernel[(num_rows, pieces)](
            query.contiguous(),
            *fixed[:4],
            leaving.keys,
            leaving.values,
            leaving.leaves.view(torch.uint8),
            *part,
            scaling,
            H=num_rows // fixed.lens.shape[0],
            G=query.shape[1],
            D=dim,
            SINK=fixed.sink,
            SIZE=size,
            SOFTCAP=softcap or 0.0,
            PRECISION=_precision(query),
            BG=tile(query.shape[1]),
            BD=tile(dim),
            BT=token_tile,
            num_warps=num_warps(dim),
        )
    return part


def attend_pages(
    query: Tensor,
    pages: DevicePages,
    selected: Selected,
    slots: Tensor,
    scaling: float,
    softcap: float | None,
) -> Part:
    """As `twin.attend_pages`, a piece a page."""
    pool = pages.host if pages.resident is None else pages.resident
    check_contiguous(pool=pool, tokens=selected.tokens, slots=slots)
    num_rows, most = slots.shape
    part = _empty_part(query, most)
    with on_device_of(query):
        _pages_kernel[(num_rows, most)](
            query.contiguous(),
            pool,
            selected.tokens,
            slots,
            *part,
            scaling,
            pool.shape[1],
            S=most,
            G=query.shape[1],
            D=query.shape[2],
            T=pool.shape[3],
            SOFTCAP=softcap or 0.0,
            PRECISION=_precision(query),
            BG=tile(query.shape[1]),
            BD=tile(query.shape[2]),
            BT=tile(pool.shape[3]),
            num_warps=num_warps(query.shape[2]),
        )
    return part


def _precision(query: Tensor) -> str:
    """Return a precision of products in which the query's dtype is exact."""
    return "ieee" if query.dtype == torch.float32 else "tf32"


def _empty_part(query: Tensor, pieces: int) -> Part:
    num_rows, group, dim = query.shape
    out = torch.empty(num_rows, pieces, group, dim, dtype=torch.float32, device=query.device)
    return Part(out, torch.empty_like(out[..., 0]))


@triton.jit
def _attend_tile(
    b_query, b_key, b_value, m_token, scaling, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):
    """Return attention and log-sum-exp of one tile of tokens; unreal ones are 0."""
    b_logit = scaling * tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
    b_logit = tl.where(m_token[None, :], squash(b_logit, SOFTCAP), -float("inf"))  # [BG, BT]
    largest = safe(tl.max(b_logit, 1))
    b_weight = tl.exp(b_logit - largest[:, None])
    total = tl.sum(b_weight, 1)
    b_out = tl.dot(b_weight, b_value, input_precision=PRECISION) / divisor(total)[:, None]
    return b_out, tl.where(total > 0, largest + tl.log(divisor(total)), -float("inf"))


@triton.jit
def _load_query(query, i_row, G: tl.constexpr, D: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr):
    o_group, o_dim = tl.arange(0, BG), tl.arange(0, BD)
    mask = (o_group < G)[:, None] & (o_dim < D)[None, :]
    p_query = query + (i_row * G + o_group)[:, None] * D + o_dim[None, :]
    return tl.load(p_query, mask, other=0.0).to(tl.float32)


@triton.jit
def _store_piece(
    out,
    lse,
    i_piece,
    b_out,
    b_lse,
    G: tl.constexpr,
    D: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
):
    o_group, o_dim = tl.arange(0, BG), tl.arange(0, BD)
    m_group = o_group < G
    p_out = out + (i_piece * G + o_group)[:, None] * D + o_dim[None, :]
    tl.store(p_out, b_out, m_group[:, None] & (o_dim < D)[None, :])
    tl.store(lse + i_piece * G + o_group, b_lse, m_group)


@triton.jit
def _fixed_kernel(
    query,
    keys,
    values,
    lens,
    left,
    left_keys,
    left_values,
    leaves,
    out,
    lse,
    scaling,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SINK: tl.constexpr,
    SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_token, o_dim = i_tile * BT + tl.arange(0, BT), tl.arange(0, BD)
    length, first = tl.load(lens + i_row // H), tl.load(left + i_row // H)
    # the position that lies in a place of the ring is the first from `left` on that belongs there
    behind = (o_token - SINK - (first - SINK) % (SIZE - SINK) + (SIZE - SINK)) % (SIZE - SINK)
    m_held = tl.where(o_token < SINK, o_token, first + behind) < length
    m_held = m_held & (o_token < SIZE)
    # the leaving token comes behind the ring
    m_left = (o_token == SIZE) & everywhere(tl.load(leaves + i_row) != 0, o_token)
    m_dim = (o_dim < D)[None, :]
    p_held = (i_row * SIZE + o_token)[:, None] * D + o_dim[None, :]
    p_left = (i_row + o_token * 0)[:, None] * D + o_dim[None, :]
    b_key = tl.load(keys + p_held, m_held[:, None] & m_dim, other=0.0).to(tl.float32)
    b_key += tl.load(left_keys + p_left, m_left[:, None] & m_dim, other=0.0).to(tl.float32)
    b_value = tl.load(values + p_held, m_held[:, None] & m_dim, other=0.0).to(tl.float32)
    b_value += tl.load(left_values + p_left, m_left[:, None] & m_dim, other=0.0).to(tl.float32)
    b_query = _load_query(query, i_row, G, D, BG, BD)
    b_out, b_lse = _attend_tile(
        b_query, b_key, b_value, m_held | m_left, scaling, SOFTCAP, PRECISION
    )
    _store_piece(out, lse, i_row * tl.num_programs(1) + i_tile, b_out, b_lse, G, D, BG, BD)


@triton.jit(do_not_specialize=["C"])
def _pages_kernel(
    query,
    pool,
    tokens,
    slots,
    out,
    lse,
    scaling,
    C,
    S: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    i_row, i_page = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + i_row * S + i_page)
    attended = tl.load(tokens + i_row * S + i_page)
    o_token, o_dim = tl.arange(0, BT).to(tl.int64), tl.arange(0, BD)
    m_token = (o_token < T) & ((attended >> (o_token & 63)) & 1 == 1)
    mask = m_token[:, None] & (o_dim < D)[None, :]
    p_key = ((i_row * C + slot) * 2 * T + o_token)[:, None] * D + o_dim[None, :]
    b_key = tl.load(pool + p_key, mask, other=0.0).to(tl.float32)  # [BT, BD]
    b_value = tl.load(pool + p_key + T * D, mask, other=0.0).to(tl.float32)
    b_query = _load_query(query, i_row, G, D, BG, BD)
    b_out, b_lse = _attend_tile(b_query, b_key, b_value, m_token, scaling, SOFTCAP, PRECISION)
    _store_piece(out, lse, i_row * S + i_page, b_out, b_lse, G, D, BG, BD)
