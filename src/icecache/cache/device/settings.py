"""The settings of one layer on a device, and what follows from them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.config import IceCacheConfig
from icecache.errors import ConfigError
from icecache.store.device_pool import PoolShape, free_device_bytes

__all__ = ["DeviceSettings", "check_device_config"]

_LEAST_PAGE, _MOST_PAGE = 8, 64
_SLOTS_PER_SELECTED = 4
_GROWTH_TOKENS = 4096
_ONE_BUILD = 33


class DeviceSettings(NamedTuple):
    """A config beside the shape of the layer that it is for.

    Attributes
    ----------
    config : IceCacheConfig
    backend : ``"triton"`` or ``"twin"``
    heads, dim : KV heads and head_dim.
    dtype : torch.dtype
    device : torch.device
    num_layers : layers of the model that share the device, for ``offload="auto"``.
    """

    config: IceCacheConfig
    backend: str
    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    num_layers: int

    @property
    def most_selected(self) -> int:
        """Most pages that a step selects of a row: so many that `room` tokens always fit in them.

        Pages that were full once stay half full; a build may leave one more that is not.
        """
        room = self.config.budget - self.config.sink - self.config.window
        return 2 * math.ceil(room / self.config.page_size) + 2 + room // _ONE_BUILD

    @property
    def num_slots(self) -> int:
        """Pages of a row that the device keeps."""
        if self.config.device_slots is None:
            return _SLOTS_PER_SELECTED * self.most_selected
        return self.config.device_slots

    @property
    def build_config(self) -> IceCacheConfig:
        """The config that trees are built with: by torch, wherever the keys are."""
        return self.config.replace(backend="torch", offload="auto", page_dtype="auto")

    def rows_of(self, tokens: Tensor) -> Tensor:
        """Return one token a row, [batch, heads, 1, dim] as [rows, dim]."""
        return tokens.reshape(-1, self.dim)

    def growth(self, tokens: int) -> tuple[int, int]:
        """Return the most leaves and pages that a row gains by so many tokens."""
        if tokens <= _ONE_BUILD:
            return tokens, tokens
        return self._usual(tokens, 1.5)

    def spare(self, tokens: int) -> tuple[int, int]:
        """Return leaves and pages of the room that a context of so many tokens gets beside it."""
        return self._usual(max(tokens // 4, _GROWTH_TOKENS), 1.0)

    def pool_shape(self, batch: int, tokens: int) -> PoolShape:
        """Return the shape of a pool for rows of so many tokens and some more."""
        most = self.config.max_context
        if most is None:
            leaves, pages = self._usual(tokens + max(tokens // 16, _GROWTH_TOKENS), 1.0)
        else:
            leaves, pages = self._usual(max(most, tokens), 1.0)
        shape = PoolShape(
            rows=batch * self.heads,
            leaves=leaves + _ONE_BUILD,
            pages=pages + _ONE_BUILD,
            slots=self.num_slots,
            page_size=self.config.page_size,
            head_dim=self.dim,
            dtype=self.dtype,
            page_dtype=torch.int8 if self.config.page_dtype == "int8" else self.dtype,
            offloads=True,
        )
        return shape._replace(offloads=self._offloads(shape))

    def _usual(self, tokens: int, factor: float) -> tuple[int, int]:
        """Return leaves and pages of so many tokens, by what builds were seen to need at most."""
        leaf, page = 0.6 * self.config.leaf_target, 0.75 * self.config.page_size
        return math.ceil(factor * tokens / leaf), math.ceil(factor * tokens / page)

    def _offloads(self, shape: PoolShape) -> bool:
        if self.config.offload != "auto":
            return self.config.offload == "host"
        free = free_device_bytes(self.device)
        if free is None or self.config.page_dtype == "int8":
            return True
        return 2 * self.num_layers * shape._replace(offloads=False).device_bytes > free


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
    if config.page_dtype == "int8" and config.offload == "none":
        raise ConfigError(
            'page_dtype must be "auto" with offload="none", where pages are read in place, '
            'got "int8"'
        )
