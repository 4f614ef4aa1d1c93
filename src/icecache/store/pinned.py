"""Host memory that a device reads and writes in place.

torch's pinned allocator rounds a request up to a power of two, which for pages of many gigabytes
may double them. Here a block is mapped at its exact size and then registered with CUDA.
"""

import math
import mmap
import weakref

import torch
from torch import Tensor

from icecache.errors import HostMemoryExceeded
from icecache.store.memory import check_host_memory

__all__ = ["PinnedBlock"]

# cudaHostRegisterPortable | cudaHostRegisterMapped
_REGISTER_FLAGS = 3
_ALIGNMENT = 256


class PinnedBlock:
    """A piece of host memory of exact size, handed out as tensors.

    Parameters
    ----------
    num_bytes : int
        The sum of `bytes_for` over the tensors that will be taken.
    device : torch.device
        Who else uses the memory: on CUDA it is registered, which pins it; elsewhere it is plain
        memory, which the system gives at first touch.

    Raises
    ------
    HostMemoryExceeded
        If the machine has not so much free, or CUDA may not pin it; nothing was taken then.

    Notes
    -----
    CUDA is told to let go of the memory by `close`, or when nothing refers to the block any more,
    after a wait for what the device does by then; it must not use the tensors after that.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        check_host_memory(num_bytes)
        self.num_bytes = max(num_bytes, _ALIGNMENT)
        try:
            # private: a shared one would be written to by forked processes too
            self._memory = mmap.mmap(
                -1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        except OSError as error:
            raise HostMemoryExceeded(num_bytes, 0) from error
        self._taken = 0
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._release: weakref.finalize[[int, torch.device], PinnedBlock] | None = None
        if device.type == "cuda":
            register(self._bytes)
            self._release = weakref.finalize(self, unregister, self._bytes.data_ptr(), device)
            # the process's end frees it, and CUDA may be gone by then
            self._release.atexit = False

    @staticmethod
    def bytes_for(shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Return the bytes that a tensor takes of a block."""
        needed = math.prod(shape) * dtype.itemsize
        return -(-needed // _ALIGNMENT) * _ALIGNMENT

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of the block's memory, all zero; it lives no longer than the block."""
        needed = self.bytes_for(shape, dtype)
        free = self.num_bytes - self._taken
        if needed > free:
            raise HostMemoryExceeded(needed, free)
        piece = self._bytes[self._taken : self._taken + math.prod(shape) * dtype.itemsize]
        self._taken += needed
        return piece.view(dtype).view(shape)

    def close(self) -> None:
        """Let CUDA let go of the memory; calling it again changes nothing."""
        if self._release is not None:
            self._release()


def register(memory: Tensor) -> None:
    """Pin host memory, and map it for all CUDA devices.

    Raises
    ------
    HostMemoryExceeded
        If CUDA refuses.
    """
    result = torch.cuda.cudart().cudaHostRegister(  # type: ignore[no-untyped-call]
        memory.data_ptr(), memory.nbytes, _REGISTER_FLAGS
    )
    if int(result):
        error = HostMemoryExceeded(memory.nbytes, 0)
        error.args = (
            f"host memory: {memory.nbytes:,} bytes could not be pinned (cudaHostRegister: error "
            f"{int(result)}); raise the limit of locked memory (ulimit -l), shorten the context, "
            'or pass offload="none"',
        )
        raise error


def unregister(address: int, device: torch.device) -> None:
    """Take back `register`, once the device has done all that was asked of it.

    Who drops the memory need not have waited: copies to it may be under way.
    """
    torch.cuda.synchronize(device)
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(address)))  # type: ignore[no-untyped-call]
