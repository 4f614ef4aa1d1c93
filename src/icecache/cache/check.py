"""What a layer demands of the tensors it is given."""

import torch
from torch import Tensor

from icecache.errors import InputError

__all__ = ["check_mask", "check_query", "check_tokens"]


def check_tokens(
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    batch: int | None,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise `InputError` unless keys and values may be stored."""
    for name, x in (("keys", keys), ("values", values)):
        if x.dim() != 4:
            raise InputError(
                f"{name} must be [batch, num_kv_heads, tokens, head_dim], got {_shape(x)}"
            )
        if x.shape[1] != num_kv_heads or x.shape[3] != head_dim:
            raise InputError(
                f"{name} must have {num_kv_heads} KV heads of head_dim {head_dim}, got {_shape(x)}"
            )
        if x.dtype != dtype:
            raise InputError(f"{name} must be {dtype}, got {x.dtype}")
        if x.device.type != device.type:
            raise InputError(f"{name} must be on {device}, got {x.device}")
    if keys.shape != values.shape:
        raise InputError(f"keys and values must agree, got {_shape(keys)} and {_shape(values)}")
    if keys.shape[0] == 0 or keys.shape[2] == 0:
        raise InputError(f"keys must hold at least one row and one token, got {_shape(keys)}")
    if batch is not None and keys.shape[0] != batch:
        raise InputError(
            f"batch must stay {batch} until reset() or reorder(), got {keys.shape[0]} rows"
        )
    if mask is not None:
        check_mask(mask, keys.shape[0], keys.shape[2])
    for name, x in (("keys", keys), ("values", values)):
        seen = x if mask is None else x.masked_fill(~mask[:, None, :, None], 0.0)
        # a sum is finite only if all its parts are, and costs one pass
        if not bool(torch.isfinite(seen.sum(dtype=torch.float64))):
            raise InputError(f"{name} must be finite, got NaN or infinity")


def check_mask(mask: Tensor, batch: int, tokens: int) -> None:
    """Raise `InputError` unless the mask fits the tokens."""
    if mask.dtype != torch.bool:
        raise InputError(f"mask must be torch.bool, True = token, got {mask.dtype}")
    if mask.shape != (batch, tokens):
        raise InputError(f"mask must be [batch, tokens] = {(batch, tokens)}, got {_shape(mask)}")


def check_query(query: Tensor, *, batch: int, num_kv_heads: int, head_dim: int) -> None:
    """Raise `InputError` unless the query fits the stored keys."""
    if query.dim() != 4 or query.shape[0] != batch or query.shape[3] != head_dim:
        raise InputError(
            f"query must be [{batch}, num_q_heads, q_tokens, {head_dim}], got {_shape(query)}"
        )
    if query.shape[1] == 0 or query.shape[1] % num_kv_heads:
        raise InputError(
            f"query heads must be a multiple of the {num_kv_heads} KV heads, got {query.shape[1]}"
        )
    if query.shape[2] == 0:
        raise InputError(f"query must have at least one token, got {_shape(query)}")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
