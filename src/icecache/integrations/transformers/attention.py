"""The attention and mask functions that transformers calls under the name "icecache"."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from icecache.errors import IceCacheError, InputError, UnsupportedModel
from icecache.integrations.transformers.fallback import plain_attention

if TYPE_CHECKING:
    from icecache.integrations.transformers.forward import ForwardPass
    from icecache.integrations.transformers.layer import ManagedLayer

__all__ = ["NAME", "Handoff", "hand_over", "icecache_attention", "icecache_mask", "register"]

# without "sdpa", "flash" or "flex_attention" in it: transformers matches those as substrings
NAME = "icecache"
# the keyword that a compiled step passes through the model to its attention
STEP = "icecache_step"
_ATTRIBUTE = "_icecache_handoff"
_SELECTING = ("indices", "block_indices", "sinks")


class Handoff(NamedTuple):
    """What `IceCache.update` hangs on the keys it returns."""

    layer: "ManagedLayer | None"  # None: a layer left to the model
    values: torch.Tensor  # returned beside the keys
    forward: "ForwardPass"


def register() -> None:
    """Register both functions with transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, icecache_attention)
    AttentionMaskInterface.register(NAME, icecache_mask)


def hand_over(keys: torch.Tensor, handoff: Handoff) -> None:
    """Hang the layer on the tensor that the model passes on to the attention function."""
    setattr(keys, _ATTRIBUTE, handoff)


def icecache_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return None without padding, else the padding mask ``[batch, 1, 1, kv_length]``, O(tokens).

    Only plain causal layers get that; every other pattern (sliding, chunked, two-way) gets sdpa's
    own mask, which the layers that IceCache manages refuse.
    """
    if local_size is None and mask_function is causal_mask_function:
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] == kv_length and bool(attention_mask.all()):
            return None
        # four dimensions, because models that keep the last queries only slice the third
        return attention_mask[:, None, None, :]
    mask: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )
    return mask


def icecache_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend through the cache layer that hangs on `key`, or plainly where none does."""
    step = kwargs.get(STEP)
    if step is not None:
        factor = query.shape[3] ** -0.5 if scaling is None else scaling
        return step(query, key, value, module.layer_idx, factor, softcap, s_aux), None
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    handoff: Handoff | None = getattr(key, _ATTRIBUTE, None)
    try:
        _refuse_unknown(module, kwargs)
        if handoff is None or handoff.layer is None:
            if handoff is None:
                _refuse_foreign_past(module, query, key, causal)
            output = plain_attention(
                module,
                query,
                key,
                value,
                attention_mask,
                scaling=scaling,
                dropout=dropout,
                softcap=softcap,
                sinks=s_aux,
                position_bias=position_bias,
                is_causal=causal,
            )
            return output, None
        _refuse_for_managed(module, dropout, position_bias, causal)
        if value is not handoff.values:
            raise UnsupportedModel(
                f"{type(module).__name__} changes its values between cache and attention, which "
                "IceCache cannot follow; run this model without IceCache"
            )
        new = handoff.forward.new_tokens(attention_mask)
        output = handoff.layer.take_and_attend(
            query, key, value, new, scaling=scaling, softcap=softcap, sink_logits=s_aux
        )
    except IceCacheError:
        if handoff is not None:
            handoff.forward.undo()
        raise
    return output.transpose(1, 2).contiguous(), None


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise InputError(
            "output_attentions=True needs the whole attention matrix, which IceCache never forms; "
            "drop it, or detach IceCache and load the model with attn_implementation='eager'"
        )
    for name in _SELECTING:
        if kwargs.get(name) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} passes its own token selection ({name}) to the "
                "attention, which IceCache does not honour; run this model without IceCache"
            )


def _refuse_foreign_past(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, causal: bool
) -> None:
    has_past = key.shape[2] > query.shape[2] and not getattr(module, "is_kv_shared_layer", False)
    if causal and hasattr(module, "layer_idx") and has_past:
        raise InputError(
            "the model attends with IceCache, but its past_key_values is another cache; pass "
            "past_key_values=IceCache(model), call model.generate(...), or detach IceCache"
        )


def _refuse_for_managed(
    module: nn.Module, dropout: float, position_bias: torch.Tensor | None, causal: bool
) -> None:
    if dropout or module.training:
        raise InputError("IceCache runs inference only; call model.eval() first")
    if position_bias is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} adds a position bias to full attention, which IceCache does "
            "not support; run this model without IceCache"
        )
    if not causal:
        raise UnsupportedModel(
            f"{type(module).__name__} attends in both directions; IceCache needs a causal decoder"
        )
