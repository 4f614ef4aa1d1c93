"""vLLM's CPU attention backend, with full-attention layers on `IceCacheLayer`."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from icecache.errors import UnsupportedModel
from icecache_vllm.blocks import IceSpec
from icecache_vllm.settings import Settings
from icecache_vllm.store import RequestStore

__all__ = ["IceBackend", "IceBuilder", "IceImpl", "IceMetadata"]


class Row(NamedTuple):
    """One request's tokens in a packed batch.

    Attributes
    ----------
    block : int, granted to the request
    start, stop : int, where its new tokens are
    num_past : int, tokens before them
    """

    block: int
    start: int
    stop: int
    num_past: int


@dataclass
class IceMetadata:
    """What the managed layers of a group need for one batch."""

    store: RequestStore
    rows: list[Row]


class IceBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Lists the requests of a batch."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> IceMetadata | CPUAttentionMetadata:
        """Return the rows of a group that IceCache manages, vLLM's own metadata of another."""
        common = common_attn_metadata
        if not isinstance(self.kv_cache_spec, IceSpec):
            return super().build(common_prefix_len, common, fast_build)
        starts = common.query_start_loc_cpu.tolist()
        blocks = common.block_table_tensor[:, 0].tolist()
        lens = common.seq_lens.tolist()
        rows = [
            Row(block, start, stop, length - (stop - start))
            for block, start, stop, length in zip(blocks, starts, starts[1:], lens)
            if stop > start
        ]
        return IceMetadata(get_kv_transfer_group().store, rows)


class IceImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """Attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.alibi_slopes is not None or self.kv_sharing_target_layer_name is not None:
            raise UnsupportedModel(
                "icecache-vllm: layers with ALiBi or with another layer's keys and values are not "
                "supported; start this model without IceCacheConnector"
            )

    def do_kv_cache_update(self, *args: Any, **kwargs: Any) -> None:
        """Write to the blocks of layers that stay with vLLM; ours are written in `forward`."""
        if self.sliding_window != -1:
            super().do_kv_cache_update(*args, **kwargs)

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: IceMetadata | CPUAttentionMetadata | None,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Take in each request's new tokens and attend their queries; write to output."""
        if not isinstance(attn_metadata, IceMetadata):
            stock = (layer, query, key, value, kv_cache, attn_metadata, output)
            out: Tensor = super().forward(*stock, *args, **kwargs)
            return out
        how: dict[str, Any] = {
            "scaling": self.scale,
            "softcap": self.logits_soft_cap or None,
            "sink_logits": None if self.sinks is None else self.sinks.float(),
        }
        for block, start, stop, num_past in attn_metadata.rows:
            kept = attn_metadata.store.layer(block, layer.layer_name, kv_cache[block], num_past)
            # [tokens, heads, head_dim] to [1, heads, tokens, head_dim]
            q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (query, key, value))
            if stop - start == 1:
                attended = kept.step(q, k, v, **how)
            else:
                kept.append(k, v)
                attended = kept.attend(q, **how)
            output[start:stop] = attended[0].transpose(0, 1)
        return output


class IceBackend(CPUAttentionBackend):  # type: ignore[misc]
    """The backend; layers with a sliding window, and encoders, stay with vLLM's own."""

    settings: ClassVar[Settings]

    @classmethod
    def configured(cls, settings: Settings) -> type["IceBackend"]:
        """Return the backend of an engine; vLLM asks classes for specs, not objects."""
        return type(cls.__name__, (cls,), {"settings": settings, "__module__": cls.__module__})

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Return the spec of a managed layer, or the spec as it is."""
        if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
            return spec
        if spec.non_causal or spec.head_size_v != spec.head_size:
            raise UnsupportedModel(
                "icecache-vllm: layers that are not causal, or whose values are wider than their "
                "keys, are not supported; start this model without IceCacheConnector"
            )
        return IceSpec.in_place_of(spec, cls.settings.cache)

    @staticmethod
    def get_impl_cls() -> type[IceImpl]:
        """Return the class of a layer's attention."""
        return IceImpl

    @staticmethod
    def get_builder_cls() -> type[IceBuilder]:
        """Return the class that prepares a batch."""
        return IceBuilder
