"""`IceCache`, the cache of a whole model for transformers."""

import os
import warnings
import weakref
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from icecache.cache.device.settings import OffloadChoice
from icecache.config import IceCacheConfig
from icecache.errors import IceCacheError, InputError
from icecache.integrations.transformers.attention import Handoff, hand_over, register
from icecache.integrations.transformers.forward import ForwardPass
from icecache.integrations.transformers.layer import ManagedLayer
from icecache.integrations.transformers.saving import (
    load_into,
    open_snapshot,
    save_cache,
    settings_of,
)
from icecache.integrations.transformers.stats import CacheStats
from icecache.integrations.transformers.support import SupportReport, decoder_config, supports
from icecache.integrations.transformers.threads import Threads

__all__ = ["IceCache"]

_STEPS_BETWEEN_BUILDS = 2


class IceCache(Cache):
    """A transformers cache whose full-attention layers attend within a token budget.

    The model has to run IceCache's attention: `icecache.attach` sets it, and so does
    ``model.set_attn_implementation("icecache")``. Pass the cache as ``past_key_values`` and keep it
    to go on with the conversation; one cache serves one batch of conversations.

    Parameters
    ----------
    model_or_config : PreTrainedModel or PreTrainedConfig
        The model that will fill the cache.
    settings : IceCacheConfig, optional
        All settings at once.
    **config
        Single settings, such as ``budget=128``; see `icecache.IceCacheConfig`.

    Raises
    ------
    ConfigError
        On an unknown setting or a value outside its rule.
    UnsupportedModel
        If one of the model's layers can neither be managed nor be left to the model.

    Examples
    --------
    >>> with icecache.attach(model):                              # doctest: +SKIP
    ...     cache = icecache.IceCache(model, budget=256)
    ...     model.generate(**inputs, past_key_values=cache)
    """

    _model: weakref.ref[PreTrainedModel] | None

    def __init__(
        self,
        model_or_config: PreTrainedModel | PreTrainedConfig,
        settings: IceCacheConfig | None = None,
        **config: Any,
    ) -> None:
        settings = combine(settings, config)
        report = supports(model_or_config)
        report.require()
        warn_if_nothing_managed(report)
        register()
        self._open(getattr(model_or_config, "config", model_or_config), settings)
        if isinstance(model_or_config, PreTrainedModel):
            self._model = weakref.ref(model_or_config)

    @classmethod
    def for_attached(cls, model: PreTrainedModel, settings: IceCacheConfig) -> "IceCache":
        """Return a cache for a model that `attach` has checked already."""
        cache = cls.__new__(cls)
        cache._open(model.config, settings)
        cache._model = weakref.ref(model)
        return cache

    def _open(self, config: PreTrainedConfig, settings: IceCacheConfig) -> None:
        self._threads = Threads()
        super().__init__(layers=_layers(decoder_config(config), settings, self._threads))
        self.settings = settings
        self._forward = ForwardPass(self.layers)
        self._is_closed = False
        self._model = None
        self.about: dict[str, Any] = {}

    @property
    def model(self) -> PreTrainedModel | None:
        """The model that the cache was made for, if it still exists."""
        return None if self._model is None else self._model()

    @property
    def forward_pass(self) -> ForwardPass:
        """What is known of the running forward."""
        return self._forward

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand new keys and values of one layer over; called by the model's attention modules."""
        if self._is_closed:
            raise InputError("this IceCache was closed; make a new one")
        if layer_idx >= len(self.layers):
            raise InputError(
                f"layer {layer_idx} is not among the {len(self.layers)} layers of the model that "
                "this IceCache was made for; make one for this model"
            )
        self._forward.enter(layer_idx, key_states)
        layer = self.layers[layer_idx]
        managed = layer if isinstance(layer, ManagedLayer) else None
        # what transformers does beside that is for layers that move between devices
        update = super().update if managed is None else managed.update
        try:
            keys, values = update(key_states, value_states, layer_idx, *args, **kwargs)
        except IceCacheError:
            self._forward.undo()
            raise
        hand_over(keys, Handoff(managed, values, self._forward))
        return keys, values

    def step(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer_idx: int,
        scaling: float,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """Take one token of each row into a managed layer and attend it, for compiled steps.

        Shapes as in `IceCacheLayer.step`; the forward is undone by who runs it.
        """
        self.update(keys, values, layer_idx)
        layer: ManagedLayer = self.layers[layer_idx]
        return layer.take_and_attend(
            query, keys, values, None, scaling=scaling, softcap=softcap, sink_logits=sink_logits
        )

    def undo(self) -> None:
        """Take back a forward that failed."""
        self._forward.undo()

    @property
    def managed(self) -> dict[int, ManagedLayer]:
        """The layers that IceCache manages, by index."""
        return {i: x for i, x in enumerate(self.layers) if isinstance(x, ManagedLayer)}

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest row, padding excluded."""
        return self.stats().tokens

    def stats(self) -> CacheStats:
        """Return what the managed layers hold and did, per layer and summed."""
        stats = {index: layer.stats() for index, layer in self.managed.items()}
        return CacheStats(
            budget=self.settings.budget,
            num_layers=len(self.layers),
            layers={index: layer for index, layer in stats.items() if layer is not None},
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens of every row; 0 drops none.

        Raises
        ------
        InputError
            If a layer cannot go back that far; the cache is as it was.
        """
        self._forward.settle()
        self._check_crop(-tokens_to_remove)
        # the managed layers first: they alone can refuse now
        for layer in sorted(self.layers, key=lambda x: not isinstance(x, ManagedLayer)):
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i continue row ``beam_idx[i]`` (beam search)."""
        self._forward.settle()
        super().reorder_cache(beam_idx)
        self._rows_changed(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, ids or a bool mask."""
        self._forward.settle()
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        super().batch_select_indices(rows)
        self._rows_changed(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._forward.settle()
        super().batch_repeat_interleave(repeats)
        if self._forward.batch_size is not None:
            self._rows_changed(torch.arange(self._forward.batch_size).repeat_interleave(repeats))

    def save(self, path: str | os.PathLike[str], about: dict[str, Any] | None = None) -> None:
        """Write all that the cache holds to a folder, to go on later with `load`.

        Parameters
        ----------
        path : path
            A folder of its own; an older snapshot there stays whole until the new one is.
        about : dict, optional
            What JSON can hold; `load` gives it back as `about`.

        Raises
        ------
        InputError, UnsupportedModel
            If which model it is for is not known, or its other layers hold more than keys.
        OSError
            If it cannot be written; an older snapshot is as it was.
        """
        save_cache(self, path, self.about if about is None else about)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        settings: IceCacheConfig | None = None,
    ) -> "IceCache":
        """Return a cache that `save` has written; with `settings`, one that has just those.

        Raises
        ------
        SnapshotMismatch
            If the snapshot is of another model, other settings or another format, or truncated
            or altered. Nothing in it is executed.
        """
        snapshot = open_snapshot(path, model)
        cache = cls(model, settings_of(snapshot, settings))
        load_into(cache, snapshot)
        cache.about = snapshot.about["about"]
        return cache

    def reset(self) -> None:
        """Forget the conversation; settings stay."""
        super().reset()
        self._forward.clear()

    def close(self) -> None:
        """Free all memory and end all threads; the cache cannot be used again."""
        self.reset()
        self._threads.close()
        for layer in self.managed.values():
            layer.core = None
            layer.is_initialized = False
        self._is_closed = True

    def _rows_changed(self, rows: torch.Tensor) -> None:
        self._forward.padding.keep_rows(rows)
        if self._forward.batch_size is not None:
            self._forward.batch_size = int(rows.numel())

    def _num_columns(self) -> int:
        return max((layer.num_columns for layer in self.managed.values()), default=0)

    def _check_crop(self, num_tokens: int) -> None:
        if num_tokens < 0:
            raise InputError(
                f"crop takes the tokens to remove as a negative number, got {-num_tokens}"
            )
        held = self._num_columns()
        if self.managed and num_tokens > held:
            raise InputError(f"crop cannot remove {num_tokens} tokens of the {held} in the cache")
        # so that what was cropped of the padding's record was real, as what follows is
        if self._forward.padding.is_padded(held - num_tokens):
            raise InputError(
                f"crop cannot remove {num_tokens} tokens, for they are padding in some rows"
            )
        for index, layer in enumerate(self.layers):
            is_full = (
                isinstance(layer, DynamicSlidingWindowLayer)
                and layer.get_seq_length() >= layer.sliding_window
            )
            if num_tokens and is_full and not layer.record_past:
                raise InputError(
                    f"layer {index} has a sliding window and has dropped older tokens; call "
                    "activate_past_recording() before the tokens that crop may take back"
                )


def combine(settings: IceCacheConfig | None, config: dict[str, Any]) -> IceCacheConfig:
    """Return `settings` with the single settings of `config` changed."""
    if settings is None:
        return IceCacheConfig.from_kwargs(**config)
    return settings.replace(**config) if config else settings


def warn_if_nothing_managed(report: SupportReport) -> None:
    """Warn that the cache will do nothing for this model."""
    if not report.managed:
        warnings.warn(
            f"{report.model_type} has no layer with full attention: IceCache manages nothing and "
            "the model runs with its own caches",
            UserWarning,
            stacklevel=3,
        )


def _layers(config: PreTrainedConfig, settings: IceCacheConfig, threads: Threads) -> list[Any]:
    layers: list[Any] = []
    leader, managed = None, 0
    kinds, _ = get_layer_types_and_kwargs(config)
    choice = OffloadChoice(sum(kind == "full_attention" for kind in kinds))
    for kind, kwargs in zip(*get_layer_types_and_kwargs(config)):
        if kind != "full_attention":
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs))
            continue
        is_leader = managed % settings.layer_reuse == 0
        own = _staggered(settings, managed)
        layers.append(ManagedLayer(own, threads, None if is_leader else leader, choice))
        leader = layers[-1] if is_leader else leader
        managed += 1
    return layers


def _staggered(settings: IceCacheConfig, number: int) -> IceCacheConfig:
    """Return settings under which no two layers leave the dense phase in the same decode step.

    The first step of a long context builds a tree: that of one layer is hardly noticed.
    """
    if settings.dense_until <= settings.budget:
        return settings
    # with shared selections a leader and its followers become sparse together
    place = number // settings.layer_reuse
    until = settings.dense_until + _STEPS_BETWEEN_BUILDS * place
    return settings.replace(dense_until=min(until, 1 << 31))
