"""How much host memory may still be taken, and what is given back."""

import ctypes
import os
import sys
from pathlib import Path

from icecache.errors import HostMemoryExceeded

__all__ = ["available_host_bytes", "check_host_limit", "check_host_memory", "give_back"]

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def available_host_bytes() -> int | None:
    """Return the bytes that can still be taken, None where the system does not say.

    The least of what the operating system has free and what the control group (a container's
    memory limit) leaves.
    """
    known = [free for free in (_system_bytes(), _group_bytes()) if free is not None]
    return min(known, default=None)


def _system_bytes() -> int | None:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _group_bytes() -> int | None:
    limit, used = _GROUP / "memory.max", _GROUP / "memory.current"
    if not (limit.exists() and used.exists()):
        return None
    text = limit.read_text().strip()
    return None if text == "max" else max(0, int(text) - int(used.read_text()))


def check_host_limit(needed: int, taken: int, limit: int | None) -> None:
    """Raise `HostMemoryExceeded` if `needed` more bytes beside `taken` would pass the limit."""
    if limit is not None and taken + needed > limit:
        raise HostMemoryExceeded(needed, max(0, limit - taken))


def check_host_memory(needed: int) -> None:
    """Raise `HostMemoryExceeded` if the machine has fewer than `needed` bytes free."""
    available = available_host_bytes()
    if available is not None and needed > available:
        raise HostMemoryExceeded(needed, available)


def give_back() -> bool:
    """Return to the operating system what the C library keeps of freed memory.

    False where it cannot be asked to: glibc keeps gigabytes between blocks that are still in use,
    others do not.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return False
    trim(0)
    return True
