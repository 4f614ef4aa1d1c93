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
        factor = self.head_dim**-0.5 if scaling is None else scaling
        # learned sinks are the twin's
        fused = self.fused_step() if sink_logits is None else None
        if fused is not None:
            try:
                out = fused.run(NewToken(query, keys, values, factor, softcap), self._counters)
            except BaseException:
                self.take_back(fused)
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

    def fused_step(self) -> FusedStep | None:
        """Return what takes the next token in by a compiled call; None where only the twin can.

        What a prompt left over is in the tree afterwards.
        """
        context, config = self._context, self.config
        if context is None or self._backend != "native" or self.keeps_window:
            return None
        # limits of memory and shared selections are the twin's
        if config.max_host_memory is not None:
            return None
        if context.indexed is not None:
            if config.layer_reuse > 1:
                return None
            if context.tail.longest >= config.window:
                # as `append` would build it
                self._settle(config.window)
                self._settle(config.window - 1)
        if self._fused is None or self._fused.context is not context:
            self._fused = FusedStep(config, context, self.num_kv_heads)
        return self._fused

    def close_step(self, fused: FusedStep, status: int, row: int) -> bool:
        """`FusedStep.close`, with this layer's counters."""
        has_run = fused.close(status, row, self._counters)
        if has_run:
            self._unsettled = 1
        return has_run

    def take_back(self, fused: FusedStep) -> None:
        """Drop the token that a step took in before it failed."""
        context = self._context
        if fused.took_in and context is not None and not context.is_torn:
            self.crop(1)
