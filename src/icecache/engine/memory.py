"""Host memory of an engine: asked for when a request comes, before any of it is taken."""

from icecache.errors import HostMemoryExceeded
from icecache.store.memory import available_host_bytes

__all__ = ["Ledger"]

_SHARE_OF_FREE = 0.9


class Ledger:
    """Who may take how much.

    Parameters
    ----------
    limit : int, optional
        Bytes for all; by default a share of what is free now.
    """

    def __init__(self, limit: int | None) -> None:
        if limit is None:
            free = available_host_bytes()
            limit = 1 << 62 if free is None else int(_SHARE_OF_FREE * free)
        self.limit = limit
        self.reserved = 0

    @property
    def free(self) -> int:
        """Bytes that nobody has set aside."""
        return max(0, self.limit - self.reserved)

    def check(self, needed: int) -> None:
        """Raise `HostMemoryExceeded` unless so many bytes can be set aside."""
        if needed > self.free:
            raise HostMemoryExceeded(needed, self.free)

    def reserve(self, needed: int) -> None:
        """Set bytes aside; `HostMemoryExceeded` if they are not there."""
        self.check(needed)
        self.reserved += needed

    def release(self, num_bytes: int) -> None:
        """Give bytes back."""
        self.reserved -= num_bytes
