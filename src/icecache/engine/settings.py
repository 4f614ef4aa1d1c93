"""Settings of the engine and of one request."""

from dataclasses import dataclass
from pathlib import Path

from icecache.errors import ConfigError

__all__ = ["EngineSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings of an `Engine`; every value is checked at construction.

    Parameters
    ----------
    max_running : int, default 16
        Requests that are worked on at once; others wait in their order.
    max_waiting : int, default 256
        Requests that may wait; one more is refused.
    prefill_chunk : int, default 512
        Tokens of a prompt that one step takes in beside the running answers. Larger is faster for
        prompts and makes answers stutter while others' prompts are read.
    max_host_memory : int, optional
        Bytes that all requests and stored conversations may take together; by default nine tenths
        of what the machine has free when the engine starts.
    conversations : Path, optional
        A folder that idle conversations are spilled to; without one they are forgotten when their
        memory is needed, and at the end.
    max_disk : int, optional
        Bytes that the folder may take; without a limit by default.
    idle_seconds : float, default 5.0
        A conversation that nobody has used for so long is written to the folder.
    forget_seconds : float, default 600.0
        A conversation that nobody has used for so long leaves the memory.
    threads : int, optional
        Threads that attend in forwards by torch; by default the cores that this process may use.
        Native steps have as many as torch.
    native : bool, optional
        Take the next tokens of answers in by one compiled call, products with the weights included.
        By default wherever the model can, as in `icecache.attach`; True raises where that cannot
        be, False never does it.
    """

    max_running: int = 16
    max_waiting: int = 256
    prefill_chunk: int = 512
    max_host_memory: int | None = None
    conversations: Path | None = None
    max_disk: int | None = None
    idle_seconds: float = 5.0
    forget_seconds: float = 600.0
    threads: int | None = None
    native: bool | None = None

    def __post_init__(self) -> None:
        for name, low in (("max_running", 1), ("max_waiting", 0), ("prefill_chunk", 32)):
            _check(name, getattr(self, name), low)
        for name in ("max_host_memory", "max_disk", "threads"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), 1)
        if not (self.native is None or isinstance(self.native, bool)):
            raise ConfigError(f"native must be True, False or None, got {self.native!r}")
        for name in ("idle_seconds", "forget_seconds"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)!r}")


def _check(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}")
