"""The next token of an answer."""

import torch
from torch import Tensor

from icecache.engine.request import Sampling
from icecache.errors import InputError

__all__ = ["next_token"]


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """Return the next token; logits: shape [vocabulary].

    Raises
    ------
    InputError
        If the logits are not finite: the model overflowed.
    """
    if not bool(torch.isfinite(logits).all()):
        raise InputError("the model's logits are not finite; load it in a wider dtype")
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
    beyond[0] = False
    return share.index_fill(-1, index[beyond], 0.0)
