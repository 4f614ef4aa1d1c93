"""The settings of one layer on a device, and what follows from them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from icecache.config import IceCacheConfig
from icecache.errors import ConfigError
from icecache.store.device_pool import PoolShape, free_device_bytes

__all__ = ["DeviceSettings", "OffloadChoice", "check_device_config", "most_selected"]

_LEAST_PAGE, _MOST_PAGE = 8, 64
_SLOTS_PER_SELECTED = 2
_PAGES_PER_FILLED = 3
_GROWTH_TOKENS = 4096
_MARGIN = 64
_ONE_BUILD = 33


class DeviceSettings(NamedTuple):
    """A config beside the shape of the layer that it is for.

    Attributes
    ----------
    config : IceCacheConfig
    heads, dim : KV heads and head_dim.
    dtype : torch.dtype
    device : torch.device
    choice : OffloadChoice
    """

    config: IceCacheConfig
    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    choice: "OffloadChoice"

    @property
    def num_slots(self) -> int:
        """Pages of a row that the device keeps."""
        if self.config.device_slots is None:
            return _SLOTS_PER_SELECTED * most_selected(self.config)
        return self.config.device_slots

    @property
    def build_config(self) -> IceCacheConfig:
        """The config that trees are built with: by torch, wherever the keys are."""
        return self.config.replace(backend="torch", offload="auto", page_dtype="auto")

    def spare(self, tokens: int) -> tuple[int, int]:
        """Return leaves and pages that rows of so many tokens get room for beside those in use.

        Counted for tokens that are inserted one by one, whose leaves and pages are less full than
        those of a build.
        """
        most = self.config.max_context
        more = max(tokens // 32, _GROWTH_TOKENS) if most is None else max(most - tokens, 0)
        leaf, page = 0.7 * self.config.leaf_target, 0.7 * self.config.page_size
        return math.ceil(more / leaf) + _MARGIN, math.ceil(more / page) + _MARGIN

    def pool_shape(self, batch: int, tokens: int, leaves: int, pages: int) -> PoolShape:
        """Return the shape of a pool for rows that have so many tokens, leaves and pages."""
        shape = self._shape(batch, tokens, leaves, pages)
        return shape._replace(offloads=self._offloads(shape, self.choice.fits))

    def _shape(self, batch: int, tokens: int, leaves: int, pages: int) -> PoolShape:
        spare_leaves, spare_pages = self.spare(tokens)
        return PoolShape(
            rows=batch * self.heads,
            leaves=leaves + spare_leaves,
            pages=pages + spare_pages,
            slots=self.num_slots,
            page_size=self.config.page_size,
            head_dim=self.dim,
            dtype=self.dtype,
            page_dtype=torch.int8 if self.config.page_dtype == "int8" else self.dtype,
            offloads=True,
        )

    def will_offload(self, batch: int, tokens: int) -> bool:
        """Say whether pages of rows of so many tokens will live in host memory; takes nothing.

        A guess as long as ``offload="auto"`` has not chosen, from how full leaves and pages mostly
        are.
        """
        leaves, pages = tokens / self.config.leaf_target, tokens / self.config.page_size
        shape = self._shape(batch, tokens, math.ceil(leaves), math.ceil(pages))
        return self._offloads(shape, self.choice.would_fit)

    def _offloads(self, shape: PoolShape, fits: Callable[[int, torch.device], bool]) -> bool:
        if self.config.offload != "auto":
            return self.config.offload == "host"
        if self.config.page_dtype == "int8":
            return True
        return not fits(shape._replace(offloads=False).device_bytes, self.device)


class OffloadChoice:
    """Where ``offload="auto"`` keeps pages: all layers of a device alike.

    Parameters
    ----------
    num_layers : int
        That share the device.
    """

    def __init__(self, num_layers: int = 1) -> None:
        self._num_layers = num_layers
        self._granted: dict[torch.device, int] = {}
        self._refused: set[torch.device] = set()

    def fits(self, num_bytes: int, device: torch.device) -> bool:
        """Whether every layer may take so many bytes of the device; refused once, always refused.

        Half of what is free is left to the model's own work.
        """
        fits = self.would_fit(num_bytes, device)
        if not fits:
            self._refused.add(device)
        elif num_bytes > self._granted.get(device, 0):
            # layers that come later are a few leaves larger or smaller
            self._granted[device] = num_bytes + num_bytes // 8
        return fits

    def would_fit(self, num_bytes: int, device: torch.device) -> bool:
        """Say what `fits` would say, without consequences."""
        granted = self._granted.get(device, 0)
        if device in self._refused or num_bytes <= granted:
            return device not in self._refused
        free, held = free_device_bytes(device), self._num_layers * granted
        return free is not None and 2 * self._num_layers * num_bytes <= free + held

    def forget(self, device: torch.device) -> None:
        """Take note that a device's layers have let go of what they held."""
        self._granted.pop(device, None)
        self._refused.discard(device)


def most_selected(config: IceCacheConfig) -> int:
    """Return the most pages that a step selects of a row: what has room is always among them.

    Pages that were full once stay half full; a build may leave one more that is not. Chosen leaves
    lie in some two and a half times as many pages as they would fill.
    """
    room = config.budget - config.sink - config.window
    filled = math.ceil(room / config.page_size)
    most = 2 * filled + 2 + room // _ONE_BUILD
    return most if config.unit == "page" else max(most, _PAGES_PER_FILLED * filled)


def check_device_config(config: IceCacheConfig) -> None:
    """Raise `ConfigError` if the device path cannot run with these settings."""
    size = config.page_size
    if not _LEAST_PAGE <= size <= _MOST_PAGE:
        raise ConfigError(f"page_size must be from 8 to 64 on the device path, got {size}")
    if 2 * config.leaf_size > size:
        raise ConfigError(
            f"leaf_size must be at most half of page_size ({size}) on the device path, "
            f"got {config.leaf_size}"
        )
    for name, only in (("selection", "tree"), ("layer_reuse", 1)):
        if getattr(config, name) != only:
            raise ConfigError(
                f"{name} must be {only!r} on the device path, got {getattr(config, name)!r}"
            )
    least = most_selected(config)
    if config.device_slots is not None and config.device_slots < least:
        raise ConfigError(
            f"device_slots must be at least the {least} pages that a step may select, "
            f"got {config.device_slots}"
        )
    if config.page_dtype == "int8" and config.offload == "none":
        raise ConfigError(
            'page_dtype must be "auto" with offload="none", where pages are read in place, '
            'got "int8"'
        )
