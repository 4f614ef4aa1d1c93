"""A decode step of a whole model as one compiled call; forward.h says what is in its structures."""

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p, sizeof
from functools import lru_cache

from icecache.errors import BackendUnavailable
from icecache.ops.native import REBUILD, Answer, load

__all__ = ["ACTIVATIONS", "Block", "Forward", "Linear", "Norm", "Place", "load_forward"]

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")


class Linear(ctypes.Structure):
    """`Linear` of linear.h."""

    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("num_out", c_int64),
        ("num_in", c_int64),
    ]


class Norm(ctypes.Structure):
    """`Norm` of forward.h."""

    _fields_ = [
        ("weight", c_void_p),
        ("dim", c_int64),
        ("eps", c_float),
    ]


class Block(ctypes.Structure):
    """`Block` of forward.h."""

    _fields_ = [
        *((name, Norm) for name in ("before_attention", "of_query", "of_key", "before_mlp")),
        *((name, Linear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        ("activation", c_int32),
        ("rotates", c_int32),
        ("decodes", c_void_p),
    ]


class Forward(ctypes.Structure):
    """`Forward` of forward.h."""

    _fields_ = [
        ("blocks", c_void_p),
        ("norm", Norm),
        ("head", Linear),
        ("embedding", c_void_p),
        *((name, c_int64) for name in ("num_blocks", "num_caches", "batch", "hidden", "num_heads")),
        *((name, c_int64) for name in ("num_kv_heads", "head_dim", "rotary_dim", "inner")),
        ("threads", c_int64),
        *((name, c_float) for name in ("embedding_scale", "residual_scale", "logit_scale")),
        ("dtype", c_int32),
        *((name, c_void_p) for name in ("token_ids", "cosines", "sines")),
        *((name, c_void_p) for name in ("hidden_states", "products", "vectors", "inner_vectors")),
        ("widest", c_int64),
        *((name, c_void_p) for name in ("query", "key", "value", "attended", "logits")),
        *((name, c_void_p) for name in ("watched", "watched_query")),
    ]


class Place(ctypes.Structure):
    """`Place` of forward.h."""

    _fields_ = [
        ("block", c_int64),
        ("cache", c_int64),
        ("row", c_int64),
    ]


@lru_cache(maxsize=1)
def load_forward() -> ctypes.CDLL:
    """Return the library with `icecache_forward`; `BackendUnavailable` where it was not built."""
    library = load()
    expected = 1
    for structure in (Linear, Norm, Block, Forward, Place):
        expected = expected * 131 + sizeof(structure)
    try:
        library.icecache_forward_layout.restype = c_int64
        found = library.icecache_forward_layout()
    except AttributeError:
        found = 0
    if found != expected:
        raise BackendUnavailable(f"the compiled ops are of another version; {REBUILD}")
    library.icecache_forward.argtypes = [
        POINTER(Forward),
        POINTER(Place),
        POINTER(Answer),
    ]
    library.icecache_forward.restype = c_int
    return library
