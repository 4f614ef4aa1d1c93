"""Every exception that IceCache raises on purpose."""

from typing import ClassVar

__all__ = [
    "BackendUnavailable",
    "ConfigError",
    "DeviceMemoryExceeded",
    "HostMemoryExceeded",
    "IceCacheError",
    "InputError",
    "IntegrityError",
    "MemoryExceeded",
    "PoolExhausted",
    "QueueFull",
    "SnapshotMismatch",
    "UnsupportedModel",
]


class IceCacheError(Exception):
    """Base of all IceCache exceptions."""


class ConfigError(IceCacheError, ValueError):
    """A setting is unknown or breaks its rule; the message names it, the rule and the value."""


class InputError(IceCacheError, ValueError):
    """A tensor or argument of a call breaks its rule; the state is as it was before the call."""


class UnsupportedModel(IceCacheError, ValueError):
    """The model cannot run with IceCache; the message says why and what to do."""


class BackendUnavailable(IceCacheError, ImportError):
    """An optional package is missing; the message holds the command that installs it."""


class IntegrityError(IceCacheError, RuntimeError):
    """An internal invariant is broken: a defect of IceCache, please report it."""


class SnapshotMismatch(IceCacheError, ValueError):
    """A snapshot is damaged, or of another model, other settings or another format."""


class PoolExhausted(IceCacheError, RuntimeError):
    """A page pool of fixed size has too few free pages.

    Parameters
    ----------
    needed, free, total : int
        Pages asked for, free and in the pool.
    """

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(
            f"page pool exhausted: {needed} pages needed, {free} of {total} free; "
            "raise max_host_memory or shorten the context"
        )
        self.needed, self.free, self.total = needed, free, total


class MemoryExceeded(IceCacheError, MemoryError):
    """A call would take more memory than there is; nothing was taken.

    Parameters
    ----------
    needed, free : int
        Bytes asked for and bytes that may still be taken.
    """

    _what: ClassVar[str]
    _advice: ClassVar[str]

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(
            f"{self._what}: {needed:,} bytes needed, {free:,} bytes free; {self._advice}"
        )
        self.needed, self.free = needed, free


class HostMemoryExceeded(MemoryExceeded):
    """A call would take more host memory than there is; nothing was taken."""

    _what = "host memory"
    _advice = "shorten the context, close other caches or raise max_host_memory"


class DeviceMemoryExceeded(MemoryExceeded):
    """A call would take more of a device's memory than there is; nothing was taken."""

    _what = "device memory"
    _advice = 'shorten the context, lower device_slots, use larger leaves, or offload="host"'


class QueueFull(IceCacheError, RuntimeError):
    """Too many requests wait already; nothing was taken.

    Parameters
    ----------
    waiting : int
        Requests that wait.
    """

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests wait already; try again later")
        self.waiting = waiting
