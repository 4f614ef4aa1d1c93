"""Which layer holds keys and values: on a CPU, or on a device."""

from concurrent.futures import Executor
from typing import TypeAlias

import torch

from icecache.cache.device.layer import DeviceLayer
from icecache.cache.device.settings import OffloadChoice
from icecache.cache.layer import IceCacheLayer
from icecache.config import IceCacheConfig
from icecache.ops.dispatch import DEVICE_BACKENDS

__all__ = ["AnyLayer", "make_layer", "runs_on_device"]

AnyLayer: TypeAlias = IceCacheLayer | DeviceLayer


def runs_on_device(config: IceCacheConfig, device: torch.device) -> bool:
    """Whether layers take the device path: on every other device than a CPU, and if asked to."""
    return device.type != "cpu" or config.backend in DEVICE_BACKENDS


def make_layer(
    config: IceCacheConfig,
    *,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    executor: Executor | None = None,
    choice: OffloadChoice | None = None,
) -> AnyLayer:
    """Return an `IceCacheLayer` or, on the device path, a `DeviceLayer`.

    Arguments as theirs; `executor` is for the one, `choice` for the other.

    Raises
    ------
    ConfigError
        If a setting is not for the path that the device takes.
    """
    device = torch.device(device)
    if runs_on_device(config, device):
        return DeviceLayer(
            config,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            choice=choice,
        )
    return IceCacheLayer(
        config,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        executor=executor,
    )
