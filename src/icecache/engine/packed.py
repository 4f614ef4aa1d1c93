"""Attention of a packed batch: the tokens of many requests side by side, ``[1, tokens]``.

The model multiplies all of them at once; here they part, and each request attends through layers
of its own. transformers hands the batch on as a keyword of the model's forward.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from icecache.cache.layer import IceCacheLayer
from icecache.engine.watch import Watch
from icecache.errors import IceCacheError, InputError, UnsupportedModel

__all__ = ["KEYWORD", "NAME", "PackedBatch", "Span", "register_packed"]

# without "sdpa", "flash" or "flex_attention" in it: transformers matches those as substrings
NAME = "icecache_packed"
KEYWORD = "icecache_batch"


@dataclass(slots=True)
class Span:
    """One request's tokens in a batch.

    Parameters
    ----------
    layers : sequence of IceCacheLayer
        By the model's layer index.
    start, num : int
        Where the tokens are in the batch.
    watch : Watch, optional
    error : IceCacheError, optional
        Set by the first layer that refused; the rest of the forward leaves the request out.
    """

    layers: Sequence[IceCacheLayer]
    start: int
    num: int
    watch: Watch | None = None
    error: IceCacheError | None = None


@dataclass(slots=True)
class PackedBatch:
    """The requests of one forward.

    Parameters
    ----------
    spans : list of Span
    executor : Executor, optional
        Whose threads help with the attention of single tokens.
    num_threads : int
        Groups that those are dealt out to, the calling thread's included.
    """

    spans: list[Span]
    executor: Executor | None = None
    num_threads: int = 1
    singles: list[Span] = field(init=False)

    def __post_init__(self) -> None:
        self.singles = [span for span in self.spans if span.num == 1]

    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]
    ) -> Tensor:
        """Let every request take in its keys and attend; shapes [1, heads, tokens, dim]."""
        out = torch.zeros_like(query)
        # one after the other, for requests may share a pool of pages that they write to
        for span in self.spans:
            self._append(span, index, key, value)
            if span.num > 1:
                _attend(span, index, query, out, settings)
        groups = [self.singles[i :: self.num_threads] for i in range(self.num_threads)]
        others = [
            self.executor.submit(_attend_group, group, index, query, out, settings)
            for group in groups[1:]
            if group and self.executor is not None
        ]
        _attend_group(groups[0], index, query, out, settings)
        for other in others:
            other.result()
        return out

    def _append(self, span: Span, index: int, key: Tensor, value: Tensor) -> None:
        if span.error is None:
            own = slice(span.start, span.start + span.num)
            try:
                span.layers[index].append(key[:, :, own], value[:, :, own])
            except IceCacheError as error:
                span.error = error


@torch.inference_mode()
def _attend_group(
    spans: list[Span], index: int, query: Tensor, out: Tensor, settings: dict[str, Any]
) -> None:
    for span in spans:
        _attend(span, index, query, out, settings)


def _attend(span: Span, index: int, query: Tensor, out: Tensor, settings: dict[str, Any]) -> None:
    if span.error is None:
        own = slice(span.start, span.start + span.num)
        try:
            out[:, :, own] = span.layers[index].attend(query[:, :, own], **settings)
            if span.watch is not None and span.num == 1:
                span.watch.look(index, span.layers, query[:, :, own], settings)
        except IceCacheError as error:
            span.error = error


def register_packed() -> None:
    """Register attention and mask with transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    batch: PackedBatch | None = kwargs.get(KEYWORD)
    if batch is None:
        raise InputError(
            "the model belongs to an icecache.Engine, which alone can run it; close the engine "
            "to use the model otherwise"
        )
    if position_bias is not None or value.shape != key.shape:
        raise UnsupportedModel(
            f"{type(module).__name__} has a position bias, or values unlike its keys in shape, "
            "which the engine does not support; use icecache.attach(model)"
        )
    settings = {"scaling": scaling, "softcap": softcap, "sink_logits": s_aux}
    index = int(module.layer_idx)  # type: ignore[arg-type]
    out = batch.attend(index, query, key, value, settings)
    return out.transpose(1, 2).contiguous(), None
