"""A whole cache to a snapshot and back."""

import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from icecache.cache.snapshot import Snapshot, State, read_snapshot, write_snapshot
from icecache.config import IceCacheConfig
from icecache.errors import IceCacheError, InputError, SnapshotMismatch, UnsupportedModel
from icecache.integrations.transformers.fingerprint import fingerprint
from icecache.integrations.transformers.layer import ManagedLayer

if TYPE_CHECKING:
    from icecache.integrations.transformers.cache import IceCache

__all__ = ["check_fingerprint", "load_into", "open_snapshot", "save_cache", "settings_of"]

_PLAIN = (DummyLayer, DynamicLayer, DynamicSlidingWindowLayer)


def save_cache(cache: "IceCache", path: str | os.PathLike[str], about: dict[str, Any]) -> None:
    """Write a cache; arguments and errors as in `IceCache.save`."""
    if cache.model is None:
        raise InputError(
            "a cache that was made from a config alone, or whose model is gone, cannot be saved: "
            "which model it belongs to is not known; make it with IceCache(model) and keep that"
        )
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, ManagedLayer) and type(layer) not in _PLAIN:
            raise UnsupportedModel(
                f"layer {index} is left to the model as a {type(layer).__name__}, which cannot be "
                "saved: it holds more than keys and values"
            )
    record = {
        "model": fingerprint(cache.model),
        "settings": dataclasses.asdict(cache.settings),
        "about": about,
    }
    write_snapshot(path, _parts(cache), record)


def open_snapshot(path: str | os.PathLike[str], model: PreTrainedModel) -> Snapshot:
    """Return a snapshot of this model; `SnapshotMismatch` if it is another's."""
    snapshot = read_snapshot(path)
    check_fingerprint(snapshot, model)
    return snapshot


def check_fingerprint(snapshot: Snapshot, model: PreTrainedModel) -> None:
    """Raise `SnapshotMismatch` unless the snapshot is of this model."""
    kept, own = snapshot.about["model"], fingerprint(model)
    for part in ("class", "config", "weights"):
        if kept[part] != own[part]:
            raise SnapshotMismatch(
                f"{snapshot.folder} is of another model: its {part} differs "
                f"({kept[part]}, here {own[part]}); load it with the model that made it"
            )


def settings_of(snapshot: Snapshot, wanted: IceCacheConfig | None) -> IceCacheConfig:
    """Return a snapshot's settings; `SnapshotMismatch` if others are wanted."""
    kept = IceCacheConfig.from_kwargs(**snapshot.about["settings"])
    if wanted is not None and wanted != kept:
        (name, *_) = [
            field.name
            for field in dataclasses.fields(kept)
            if getattr(kept, field.name) != getattr(wanted, field.name)
        ]
        raise SnapshotMismatch(
            f"{snapshot.folder} was made with other settings: {name}={getattr(kept, name)!r}, "
            f"not {getattr(wanted, name)!r}"
        )
    return kept


def load_into(cache: "IceCache", snapshot: Snapshot) -> None:
    """Fill a new cache; `SnapshotMismatch` if the snapshot is damaged."""
    try:
        for index, layer in enumerate(cache.layers):
            _load_layer(layer, snapshot.part(f"layer-{index:03}"))
        cache.forward_pass.load_state(snapshot.part("conversation"))
    except IceCacheError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SnapshotMismatch(f"{snapshot.folder} is damaged: {error}") from error


def _parts(cache: "IceCache") -> Iterator[tuple[str, State]]:
    yield "conversation", cache.forward_pass.state()
    for index, layer in enumerate(cache.layers):
        yield f"layer-{index:03}", _layer_state(layer)


def _layer_state(layer: Any) -> State:
    if isinstance(layer, ManagedLayer):
        return layer.state()
    if isinstance(layer, DummyLayer) or not layer.is_initialized:
        return {"kept": {}}
    numbers = {name: x for name, x in vars(layer).items() if isinstance(x, int | float | bool)}
    return {"kept": {"keys": layer.keys, "values": layer.values, **numbers}}


def _load_layer(layer: Any, state: State) -> None:
    if isinstance(layer, ManagedLayer):
        layer.load_state(state)
    elif state["kept"]:
        layer.lazy_initialization(state["kept"]["keys"], state["kept"]["values"])
        vars(layer).update(state["kept"])
