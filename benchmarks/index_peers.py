"""Other nearest-neighbour indexes on the same keys: hnswlib's graph, faiss's inverted lists.

One index for each KV head, on keys less their mean (which changes no softmax, and inner products
need it), asked by every query head for as many tokens as the budget leaves. Only the libraries'
own calls are timed. What the query heads of a KV head found is merged by the sum of their shares.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from index_case import Case
from torch import Tensor

from icecache.errors import BackendUnavailable

PACKAGES = {"hnswlib": "hnswlib", "faiss": "faiss-cpu"}
_LINKS, _CONSTRUCTION = 16, 200
_PROBES = 16


class Found(NamedTuple):
    """Numbers of the tokens found, -1 for none, and their inner products; [group, room]."""

    ids: np.ndarray
    products: np.ndarray


Ask = Callable[[np.ndarray], Found]


class Peer(NamedTuple):
    """A library's indexes of one layer.

    Attributes
    ----------
    name : str
    settings : dict. What the index was built and is searched with.
    build_s : float. Of all KV heads.
    asks : one for each KV head, queries [group, head_dim] -> Found
    """

    name: str
    settings: dict[str, int]
    build_s: float
    asks: list[Ask]

    def search(self, query: np.ndarray) -> list[Found]:
        """Ask every KV head's index; query: shape [kv_heads, group, head_dim], float32."""
        return [ask(heads) for ask, heads in zip(self.asks, query, strict=True)]


def load(name: str) -> ModuleType:
    """Import a peer; `BackendUnavailable` with the command that installs it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise BackendUnavailable(
            f"peer {name} is not installed: pip install {PACKAGES[name]}"
        ) from error


def build(name: str, case: Case, room: int) -> Peer:
    """Index the keys of every KV head with a peer, with as many threads as torch uses."""
    library, threads = load(name), torch.get_num_threads()
    room = min(room, case.keys.shape[1])
    make = {"hnswlib": _hnswlib, "faiss": _faiss}[name]
    asks, seconds, settings = [], 0.0, {}
    for keys in case.keys:
        centred = keys.float() - keys.float().mean(0)
        start = time.perf_counter()
        ask, settings = make(library, centred.numpy(), room, threads)
        seconds += time.perf_counter() - start
        asks.append(ask)
    return Peer(name, settings, seconds, asks)


def _hnswlib(library: Any, keys: np.ndarray, room: int, threads: int) -> tuple[Ask, dict[str, int]]:
    index = library.Index(space="ip", dim=keys.shape[1])
    index.init_index(max_elements=len(keys), M=_LINKS, ef_construction=_CONSTRUCTION)
    index.set_num_threads(threads)
    index.add_items(keys, num_threads=threads)
    # the least that ef may be: the fastest search
    index.set_ef(room)

    def ask(queries: np.ndarray) -> Found:
        ids, distances = index.knn_query(queries, k=room, num_threads=threads)
        return Found(ids.astype(np.int64), 1.0 - distances)

    return ask, {"M": _LINKS, "ef_construction": _CONSTRUCTION, "ef": room}


def _faiss(library: Any, keys: np.ndarray, room: int, threads: int) -> tuple[Ask, dict[str, int]]:
    library.omp_set_num_threads(threads)
    lists = max(1, round(math.sqrt(len(keys))))
    coarse = library.IndexFlatIP(keys.shape[1])
    index = library.IndexIVFFlat(coarse, keys.shape[1], lists, library.METRIC_INNER_PRODUCT)
    index.train(keys)
    index.add(keys)
    index.nprobe = min(_PROBES, lists)

    def ask(queries: np.ndarray) -> Found:
        products, ids = index.search(queries, room)
        return Found(ids, products)

    # the list of centres is read through `coarse`, which the index does not keep alive
    ask.coarse = coarse  # type: ignore[attr-defined]
    return ask, {"nlist": lists, "nprobe": index.nprobe}


def merge(found: list[Found], scaling: float, room: int) -> Tensor:
    """Choose `room` tokens a KV head of what its query heads found: numbers [kv_heads, room], -1.

    The heads vote by their shares among what each of them found.
    """
    chosen = torch.full((len(found), room), -1, dtype=torch.int64)
    for row, (ids, products) in enumerate(found):
        flat = torch.from_numpy(ids)
        logits = torch.from_numpy(products).double() * scaling
        share = logits.masked_fill(flat < 0, -math.inf).softmax(-1)
        token, where = torch.unique(flat, return_inverse=True)
        votes = torch.zeros(len(token), dtype=torch.float64)
        votes.index_add_(0, where.flatten(), share.flatten())
        votes.masked_fill_(token < 0, -1.0)
        best = votes.topk(min(room, len(token)))
        numbers = token[best.indices].masked_fill(best.values < 0, -1)
        chosen[row, : len(numbers)] = numbers
    return chosen
