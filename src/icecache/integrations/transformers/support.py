"""Which layers of a model IceCache can manage, and why not the others."""

from dataclasses import dataclass
from typing import Any, Literal

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from icecache.errors import UnsupportedModel

__all__ = ["LayerSupport", "SupportReport", "decoder_config", "supports"]

Status = Literal["managed", "model", "unsupported"]

_KINDS: dict[str, tuple[Status, str]] = {
    "full_attention": ("managed", "full attention over a cache of its own"),
    "sliding_attention": ("model", "sliding window: its cache is small and stays with the model"),
    "chunked_attention": (
        "model",
        "chunked attention: its cache is small and stays with the model",
    ),
    "linear_attention": ("model", "recurrent state, no keys"),
    "conv": ("model", "recurrent state, no keys"),
    "dummy": ("model", "no cache of its own: no attention, or another layer's keys"),
}


@dataclass(frozen=True, slots=True)
class LayerSupport:
    """What IceCache does with one layer.

    Parameters
    ----------
    index : int
        Of the layer in the decoder.
    kind : str
        transformers' layer type, such as ``"full_attention"``.
    status : {"managed", "model", "unsupported"}
        ``"model"``: the layer keeps transformers' own cache, exactly.
    reason : str
        Why.
    """

    index: int
    kind: str
    status: Status
    reason: str


@dataclass(frozen=True, slots=True)
class SupportReport:
    """Per-layer report on a model; ``print(report)`` shows it.

    Parameters
    ----------
    model_type : str
        transformers' name of the architecture.
    layers : tuple of LayerSupport
        One a decoder layer.
    """

    model_type: str
    layers: tuple[LayerSupport, ...]

    @property
    def managed(self) -> tuple[int, ...]:
        """Indices of the layers that IceCache manages."""
        return self._indices("managed")

    @property
    def unsupported(self) -> tuple[int, ...]:
        """Indices of the layers that IceCache cannot run; one is enough to refuse the model."""
        return self._indices("unsupported")

    @property
    def is_supported(self) -> bool:
        """Whether the model runs with IceCache."""
        return not self.unsupported

    def require(self) -> None:
        """Raise `UnsupportedModel` unless the model runs with IceCache."""
        if not self.is_supported:
            first = self.layers[self.unsupported[0]]
            raise UnsupportedModel(
                f"{self.model_type} cannot run with IceCache (layer {first.index} of "
                f"{len(self.layers)}): {first.reason}; run it without IceCache"
            )

    def __str__(self) -> str:
        lines = [f"{self.model_type}: {len(self.managed)} of {len(self.layers)} layers managed"]
        lines += [f"{x.index:4}  {x.status:<12} {x.kind}: {x.reason}" for x in self.layers]
        return "\n".join(lines)

    def _indices(self, status: Status) -> tuple[int, ...]:
        return tuple(layer.index for layer in self.layers if layer.status == status)


def supports(model_or_config: PreTrainedModel | PreTrainedConfig) -> SupportReport:
    """Return what IceCache does with each layer of a model.

    Parameters
    ----------
    model_or_config : PreTrainedModel or PreTrainedConfig
        A model, or its config (nothing is loaded then but the model's source).

    Returns
    -------
    SupportReport
        ``report.is_supported`` tells whether the model runs at all.
    """
    config = getattr(model_or_config, "config", model_or_config)
    obstacle = _obstacle(model_or_config, config)
    decoder = decoder_config(config)
    kinds, _ = get_layer_types_and_kwargs(decoder)
    layers = []
    for index, kind in enumerate(kinds):
        status, reason = _KINDS.get(
            kind, ("unsupported", f"{kind} keeps more than keys and values in its cache")
        )
        if obstacle is not None:
            status, reason = "unsupported", obstacle
        layers.append(LayerSupport(index, kind, status, reason))
    return SupportReport(str(config.model_type), tuple(layers))


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the text decoder, which in composite models lies inside."""
    return config.get_text_config(decoder=True)


def _obstacle(model_or_config: Any, config: PreTrainedConfig) -> str | None:
    """Return why the model as a whole cannot run, None if it can."""
    decoder = decoder_config(config)
    if config.is_encoder_decoder:
        return (
            "encoder-decoder models attend to an encoder, IceCache to a causal decoder's own past"
        )
    if getattr(decoder, "kv_lora_rank", None):
        return "multi-head latent attention (MLA) caches a compressed latent, not keys and values"
    if getattr(decoder, "cross_attention_layers", None) or getattr(
        decoder, "add_cross_attention", False
    ):
        return "cross-attention layers keep keys that are not the decoder's past"
    if not getattr(decoder, "is_causal", True) or getattr(
        decoder, "use_bidirectional_attention", None
    ) in (True, "all"):
        return "the attention is not causal"
    model_class = type(model_or_config)
    if not issubclass(model_class, PreTrainedModel):
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is not None and not model_class._can_set_attn_implementation():
        return (
            f"{model_class.__name__} does not call transformers' attention interface, so its "
            "attention cannot be replaced"
        )
    if model_class is not None and not model_class._supports_default_dynamic_cache():
        return f"{model_class.__name__} makes a cache of its own kind and takes no other"
    return None
