"""What a decoder block does around its attention, in plain PyTorch: the truth of block.c."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ACTIVATION_OF", "gated_mlp", "rms_norm", "rotate"]

ACTIVATION_OF: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "gelu": functional.gelu,
    "relu": functional.relu,
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm the last dimension by its root mean square (arXiv 1910.07467)."""
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the first elements of heads by their angles (arXiv 2104.09864).

    x: shape [..., head_dim]; cosines, sines: shape [..., rotary_dim]; halves are the pairs.
    """
    dim = cosines.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    low, high = turned.chunk(2, -1)
    return torch.cat([turned * cosines + torch.cat([-high, low], -1) * sines, rest], -1)


def gated_mlp(
    x: Tensor,
    gate: tuple[Tensor, Tensor | None],
    up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    activation: str,
) -> Tensor:
    """Return down(activation(gate(x)) * up(x)); each a weight, [out, in], and a bias or None."""
    inner = ACTIVATION_OF[activation](functional.linear(x, *gate)) * functional.linear(x, *up)
    return functional.linear(inner, *down)
