"""One level of the tree: the summaries of all rows' leaves, or of the nodes above them.

num         [row]              leaves or nodes of the row
count       [row, i]           tokens below
key_mean    [row, i, dim]      int8 codes, times key_scale [row, i], counted from the row's centre
value_mean  [row, i, dim]      int8 codes, times value_scale [row, i]
spread      [row, i]           mean squared distance of the keys from key_mean
next        [row, i]           the next child of the same node, NONE behind the last
first       [row, i]           a node's first child; leaves have none

Scales and spreads are bfloat16: codes are made with the rounded scale.
"""

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from icecache.ops.batched import quantize_rows
from icecache.ops.bounds import check_range
from icecache.ops.native import Level as NativeLevel
from icecache.ops.native import pointer

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["NONE", "Level", "Summaries"]

NONE = -1
_MIN_CAPACITY = 64
_LINE = 64


@dataclass(frozen=True, slots=True)
class Summaries:
    """Arrays of a level: of all rows up to the longest (views), or of single entries (copies)."""

    count: Tensor
    spread: Tensor
    key_mean: Tensor
    key_scale: Tensor
    value_mean: Tensor
    value_scale: Tensor

    def keys(self) -> Tensor:
        """Return the mean keys from their row's centre, shape [..., dim], float32."""
        return self.key_mean.float() * self.key_scale.float()[..., None]

    def values(self) -> Tensor:
        """Return the mean values, shape [..., dim], float32."""
        return self.value_mean.float() * self.value_scale.float()[..., None]


