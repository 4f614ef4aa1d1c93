"""A decode step: one new token of each row is taken in and attended."""

from abc import ABC, abstractmethod

from torch import Tensor

from icecache.cache.context import Context
from icecache.cache.fused import FusedStep, NewToken
from icecache.cache.stats import Counters, Phase
from icecache.config import IceCacheConfig

__all__ = ["Stepping"]


class Stepping(ABC):
    """The part of `IceCacheLayer` that takes decode steps.

    Attributes
    ----------
    keeps_window : bool, default False
        Let the oldest of a full window stay until the next token comes, so that `search` says what
        the latest step selected and `crop` reaches as far as the window. Steps take longer.
    """

    config: IceCacheConfig
    num_kv_heads: int
    head_dim: int
    _backend: str
    _counters: Counters
    _unsettled: int
    _fused: FusedStep | None = None
    keeps_window: bool = False

    @property
    @abstractmethod
    def phase(self) -> Phase:
        """How the context is held."""

    @property
    @abstractmethod
    def _context(self) -> Context | None: ...

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in new tokens."""

    @abstractmethod
    def crop(self, num_tokens: int) -> None:
        """Drop the latest tokens of every row."""

    @abstractmethod
    def attend(
        self,
        query: Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Attend the latest tokens' queries to the context."""

    @abstractmethod
    def _settle(self, keep: int) -> None:
        """Let all but the latest `keep` tokens leave the tail, once the budget is passed."""

    def step(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Take in a token of each row, and attend its query: `append`, then `attend`.

        The same result for less: where it can be, both are one compiled call. The oldest token of
        a full window enters the tree afterwards and not with the next token (`keeps_window`).

        Parameters
        ----------
        query : Tensor, shape [batch, num_q_heads, 1, head_dim]
        keys, values : Tensor, shape [batch, num_kv_heads, 1, head_dim]
        scaling, softcap, sink_logits
            As in `attend`.

        Returns
        -------
        Tensor, shape of query, dtype of query

        Raises
        ------
        InputError
            As `append` and `attend` do. The token was not taken in then, nor after any other
            error that leaves the context whole.
        """
        context = self._context
        # learned sinks, limits of memory and shared selections are the twin's
        can_fuse = sink_logits is None and self.config.max_host_memory is None
        can_fuse = can_fuse and not self.keeps_window
        is_alone = self.config.layer_reuse == 1 or context is None or context.indexed is None
        if context is not None and self._backend == "native" and can_fuse and is_alone:
            if self._fused is None or self._fused.context is not context:
                self._fused = FusedStep(self.config, context, self.num_kv_heads)
            if context.indexed is not None and context.tail.longest >= self.config.window:
                # what a prompt left over is built as `append` would build it
                self._settle(self.config.window)
                self._settle(self.config.window - 1)
            factor = self.head_dim**-0.5 if scaling is None else scaling
            new = NewToken(query, keys, values, factor, softcap)
            try:
                out = self._fused.run(new, self._counters)
            except BaseException:
                if self._fused.took_in and not context.is_torn:
                    self.crop(1)
                raise
            if out is not None:
                self._unsettled = 1
                return out
        self.append(keys, values)
        try:
            out = self.attend(query, scaling=scaling, softcap=softcap, sink_logits=sink_logits)
            if self.phase is Phase.INDEXED and not self.keeps_window:
                self._settle(self.config.window - 1)
            return out
        except BaseException:
            if self._context is not None and not self._context.is_torn:
                self.crop(keys.shape[2])
            raise
