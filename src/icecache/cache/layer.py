"""`IceCacheLayer`: the key-value cache of one attention layer."""

from concurrent.futures import Executor

import torch
from torch import Tensor

from icecache.attention.ask import Ask
from icecache.attention.attend import SparseStep
from icecache.cache.background import Background
from icecache.cache.check import (
    Expected,
    check_crop,
    check_finite_output,
    check_host_config,
    check_positions,
    check_query,
    check_rows,
    check_tokens,
)
from icecache.cache.context import Context
from icecache.cache.decode import SearchResult, attend_one, inspect_step, search_step
from icecache.cache.estimate import ask_for_memory, estimate_bytes
from icecache.cache.portable import Portable
from icecache.cache.stats import Counters, LayerStats, Phase, layer_stats
from icecache.cache.step import Stepping
from icecache.config import IceCacheConfig
from icecache.errors import InputError
from icecache.ops.dispatch import ops_for, resolve_backend

__all__ = ["IceCacheLayer"]


class IceCacheLayer(Stepping, Portable):
    """Key-value cache of one attention layer, attended within a budget.

    Keys and values are stored as given (after rotary embedding). While the context is not longer
    than the budget, attention is plain and exact. Beyond it the tokens between the first `sink`
    and the latest `window` are kept in pages under a tree, and a step with one query token
    attends to sink, window and selected leaves exactly and to the rest through summaries.

    Parameters
    ----------
    config : IceCacheConfig
    num_kv_heads, head_dim : int
    dtype : torch.dtype
        Of keys and values.
    device : str or torch.device, default "cpu"
    executor : concurrent.futures.Executor, optional
        Builds trees in its threads while the caller goes on; the next use of the layer waits.

    Notes
    -----
    A layer is used by one thread at a time; layers are independent of each other.

    Examples
    --------
    >>> layer = IceCacheLayer(IceCacheConfig(), num_kv_heads=2, head_dim=64, dtype=torch.float32)
    >>> layer.prefill(torch.randn(1, 2, 1000, 64), torch.randn(1, 2, 1000, 64))
    >>> layer.attend(torch.randn(1, 8, 1, 64)).shape
    torch.Size([1, 8, 1, 64])
    """

    def __init__(
        self,
        config: IceCacheConfig,
        *,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        executor: Executor | None = None,
    ) -> None:
        self._expected = Expected.checked(num_kv_heads, head_dim, dtype, device)
        self.config = check_host_config(config)
        self.num_kv_heads, self.head_dim, self.dtype, self.device = self._expected
        self._backend = resolve_backend(config.backend)
        self._background = Background(executor)
        self._held: Context | None = None
        self._counters = Counters()
        self._unsettled = 0
        self._selection: Tensor | None = None

    def __getstate__(self) -> dict[str, object]:
        self._background.wait()
        return {**self.__dict__, "_fused": None}

    @property
    def _context(self) -> Context | None:
        self._background.wait()
        return self._held

    @property
    def phase(self) -> Phase:
        """How the context is held."""
        if self._context is None:
            return Phase.EMPTY
        return Phase.DENSE if self._context.indexed is None else Phase.INDEXED

    @property
    def batch_size(self) -> int:
        """Rows of the batch, 0 when empty."""
        return 0 if self._context is None else self._context.batch_size

    @property
    def row_lens(self) -> list[int]:
        """Tokens of each batch row, padding not counted."""
        return [] if self._context is None else self._context.row_lens

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest batch row, padding not counted."""
        return max(self.row_lens, default=0)

    @property
    def selection(self) -> Tensor | None:
        """What the latest step selected, as `search` says it; kept when ``layer_reuse > 1``."""
        return self._selection

    def prefill(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in the keys and values of a prompt; a later call extends the context.

        With an executor the tree is built from here on, while the caller goes on.

        Parameters
        ----------
        keys, values : Tensor, shape [batch, num_kv_heads, tokens, head_dim]
        mask : Tensor, shape [batch, tokens], bool, optional
            True where a row has a token, False where it is padded.

        Raises
        ------
        InputError
            On wrong shapes, dtype or device, NaN or infinity; nothing has changed then.
        HostMemoryExceeded
            If the tokens do not fit in the memory there is; nothing has changed then.
        """
        self.append(keys, values, mask)
        if self._background.has_threads and self._unsettled > self.config.draft:
            self._build(self.config.window)

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in new tokens; the oldest of the window leave it into the tree.

        Arguments and errors as in `prefill`. The window can be taken back by `crop` at any time;
        a call of 2 to `config.draft` tokens can be taken back as a whole, until the next call of
        `append` or of `attend` with one query token.
        """
        check_tokens(keys, values, mask, self.batch_size or None, self._expected)
        if mask is not None and bool(mask.all()):
            mask = None
        batch, _, num_new, _ = keys.shape
        context = self._context
        held = 0 if context is None else context.host_bytes
        ask_for_memory(self.config, self._expected, batch, num_new, held)
        if context is None:
            shape = (batch, self.num_kv_heads, self.head_dim)
            context = Context(self.config, *shape, self.dtype)
        else:
            self._settle(self.config.window)
        context.tail.append(keys, values, mask)
        self._held, self._unsettled = context, num_new
        if num_new == 1:
            self._settle(self.config.window)

    @torch.no_grad()
    def attend(
        self,
        query: Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Attend the latest tokens' queries to the context.

        Parameters
        ----------
        query : Tensor, shape [batch, num_q_heads, q_tokens, head_dim]
            Of the last `q_tokens` tokens, whose keys have been given. One token: a sparse step
            once the context passes the budget. Several: exact and causal over everything.
        scaling : float, optional
            Of the logits; head_dim ** -0.5 by default.
        softcap : float, optional
            Logits become softcap * tanh(logits / softcap).
        sink_logits : Tensor, shape [num_q_heads], optional
            Learned logits that take part in the softmax without a value.
        positions : Tensor, shape [batch * num_kv_heads, tokens], integer, optional
            Tokens to select instead of choosing, such as another layer's `selection`; one query
            token. -1 and tokens outside the tree are passed over.

        Returns
        -------
        Tensor, shape of query, dtype of query

        Raises
        ------
        InputError
            On wrong shapes, an empty layer, or more query tokens than were given last.
        """
        if self._context is None or self.num_tokens == 0:
            raise InputError("attend needs tokens: call prefill or append first")
        scaling = self.head_dim**-0.5 if scaling is None else scaling
        check_query(query, scaling, softcap, sink_logits, self.batch_size, self._expected)
        num_queries = query.shape[2]
        if num_queries > max(1, self._unsettled):
            raise InputError(
                f"query has {num_queries} tokens, the latest call gave {self._unsettled}"
            )
        if num_queries > 1 and positions is not None:
            raise InputError(f"positions go with one query token, got {num_queries}")
        if num_queries == 1:
            self._settle(self.config.window)
            if positions is not None and self._context.indexed is not None:
                rows = self.batch_size * self.num_kv_heads
                check_positions(positions, rows, self._context.room, self.config.selection)
            ask = Ask.of_layer(query, self.num_kv_heads, scaling, softcap, sink_logits, positions)
            one = attend_one(self._context, self.config, self._backend, ask, self._counters)
            self._selection = None if one is None else one.positions
            if one is not None:
                return one.out.view(query.shape).to(query.dtype)
        self._counters.count_dense(self.num_tokens)
        dense = self._context.dense()
        out: Tensor = ops_for(self._backend).attend_dense(
            query, *dense, scaling, softcap, sink_logits
        )
        check_finite_output(out)
        if num_queries > 1:
            # a prompt's last tokens are no draft: keeping them would hold up the first step
            draft = self._unsettled if self._unsettled <= self.config.draft else 0
            self._build(self.config.window + draft)
        return out.to(query.dtype)

    @torch.no_grad()
    def search(
        self,
        query: Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> SearchResult:
        """Return which tokens a sparse step would select for a query; counts nothing.

        Arguments as in `attend`, one query token; the layer must be ``INDEXED``.
        """
        context, ask = self._indexed_ask("search", query, scaling, softcap, sink_logits)
        return search_step(context, self.config, self._backend, ask)

    @torch.no_grad()
    def inspect(
        self,
        query: Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> SparseStep:
        """Return all that a sparse step would do for a query, from the twin; counts nothing.

        Arguments as in `attend`, one query token; the layer must be ``INDEXED``.
        """
        context, ask = self._indexed_ask("inspect", query, scaling, softcap, sink_logits)
        return inspect_step(context, self.config, self._backend, ask)

    def crop(self, num_tokens: int) -> None:
        """Drop the latest tokens of every row.

        Parameters
        ----------
        num_tokens : int
            How many; at most what the window holds, after a `step` a token less than ``window``.

        Raises
        ------
        InputError
            If it is negative or reaches below the window; nothing has changed then.
        """
        check_crop(num_tokens, min(self._context.tail.lens) if self._context is not None else 0)
        if self._context is not None and num_tokens:
            self._context.tail.drop_latest(num_tokens)
            self._unsettled = max(0, self._unsettled - num_tokens)

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> None:
        """Take batch rows in a new order, repeated or dropped (beam search).

        rows: shape [new_batch], integer. Repeated rows share their pages until they write.
        """
        rows = check_rows(rows, self.batch_size)
        if self._context is not None and rows.tolist() != list(range(self.batch_size)):
            self._context.reorder(rows)
            self._selection = None

    def reset(self) -> None:
        """Forget the context and the counters; the memory is free again."""
        self._background.drop()
        self._held = None
        self._counters, self._unsettled = Counters(), 0
        self._selection = self._fused = None

    def estimate_bytes(self, batch: int, tokens: int) -> int:
        """Return the host bytes that so many more tokens take, pages and index."""
        rows = batch * self.num_kv_heads
        return estimate_bytes(self.config, rows, tokens, self.head_dim, self.dtype.itemsize)

    def stats(self) -> LayerStats:
        """Return what the layer holds and what it has done."""
        return layer_stats(self._context, self._counters, self.phase, self._backend)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every token is in exactly one place, summaries true."""
        if self._context is not None:
            self._context.check_integrity()

    def _indexed_ask(
        self,
        name: str,
        query: Tensor,
        scaling: float | None,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> tuple[Context, Ask]:
        if self._context is None or self._context.indexed is None:
            raise InputError(f"{name} needs an indexed context, the layer is {self.phase.value}")
        scaling = self.head_dim**-0.5 if scaling is None else scaling
        check_query(query, scaling, softcap, sink_logits, self.batch_size, self._expected)
        if query.shape[2] != 1:
            raise InputError(f"{name} takes one query token, got {query.shape[2]}")
        self._settle(self.config.window)
        return self._context, Ask.of_layer(query, self.num_kv_heads, scaling, softcap, sink_logits)

    def _build(self, keep: int) -> None:
        """Settle, in the background where there are threads and enough to do."""
        if self._unsettled > self.config.draft:
            context = self._context
            self._background.run(lambda: self._settle_context(context, keep))
        else:
            self._settle(keep)

    def _settle(self, keep: int) -> None:
        self._settle_context(self._context, keep)

    def _settle_context(self, context: Context | None, keep: int) -> None:
        assert context is not None
        inserted, built = context.settle(keep)
        self._counters.inserted += inserted
        self._counters.built += built