class Level:
    """Summaries of one level of one layer, all rows (batch x KV heads).

    Parameters
    ----------
    num_rows, head_dim : int
    """

    _COUNT = "int32"

    def __init__(self, num_rows: int, head_dim: int) -> None:
        self.head_dim = head_dim
        self.num = np.zeros(num_rows, dtype=np.int32)
        self._arrays = self._allocate(0)
        arrays = self._arrays.values()
        self.entry_bytes = sum(a.element_size() * a.shape[2:].numel() for a in arrays)
        self._native: NativeLevel | None = None
        self._is_shared = False

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_native": None}

    def fork(self) -> "Self":
        """Return a level with the same content; the arrays are shared until one of them writes."""
        other = copy.copy(self)
        other.num = self.num.copy()
        other._native = None
        self._is_shared = other._is_shared = True
        return other

    def own(self) -> None:
        """Take a copy of arrays that forks share; every change of a shared level begins here."""
        if self._is_shared:
            arrays, longest = self._allocate(self.capacity), self.longest
            for name, array in self._arrays.items():
                arrays[name][:, :longest] = array[:, :longest]
            self._arrays, self._native, self._is_shared = arrays, None, False

    @property
    def num_rows(self) -> int:
        """Rows of the level."""
        return int(self.num.size)

    @property
    def longest(self) -> int:
        """Leaves or nodes of the longest row."""
        return int(self.num.max(initial=0))

    @property
    def total(self) -> int:
        """Leaves or nodes of all rows."""
        return int(self.num.sum())

    @property
    def capacity(self) -> int:
        """Leaves or nodes that a row has room for."""
        return int(self._arrays["count"].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the leaves or nodes in use."""
        return self.total * self.entry_bytes

    def native(self) -> NativeLevel:
        """Return the arrays' addresses for the compiled ops, valid until the level grows."""
        if self._native is None:
            names = ("count", "spread", "key_mean", "key_scale", "value_mean", "value_scale")
            arrays = {n: pointer(self._arrays[n]) for n in (*names, "next")}
            self._native = NativeLevel(
                num=self.num.ctypes.data,
                first=pointer(self._arrays.get("first")),
                capacity=self.capacity,
                **arrays,
            )
        return self._native

    def view(self) -> Summaries:
        """Return the summaries up to the longest row."""
        names = Summaries.__dataclass_fields__
        return Summaries(*(self._arrays[name][:, : self.longest] for name in names))

    def at(self, row: Tensor | int, entry: Tensor) -> Summaries:
        """Return copies of single summaries; row, entry: shape [n] -> arrays of [n, ...]."""
        names = Summaries.__dataclass_fields__
        return Summaries(*(self._arrays[name][row, entry] for name in names))

    def keys_of(self, row: int) -> Tensor:
        """Return the mean keys of a row from its centre, shape [n, dim], float32."""
        num = int(self.num[row])
        scale = self._arrays["key_scale"][row, :num].float()
        return self._arrays["key_mean"][row, :num].float() * scale[:, None]

    def array(self, name: str) -> Tensor:
        """Return one of the arrays with its spare room."""
        return self._arrays[name]

    def counts(self) -> Tensor:
        """Return the tokens below each, shape [rows, longest row]."""
        return self._arrays["count"][:, : self.longest]

    def add(self, row: int, num: int) -> int:
        """Open `num` more in a row and return the first one's number."""
        first = int(self.num[row])
        if first + num > self.capacity:
            self.reserve(max(first + num, self.capacity * 3 // 2))
        self._arrays["next"][row, first : first + num] = NONE
        self.num[row] += num
        return first

    def clear(self, row: int) -> None:
        """Drop all of a row."""
        self._arrays["count"][row] = 0
        self.num[row] = 0

    def reserve(self, capacity: int) -> None:
        """Make room for that many a row."""
        have, capacity = self.capacity, max(capacity, _MIN_CAPACITY)
        if capacity <= have:
            return
        arrays = self._allocate(capacity)
        for name, array in self._arrays.items():
            arrays[name][:, :have] = array
        self._arrays, self._native = arrays, None

    def set_summaries(
        self, row: Tensor, at: Tensor, keys: Tensor, values: Tensor, spread: Tensor
    ) -> None:
        """Store means, shape [n, dim], and spreads, [n]; the int8 rounding counts as spread."""
        for name, mean in (("key", keys), ("value", values)):
            codes, scale = quantize_rows(mean)
            self._arrays[f"{name}_mean"][row, at] = codes
            self._arrays[f"{name}_scale"][row, at] = scale
            if name == "key":
                spread = spread + scale.float().square() * (self.head_dim / 12)
        self._arrays["spread"][row, at] = spread.bfloat16()

    def state(self) -> dict[str, Any]:
        """Return what the level holds, by name; views, valid until it changes."""
        arrays = {name: array[:, : self.longest] for name, array in self._arrays.items()}
        return {"num": self.num, **arrays}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take a state back into an empty level of as many rows."""
        num = state["num"].numpy()
        longest = int(num.max(initial=0))
        check_range("num", num, 0, longest)
        check_range("next", state["next"], NONE, longest - 1)
        check_range("count", state["count"], 0, np.iinfo(np.int32).max)
        self.reserve(longest)
        for name, array in self._arrays.items():
            array[:, :longest] = state[name]
        self.num[:] = num

    def set_counts(self, row: Tensor, at: Tensor, count: Tensor) -> None:
        """Store the tokens below."""
        array = self._arrays["count"]
        array[row, at] = count.to(array.dtype)

    def link(self, row: Tensor, children: Tensor, node: Tensor, above: "Level") -> None:
        """Make children the children of nodes, in their order; children of a node lie together.

        row, children, node: shape [n], int64; a node's children come one after the other.
        """
        if children.numel() == 0:
            return
        last = torch.ones_like(children, dtype=torch.bool)
        last[:-1] = (node[1:] != node[:-1]) | (row[1:] != row[:-1])
        following = torch.cat([children[1:], children[:1]]).masked_fill(last, NONE)
        self._arrays["next"][row, children] = following.int()
        begins = torch.cat([last[-1:], last[:-1]])
        above._arrays["first"][row[begins], node[begins]] = children[begins].int()

    def renumber(self, row: int, order: Tensor) -> None:
        """Number all of a row anew, as order says, shape [n]; nothing above may refer to them."""
        for array in self._arrays.values():
            array[row, : order.numel()] = array[row, order]

    def adopt(self, row: int, node: int, child: int, below: "Level") -> None:
        """Make one child the first child of a node."""
        first = self.numpy("first")
        below.numpy("next")[row, child] = first[row, node]
        first[row, node] = child

    def orphan(self, row: int, node: int) -> None:
        """Take all children from a node."""
        self.numpy("first")[row, node] = NONE

    def children(self, row: int, node: int, below: "Level") -> list[int]:
        """Return a node's children in their order."""
        found, following = [], below.numpy("next")[row]
        child = int(self.numpy("first")[row, node])
        while child != NONE:
            found.append(child)
            child = int(following[child])
        return found

    def count(self, row: int, at: int) -> int:
        """Return the tokens below one."""
        return int(self.numpy("count")[row, at])

    def reorder(self, rows: Tensor) -> None:
        """Take rows, repeated or dropped, in a new order."""
        self._arrays = {name: array[rows] for name, array in self._arrays.items()}
        self.num = self.num[rows.numpy()]
        self._native = None

    def numpy(self, name: str) -> np.ndarray:
        """Return one of the integer arrays."""
        return self._arrays[name].numpy()

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        dim = (self.head_dim,)
        return {
            "count": ((), self._COUNT),
            "spread": ((), "bfloat16"),
            "key_mean": (dim, "int8"),
            "key_scale": ((), "bfloat16"),
            "value_mean": (dim, "int8"),
            "value_scale": ((), "bfloat16"),
            "next": ((), "int32"),
            "first": ((), "int32"),
        }

    def _allocate(self, capacity: int) -> dict[str, Tensor]:
        arrays = {}
        for name, (shape, dtype) in self._shapes().items():
            stored = "int16" if dtype == "bfloat16" else dtype
            array = torch.from_numpy(_zeros((self.num.size, capacity, *shape), np.dtype(stored)))
            arrays[name] = array.view(torch.bfloat16) if dtype == "bfloat16" else array
        return arrays


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return zeros that begin with a line of the processor's caches."""
    num_bytes = math.prod(shape) * dtype.itemsize
    # numpy's zeros are mapped at first touch, so that room for growth costs no memory
    spare = np.zeros(num_bytes + _LINE, dtype=np.uint8)
    start = -spare.ctypes.data % _LINE
    return spare[start : start + num_bytes].view(dtype).reshape(shape)
