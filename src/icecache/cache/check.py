"""What a layer demands of the tensors it is given."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.config import IceCacheConfig
from icecache.errors import ConfigError, InputError

__all__ = [
    "Expected",
    "check_crop",
    "check_finite_output",
    "check_positions",
    "check_query",
    "check_rows",
    "check_tokens",
]


class Expected(NamedTuple):
    """What a layer's tensors are like."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def checked(
        cls,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str | torch.device,
        devices: tuple[str, ...] = ("cpu",),
    ) -> "Expected":
        """Raise `ConfigError` unless a layer can have such tensors, on devices of such types."""
        for name, value in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if dtype not in _DTYPES:
            names = ", ".join(str(known) for known in _DTYPES)
            raise ConfigError(f"dtype must be a floating-point type of {names}, got {dtype!r}")
        device = torch.device(device)
        if device.type not in devices:
            raise ConfigError(f"device must be {' or '.join(devices)} for this layer, got {device}")
        return cls(num_kv_heads, head_dim, dtype, device)


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
    if keys.shape[2] == 1 and keys.device.type != "cpu":
        # a step must not wait for the device
        return
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
    if device.type == "cpu":
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
        if device.type == "cpu" and bool(sink_logits.isnan().any()):
            raise InputError("sink_logits must be numbers, got NaN")


def check_host_config(config: IceCacheConfig) -> IceCacheConfig:
    """Return the config; `ConfigError` if it asks for what the device path alone can do."""
    if config.page_dtype != "auto":
        raise ConfigError(
            f'page_dtype must be "auto" on a CPU, got {config.page_dtype!r}; the device path alone '
            "has other pages than the model's"
        )
    return config


def check_finite_output(out: Tensor) -> None:
    """Raise `InputError` if attention overflowed."""
    if not math.isfinite(float(out.sum(dtype=torch.float64))):
        raise InputError("attention overflowed: keys or query are too large for float32")


def check_positions(positions: Tensor, num_rows: int, room: int, selection: str) -> None:
    """Raise `InputError` unless positions name as many tokens a row as there is room for."""
    _check_tensor("positions", positions)
    if selection != "tree":
        raise InputError(f'positions need selection="tree", the layer has "{selection}"')
    if positions.dtype not in _INTEGER_TYPES or positions.dim() != 2:
        raise InputError(
            f"positions must be integers of shape [batch * num_kv_heads, tokens], "
            f"got {positions.dtype} of shape {_shape(positions)}"
        )
    if positions.shape[0] != num_rows or positions.shape[1] > room:
        raise InputError(
            f"positions must be of {num_rows} rows and at most {room} tokens, what the budget "
            f"leaves beside sink and window, got {_shape(positions)}"
        )


def check_crop(num_tokens: int, held: int) -> None:
    """Raise `InputError` unless so many of the `held` latest tokens can be dropped."""
    if not isinstance(num_tokens, int) or isinstance(num_tokens, bool):
        raise InputError(f"crop must be an integer, got {num_tokens!r}")
    if not 0 <= num_tokens <= held:
        raise InputError(
            f"crop must be from 0 to the {held} tokens still in the window, got {num_tokens}"
        )


def check_rows(rows: Tensor, batch: int) -> Tensor:
    """Return rows as int64; `InputError` unless they name rows of the batch."""
    _check_tensor("rows", rows)
    if rows.dim() != 1 or rows.numel() == 0 or rows.dtype not in _INTEGER_TYPES:
        raise InputError(
            f"rows must be a vector of integers, got {rows.dtype} of shape {_shape(rows)}"
        )
    if batch and (int(rows.min()) < 0 or int(rows.max()) >= batch):
        raise InputError(f"rows must be from 0 to {batch - 1}, got {rows.tolist()}")
    return rows.long().cpu()


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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
