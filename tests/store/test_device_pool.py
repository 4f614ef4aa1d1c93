"""Memory of the device path: exact sizes, asked for before it is taken, moved without a loss."""

import mmap
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from icecache.cache.device.transfer import Outbound
from icecache.errors import DeviceMemoryExceeded, HostMemoryExceeded
from icecache.store import device_pool, pinned
from icecache.store.device_pool import DevicePool, PoolShape
from icecache.store.pinned import PinnedBlock

CPU = torch.device("cpu")
SHAPE = PoolShape(
    rows=3, leaves=7, pages=5, slots=4, page_size=8, head_dim=16, dtype=torch.bfloat16,
    page_dtype=torch.bfloat16, offloads=True,
)  # fmt: skip


def _bytes(tensors: tuple[torch.Tensor | None, ...]) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


@pytest.mark.parametrize("offloads", [True, False])
@pytest.mark.parametrize("page_dtype", [torch.bfloat16, torch.int8])
def test_a_shape_says_what_a_pool_takes(offloads: bool, page_dtype: torch.dtype) -> None:
    shape = SHAPE._replace(offloads=offloads, page_dtype=page_dtype)
    pool = DevicePool(shape, CPU)
    pages, slots = pool.pages[:3], pool.pages[3:]
    assert shape.page_bytes == _bytes(pages)
    host = _bytes(pages) if offloads else 0
    assert shape.host_bytes == host
    beside = 24 * shape.rows if offloads else 0
    # the counters of fetched pages, and `full`, are not worth a term
    held = _bytes(tuple(pool.tree)) + _bytes(pages) + _bytes(slots) - host
    assert 0 <= held - shape.device_bytes <= beside + 4 * shape.rows


def test_a_larger_pool_has_the_same_content() -> None:
    pool = DevicePool(SHAPE._replace(page_dtype=torch.int8), CPU)
    for part in (*pool.tree, *pool.pages[:3]):
        part.copy_(torch.randint(0, 100, part.shape))
    old = [part.clone() for part in (*pool.tree, *pool.pages[:3])]
    grown = pool.grown(pool.shape._replace(leaves=11, pages=9))
    for part, before in zip((*grown.tree, *grown.pages[:3]), old, strict=True):
        assert torch.equal(part[tuple(slice(n) for n in before.shape)], before)
    assert int(grown.pages.positions[:, 5:].max()) == -1
    assert int(grown.pages.slot_of_page.max()) == -1


def test_rows_in_another_order() -> None:
    pool = DevicePool(SHAPE, CPU)
    pool.pages.host.copy_(torch.randn(pool.pages.host.shape))
    other = pool.reordered(torch.tensor([2, 0, 2, 1]))
    assert other.shape.rows == 4
    assert torch.equal(other.pages.host, pool.pages.host[[2, 0, 2, 1]])


def test_a_block_is_of_exact_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def mapped(fd: int, size: int, flags: int) -> mmap.mmap:
        asked.append((size, flags))
        return made(fd, size, flags=flags)

    made = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", mapped)
    shape = (3, 5, 7)
    needed = PinnedBlock.bytes_for(shape, torch.float32)
    assert 0 <= needed - 4 * 3 * 5 * 7 < 256
    block = PinnedBlock(2 * needed, CPU)
    assert asked == [(2 * needed, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)]
    first, second = (block.take(shape, torch.float32) for _ in range(2))
    first.fill_(1.0)
    assert float(second.abs().max()) == 0.0
    with pytest.raises(HostMemoryExceeded):
        block.take((1,), torch.int8)


def test_memory_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icecache.store.memory.available_host_bytes", lambda: 1000)
    monkeypatch.setattr(mmap, "mmap", lambda *_, **__: pytest.fail("taken before it was asked for"))
    with pytest.raises(HostMemoryExceeded):
        DevicePool(SHAPE, CPU)
    monkeypatch.setattr(device_pool, "free_device_bytes", lambda device: 1000)
    with pytest.raises(DeviceMemoryExceeded, match="1,000 bytes free"):
        DevicePool(SHAPE, CPU)


def test_memory_is_registered_once_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA's two calls stood in for: their order, and what they are given."""
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(pinned, "register", lambda x: calls.append(("register", x.data_ptr())))
    monkeypatch.setattr(pinned, "unregister", lambda address, _: calls.append(("let go", address)))
    block = PinnedBlock(4096, torch.device("cuda"))
    assert block._release is not None and not block._release.atexit
    address = block.take((16,), torch.float32).data_ptr()
    block.close()
    block.close()
    assert calls == [("register", address), ("let go", address)]
    PinnedBlock(4096, torch.device("cuda"))
    # nothing refers to it any more
    assert [name for name, _ in calls[2:]] == ["register", "let go"]


def test_memory_that_is_dropped_waits_for_copies_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is closed or nothing refers to it any more."""
    calls: list[object] = []
    cuda = SimpleNamespace(
        cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda _: calls.append("let go") or 0
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "check_error", lambda result: None)
    monkeypatch.setattr(torch.cuda, "synchronize", calls.append)
    device = torch.device("cuda", 1)
    PinnedBlock(4096, device).close()
    assert calls == [device, "let go"]
    PinnedBlock(4096, device)
    assert calls == 2 * [device, "let go"]


def test_memory_that_cuda_may_not_pin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = SimpleNamespace(cudaHostRegister=lambda address, size, flags: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    with pytest.raises(HostMemoryExceeded, match=r"4,096 bytes could not be pinned.*ulimit -l"):
        PinnedBlock(4096, torch.device("cuda"))


@pytest.mark.parametrize("offloads", [True, False])
def test_memory_of_a_copy_under_way_is_not_given_away(
    monkeypatch: pytest.MonkeyPatch, offloads: bool
) -> None:
    """Of pages on the device as well, whose layer may be dropped meanwhile."""
    stream, kept = SimpleNamespace(wait_stream=lambda _: None), []

    def tensor(name: str, is_cuda: bool) -> SimpleNamespace:
        def copy(source: object, non_blocking: bool) -> None:
            kept.append("copied")

        return SimpleNamespace(
            is_cuda=is_cuda, copy_=copy, record_stream=lambda by: kept.append((name, by))
        )

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    outbound = Outbound(CPU)
    monkeypatch.setattr(outbound, "_stream", stream)
    outbound.copy(tensor("source", True), tensor("target", not offloads))
    on_device = ["source"] if offloads else ["source", "target"]
    assert kept == ["copied", *((name, stream) for name in on_device)]


def test_what_was_waited_for_is_not_joined_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later recording would otherwise hold a wait for another stream."""
    awaited: list[object] = []
    stream = SimpleNamespace(synchronize=lambda: None, wait_stream=awaited.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    outbound = Outbound(CPU)
    for is_waited_for in (False, True):
        monkeypatch.setattr(outbound, "_stream", stream)
        monkeypatch.setattr(outbound, "_is_under_way", True)
        if is_waited_for:
            outbound.wait()
        outbound.join()
    assert awaited == [stream]
