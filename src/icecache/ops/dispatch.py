"""Which implementation of the ops runs."""

import warnings
from types import ModuleType

from icecache.errors import BackendUnavailable, ConfigError
from icecache.ops import batched, native, reference

__all__ = ["ops_for", "resolve_backend"]


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
