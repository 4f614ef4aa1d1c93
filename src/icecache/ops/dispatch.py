"""Which implementation of the ops runs."""

import os
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from icecache.errors import BackendUnavailable, ConfigError
from icecache.ops import batched, native, reference

__all__ = ["DEVICE_BACKENDS", "device_backend", "device_ops", "ops_for", "resolve_backend"]

DEVICE_BACKENDS = ("triton", "twin")


def resolve_backend(backend: str) -> str:
    """Return ``"native"``, ``"torch"`` or ``"reference"``.

    ``"auto"`` is ``"native"`` where the compiled ops are installed, and elsewhere ``"torch"`` with
    a warning that says why; ``"native"`` raises `BackendUnavailable` where they are not.
    """
    if backend == "auto":
        try:
            native.load()
        except BackendUnavailable as error:
            warnings.warn(f"IceCache runs its slower torch ops: {error}", stacklevel=3)
            return "torch"
        return "native"
    if backend == "native":
        native.load()
    elif backend not in ("torch", "reference"):
        raise ConfigError(f"backend must be one of auto, native, torch, reference, got {backend!r}")
    return backend


def ops_for(backend: str) -> ModuleType:
    """Return the module of the ops that a resolved backend does not fuse."""
    return reference if backend == "reference" else batched


def device_backend(backend: str, device: torch.device) -> str:
    """Return ``"triton"`` or ``"twin"``, the two backends of the device path.

    Raises
    ------
    ConfigError
        If the backend is one of the CPU's.
    """
    if backend == "auto":
        return "triton" if device.type == "cuda" else "twin"
    if backend not in DEVICE_BACKENDS:
        raise ConfigError(
            f"backend must be auto, triton or twin for keys on {device.type}, got {backend!r}"
        )
    return backend


def device_ops(backend: str, device: torch.device) -> ModuleType:
    """Return the module of a step's ops on a device.

    Raises
    ------
    BackendUnavailable
        If Triton is not there, or the device is a CPU and Triton does not interpret its kernels.
    """
    if backend == "twin":
        return import_module("icecache.ops.device.twin")
    if find_spec("triton") is None:
        raise BackendUnavailable(
            'backend="triton" needs Triton, which comes with torch for CUDA: pip install triton'
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendUnavailable(
            'backend="triton" needs a CUDA device; on a CPU take backend="twin", or for tests set '
            "TRITON_INTERPRET=1 before Triton is first imported"
        )
    return import_module("icecache.ops.triton")
