"""Gather bandwidth against record size, beside what one large copy reaches on the same machine."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from gpu_timing import time_calls

from icecache.ops.device.records import DevicePages
from icecache.store.pinned import PinnedBlock

ROWS, HEAD_DIM = 8, 128
CALLS = 20


@dataclass(frozen=True)
class GatherSweep:
    """What is measured: page sizes of a bfloat16 model, and how many pages a row misses at once."""

    page_sizes: tuple[int, ...] = (8, 16, 32, 64)
    missing: tuple[int, ...] = (1, 4, 16, 64, 256)
    pool_bytes: int = 1 << 30
    copy_bytes: int = 1 << 28


SMOKE = GatherSweep(page_sizes=(8, 16), missing=(1, 2), pool_bytes=1 << 21, copy_bytes=1 << 20)


def copy_rate(sweep: GatherSweep, device: torch.device) -> float:
    """Bytes a second of a large copy from pinned host memory to the device."""
    shape = (sweep.copy_bytes,)
    block = PinnedBlock(PinnedBlock.bytes_for(shape, torch.uint8), device)
    source, target = (
        block.take(shape, torch.uint8),
        torch.empty(shape, dtype=torch.uint8).to(device),
    )
    seconds = time_calls([lambda: target.copy_(source, non_blocking=True)] * 4, device)
    block.close()
    return sweep.copy_bytes / seconds


def measure_gather(
    sweep: GatherSweep, device: torch.device, ops: ModuleType
) -> list[dict[str, Any]]:
    """One row a page size and number of missing pages: bytes a second, beside the copy's."""
    rate = copy_rate(sweep, device)
    rows = []
    for page_size in sweep.page_sizes:
        record = 2 * page_size * HEAD_DIM * torch.bfloat16.itemsize
        num_pages = sweep.pool_bytes // (ROWS * record)
        shape = (ROWS, num_pages, 2, page_size, HEAD_DIM)
        block = PinnedBlock(PinnedBlock.bytes_for(shape, torch.bfloat16), device)
        host = block.take(shape, torch.bfloat16)
        for missing in (count for count in sweep.missing if count <= num_pages):
            seconds = _time_gather(host, missing, device, ops)
            bandwidth = ROWS * missing * record / seconds
            rows.append(
                {
                    "record_bytes": record,
                    "records": ROWS * missing,
                    "seconds": seconds,
                    "bytes_per_second": bandwidth,
                    "copy_bytes_per_second": rate,
                    "share_of_copy": bandwidth / rate,
                }
            )
        block.close()
    return rows


def _time_gather(host: torch.Tensor, missing: int, device: torch.device, ops: ModuleType) -> float:
    """Seconds of one gather; each call reads other pages, which were not read before."""
    num_rows, num_pages = host.shape[:2]
    slots = torch.arange(missing, dtype=torch.int32).expand(num_rows, -1).contiguous().to(device)
    resident = torch.empty(num_rows, missing, *host.shape[2:], dtype=host.dtype, device=device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    pages = DevicePages(host, None, none, resident, none, none, none, none)
    wanted = [
        torch.stack([torch.randperm(num_pages)[:missing] for _ in range(num_rows)]).int().to(device)
        for _ in range(CALLS)
    ]
    return time_calls([lambda w=w: ops.gather(pages, slots, w) for w in wanted], device)
