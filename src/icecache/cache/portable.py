"""What a layer holds, shared with another layer, given away, or taken back."""

import copy
import dataclasses
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from icecache.cache.background import Background
from icecache.cache.context import Context
from icecache.cache.granted import Granted
from icecache.cache.stats import Counters
from icecache.config import IceCacheConfig
from icecache.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Portable"]


class Portable:
    """The part of `IceCacheLayer` that moves its content."""

    config: IceCacheConfig
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    _background: Background
    _held: Context | None
    _counters: Counters
    _unsettled: int

    def fork(self, executor: Executor | None = None) -> "Self":
        """Return a layer with the same context, independent of this one from now on.

        Pages and tree are shared until one of the two writes to them: a fork costs the tokens of
        sink and window. Both must be used by one thread at a time, also when they are different
        ones, and `release` tells when one of them ends.
        """
        self._background.wait()
        other = copy.copy(self)
        other._background = Background(executor)
        other._held = None if self._held is None else self._held.fork()
        other._counters = Counters()
        return other

    def use_granted(self, memory: Tensor) -> None:
        """Keep sink and window, of one batch row, in memory that the caller owns.

        Used in place until `reset`, `release` or `reorder`; tokens that do not fit between two
        steps, such as those of a long prompt, are kept in memory of the layer's own meanwhile.

        Parameters
        ----------
        memory : Tensor, shape [num_kv_heads, tokens, 2 * head_dim], contiguous
            Of the layer's dtype and device; tokens: at least `Granted.tokens_of(config)`.

        Raises
        ------
        InputError
            If the layer holds tokens already, or the memory is not of that kind.
        """
        shape = (self.num_kv_heads, self.head_dim)
        if self._held is not None:
            raise InputError("memory is granted to an empty layer; call reset first")
        if memory.shape[2:] != (2 * self.head_dim,) or memory.dtype != self.dtype:
            raise InputError(
                f"granted memory must be {self.dtype}, [..., {2 * self.head_dim}], "
                f"got {memory.dtype}, {list(memory.shape)}"
            )
        granted = Granted.carve(memory, self.config, self.num_kv_heads)
        self._held = Context(self.config, 1, *shape, self.dtype, granted)

    def release(self) -> None:
        """Let the context go, and with it the pages that no fork holds."""
        self._background.drop()
        if self._held is not None and not self._held.is_torn:
            self._held.release()
        self._held = None
        self._unsettled = 0

    def shared_bytes(self) -> tuple[int, object | None, int]:
        """Return the bytes beside the pages, the pool of pages, and the bytes of that.

        Forks have the same pool, which is there once for all of them.
        """
        self._background.wait()
        if self._held is None:
            return 0, None, 0
        held = self._held
        if held.indexed is None:
            return held.host_bytes, None, 0
        pool = held.indexed.pool
        return held.host_bytes - pool.nbytes, pool, pool.nbytes

    def state(self) -> dict[str, Any]:
        """Return all that the layer holds, by name; tensors are views, valid until it changes."""
        self._background.wait()
        return {
            "context": None if self._held is None else self._held.state(),
            "counters": dataclasses.asdict(self._counters),
            "unsettled": self._unsettled,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take a state back, of a layer of the same settings and shape; this one must be new.

        Raises
        ------
        SnapshotMismatch
            If a number is outside its range; the layer is as it was.
        """
        held = state["context"]
        if held is not None:
            shape = (int(held["batch"]), self.num_kv_heads, self.head_dim)
            context = Context(self.config, *shape, self.dtype)
            context.load_state(held)
            self._held = context
        self._counters = Counters(**state["counters"])
        self._unsettled = int(state["unsettled"])
