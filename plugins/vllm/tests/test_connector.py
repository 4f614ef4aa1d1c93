"""The connector's two sides without an engine: what waits, what is freed, what is reported."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import fake_engine
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from icecache import IceCacheConfig
from icecache.cache.estimate import estimate_bytes
from icecache.cache.granting import Ended, Report, Row, Work
from icecache.errors import ConfigError, UnsupportedModel
from icecache.store import reservations
from icecache_vllm import connector as connectors
from icecache_vllm.blocks import IceSpec
from icecache_vllm.connector import IceCacheConnector, Lifecycle
from icecache_vllm.metrics import IceMetrics, IceStats

SETTINGS = {"budget": 64, "sink": 4, "window": 8}
SHAPE: dict[str, Any] = {"num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
SPEC = IceSpec.in_place_of(
    FullAttentionSpec(block_size=32, **SHAPE), IceCacheConfig.from_kwargs(**SETTINGS)
)
SLIDING = SlidingWindowSpec(block_size=32, sliding_window=64, **SHAPE)


def made(side: str, specs: tuple[Any, ...] = (SPEC,), engine: Any = None) -> IceCacheConnector:
    """Return one side of the connector of an engine with two layers of each spec."""
    groups = [
        SimpleNamespace(layer_names=[f"{index}.a", f"{index}.b"], kv_cache_spec=spec)
        for index, spec in enumerate(specs)
    ]
    engine = engine or fake_engine(max_host_memory=1 << 40, **SETTINGS)
    role = getattr(base.KVConnectorRole, side)
    return IceCacheConnector(engine, role, SimpleNamespace(kv_cache_groups=groups))


def bytes_of(tokens: int) -> int:
    return 2 * estimate_bytes(IceCacheConfig.from_kwargs(**SETTINGS), 2, tokens, 16, 4)


@pytest.mark.parametrize(
    ("prompt", "most", "goes_on", "tokens"),
    [(300, 50, False, 350), (900, 500, False, 1000), (300, 50, True, 1000), (20, 10, False, 0)],
)
def test_what_a_request_may_grow_to_is_set_aside(
    prompt: int, most: int, goes_on: bool, tokens: int
) -> None:
    side = made("SCHEDULER")
    request = SimpleNamespace(request_id="a", num_prompt_tokens=prompt, max_tokens=most)
    request.resumable = goes_on
    side.on_new_request(request)
    side.reservations.take("a")
    assert side.reservations.reserved == bytes_of(tokens)
    assert side.request_finished_all_groups(request, None) == (False, None)
    assert (side.reservations.reserved, side.reservations.num_known) == (0, 0)


def test_the_ranks_of_a_machine_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "available_host_bytes", lambda: 12 << 30)
    engine = fake_engine(**SETTINGS)
    engine.parallel_config.local_world_size = 3
    engine.parallel_config.data_parallel_size_local = 2
    assert made("SCHEDULER", engine=engine).reservations.limit == 1 << 30


def test_a_limit_that_one_long_request_would_pass_is_refused() -> None:
    engine = fake_engine(max_host_memory=bytes_of(1000) - 1, **SETTINGS)
    with pytest.raises(ConfigError, match="one request of 1000 tokens"):
        made("SCHEDULER", engine=engine)
    engine.kv_transfer_config.kv_connector_extra_config["max_host_memory"] += 1
    made("SCHEDULER", engine=engine)


def test_layers_that_cannot_be_managed_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no full-attention layer"):
        made("SCHEDULER", (SLIDING,))
    engine = fake_engine(max_host_memory=1 << 40, **SETTINGS)
    engine.cache_config.enable_prefix_caching = True
    made("SCHEDULER", (SPEC, SPEC), engine)
    with pytest.raises(ConfigError, match="--no-enable-prefix-caching"):
        made("SCHEDULER", (SLIDING, SPEC), engine)


def test_the_workers_hear_who_ended_and_who_began() -> None:
    side = made("SCHEDULER", (SLIDING, SPEC))
    blocks = SimpleNamespace(get_block_ids=lambda: ([1, 2, 3], [7]))
    side.update_state_after_alloc(SimpleNamespace(request_id="b"), blocks, 0)
    step = SimpleNamespace(finished_req_ids={"c"}, preempted_req_ids={"a"})
    assert side.build_connector_meta(step) == Lifecycle(["a", "c"], {"b": [7]}, reports=True)
    step = SimpleNamespace(finished_req_ids=set(), preempted_req_ids=None)
    assert side.build_connector_meta(step) == Lifecycle([], {}, reports=False)
    side._last_report -= 2
    assert side.build_connector_meta(step) == Lifecycle([], {}, reports=True)
    assert side.build_connector_meta(step) == Lifecycle([], {}, reports=False)


def attend(side: IceCacheConnector, block: int, num_past: int, num_new: int) -> None:
    memory = torch.zeros(2, SPEC.block_size, 32)
    packed = tuple(torch.randn(num_new, heads, 16) for heads in (4, 2, 2))
    side.layers.attend(Row(block, 0, num_new, num_past), "0.a", memory, packed)


def test_a_worker_frees_what_ends_and_reports_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connectors, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(connectors.logger, "propagate", True)
    side = made("WORKER")
    side.bind_connector_metadata(Lifecycle([], {"a": [5], "b": [6]}, reports=True))
    for block in (5, 6):
        attend(side, block, 0, 300)
    attend(side, 5, 300, 1)
    held = side.layers.host_bytes
    stats = side.get_kv_connector_stats()
    expected = {"sparse_steps": 1, "dense_steps": 2, "requests": [], "host_bytes": {"0": held}}
    assert stats is not None and stats.data == expected and held > 0
    # block 5 changes hands
    side.bind_connector_metadata(Lifecycle(["a"], {"c": [5]}, reports=False))
    assert side.get_kv_connector_stats() is None
    assert 0 < side.layers.host_bytes < held
    side.bind_connector_metadata(Lifecycle(["b", "never began"], {}, reports=True))
    with caplog.at_level("INFO", connectors.logger.name):
        stats = side.get_kv_connector_stats()
    expected = {"sparse_steps": 0, "dense_steps": 0, "requests": [1, 0], "host_bytes": {"0": 0}}
    assert stats is not None and stats.data == expected
    assert "request a ended with 301 tokens, 1 sparse and 1 dense steps" in caplog.text
    attend(side, 5, 0, 300)
    assert side.layers.host_bytes > 0
    side.shutdown()
    assert (side.layers.host_bytes, side.layers.num_running) == (0, 0)


def test_steps_are_those_of_the_first_rank_and_bytes_of_all() -> None:
    report = Report(Work(4, 2), [Ended("a", 90, Work(3, 1), 70)], 500)
    of = {"sparse_steps": 4, "dense_steps": 2, "requests": [3], "host_bytes": {"0": 500}}
    assert IceStats.of(report, 0).data == of
    of = {"sparse_steps": 0, "dense_steps": 0, "requests": [], "host_bytes": {"2": 500}}
    assert IceStats.of(report, 2).data == of


def test_metrics_are_what_was_observed() -> None:
    kinds = {kind: kind for kind in (Counter, Gauge, Histogram)}
    metrics = IceMetrics(fake_engine(), kinds, ["engine"], {0: ["0"], 1: ["1"]})
    first = {"sparse_steps": 5, "dense_steps": 2, "requests": [3, 0], "host_bytes": {"0": 7}}
    for data in (first, {**first, "requests": [9], "host_bytes": {"0": 4, "1": 6}}):
        metrics.observe(data, 1)
    found = {
        name: REGISTRY.get_sample_value(f"icecache:{name}", {"engine": "1"})
        for name in ("sparse_steps_total", "dense_steps_total", "host_bytes")
    }
    assert found == {"sparse_steps_total": 10, "dense_steps_total": 4, "host_bytes": 10}
    for name, value in (("count", 3), ("sum", 12)):
        name = f"icecache:request_sparse_steps_{name}"
        assert REGISTRY.get_sample_value(name, {"engine": "1"}) == value
        assert REGISTRY.get_sample_value(name, {"engine": "0"}) == 0


def test_reports_add_up_over_ranks_and_time() -> None:
    first = {"sparse_steps": 2, "dense_steps": 1, "requests": [2], "host_bytes": {"0": 5}}
    other = {"sparse_steps": 0, "dense_steps": 0, "requests": [], "host_bytes": {"1": 6}}
    later = {"sparse_steps": 3, "dense_steps": 0, "requests": [], "host_bytes": {"0": 1, "1": 2}}
    total = IceStats(data=first).aggregate(IceStats(data=other))
    assert total.reduce()["icecache_host_bytes"] == 11
    total = total.aggregate(IceStats(data=later))
    assert total.reduce() == {
        "icecache_sparse_steps": 5,
        "icecache_dense_steps": 1,
        "icecache_requests_ended": 1,
        "icecache_host_bytes": 3,
    }
    assert IceStats().is_empty() and not total.is_empty()
