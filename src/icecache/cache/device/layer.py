"""`DeviceLayer`: the key-value cache of one attention layer, decoded on a device."""

from typing import Any

import torch
from torch import Tensor

from icecache.cache.check import (
    Expected,
    check_crop,
    check_finite_output,
    check_query,
    check_rows,
    check_tokens,
)
from icecache.cache.device.context import DeviceContext
from icecache.cache.device.settings import DeviceSettings, OffloadChoice, check_device_config
from icecache.cache.device.stats import DeviceCounters, device_stats
from icecache.cache.device.step import attend_step
from icecache.cache.device.transfer import on_device
from icecache.cache.stats import LayerStats, Phase
from icecache.config import IceCacheConfig
from icecache.errors import ConfigError, InputError
from icecache.ops.dispatch import device_backend, device_ops
from icecache.store.memory import check_host_limit

__all__ = ["DeviceLayer"]


class DeviceLayer:
    """Key-value cache of one attention layer whose decode steps run on a device.

    The calls are those of `IceCacheLayer`, and mean the same. Summaries of all leaves, sink, window
    and the pages wanted lately lie on the device, all pages in pinned host memory or on the device
    too. A step has fixed shapes and does not wait for the device, so that a CUDA graph can hold it.
    Whole pages are fetched; what is attended of them is their chosen leaves, or with
    ``unit="page"`` all. A step touches a bounded number of them (docs/gpu.md).

    Parameters
    ----------
    config : IceCacheConfig
    num_kv_heads, head_dim : int
    dtype : torch.dtype
        Of keys and values: float32, float16 or bfloat16.
    device : str or torch.device, default "cuda"
        On ``"cpu"`` all is done as on a device, slowly: for tests.
    choice : OffloadChoice, optional
        Shared by the layers of a model, for ``offload="auto"``.

    Raises
    ------
    ConfigError
        If the device path cannot run with the settings, or not on the device.
    BackendUnavailable
        If Triton is missing.
    """

    def __init__(
        self,
        config: IceCacheConfig,
        *,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str | torch.device = "cuda",
        choice: OffloadChoice | None = None,
    ) -> None:
        expected = Expected.checked(num_kv_heads, head_dim, dtype, device, ("cpu", "cuda"))
        check_device_config(config)
        if dtype == torch.float64:
            raise ConfigError("dtype must have at most 32 bits on the device path, got float64")
        self._expected = expected
        self.config = config
        self.num_kv_heads, self.head_dim, self.dtype, self.device = expected
        self._backend = device_backend(config.backend, self.device)
        self._ops = device_ops(self._backend, self.device)
        self._settings = DeviceSettings(config, *expected, choice or OffloadChoice())
        self._held: DeviceContext | None = None
        self._counters = DeviceCounters()
        self._unsettled = 0

    @property
    def phase(self) -> Phase:
        """How the context is held."""
        if self._held is None:
            return Phase.EMPTY
        return Phase.DENSE if self._held.index is None else Phase.INDEXED

    @property
    def batch_size(self) -> int:
        """Rows of the batch, 0 when empty."""
        return 0 if self._held is None else self._held.batch_size

    @property
    def row_lens(self) -> list[int]:
        """Tokens of each batch row, padding not counted."""
        return [] if self._held is None else self._held.row_lens

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest batch row, padding not counted."""
        return max(self.row_lens, default=0)

    @property
    def selection(self) -> None:
        """None: layers on a device do not share selections."""
        return None

    def prefill(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in the keys and values of a prompt; a later call extends the context.

        As `IceCacheLayer.prefill`. Large tensors are not copied before the next call of the layer:
        they must not be written to until then.
        """
        self.append(keys, values, mask)

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in new tokens, as `IceCacheLayer.append` does; see `prefill`."""
        check_tokens(keys, values, mask, self.batch_size or None, self._expected)
        if mask is not None and bool(mask.all()):
            mask = None
        batch, _, num_new, _ = keys.shape
        self._ask_for_memory(batch, num_new)
        with on_device(self.device):
            if self._held is None:
                self._held = DeviceContext(self._settings, self._ops, batch)
            self._held.append(keys, values, mask)
        self._unsettled = num_new

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
        """Attend the latest tokens' queries to the context, as `IceCacheLayer.attend` does.

        `positions` must be None: a step attends what it selects itself.
        """
        if self._held is None or self.num_tokens == 0:
            raise InputError("attend needs tokens: call prefill or append first")
        if positions is not None:
            raise InputError("positions must be None on the device path, where each layer selects")
        scaling = self.head_dim**-0.5 if scaling is None else scaling
        check_query(query, scaling, softcap, sink_logits, self.batch_size, self._expected)
        num_queries = query.shape[2]
        if num_queries > max(1, self._unsettled):
            raise InputError(
                f"query has {num_queries} tokens, the latest call gave {self._unsettled}"
            )
        with on_device(self.device):
            if num_queries == 1:
                out = self._attend_one(self._held, query, scaling, softcap, sink_logits)
            else:
                out = self._held.attend_all(query, scaling, softcap, sink_logits)
                self._counters.count_dense(self.num_tokens)
                if self._unsettled > self.config.draft:
                    self._held.settle()
        if self.device.type == "cpu":
            check_finite_output(out)
        return out

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
        """Take in a token of each row, and attend its query; as `IceCacheLayer.step`."""
        self.append(keys, values)
        try:
            return self.attend(query, scaling=scaling, softcap=softcap, sink_logits=sink_logits)
        except BaseException:
            if self._held is not None and not self._held.is_torn:
                self.crop(keys.shape[2])
            raise

    def crop(self, num_tokens: int) -> None:
        """Drop the latest tokens of every row, as `IceCacheLayer.crop` does."""
        check_crop(num_tokens, 0 if self._held is None else self._held.may_crop)
        if self._held is not None and num_tokens:
            with on_device(self.device):
                self._held.crop(num_tokens)
            self._unsettled = max(0, self._unsettled - num_tokens)

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> None:
        """Take batch rows in a new order, repeated or dropped; repeated rows are copied."""
        rows = check_rows(rows, self.batch_size)
        if self._held is not None and rows.tolist() != list(range(self.batch_size)):
            with on_device(self.device):
                self._held.reorder(rows)

    @torch.no_grad()
    def settle(self) -> None:
        """Let all tokens that were given enter the window and the tree, as the next step would."""
        if self._held is not None:
            with on_device(self.device):
                self._held.settle()

    def is_steady(self) -> bool:
        """Whether the next step does what every later one does; makes room for it first."""
        index = None if self._held is None else self._held.index
        if index is None or self._held is None or self._held.fresh is not None or index.is_torn:
            return False
        if index.leaving is not None or not all(index.window.is_full):
            return False
        with on_device(self.device):
            index.make_room(1, 1)
        return True

    def addresses(self) -> tuple[object, ...]:
        """Return where a step reads and writes: what has recorded it is bound to those."""
        assert self._held is not None and self._held.index is not None
        return self._held.index.addresses()

    def join_transfers(self) -> None:
        """Let the steps from here on see pages that are still on their way to host memory."""
        assert self._held is not None and self._held.index is not None
        self._held.index.join_transfers()

    def count_step(self) -> None:
        """Take note of a step that the device did without the host: a replayed recording."""
        assert self._held is not None and self._held.index is not None
        self._held.inserted += self._held.index.count_step()
        self._counters.sparse_steps += 1
        self._unsettled = 1

    def mark(self) -> object:
        """Return what the host counts, for `rewind`."""
        assert self._held is not None and self._held.index is not None
        counters = self._counters.mark()
        return self._held.index.mark(), self._held.inserted, self._unsettled, counters

    def rewind(self, mark: Any) -> None:
        """Let the host count as at a mark, after a step that the device has not done."""
        assert self._held is not None and self._held.index is not None
        index, self._held.inserted, self._unsettled, counters = mark
        self._held.index.rewind(index)
        self._counters.rewind(counters)

    def tear(self) -> None:
        """Refuse all further use: what the device has done of a step is not known."""
        if self._held is not None and self._held.index is not None:
            self._held.index.is_torn = True

    def reset(self) -> None:
        """Forget the context and the counters; the memory is free again."""
        self.release()
        self._counters = DeviceCounters()

    def release(self) -> None:
        """Let the context go."""
        if self._held is not None:
            self._held.close()
            self._settings.choice.forget(self.device)
        self._held, self._unsettled = None, 0

    @torch.no_grad()
    def fork(self) -> "DeviceLayer":
        """Return a layer with a copy of the context, independent of this one from now on."""
        self.settle()
        other = object.__new__(DeviceLayer)
        other.__dict__.update(self.__dict__)
        other._held = None if self._held is None else self._held.fork()
        other._counters = DeviceCounters()
        return other

    def estimate_bytes(self, batch: int, tokens: int) -> int:
        """Return the host bytes that so many more tokens take, 0 if pages live on the device."""
        held = max(self.row_lens, default=0)
        if not self._settings.will_offload(batch, held + tokens):
            return 0
        size = 1 if self.config.page_dtype == "int8" else self.dtype.itemsize
        scales = 8 if self.config.page_dtype == "int8" else 0
        kv = 2 * self.head_dim * size + scales + 4
        return int(batch * self.num_kv_heads * tokens * 1.2 * kv)

    def stats(self) -> LayerStats:
        """Return what the layer holds and what it has done; waits for the device."""
        return device_stats(self._held, self._counters, self.phase, self._backend)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every token is in exactly one place, summaries true."""
        if self._held is not None:
            self._held.check_integrity()

    def _attend_one(
        self,
        context: DeviceContext,
        query: Tensor,
        scaling: float,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        context.check_whole()
        if context.fresh is not None:
            context.settle()
        if context.index is None:
            self._counters.count_dense(self.num_tokens)
            return context.attend_all(query, scaling, softcap, sink_logits)
        batch, heads, _, dim = query.shape
        rows = batch * self.num_kv_heads
        sinks = None
        if sink_logits is not None:
            sinks = sink_logits.float().view(1, -1).expand(batch, -1).reshape(rows, -1)
        grouped = query.reshape(rows, heads // self.num_kv_heads, dim).contiguous()
        step = attend_step(context.index, self._ops, grouped, scaling, softcap, sinks)
        if context.index.leaving is not None:
            context.inserted += context.index.inserted()
        self._counters.count_sparse(step)
        return step.out.view(query.shape).to(query.dtype)

    def _ask_for_memory(self, batch: int, tokens: int) -> None:
        # of single tokens the pools know better, which grow by many at once
        if self.config.max_host_memory is None or tokens == 1:
            return
        index = None if self._held is None else self._held.index
        held = 0 if index is None else index.pool.shape.host_bytes
        check_host_limit(self.estimate_bytes(batch, tokens), held, self.config.max_host_memory)
