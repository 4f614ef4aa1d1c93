"""The compiled ops, C through ctypes.

Built at installation where there is a C compiler. `load` says clearly where it is not.
"""

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p, sizeof
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from icecache.errors import BackendUnavailable

__all__ = [
    "DTYPES",
    "MAX_DIM",
    "MAX_HEADS",
    "MOST_LEVELS",
    "REBUILD",
    "Answer",
    "Build",
    "Decode",
    "Level",
    "Pages",
    "Result",
    "Segment",
    "Shape",
    "Tokens",
    "Tree",
    "View",
    "load",
    "pointer",
]

MAX_HEADS = 256
_VERSION = 8
MAX_DIM = 512
MOST_LEVELS = 12
REBUILD = "install a C compiler and run pip install --force-reinstall --no-deps . in the checkout"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Shape(ctypes.Structure):
    """`Shape` of layer.h."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "heads", "dim", "leaf_size", "page_size", "room")),
        *((name, c_int64) for name in ("most_children", "crossover", "field_of_view")),
        *((name, c_int32) for name in ("dtype", "remainder")),
        *((name, c_float) for name in ("scaling", "softcap", "spread_weight")),
    ]


class Level(ctypes.Structure):
    """`Level` of layer.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("num", "count", "spread", "key_mean", "key_scale")),
        *((name, c_void_p) for name in ("value_mean", "value_scale", "next", "first")),
        ("capacity", c_int64),
    ]


class Tree(ctypes.Structure):
    """`Tree` of layer.h."""

    _fields_ = [
        ("level", Level * MOST_LEVELS),
        *((name, c_void_p) for name in ("page", "slots", "centre")),
        ("num_levels", c_int64),
    ]


class Pages(ctypes.Structure):
    """`Pages` of layer.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("data", "positions", "holders", "num_pages", "page_of")),
        *((name, c_void_p) for name in ("free", "before", "after", "head")),
        ("capacity", c_int64),
    ]


class Build(ctypes.Structure):
    """`Build` of fill.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values", "positions", "leaf_of", "page_of")),
        *((name, c_int64) for name in ("num_tokens", "num_leaves", "row", "first_leaf")),
        ("first_number", c_int64),
    ]


class Result(ctypes.Structure):
    """`Result` of step.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("out", "num_attended", "positions", "given")),
        *((name, c_int64) for name in ("nodes_scored", "leaves_scored")),
    ]


class Tokens(ctypes.Structure):
    """`Tokens` of insert.c."""

    _fields_ = [(name, c_void_p) for name in ("keys", "values", "row", "offset", "position")]


class Answer(ctypes.Structure):
    """`Answer` of insert.c."""

    _fields_ = [("status", c_int32), ("page", c_int32)]


class Segment(ctypes.Structure):
    """`Segment` of step.c."""

    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("row_stride", c_int64),
        ("start", c_void_p),
        ("len", c_void_p),
    ]


class View(ctypes.Structure):
    """`View` of decode.h."""

    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("head_stride", c_int64)]


class Decode(ctypes.Structure):
    """`Decode` of decode.h."""

    _fields_ = [
        ("shape", Shape),
        ("tree", c_void_p),
        ("pages", c_void_p),
        ("segments", Segment * 2),
        *((name, c_int64) for name in ("num_segments", "kv_heads", "threads", "end")),
        *((name, View) for name in ("query", "key", "value")),
        ("sink_logits", c_void_p),
        ("leaving", Tokens),
        *((name, c_void_p) for name in ("offset", "answers", "wide", "out")),
        ("status", c_int64),
        ("result", Result),
        ("team", c_void_p),
    ]


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """Return the library; `BackendUnavailable` where it was not built."""
    path = _library_path()
    if path is None:
        raise BackendUnavailable(f"the compiled ops are not installed; {REBUILD}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailable(
            f"the compiled ops cannot be loaded: {error}; {REBUILD}"
        ) from error
    _check_layout(library)
    library.icecache_sparse_step.argtypes = [
        POINTER(Shape),
        POINTER(Tree),
        POINTER(Pages),
        POINTER(Segment),
        c_int64,
        c_void_p,
        c_void_p,
        c_int64,
        POINTER(Result),
    ]
    library.icecache_sparse_step.restype = c_int
    library.icecache_insert.argtypes = [
        POINTER(Shape),
        POINTER(Tree),
        POINTER(Pages),
        POINTER(Tokens),
        c_int64,
        c_int64,
        POINTER(Answer),
    ]
    library.icecache_insert.restype = c_int64
    library.icecache_decode.argtypes = [POINTER(Decode), POINTER(c_int64), POINTER(Answer)]
    library.icecache_decode.restype = c_int
    library.icecache_group.argtypes = [
        c_void_p,
        c_int64,
        c_void_p,
        c_int64,
        c_int64,
        *(c_void_p,) * 4,
    ]
    library.icecache_group.restype = c_int
    library.icecache_pack.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_void_p]
    library.icecache_pack.restype = c_int64
    library.icecache_siblings.argtypes = [c_void_p, c_int64, c_void_p, c_int64]
    library.icecache_siblings.restype = c_int
    library.icecache_fill.argtypes = [POINTER(Shape), POINTER(Tree), POINTER(Pages), POINTER(Build)]
    library.icecache_fill.restype = c_int
    library.icecache_adopt.argtypes = [POINTER(Tree), c_int64, c_int64, *(c_void_p,) * 3, c_int64]
    library.icecache_adopt.restype = None
    return library


def _check_layout(library: ctypes.CDLL) -> None:
    expected = _VERSION
    for structure in (Shape, Level, Tree, Pages, Segment, Result, Decode):
        expected = expected * 131 + sizeof(structure)
    try:
        library.icecache_layout.restype = c_int64
        found = library.icecache_layout()
    except AttributeError:
        found = 0
    if found != expected:
        raise BackendUnavailable(f"the compiled ops are of another version; {REBUILD}")


def pointer(x: Tensor | None) -> int | None:
    """Return the address of a tensor's first element, None of None."""
    return None if x is None else x.data_ptr()


def _library_path() -> Path | None:
    spec = find_spec("icecache.ops._native")
    return Path(spec.origin) if spec is not None and spec.origin is not None else None
