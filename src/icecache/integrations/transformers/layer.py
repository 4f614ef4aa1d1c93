"""One managed attention layer as transformers' caches see it."""

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from icecache.cache.device.layer import DeviceLayer
from icecache.cache.device.settings import OffloadChoice
from icecache.cache.layer import IceCacheLayer
from icecache.cache.make import AnyLayer, make_layer
from icecache.cache.stats import LayerStats
from icecache.config import IceCacheConfig
from icecache.errors import InputError, UnsupportedModel
from icecache.integrations.transformers.threads import Threads

__all__ = ["ManagedLayer"]


class _Inference(torch.autograd.Function):
    """Pass the output on, and say so when somebody asks for gradients through it."""

    @staticmethod
    def forward(ctx: object, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> tuple[None, None]:
        raise InputError("IceCache runs inference only and has no gradients; detach it to train")


class ManagedLayer(CacheLayerMixin):
    """A transformers cache layer over an `IceCacheLayer` or a `DeviceLayer`.

    `update` only hands the new keys and values over: the padding mask reaches the attention
    function alone, which then calls `take` and `attend`.

    Parameters
    ----------
    settings : IceCacheConfig
        Of the layer, which is made when the first keys tell its shape and device.
    threads : Threads
        Of the cache, which build trees in the background.
    leader : ManagedLayer, optional
        The earlier layer whose selection this one attends to; by default it selects itself.
    choice : OffloadChoice, optional
        Shared by the layers of the cache.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        settings: IceCacheConfig,
        threads: Threads,
        leader: "ManagedLayer | None" = None,
        choice: OffloadChoice | None = None,
    ) -> None:
        super().__init__()
        self.settings, self._threads, self._leader = settings, threads, leader
        self.choice = choice
        self.core: AnyLayer | None = None
        self.num_columns = 0
        self.is_pending = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the core layer for tensors like these."""
        if key_states.shape != value_states.shape:
            raise UnsupportedModel(
                f"keys of shape {list(key_states.shape)} and values of {list(value_states.shape)} "
                "differ, and IceCache stores them side by side; run this model without IceCache"
            )
        _, heads, _, dim = key_states.shape
        self._make(heads, dim, key_states.dtype, key_states.device)

    def _make(self, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        leader = None if self._leader is None else self._leader.core
        if leader is not None and leader.num_kv_heads != heads:
            raise UnsupportedModel(
                f"layer_reuse shares selections between layers of as many KV heads, and here are "
                f"layers of {leader.num_kv_heads} and {heads}; use layer_reuse=1 for this model"
            )
        self.core = make_layer(
            self.settings,
            num_kv_heads=heads,
            head_dim=dim,
            dtype=dtype,
            device=device,
            executor=self._threads.executor() if self.settings.overlap else None,
            choice=self.choice,
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Announce new tokens; return them as they are, to be taken by the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.is_pending = True
        return key_states, value_states

    @torch.no_grad()
    def take(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Append the announced tokens; a second call, by a layer that shares them, does nothing."""
        if not self.is_pending:
            return
        assert self.core is not None
        self.is_pending = False
        # the build begins when these tokens have been attended, not before
        self.core.append(keys.detach(), values.detach(), mask)
        self.num_columns += keys.shape[2]

    def take_and_attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float | None,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """`take`, then `attend`; of one token as one step of the core layer."""
        is_step = self.is_pending and mask is None and keys.shape[2] == query.shape[2] == 1
        wants_gradients = torch.is_grad_enabled() and query.requires_grad
        if is_step and not wants_gradients and self._given() is None:
            assert self.core is not None
            self.is_pending = False
            output = self.core.step(
                query, keys, values, scaling=scaling, softcap=softcap, sink_logits=sink_logits
            )
            self.num_columns += 1
            return output
        self.take(keys, values, mask)
        return self.attend(query, scaling=scaling, softcap=softcap, sink_logits=sink_logits)

    def attend(
        self,
        query: torch.Tensor,
        *,
        scaling: float | None,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the output for the last tokens, ``[batch, num_q_heads, q_tokens, value_dim]``."""
        assert self.core is not None
        with torch.no_grad():
            output = self.core.attend(
                query,
                scaling=scaling,
                softcap=softcap,
                sink_logits=sink_logits,
                positions=self._given() if query.shape[2] == 1 else None,
            )
        if torch.is_grad_enabled() and query.requires_grad:
            result: torch.Tensor = _Inference.apply(query, output)  # type: ignore[no-untyped-call]
            return result
        return output

    def _given(self) -> torch.Tensor | None:
        """Return what the leader has selected in this forward, None where all is attended."""
        if self._leader is None or self._leader.core is None:
            return None
        return self._leader.core.selection

    def get_seq_length(self) -> int:
        """Return the columns seen, padding included: positions and masks count from here."""
        return self.num_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the mask for `query_length` new tokens."""
        return self.num_columns + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit but memory."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens."""
        num_tokens = abs(tokens_to_remove)
        if num_tokens and self.core is not None:
            self.core.crop(num_tokens)
            self.num_columns -= num_tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i continue row ``beam_idx[i]``."""
        if self.core is not None and self.num_columns:
            self.core.reorder(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.core is not None and self.num_columns:
            rows = torch.arange(self.core.batch_size)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def state(self) -> dict[str, Any]:
        """Return all that the layer holds, by name; views, valid until it changes."""
        core = self.core
        if core is None or not self.num_columns:
            return {"num_columns": 0}
        shape = {"num_kv_heads": core.num_kv_heads, "head_dim": core.head_dim}
        if isinstance(core, DeviceLayer):
            raise InputError("a cache on the device path cannot be saved; run the prompt again")
        dtype = str(core.dtype).removeprefix("torch.")
        return {"num_columns": self.num_columns, **shape, "dtype": dtype, "core": core.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take a state back, into a new layer."""
        if state["num_columns"]:
            self._make(
                state["num_kv_heads"],
                state["head_dim"],
                getattr(torch, state["dtype"]),
                torch.device("cpu"),
            )
            if not isinstance(self.core, IceCacheLayer):
                raise InputError("a snapshot cannot be loaded to the device path; run the prompt")
            self.core.load_state(state["core"])
            self.num_columns = int(state["num_columns"])

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_pending = False
        self.num_columns = 0
        if self.core is not None:
            self.core.reset()

    def offload(self) -> None:
        """Do nothing: the layer decides itself what lives where."""

    def prefetch(self) -> None:
        """Do nothing: the layer decides itself what lives where."""

    def stats(self) -> LayerStats | None:
        """Return the core layer's statistics, None before the first token."""
        return None if self.core is None else self.core.stats()
