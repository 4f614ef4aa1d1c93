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
    record = 2 * page_size * dim
    chunk = min(_CHUNK, tile(record))
    with on_device_of(pages.resident):
        _gather_kernel[(num_rows * most, triton.cdiv(record, chunk))](
            pages.host,
            pages.host if pages.scales is None else pages.scales,
            pages.resident,
            slots,
            missing,
            pages.host.shape[1],
            pages.resident.shape[1],
            S=most,
            D=dim,
            RECORD=record,
            QUANTIZED=pages.scales is not None,
            BE=chunk,
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
    D: tl.constexpr,
    RECORD: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BE: tl.constexpr,
):
    i_wanted, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    page = tl.load(missing + i_wanted)
    if page >= 0:
        i_row = i_wanted // S
        o_element = i_chunk * BE + tl.arange(0, BE)
        mask = o_element < RECORD
        record = i_row * P + page
        b_page = tl.load(host + record * RECORD + o_element, mask, other=0)
        if QUANTIZED:
            scale = tl.load(scales + record * (RECORD // D) + o_element // D, mask, other=0.0)
            b_page = b_page.to(tl.float32) * scale
        slot = i_row * C + tl.load(slots + i_wanted)
        tl.store(resident + slot * RECORD + o_element, b_page, mask)
