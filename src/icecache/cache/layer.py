"""`IceCacheLayer`: the key-value cache of one attention layer."""

from concurrent.futures import Executor

import torch
from torch import Tensor

from icecache.attention.ask import Ask
from icecache.attention.attend import SparseStep
from icecache.cache.background import Background
from icecache.cache.check import Expected, check_query, check_rows, check_tokens
from icecache.cache.context import Context
from icecache.cache.decode import SearchResult, attend_one, inspect_step, search_step
from icecache.cache.estimate import estimate_bytes, transient_bytes
from icecache.cache.portable import Portable
from icecache.cache.stats import Counters, LayerStats, Phase, layer_stats
from icecache.config import IceCacheConfig
from icecache.errors import ConfigError, InputError
from icecache.ops.dispatch import ops_for, resolve_backend
from icecache.store.memory import check_host_limit, check_host_memory

__all__ = ["IceCacheLayer"]


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class IceCacheLayer(Portable):
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
        for name, value in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if dtype not in _DTYPES:
            names = ", ".join(str(known) for known in _DTYPES)
            raise ConfigError(f"dtype must be a floating-point type of {names}, got {dtype!r}")
        self.config = config
        self.num_kv_heads, self.head_dim, self.dtype = num_kv_heads, head_dim, dtype
        self.device = torch.device(device)
        if self.device.type != "cpu":
            raise ConfigError(f"device must be cpu in this version, got {self.device}")
        self._expected = Expected(num_kv_heads, head_dim, dtype, self.device)
        self._backend = resolve_backend(config.backend)
        self._background = Background(executor)
        self._held: Context | None = None
        self._counters = Counters()
        self._unsettled = 0

    def __getstate__(self) -> dict[str, object]:
        self._background.wait()
        return self.__dict__

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
        needed = self.estimate_bytes(batch, num_new)
        held = 0 if self._context is None else self._context.host_bytes
        check_host_limit(needed, held, self.config.max_host_memory)
        # only calls of some size ask the system: the question itself takes time
        if num_new > self.config.draft:
            rows = batch * self.num_kv_heads
            extra = transient_bytes(rows, num_new, self.head_dim, self.dtype)
            check_host_memory(needed + extra)
        context = self._context
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
        if num_queries == 1:
            self._settle(self.config.window)
            ask = Ask.of_layer(query, self.num_kv_heads, scaling, softcap, sink_logits)
            one = attend_one(self._context, self.config, self._backend, ask, self._counters)
            if one is not None:
                return one.view(query.shape).to(query.dtype)
        self._counters.count_dense(self.num_tokens)
        dense = self._context.dense()
        out: Tensor = ops_for(self._backend).attend_dense(
            query, *dense, scaling, softcap, sink_logits
        )
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
            How many; at most what the window holds, for what is in the tree stays there.

        Raises
        ------
        InputError
            If it is negative or reaches below the window; nothing has changed then.
        """
        if not isinstance(num_tokens, int) or isinstance(num_tokens, bool):
            raise InputError(f"crop must be an integer, got {num_tokens!r}")
        held = min(self._context.tail.lens) if self._context is not None else 0
        if not 0 <= num_tokens <= held:
            raise InputError(
                f"crop must be from 0 to the {held} tokens still in the window, got {num_tokens}"
            )
        if self._context is not None and num_tokens:
            self._context.tail.drop_latest(num_tokens)
            self._unsettled = max(0, self._unsettled - num_tokens)

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> None:
        """Take batch rows in a new order, repeated or dropped (beam search).

        rows: shape [new_batch], integer. Repeated rows share their pages until they write.
        """
        check_rows(rows, self.batch_size)
        rows = rows.long().cpu()
        if self._context is not None and rows.tolist() != list(range(self.batch_size)):
            self._context.reorder(rows)

    def reset(self) -> None:
        """Forget the context and the counters; the memory is free again."""
        self._background.drop()
        self._held = None
        self._counters = Counters()
        self._unsettled = 0

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
