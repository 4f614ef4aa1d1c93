"""Push: one token a row to sink or window, and what it displaces."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from icecache.ops.device.records import Fixed, Leaving
from icecache.ops.triton.arithmetic import everywhere
from icecache.ops.triton.launch import check_contiguous, on_device_of, tile

__all__ = ["push"]


def push(fixed: Fixed, new_keys: Tensor, new_values: Tensor) -> Leaving:
    """As `twin.push`."""
    check_contiguous(keys=fixed.keys, values=fixed.values)
    num_rows, size, dim = fixed.keys.shape
    batch = fixed.lens.shape[0]
    leaving = Leaving(
        torch.empty_like(fixed.keys[:, 0]),
        torch.empty_like(fixed.values[:, 0]),
        torch.empty(num_rows, dtype=torch.bool, device=fixed.keys.device),
        torch.empty(num_rows, dtype=torch.int32, device=fixed.keys.device),
    )
    with on_device_of(fixed.keys):
        _push_kernel[(batch,)](
            *fixed[:4],
            new_keys.contiguous(),
            new_values.contiguous(),
            leaving.keys,
            leaving.values,
            leaving.leaves.view(torch.uint8),
            leaving.position,
            H=num_rows // batch,
            D=dim,
            SINK=fixed.sink,
            SIZE=size,
            BH=tile(num_rows // batch),
            BD=tile(dim),
        )
    return leaving


@triton.jit
def _push_kernel(
    keys,
    values,
    lens,
    left,
    new_keys,
    new_values,
    left_keys,
    left_values,
    leaves,
    position,
    H: tl.constexpr,
    D: tl.constexpr,
    SINK: tl.constexpr,
    SIZE: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    i_batch = tl.program_id(0).to(tl.int64)
    length, first = tl.load(lens + i_batch), tl.load(left + i_batch)
    full = length - first == SIZE - SINK
    into = tl.where(length < SIZE, length, SINK + (length - SINK) % (SIZE - SINK))
    o_head = tl.arange(0, BH)
    o_row = i_batch * H + o_head
    o_dim = tl.arange(0, BD)
    m_row = o_head < H
    m_token = m_row[:, None] & (o_dim < D)[None, :]
    m_full = m_row & everywhere(full, o_head)
    m_left = m_full[:, None] & (o_dim < D)[None, :]
    p_ring = (o_row * SIZE + into)[:, None] * D + o_dim[None, :]
    p_row = o_row[:, None] * D + o_dim[None, :]
    b_key = tl.load(keys + p_ring, m_left, other=0.0)  # [BH, BD]
    b_value = tl.load(values + p_ring, m_left, other=0.0)
    tl.store(left_keys + p_row, b_key, m_token)
    tl.store(left_values + p_row, b_value, m_token)
    tl.store(leaves + o_row, tl.where(m_full, 1, 0).to(tl.uint8), m_row)
    tl.store(position + o_row, tl.where(m_full, first, -1), m_row)
    # every warp has read the length and what is displaced before any writes
    tl.debug_barrier()
    tl.store(keys + p_ring, tl.load(new_keys + p_row, m_token, other=0.0), m_token)
    tl.store(values + p_ring, tl.load(new_values + p_row, m_token, other=0.0), m_token)
    tl.store(lens + i_batch, length + 1)
    tl.store(left + i_batch, first + full.to(tl.int32))
