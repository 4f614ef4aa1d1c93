"""Masks of slots: one bit a slot of a page, in int64."""

import torch
from torch import Tensor

__all__ = ["count_bits", "has_bit", "mask_of"]


def count_bits(masks: Tensor) -> Tensor:
    """Return how many bits of each int64 are set, int64."""
    x = masks - ((masks >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    return (x + (x >> 32)) & 127


def has_bit(masks: Tensor, num_slots: int) -> Tensor:
    """Return which of the first `num_slots` bits are set, shape [..., num_slots], bool."""
    return (masks[..., None] >> torch.arange(num_slots, device=masks.device)) & 1 == 1


def mask_of(slots: list[int]) -> int:
    """Return the mask of slots as the int that an int64 tensor takes."""
    mask = sum(1 << slot for slot in slots)
    return mask - (1 << 64) if mask >> 63 else mask
