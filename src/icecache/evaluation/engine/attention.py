"""The attention function that transformers calls while a model is evaluated.

A cache of this package hangs a handler on the keys that it hands to the model; keys without one
belong to an `IceCache`, whose own attention function takes them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from icecache.errors import UnsupportedModel
from icecache.evaluation.engine.attend import Rule
from icecache.integrations.transformers.attention import icecache_attention, icecache_mask
from icecache.integrations.transformers.fallback import plain_attention
from icecache.integrations.transformers.support import decoder_config

__all__ = [
    "NAME",
    "Call",
    "Handler",
    "Probe",
    "attend",
    "evaluation_attention",
    "hang",
    "run_plainly",
]

NAME = "icecache_evaluation"
_ATTRIBUTE = "_icecache_evaluation_handler"


class Call(NamedTuple):
    """One call of the attention function by a layer of the model.

    Attributes
    ----------
    query : shape [batch, num_q_heads, q_tokens, head_dim]
    key, value : shape [batch, num_kv_heads, tokens, head_dim]. What the cache's `update` returned.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    rule: Rule


class Handler(Protocol):
    """Answers a layer's attention: shape [batch, q_tokens, num_q_heads, head_dim]."""

    def __call__(self, call: Call) -> Tensor: ...


class Probe(Protocol):
    """Looks at what a layer attended."""

    def see(self, call: Call, output: Tensor) -> None:
        """Take note of one decode step of one layer."""


def hang(keys: Tensor, handler: Handler) -> None:
    """Hang a handler on the keys that the model passes on to its attention function."""
    setattr(keys, _ATTRIBUTE, handler)


def run_plainly(call: Call) -> Tensor:
    """Attend exactly, as the model itself would: the handler of layers left to the model."""
    return plain_attention(
        call.module,
        call.query,
        call.key,
        call.value,
        call.mask,
        scaling=call.rule.scaling,
        softcap=call.rule.softcap,
        sinks=call.rule.sinks,
    )


@contextmanager
def evaluation_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend through this module while the block runs."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, icecache_mask)
    config = decoder_config(model.config)
    before = config._attn_implementation
    model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise UnsupportedModel(
            f"{type(model).__name__} does not let its attention be replaced, so its caches cannot "
            "be compared"
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attend(call: Call, probe: Probe | None = None, **kwargs: Any) -> Tensor:
    """Return a layer's output, ``[batch, q_tokens, num_q_heads, head_dim]``; the probe sees it."""
    handler: Handler | None = getattr(call.key, _ATTRIBUTE, None)
    if handler is not None:
        output = handler(call)
    else:
        rule = call.rule
        output, _ = icecache_attention(
            *call[:5], scaling=rule.scaling, softcap=rule.softcap, s_aux=rule.sinks, **kwargs
        )
    if probe is not None:
        probe.see(call, output)
    return output


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    probe: Probe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    return attend(Call(module, query, key, value, attention_mask, rule), probe, **kwargs), None
