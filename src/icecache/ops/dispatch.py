"""Which implementation of the ops runs."""

from types import ModuleType

from icecache.errors import ConfigError
from icecache.ops import batched, reference

__all__ = ["ops_for"]


def ops_for(backend: str) -> ModuleType:
    """Return the ops module of a backend: ``"auto"`` and ``"torch"`` the batched one,
    ``"reference"`` the truth.
    """
    if backend in ("auto", "torch"):
        return batched
    if backend == "reference":
        return reference
    raise ConfigError(f"backend must be one of auto, torch, reference, got {backend!r}")
