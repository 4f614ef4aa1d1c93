"""The attention backend of this process, chosen when vLLM asks for it by name."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from icecache_vllm.backend import IceBackend
    from icecache_vllm.settings import Settings, check_engine, is_selected

    config = get_current_vllm_config()
    if not is_selected(config):
        return CPUAttentionBackend
    check_engine(config)
    return IceBackend.configured(Settings.of(config))
