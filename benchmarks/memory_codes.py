"""Means of 4 bits and of none, simulated on a layer's tree: the library stores 8."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.tree.level import Level
from icecache.tree.tree import Tree

_SCALE_BYTES = 2


class Codes(NamedTuple):
    """How means are kept: bits of a key's and of a value's code, 0 where there are no values."""

    keys: int
    values: int

    @property
    def simulated(self) -> bool:
        return self != Codes(8, 8)


CODES = {
    "int8": Codes(8, 8),
    "int4 values": Codes(8, 4),
    "int4 keys": Codes(4, 8),
    "int4 both": Codes(4, 4),
    "int8 keys, no values": Codes(8, 0),
    "int4 keys, no values": Codes(4, 0),
}


def requantise(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of 15 levels, -7 to 7, and the scale of each row, from int8 codes and theirs."""
    means = codes.float() * scale.float()[..., None]
    narrow = (means.abs().amax(-1) / 7).bfloat16()
    step = narrow.float().clamp(min=1e-30)[..., None]
    return (means / step).round().clamp(-7, 7).to(torch.int8), narrow


def _narrow(level: Level, part: str) -> None:
    codes, scale = level.array(f"{part}_mean"), level.array(f"{part}_scale")
    narrow, step = requantise(codes, scale)
    if part == "key":
        # as the library does with its own rounding
        coarser = step.float().square() - scale.float().square()
        spread = level.array("spread")
        spread.copy_(spread.float() + coarser * (codes.shape[-1] / 12))
    codes.copy_(narrow)
    scale.copy_(step)


@contextmanager
def narrowed(tree: Tree, codes: Codes) -> Iterator[None]:
    """Let leaves and nodes have means of 4 bits where asked for; they get their own back."""
    parts = [part for part, bits in (("key", codes.keys), ("value", codes.values)) if bits == 4]
    names = [f"{part}_{what}" for part in parts for what in ("mean", "scale")] + ["spread"]
    arrays = [level.array(name) for level in tree.levels for name in names]
    kept = [array.clone() for array in arrays]
    try:
        for level in tree.levels:
            for part in parts:
                _narrow(level, part)
        yield
    finally:
        for array, before in zip(arrays, kept):
            array.copy_(before)


def saved_bytes(codes: Codes, head_dim: int, entries: int) -> int:
    """Bytes that the index of so many leaves and nodes is smaller than int8's."""
    keys = head_dim - _packed(head_dim, codes.keys)
    values = head_dim - _packed(head_dim, codes.values)
    scale = 0 if codes.values else _SCALE_BYTES
    return entries * (keys + values + scale)


def _packed(head_dim: int, bits: int) -> int:
    return math.ceil(head_dim * bits / 8)
