"""Copies from a device to host memory beside its computation. What CUDA alone has is here."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["Outbound", "on_device"]


class Outbound:
    """Copies to where pages live on a stream of their own; elsewhere than on CUDA, plain copies.

    Parameters
    ----------
    device : torch.device
        Where the copies come from.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_under_way = False
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy to pinned memory, or the device's, once the current stream has computed `source`."""
        if self._stream is None:
            target.copy_(source)
            return
        self._is_under_way = True
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        # the allocator must not give memory away that the copy still reads or writes
        for tensor in (source, target):
            if tensor.is_cuda:
                tensor.record_stream(self._stream)

    def join(self) -> None:
        """Let what the current stream does from here on see the copies."""
        if self._stream is not None and self._is_under_way:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._is_under_way = False

    def wait(self) -> None:
        """Wait until the copies are there for the CPU to read."""
        if self._stream is not None:
            self._stream.synchronize()
            torch.cuda.current_stream(self._device).synchronize()
            self._is_under_way = False


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one, where Triton launches its kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
