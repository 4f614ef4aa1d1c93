"""Host memory set aside by name, before those who will take it run."""

from collections.abc import Callable

from icecache.errors import ConfigError, InputError
from icecache.store.memory import available_host_bytes

__all__ = ["Reservations"]

_SHARE_OF_FREE = 0.5


class Reservations:
    """Host bytes that requests may come to hold.

    Parameters
    ----------
    limit : int, optional
        Bytes for all requests together; by default a share of half of what is free now.
    bytes_of : callable
        The bytes that a request of so many tokens holds at its end.
    longest : int
        Tokens of the longest request that may come.
    sharers : int, default 1
        Processes that take the default limit together.

    Raises
    ------
    ConfigError
        If the limit is no integer, or the longest request does not fit.
    """

    def __init__(
        self, limit: int | None, bytes_of: Callable[[int], int], longest: int, sharers: int = 1
    ) -> None:
        if limit is None:
            free = available_host_bytes()
            limit = 1 << 62 if free is None else int(_SHARE_OF_FREE * free / sharers)
        needed = bytes_of(longest)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < needed:
            raise ConfigError(
                f"max_host_memory must be an integer of at least {needed:,}, the bytes that one "
                f"request of {longest} tokens takes, got {limit!r}; raise it or shorten requests"
            )
        self.limit, self._bytes_of = limit, bytes_of
        self._needed: dict[str, int] = {}
        self._held: dict[str, int] = {}

    @property
    def reserved(self) -> int:
        """Bytes that running requests have set aside."""
        return sum(self._held.values())

    @property
    def num_known(self) -> int:
        """Requests that were announced and not forgotten."""
        return len(self._needed)

    def expect(self, request_id: str, num_tokens: int) -> None:
        """Take note of a request before it asks whether it fits."""
        self._needed[request_id] = self._bytes_of(num_tokens)

    def fits(self, request_id: str) -> bool:
        """Whether a request may run beside those that do; `InputError` if it is unknown."""
        if request_id not in self._needed:
            raise InputError(f"request {request_id} must be announced before it runs")
        others = self.reserved - self._held.get(request_id, 0)
        return others + self._needed[request_id] <= self.limit

    def take(self, request_id: str) -> None:
        """Set an announced request's bytes aside; a second call changes nothing."""
        self._held[request_id] = self._needed[request_id]

    def give_back(self, request_id: str) -> None:
        """Let go of what a request has set aside, if it has; it may take it again."""
        self._held.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended, whether it ran or not."""
        self._needed.pop(request_id, None)
        self.give_back(request_id)
