"""The next token of an answer."""

import torch
from torch import Tensor

from icecache.engine.request import Sampling

__all__ = ["next_token"]


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """Return the next token; logits: shape [vocabulary]."""
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    share = (logits.float() / max(sampling.temperature, 1e-5)).softmax(-1)
    if sampling.top_p < 1.0:
        share = _nucleus(share, sampling.top_p)
    return int(torch.multinomial(share, 1, generator=generator))


def _nucleus(share: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens that together reach `top_p`, the likeliest always."""
    ordered, index = share.sort(descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p
    return share.index_fill(-1, index[beyond], 0.0)
