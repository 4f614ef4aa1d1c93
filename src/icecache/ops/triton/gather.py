"""Gather: missing pages from the host's pool, which the kernel reads through its own address."""

import triton
import triton.language as tl
from torch import Tensor

from icecache.ops.device.records import DevicePages
from icecache.ops.triton.launch import check_contiguous, on_device_of, tile

__all__ = ["gather"]

# elements a program copies: 8 KiB of a 16-bit dtype, so that one page keeps one program busy
_CHUNK = 4096


def gather(pages: DevicePages, slots: Tensor, missing: Tensor) -> None:
    """As `twin.gather`; `host` and `scales` may be pinned host memory."""
    if pages.resident is None:
        return
    check_contiguous(host=pages.host, scales=pages.scales, resident=pages.resident)
    num_rows, most = missing.shape
    page_size, dim = pages.host.shape[3:]
    token_tile = min(tile(2 * page_size), max(1, _CHUNK // tile(dim)))
    with on_device_of(pages.resident):
        _gather_kernel[(num_rows * most, triton.cdiv(2 * page_size, token_tile))](
            pages.host,
            pages.host if pages.scales is None else pages.scales,
            pages.resident,
            slots,
            missing,
            pages.host.shape[1],
            pages.resident.shape[1],
            S=most,
            T=page_size,
            D=dim,
            QUANTIZED=pages.scales is not None,
            BT=token_tile,
            BD=tile(dim),
        )


@triton.jit(do_not_specialize=["P", "C"])
def _gather_kernel(
    host,
    scales,
    resident,
    slots,
    missing,
    P,
    C,
    S: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    i_wanted, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    page = tl.load(missing + i_wanted)
    if page >= 0:
        i_row = i_wanted // S
        slot = tl.load(slots + i_wanted)
        # keys of a page's tokens, then their values
        o_token, o_dim = i_tile * BT + tl.arange(0, BT), tl.arange(0, BD)
        m_token = o_token < 2 * T
        mask = m_token[:, None] & (o_dim < D)[None, :]
        p_host = (i_row * P + page) * 2 * T + o_token
        b_token = tl.load(host + p_host[:, None] * D + o_dim[None, :], mask, other=0)
        if QUANTIZED:
            scale = tl.load(scales + p_host, m_token, other=0.0)
            b_token = b_token.to(tl.float32) * scale[:, None]
        p_resident = (i_row * C + slot) * 2 * T + o_token
        tl.store(resident + p_resident[:, None] * D + o_dim[None, :], b_token, mask)
