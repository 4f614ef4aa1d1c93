"""One row of the index benchmark: build, search beside its twins and peers, insert, error."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import index_peers
import torch
from common import attend_steps, step_times
from index_case import Case, check_memory, flat_tokens, layer_around, layer_query
from index_peers import Peer
from index_twin import Quality, measure_quality, scan_of
from torch import Tensor

from icecache import IceCacheConfig, IceCacheLayer
from icecache.cache.flat import FlatTokens
from icecache.cache.indexed import IndexedTokens

_BUILD_SECONDS, _MOST_BUILDS = 5.0, 5
_ROUNDS = 3
_WARM_INSERTS = 8
_CACHE_BYTES = 1 << 26
_EVERY_LEAF = 1 << 30


class Settings(NamedTuple):
    """What is the same for every row."""

    config: IceCacheConfig
    peers: list[str]
    peer_tokens: int


def build(case: Case, config: IceCacheConfig) -> tuple[IndexedTokens, list[float]]:
    """Index the tokens of a case through fresh objects; the last one and each one's seconds."""
    tokens, seconds = flat_tokens(case), list[float]()
    while not seconds or (sum(seconds) < _BUILD_SECONDS and len(seconds) < _MOST_BUILDS):
        indexed = None
        gc.collect()
        start = time.perf_counter()
        indexed = IndexedTokens(config, case.kv_heads, case.keys.shape[2], case.keys.dtype)
        indexed.add(tokens)
        seconds.append(time.perf_counter() - start)
    assert indexed is not None
    return indexed, seconds


def time_inserts(indexed: IndexedTokens, case: Case) -> list[float]:
    """Seconds of each insert of one token into every KV head, as a decode step does."""
    rows, seconds = torch.arange(case.kv_heads), []
    position = case.sink + case.keys.shape[1]
    gc.collect()
    for i in range(case.inserts):
        token = FlatTokens(
            case.extra_keys[:, i].contiguous(),
            case.extra_values[:, i].contiguous(),
            rows,
            torch.full_like(rows, position + i),
        )
        start = time.perf_counter()
        indexed.add(token)
        seconds.append(time.perf_counter() - start)
    return seconds[min(_WARM_INSERTS, case.inserts - 1) :]


def time_in_turns(calls: dict[str, Callable[[int], Any]], steps: int) -> dict[str, float]:
    """Median milliseconds of each call over the steps.

    The calls take turns at every step, each time in another order: what one has left in the
    processor's caches must not always serve the same other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for call in calls.values():
        call(0)
    gc.collect()
    for turn in range(steps * _ROUNDS):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            calls[name](turn % steps)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * median(found) for name, found in seconds.items()}


def time_alone(call: Callable[[int], Any], steps: int, *, cold: bool) -> float:
    """Median milliseconds of a call whose memory is in the processor's caches, or in none."""
    other = torch.zeros(_CACHE_BYTES, dtype=torch.uint8) if cold else None
    seconds = []
    for turn in range(steps * _ROUNDS):
        if other is not None:
            other += 1
        start = time.perf_counter()
        call(turn % steps)
        seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds)


class Searched(NamedTuple):
    """What the searches of a case took and found.

    Attributes
    ----------
    times : median milliseconds of a search, by who searched, in turns
    warm_ms, cold_ms : the same of the index by itself, with warm and with cold caches
    positions : by who searched, a tensor a step, `[kv_heads, most]`, -1 behind the last
    nodes_scored, leaves_scored : of the index, a query and KV head
    """

    times: dict[str, float]
    warm_ms: float
    cold_ms: float
    positions: dict[str, list[Tensor]]
    nodes_scored: float
    leaves_scored: float


