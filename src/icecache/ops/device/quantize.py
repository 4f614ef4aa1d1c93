"""int8 codes with a float32 scale a vector, for leaves' means and for tokens of int8 pages."""

import torch
from torch import Tensor

__all__ = ["quantize"]


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes and float32 scales of the last dimension's vectors.

    x: shape [..., D]. `codes * scale` is within half a scale of x; the scale of zeros is 0.
    """
    x = x.float()
    scale = x.abs().amax(-1) / 127
    # where scale underflows to 0 the codes are 0 as well
    safe = torch.where(scale > 0, scale, 1.0)[..., None]
    codes = torch.floor(x / safe + 0.5).clamp(-127, 127)
    return torch.where(scale[..., None] > 0, codes, 0).to(torch.int8), scale
