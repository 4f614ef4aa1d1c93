"""What every launch needs: the right device, sizes that are powers of two, contiguous memory."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from icecache.errors import InputError

__all__ = ["check_contiguous", "num_warps", "on_device_of", "tile"]

# tl.dot takes no smaller tile
_LEAST_TILE = 16


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one: pinned pointers are only known to that one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def tile(size: int) -> int:
    """Return the side of a tile that holds `size` elements."""
    return max(_LEAST_TILE, int(triton.next_power_of_2(size)))


def num_warps(dim: int) -> int:
    """Return how many warps keep a kernel's tiles of head_dim `dim` in registers."""
    return 4 if dim <= 128 else 8


def check_contiguous(**tensors: "Tensor | None") -> None:
    """Raise `InputError` unless each tensor is contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise InputError(
                f"{name} must be contiguous, got shape {tuple(tensor.shape)} "
                f"with strides {tensor.stride()}"
            )