def search_in_turns(
    case: Case, config: IceCacheConfig, layers: dict[str, IceCacheLayer], peers: list[Peer]
) -> Searched:
    """Search with the layers, the exact scan and the peers; all answer the same queries."""
    steps, room = len(case.queries), config.budget - case.fixed_keys.shape[1]
    scan = scan_of(case, config)
    queries = [layer_query(case, step) for step in range(steps)]
    grouped = [query.unflatten(0, (case.kv_heads, -1)).numpy() for query in case.queries]

    def layer_search(layer: IceCacheLayer) -> Callable[[int], Any]:
        return lambda step: layer.search(queries[step], scaling=case.scaling)

    def peer_search(peer: Peer) -> Callable[[int], Any]:
        return lambda step: peer.search(grouped[step])

    calls = {name: layer_search(layer) for name, layer in layers.items()}
    calls["exact"] = lambda step: scan.search(case.queries[step])
    calls.update({peer.name: peer_search(peer) for peer in peers})
    times = time_in_turns(calls, steps)
    found = {name: [call(step) for step in range(steps)] for name, call in calls.items()}
    positions = {name: [one.positions for one in found[name]] for name in layers}
    for peer in peers:
        merged = [index_peers.merge(one, case.scaling, room) for one in found[peer.name]]
        positions[peer.name] = [torch.where(one < 0, one, one + case.sink) for one in merged]
    asked = steps * case.kv_heads
    return Searched(
        times,
        *(time_alone(calls["index"], steps, cold=cold) for cold in (False, True)),
        positions,
        sum(one.nodes_scored for one in found["index"]) / asked,
        sum(one.leaves_scored for one in found["index"]) / asked,
    )


def measure(case: Case, settings: Settings) -> dict[str, Any]:
    """One row."""
    config = settings.config
    check_memory(case, config)
    indexed, build_seconds = build(case, config)
    layers = {"index": layer_around(case, config, indexed)}
    if any(field.name == "crossover" for field in dataclasses.fields(config)):
        every = config.replace(crossover=_EVERY_LEAF)
        layers["flat"] = layer_around(case, every, indexed)
    stats = layers["index"].stats()
    names = settings.peers if case.tokens <= settings.peer_tokens else []
    room = config.budget - case.fixed_keys.shape[1]
    peers = [index_peers.build(name, case, room) for name in names]
    searched = search_in_turns(case, config, layers, peers)
    queries = case.queries.to(case.keys.dtype)
    outputs = {name: attend_steps(one, queries, case.scaling) for name, one in layers.items()}
    quality = measure_quality(case, config, outputs, searched.positions)
    # last, for it changes the index
    inserts = step_times(time_inserts(indexed, case))
    return {
        "source": case.source,
        "layer": case.layer,
        "tokens": case.tokens,
        "kv_heads": case.kv_heads,
        "head_dim": case.keys.shape[2],
        "q_heads": case.queries.shape[1],
        "dtype": case.dtype_name,
        "budget": config.budget,
        "build_s": median(build_seconds),
        "builds": len(build_seconds),
        "search_ms": searched.times["index"],
        "search_warm_ms": searched.warm_ms,
        "search_cold_ms": searched.cold_ms,
        "flat_search_ms": searched.times.get("flat"),
        "exact_scan_ms": searched.times["exact"],
        "insert_ms": inserts["median_ms"],
        "insert_p99_ms": inserts["p99_ms"],
        "bytes_per_token": stats.index_bytes / stats.tokens / case.kv_heads,
        "nodes_scored": searched.nodes_scored,
        "leaves_scored": searched.leaves_scored,
        **_quality_row(quality),
        "peers": {peer.name: _peer_row(peer, searched.times, quality) for peer in peers},
        "peers_left_out": [name for name in settings.peers if name not in names],
    }


def _quality_row(quality: Quality) -> dict[str, float | None]:
    error, flat_error = quality.errors["index"], quality.errors.get("flat")
    return {
        "error": error,
        "flat_error": flat_error,
        "topk_error": quality.topk_error,
        "topk_ratio": _ratio(error, quality.topk_error),
        "error_ratio": 1.0 if flat_error is None else _ratio(error, flat_error),
        "recall": quality.recalls["index"],
    }


def _ratio(error: float, other: float) -> float | None:
    return error / other if other > 0 else None


def _peer_row(peer: Peer, times: dict[str, float], quality: Quality) -> dict[str, Any]:
    return {
        "settings": peer.settings,
        "build_s": peer.build_s,
        "search_ms": times[peer.name],
        "recall": quality.recalls[peer.name],
    }
