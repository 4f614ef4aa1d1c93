"""One forward of the model over the layers of a cache: checked at its start, undone as a whole."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from icecache.cache.estimate import transient_bytes
from icecache.cache.make import make_layer, runs_on_device
from icecache.errors import InputError
from icecache.integrations.transformers.layer import ManagedLayer
from icecache.integrations.transformers.padding import Padding
from icecache.integrations.transformers.threads import most_unfinished
from icecache.store.memory import check_host_memory

__all__ = ["ForwardPass"]

_RESET = "call reset() on the cache and start the conversation anew"


class ForwardPass:
    """What one cache knows of the running forward.

    A forward updates its layers in ascending order, so an update of a layer that is not behind the
    last one starts a new forward. Before it, every managed layer has to have been attended (the
    handshake that finds a wrong attention implementation) and to hold as many tokens as the others.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._managed = [layer for layer in layers if isinstance(layer, ManagedLayer)]
        self._recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
        self._saved: list[tuple[Any, dict[str, Any]]] = []
        self._last = len(layers)
        self._past = self._tokens = 0
        self._has_begun = False
        self._broken: str | None = None
        self.batch_size: int | None = None
        self.padding = Padding()

    def enter(self, layer_index: int, keys: torch.Tensor) -> None:
        """Check one update before anything changes; `InputError` leaves the cache as it was."""
        last = self._last
        # layers come one after the other: only the latest can still be waiting
        if last < len(self._layers) and getattr(self._layers[last], "is_pending", False):
            self.undo()
            raise InputError(
                "the layer before was never attended by IceCache: the model runs another attention "
                "implementation and its answers would be garbage; use icecache.attach(model) or "
                'model.set_attn_implementation("icecache"). The forward was undone'
            )
        if layer_index <= self._last:
            self._begin(keys)
        self._last = layer_index

    def new_tokens(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Return which tokens of this forward are real, ``[batch, tokens]``, None if all are."""
        return self.padding.take(mask, self._past, self._tokens)

    def settle(self) -> None:
        """Close the last forward, before an operation on the whole cache."""
        if self._broken is not None:
            raise InputError(self._broken)
        self.padding.commit()
        self._saved = []
        self._last = len(self._layers)
        self._has_begun = False

    def undo(self) -> None:
        """Take the running forward back; a cache that cannot go back refuses all further use.

        A forward that was refused before it began is none.
        """
        if self._has_begun:
            self._take_all_back()

    def _take_all_back(self) -> None:
        self._has_begun = False
        for layer in self._managed:
            layer.is_pending = False
            if layer.num_columns > self._past:
                self._take_back(layer)
        for stock, state in self._saved:
            vars(stock).clear()
            vars(stock).update(state)
        if self._recurrent:
            self._broken = f"a forward failed and its recurrent layers cannot be put back: {_RESET}"
        self.padding.discard()
        self._saved = []
        self._last = len(self._layers)
        if self._past == 0:
            self.batch_size = None

    def forget(self, num_columns: int) -> None:
        """Drop the record of a forward that has changed no core; num_columns: those before it."""
        for layer in self._managed:
            layer.num_columns, layer.is_pending = num_columns, False
        self.settle()

    def clear(self) -> None:
        """Forget everything, as `reset` does."""
        self.padding.clear()
        self._saved = []
        self._last = len(self._layers)
        self._past = self._tokens = 0
        self._broken = self.batch_size = None

    def state(self) -> dict[str, Any]:
        """Return what outlives a forward, by name."""
        self.settle()
        return {"batch_size": self.batch_size, "padding": self.padding.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take that back, before the first forward."""
        self.batch_size = state["batch_size"]
        self.padding.load_state(state["padding"])
        self._past = max((layer.num_columns for layer in self._managed), default=0)

    def _begin(self, keys: torch.Tensor) -> None:
        self._has_begun = False
        if self._broken is not None:
            raise InputError(self._broken)
        lengths = {layer.num_columns for layer in self._managed}
        if len(lengths) > 1:
            self._take_all_back()
            raise InputError(
                "an earlier forward stopped half-way through the layers; it was undone, and the "
                f"cache holds {self._past} tokens again: repeat that call"
            )
        batch_size, _, num_tokens, _ = keys.shape
        if num_tokens == 0 or batch_size == 0:
            raise InputError(
                "the prompt must hold at least one token, got "
                f"batch {batch_size} of {num_tokens} tokens"
            )
        if self.batch_size is not None and batch_size != self.batch_size:
            raise InputError(
                f"batch size must stay {self.batch_size} within a conversation, got {batch_size}; "
                "use a new cache, or batch_select_indices() / batch_repeat_interleave() on this one"
            )
        self._check_memory(keys)
        self.settle()
        self.batch_size = batch_size
        self._past = next(iter(lengths), 0)
        self._tokens = num_tokens
        self._saved = [
            (layer, dict(vars(layer)))
            for layer in self._layers
            if isinstance(layer, CacheLayerMixin) and not isinstance(layer, ManagedLayer)
        ]
        self._has_begun = True

    def _check_memory(self, keys: torch.Tensor) -> None:
        """Ask for the memory of all layers at once: the last must not fail after the first took."""
        if not self._managed or keys.shape[2] <= self._managed[0].settings.draft:
            return
        settings = self._managed[0].settings
        one = make_layer(
            settings,
            num_kv_heads=keys.shape[1],
            head_dim=keys.shape[3],
            dtype=keys.dtype,
            device=keys.device,
            choice=self._managed[0].choice,
        )
        batch, heads, tokens, dim = keys.shape
        unfinished = most_unfinished() if settings.overlap else 1
        beside = unfinished * transient_bytes(batch * heads, tokens, dim, keys.dtype)
        if runs_on_device(settings, keys.device):
            # there the pages are filled from the device
            beside = 0
        check_host_memory(len(self._managed) * one.estimate_bytes(batch, tokens) + beside)

    def _take_back(self, layer: ManagedLayer) -> None:
        if self._past == 0:
            layer.reset()
            return
        try:
            if self.padding.is_ragged:
                raise InputError("rows took in different numbers of tokens")
            layer.crop(self._past - layer.num_columns)
        except InputError as error:
            self._broken = f"a forward failed and cannot be taken back ({error}): {_RESET}"
