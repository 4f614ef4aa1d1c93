"""What the device path accepts, where it keeps pages, and what it refuses."""

from typing import Any

import pytest
import torch

from icecache import IceCacheConfig, IceCacheLayer
from icecache.cache.device import settings as device_settings
from icecache.cache.device.layer import DeviceLayer
from icecache.cache.device.settings import OffloadChoice, most_selected
from icecache.cache.make import make_layer
from icecache.errors import BackendUnavailable, ConfigError, HostMemoryExceeded, InputError
from icecache.ops.dispatch import device_backend
from tests.helpers import make_query, make_tokens, small_layer

SHAPE: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_size": 4, "leaf_size": 2, "leaf_target": 2}, "page_size must be from 8 to 64"),
        ({"page_size": 72}, "page_size must be from 8 to 64 on the device path, got 72"),
        ({"leaf_size": 5}, r"leaf_size must be at most half of page_size \(8\)"),
        ({"selection": "exact"}, "selection must be 'tree' on the device path, got 'exact'"),
        ({"layer_reuse": 2}, "layer_reuse must be 1 on the device path, got 2"),
        ({"device_slots": 3}, "device_slots must be at least the 9 pages .* got 3"),
        ({"device_slots": 3, "unit": "page"}, "must be at least the 8 pages .* got 3"),
        ({"page_dtype": "int8", "offload": "none"}, 'page_dtype must be "auto" with offload'),
    ],
)
def test_settings_that_it_cannot_run(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_layer(backend="twin", **settings)


def test_which_layer_and_which_backend() -> None:
    assert isinstance(make_layer(IceCacheConfig(), **SHAPE), IceCacheLayer)
    assert isinstance(make_layer(IceCacheConfig(backend="twin"), **SHAPE), DeviceLayer)
    assert device_backend("auto", torch.device("cuda")) == "triton"
    with pytest.raises(ConfigError, match="backend must be auto, triton or twin for keys on cuda"):
        device_backend("native", torch.device("cuda"))
    with pytest.raises(ConfigError, match='page_dtype must be "auto" on a CPU'):
        make_layer(IceCacheConfig(page_dtype="int8"), **SHAPE)
    with pytest.raises(ConfigError, match='page_dtype must be "auto" on a CPU'):
        IceCacheLayer(IceCacheConfig(page_dtype="int8"), **SHAPE)


def test_kernels_on_a_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET=1 before"):
        make_layer(IceCacheConfig(backend="triton"), **SHAPE)


def test_all_layers_keep_their_pages_in_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is free holds ten layers of 50 bytes, and not ten of 60."""
    free = [1000]
    monkeypatch.setattr(device_settings, "free_device_bytes", lambda device: free[0])
    cuda = torch.device("cuda")
    choice = OffloadChoice(num_layers=10)
    assert not choice.would_fit(51, cuda)
    assert choice.fits(50, cuda), "what was only asked about was not refused"
    free[0] = 500
    assert choice.fits(51, cuda)
    assert not choice.fits(60, cuda)
    free[0] = 10000
    assert not choice.fits(10, cuda), "refused once, refused for all"
    other = torch.device("cuda", 1)
    assert choice.fits(60, other), "of another device nothing was refused"
    choice.forget(cuda)
    assert choice.fits(60, cuda)
    free[0] = 1000
    choice.forget(cuda)
    assert not choice.fits(60, cuda), "what was let go is free already, and no more than that"
    assert not OffloadChoice(1).fits(1, torch.device("cpu")) or free[0]


@pytest.mark.parametrize("offload", ["host", "none"])
def test_stats_say_where_pages_live(offload: str) -> None:
    layer = small_layer(backend="twin", offload=offload)
    layer.prefill(*make_tokens(0, 1, 60))
    layer.attend(make_query(1, 1, 4))
    stats = layer.stats()
    assert stats.offload == offload
    assert (stats.host_bytes > 0) == (offload == "host")
    assert stats.kv_bytes + stats.index_bytes == stats.device_bytes + stats.host_bytes
    assert stats.tokens_attended <= layer.config.budget


def test_int8_pages_are_near_the_models_own() -> None:
    """One unit in 127 of a token's largest number, and half of the bytes or less."""
    layers = [small_layer(backend="twin", offload="host", page_dtype=x) for x in ("auto", "int8")]
    prompt, query = make_tokens(0, 2, 80), make_query(1, 2, 4)
    for layer in layers:
        layer.prefill(*prompt)
    exact, rounded = (layer.attend(query) for layer in layers)
    assert 0 < float((exact - rounded).norm() / exact.norm()) < 0.02
    for step in range(10):
        token = make_tokens(2 + step, 2, 1)
        for layer in layers:
            layer.append(*token)
            layer.attend(make_query(30 + step, 2, 4))
            layer.check_integrity()
    bytes_of = [layer.stats().host_bytes for layer in layers]
    assert bytes_of[1] < 0.55 * bytes_of[0]


def test_a_step_never_selects_more_than_it_can_hold() -> None:
    """Neither more than three pages for each that the chosen tokens would fill, nor fewer than a
    row of no more than those may lie in."""
    assert most_selected(IceCacheConfig(unit="page")) == 2 * 13 + 2 + 208 // 33
    assert most_selected(IceCacheConfig()) == 3 * 13
    assert most_selected(IceCacheConfig(budget=64)) == 2 * 1 + 2


@pytest.mark.parametrize("unit", ["leaf", "page"])
def test_the_unit_is_what_is_attended_of_a_page(unit: str) -> None:
    layer = small_layer(backend="twin", unit=unit)
    layer.prefill(*make_tokens(0, 2, 200))
    parts = 0
    for step in range(5):
        layer.attend(make_query(1 + step, 2, 4))
        pages, tokens = layer._counters._last.selected
        used = layer._held.index.tree.page_used.gather(1, pages.clamp(min=0).long())
        parts += int(((pages >= 0) & (tokens != used)).sum())
        assert layer.stats().tokens_attended <= layer.config.budget
    assert (parts > 0) == (unit == "leaf")


def test_a_limit_of_host_memory_holds() -> None:
    layer = small_layer(backend="twin", max_host_memory=1000)
    with pytest.raises(HostMemoryExceeded):
        layer.prefill(*make_tokens(0, 2, 200))
    assert layer.num_tokens == 0


def test_host_memory_is_not_asked_for_where_pages_live_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A limit that no page would fit in, and a device that has room for all or for none."""
    free = [1 << 40]
    monkeypatch.setattr(device_settings, "free_device_bytes", lambda device: free[0])
    layer = small_layer(backend="twin", offload="auto", max_host_memory=1000)
    assert layer.estimate_bytes(2, 200) == 0
    layer.prefill(*make_tokens(0, 2, 200))
    assert layer.attend(make_query(1, 2, 4)).isfinite().all()
    assert layer.stats().offload == "none" and layer.stats().host_bytes == 0
    free[0] = 0
    layer = small_layer(backend="twin", offload="auto", max_host_memory=1000)
    assert layer.estimate_bytes(2, 200) > 1000
    free[0] = 1 << 40
    assert layer.estimate_bytes(2, 200) == 0, "what was only asked about was not refused"
    free[0] = 0
    with pytest.raises(HostMemoryExceeded):
        layer.prefill(*make_tokens(0, 2, 200))


def test_steps_are_counted_past_31_bits() -> None:
    """What gives way is the page that was used longest ago, also where the count gets large."""
    layers = [small_layer(backend="twin", offload="host", device_slots=9) for _ in range(3)]
    prompt = make_tokens(0, 1, 200)
    for layer in layers:
        layer.prefill(*prompt)
        layer.settle()
    most = most_selected(layers[0].config)
    for layer, start in zip(layers, (0, (1 << 31) // (2 * most) - 6, (1 << 31) - 6), strict=True):
        layer._held.index.step_number.fill_(start)
    for number in range(12):
        token, query = make_tokens(10 * number, 1, 1), make_query(number, 1, 4)
        outs = [layer.step(query, *token) for layer in layers]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    tables = [layer._held.index.pages.page_in_slot for layer in layers]
    assert torch.equal(tables[0], tables[1]) and torch.equal(tables[0], tables[2])
    assert 0 < layers[0].stats().pages_fetched < layers[0].stats().pages_selected


def test_positions_are_refused() -> None:
    layer = small_layer(backend="twin")
    layer.prefill(*make_tokens(0, 1, 60))
    with pytest.raises(InputError, match="positions must be None on the device path"):
        layer.attend(make_query(1, 1, 4), positions=torch.zeros(2, 3, dtype=torch.int64))


def test_a_fork_goes_its_own_way() -> None:
    layer = small_layer(backend="twin")
    layer.prefill(*make_tokens(0, 1, 60))
    layer.attend(make_query(1, 1, 4))
    other = layer.fork()
    for step in range(6):
        layer.append(*make_tokens(2 + step, 1, 1))
        layer.attend(make_query(20 + step, 1, 4))
    assert (layer.num_tokens, other.num_tokens) == (66, 60)
    query = make_query(40, 1, 4)
    alone = small_layer(backend="twin")
    alone.prefill(*make_tokens(0, 1, 60))
    alone.attend(make_query(1, 1, 4))
    assert torch.equal(other.attend(query), alone.attend(query))
    for one in (layer, other):
        one.check_integrity()
