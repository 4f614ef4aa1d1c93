"""vLLM's CPU attention backend, with full-attention layers on `IceCacheLayer`."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from icecache.cache.granting import GrantedLayers, Row
from icecache.errors import UnsupportedModel
from icecache_vllm.blocks import IceSpec
from icecache_vllm.settings import Settings

__all__ = ["IceBackend", "IceBuilder", "IceImpl", "IceMetadata"]


@dataclass
class IceMetadata:
    """What the managed layers of a group need for one batch."""

    layers: GrantedLayers
    rows: list[Row]


class IceBuilder(cpu_attn.CPUAttentionMetadataBuilder):
    """Lists the requests of a batch."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> IceMetadata | cpu_attn.CPUAttentionMetadata:
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
        return IceMetadata(get_kv_transfer_group().layers, rows)


class IceImpl(cpu_attn.CPUAttentionBackendImpl):
    """Attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        is_ours = self.sliding_window == -1 and self.attn_type == AttentionType.DECODER
        _refuse("ALiBi", is_ours and self.alibi_slopes is not None)
        _refuse("another's keys", is_ours and self.kv_sharing_target_layer_name is not None)

    def do_kv_cache_update(self, *args: Any, **kwargs: Any) -> None:
        """Write to the blocks of layers that stay with vLLM; ours are written in `forward`."""
        if self.sliding_window != -1:
            super().do_kv_cache_update(*args, **kwargs)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, *more: Any, **named: Any
    ) -> Tensor:
        """Take in each request's new tokens and attend their queries; the arguments are vLLM's."""
        (kv_cache, metadata), output = more, named["output"]
        if not isinstance(metadata, IceMetadata):
            return super().forward(layer, query, key, value, *more, **named)
        how: dict[str, Any] = {
            "scaling": self.scale,
            "softcap": self.logits_soft_cap or None,
            "sink_logits": None if self.sinks is None else self.sinks.float(),
        }
        packed = (query, key, value)
        for row in metadata.rows:
            place = row, layer.layer_name, kv_cache[row.block]
            output[row.start : row.stop] = metadata.layers.attend(*place, packed, **how)
        return output


class IceBackend(cpu_attn.CPUAttentionBackend):
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
        _refuse("no causal mask", spec.non_causal)
        _refuse("values of another width than its keys", spec.head_size_v != spec.head_size)
        return IceSpec.in_place_of(spec, cls.settings.cache)

    @staticmethod
    def get_impl_cls() -> type[IceImpl]:
        """Return the class of a layer's attention."""
        return IceImpl

    @staticmethod
    def get_builder_cls() -> type[IceBuilder]:
        """Return the class that prepares a batch."""
        return IceBuilder


def _refuse(what: str, is_there: bool) -> None:
    if is_there:
        raise UnsupportedModel(
            f"icecache-vllm: a layer with {what}; start this model without IceCacheConnector"
        )
