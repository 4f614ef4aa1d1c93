"""Host memory is asked about before it is taken."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from icecache import IceCacheLayer
from icecache.errors import DeviceMemoryExceeded, HostMemoryExceeded, MemoryExceeded
from icecache.store import memory
from icecache.store.memory import (
    available_host_bytes,
    check_host_limit,
    check_host_memory,
)
from tests.helpers import make_query, make_tokens, small_layer


def _machine_with(monkeypatch: pytest.MonkeyPatch, num_bytes: int | None) -> None:
    monkeypatch.setattr(memory, "available_host_bytes", lambda: num_bytes)


def test_the_machine_says_a_plausible_number() -> None:
    available = available_host_bytes()
    assert available is None or 1 << 20 < available < 1 << 50


def test_meminfo_is_read_in_kibibytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9 kB\nMemFree: 1 kB\nMemAvailable:    1234 kB\nCached: 5 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    assert available_host_bytes() == 1234 * 1024


def test_exactly_what_is_free_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine_with(monkeypatch, 1000)
    check_host_memory(1000)
    with pytest.raises(HostMemoryExceeded) as caught:
        check_host_memory(1001)
    assert (caught.value.needed, caught.value.free) == (1001, 1000)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (HostMemoryExceeded, "host memory: .* or raise max_host_memory"),
        (DeviceMemoryExceeded, 'device memory: .* or offload="host"'),
    ],
)
def test_errors_say_which_memory_and_what_to_do(kind: type[MemoryExceeded], said: str) -> None:
    with pytest.raises(MemoryError, match=said) as caught:
        raise kind(2000, 1000)
    assert isinstance(caught.value, MemoryExceeded)
    assert "2,000 bytes needed, 1,000 bytes free" in str(caught.value)


_FRAGMENTED = """
import re, sys
from icecache.store.memory import give_back
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
# below the size that is mapped by itself, with one that stays behind each one that goes
blocks = [bytearray(100_000) for _ in range(2000)]
del blocks[::2]
before = resident()
given = give_back()
print(given, before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back")
def test_freed_memory_between_blocks_in_use_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _FRAGMENTED], capture_output=True, text=True)
    given, num_bytes = done.stdout.split()
    assert given == "True"
    assert int(num_bytes) > 80_000_000


def test_exactly_the_limit_may_be_taken() -> None:
    check_host_limit(600, taken=400, limit=1000)
    check_host_limit(1 << 60, taken=400, limit=None)
    with pytest.raises(HostMemoryExceeded) as caught:
        check_host_limit(601, taken=400, limit=1000)
    assert (caught.value.needed, caught.value.free) == (601, 600)


def test_a_machine_that_says_nothing_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine_with(monkeypatch, None)
    check_host_memory(1 << 60)


def test_a_limit_that_is_passed_already_leaves_nothing_free() -> None:
    with pytest.raises(HostMemoryExceeded) as caught:
        check_host_limit(1, taken=50, limit=40)
    assert caught.value.free == 0


def test_the_message_names_the_bytes_and_the_mend() -> None:
    error = HostMemoryExceeded(1_234_567, 89_000)
    assert "1,234,567 bytes needed" in str(error)
    assert "89,000 bytes free" in str(error)
    assert "max_host_memory" in str(error)
    assert isinstance(error, MemoryError)


def test_a_prompt_that_does_not_fit_leaves_an_empty_layer_empty() -> None:
    layer = small_layer(max_host_memory=10_000)
    with pytest.raises(HostMemoryExceeded) as caught:
        layer.prefill(*make_tokens(0, 1, 500))
    assert caught.value.needed == layer.estimate_bytes(1, 500)
    assert caught.value.free == 10_000
    assert layer.num_tokens == layer.batch_size == 0
    assert layer.stats() == small_layer().stats()


def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was() -> None:
    layer, query = small_layer(max_host_memory=200_000), make_query(2, 1, 4)
    layer.prefill(*make_tokens(0, 1, 100))
    before, stats = layer.attend(query), layer.stats()
    with pytest.raises(HostMemoryExceeded, match="bytes needed"):
        layer.append(*make_tokens(3, 1, 2000))
    assert layer.stats() == stats
    assert layer.attend(query).equal(before)
    layer.check_integrity()


def test_a_machine_without_memory_refuses_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine_with(monkeypatch, 5_000)
    layer = small_layer()
    with pytest.raises(HostMemoryExceeded) as caught:
        layer.prefill(*make_tokens(0, 1, 500))
    assert caught.value.free == 5_000
    assert layer.num_tokens == 0


def _grow(layer: IceCacheLayer, num_tokens: int) -> None:
    for i in range(num_tokens // 8):
        layer.append(*make_tokens(4 + i, 1, 8))


def test_growth_by_few_tokens_stops_at_the_limit() -> None:
    """`max_host_memory` holds for decoding too, not for prompts alone."""
    limit = 300_000
    layer = small_layer(max_host_memory=limit)
    with pytest.raises(HostMemoryExceeded, match="bytes needed"):
        _grow(layer, 1600)
    assert 0 < layer.num_tokens < 1600 and layer.num_tokens % 8 == 0
    # what one call needs is an estimate: it may open a page more than foreseen
    assert layer.stats().host_bytes <= 1.02 * limit
    layer.check_integrity()


def test_what_was_estimated_covers_what_is_held() -> None:
    for selection in ("tree", "exact"):
        layer = small_layer(selection=selection)
        layer.prefill(*make_tokens(5, 2, 3000))
        layer.attend(make_query(6, 2, 4))
        stats = layer.stats()
        # beside the tokens' own pages and leaves there is the window's buffer, which never grows
        pages_and_index = stats.host_bytes - layer._context.tail.nbytes
        assert pages_and_index <= layer.estimate_bytes(2, 3000)
