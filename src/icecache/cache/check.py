"""What a layer demands of the tensors it is given."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.errors import InputError

__all__ = ["Expected", "check_query", "check_rows", "check_tokens"]


class Expected(NamedTuple):
    """What a layer's tensors are like."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


def check_tokens(
    keys: Tensor, values: Tensor, mask: Tensor | None, batch: int | None, expected: Expected
) -> None:
    """Raise `InputError` unless keys and values may be stored."""
    num_kv_heads, head_dim, dtype, device = expected
    for name, x in (("keys", keys), ("values", values)):
        _check_tensor(name, x)
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
        _check_mask(mask, keys.shape[0], keys.shape[2])
    for name, x in (("keys", keys), ("values", values)):
        seen = x if mask is None else x.masked_fill(~mask[:, None, :, None], 0.0)
        _check_finite(name, seen)


def _check_mask(mask: Tensor, batch: int, tokens: int) -> None:
    """Raise `InputError` unless the mask fits the tokens and pads on the left."""
    _check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise InputError(f"mask must be torch.bool, True = token, got {mask.dtype}")
    if mask.shape != (batch, tokens):
        raise InputError(f"mask must be [batch, tokens] = {(batch, tokens)}, got {_shape(mask)}")
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InputError("mask must be padded on the left, got padding behind a token")


def check_query(
    query: Tensor,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    batch: int,
    expected: Expected,
) -> None:
    """Raise `InputError` unless the query fits the stored keys, and its settings make sense."""
    num_kv_heads, head_dim, dtype, device = expected
    _check_tensor("query", query)
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
    if query.dtype != dtype or query.device.type != device.type:
        raise InputError(f"query must be {dtype} on {device}, got {query.dtype} on {query.device}")
    _check_finite("query", query)
    if not math.isfinite(scaling):
        raise InputError(f"scaling must be finite, got {scaling}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise InputError(f"softcap must be a positive number or None, got {softcap}")
    if sink_logits is not None:
        _check_tensor("sink_logits", sink_logits)
        if sink_logits.shape != query.shape[1:2]:
            raise InputError(
                f"sink_logits must be [num_q_heads] = ({query.shape[1]},), "
                f"got {_shape(sink_logits)}"
            )
        if bool(sink_logits.isnan().any()):
            raise InputError("sink_logits must be numbers, got NaN")


def check_rows(rows: Tensor, batch: int) -> None:
    """Raise `InputError` unless `rows` names rows of the batch."""
    _check_tensor("rows", rows)
    if rows.dim() != 1 or rows.numel() == 0 or rows.dtype not in _INTEGER_TYPES:
        raise InputError(
            f"rows must be a vector of integers, got {rows.dtype} of shape {_shape(rows)}"
        )
    if batch and (int(rows.min()) < 0 or int(rows.max()) >= batch):
        raise InputError(f"rows must be from 0 to {batch - 1}, got {rows.tolist()}")


_INTEGER_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def _check_finite(name: str, x: Tensor) -> None:
    # a sum is finite only if all its parts are, and costs one pass
    if not math.isfinite(float(x.sum(dtype=torch.float64))):
        raise InputError(f"{name} must be finite, got NaN or infinity")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
