"""Decode and prefill of one cache on a device, timed, beside the floor that its bytes set."""

from __future__ import annotations

import gc
import time
from typing import Any, NamedTuple

import torch
from gpu_caches import Offloaded, Player
from gpu_gather import GatherSweep, copy_rate
from gpu_model import make_context, weight_bytes
from gpu_timing import time_calls

_WARM_STEPS = 6
# large enough that a cache of the device does not hold it
_READ_BYTES = 1 << 32


class Bench(NamedTuple):
    """The machine, and what is the same in all cases.

    Attributes
    ----------
    read, copy : bytes a second, of the device's memory and from pinned host memory.
    """

    device: torch.device
    dtype: torch.dtype
    settings: dict[str, Any]
    read: float
    copy: float

    @classmethod
    def on(cls, device: torch.device, settings: dict[str, Any]) -> Bench:
        """Measure the machine's rates."""
        if device.type == "cuda":
            base: dict[str, Any] = {"backend": "triton"}
            dtype, sweep = torch.bfloat16, GatherSweep()
        else:
            base = {
                "backend": "twin", "budget": 48, "sink": 4, "window": 8, "leaf_size": 4,
                "leaf_target": 3, "page_size": 8, "segment_tokens": 64,
            }  # fmt: skip
            dtype, sweep = torch.float32, GatherSweep(copy_bytes=1 << 20)
        rates = read_rate(device), copy_rate(sweep, device)
        return cls(device, dtype, {**base, **settings}, *rates)


def read_rate(device: torch.device) -> float:
    """Bytes a second that the device reads of its memory: a sum over a large tensor."""
    num = _READ_BYTES if device.type == "cuda" else 1 << 20
    data = torch.zeros(num // 4, dtype=torch.float32, device=device)
    return num / time_calls([data.sum] * 4, device)


def measure_decode(player: Player, bench: Bench, steps: int) -> dict[str, Any]:
    """Fill a cache with a synthetic context and decode; one row."""
    start = time.perf_counter()
    config = player.model.config
    for layer in range(config.num_hidden_layers):
        player.take(layer, make_context(config, player.capacity, layer, bench.device, bench.dtype))
    _wait(bench.device)
    filled = time.perf_counter()
    try:
        return {"fill_s": filled - start, **_decode(player, bench, steps)}
    finally:
        player.close()
        _free(bench.device)


def _decode(player: Player, bench: Bench, steps: int) -> dict[str, Any]:
    token = torch.zeros(1, 1, dtype=torch.long, device=bench.device)
    for _ in range(_WARM_STEPS):
        token = player.step(token).argmax(-1, keepdim=True)
    fetched, before = player.fetched_bytes(), player.graph_steps()
    _reset_peak(bench.device)
    seconds = []
    for _ in range(4):
        _wait(bench.device)
        start = time.perf_counter()
        for _ in range(max(1, steps // 4)):
            token = player.step(token).argmax(-1, keepdim=True)
        _wait(bench.device)
        seconds.append((time.perf_counter() - start) / max(1, steps // 4))
    timed = 4 * max(1, steps // 4)
    graph_steps = _replayed(player, before)
    per_step = player.fetched_bytes()
    if not isinstance(player, Offloaded):
        per_step = (per_step - fetched) / timed
    floor = (weight_bytes(player.model) + player.read_bytes()) / bench.read + per_step / bench.copy
    on_device, on_host = player.held_bytes()
    full = 2 * player.model.config.num_hidden_layers * player.model.config.num_key_value_heads
    full *= player.position * player.model.config.head_dim * bench.dtype.itemsize
    tpot = min(seconds)
    return {
        "tpot_ms": 1e3 * tpot,
        "tpot_rounds_ms": [1e3 * one for one in seconds],
        "floor_ms": 1e3 * floor,
        "over_floor": tpot / floor,
        "graph_steps": graph_steps,
        "fetched_bytes_per_step": per_step,
        "device_bytes": on_device,
        "host_bytes": on_host,
        "device_share_of_full_cache": on_device / full,
        "peak_device_bytes": _peak(bench.device),
    }


def _replayed(player: Player, before: int | None) -> int | None:
    """Steps that were replayed since; an error if they should have been, and were not."""
    now = player.graph_steps()
    if now is None or before is None:
        return None
    if now == before:
        raise RuntimeError("no step ran from a CUDA graph: the times are of other steps")
    return now - before


def measure_prefill(player: Player, bench: Bench, tokens: int) -> dict[str, Any]:
    """Run a random prompt through the model; seconds until its logits, and until all is stored."""
    vocabulary = player.model.config.vocab_size
    ids = torch.randint(vocabulary, (1, tokens), device=bench.device)
    _reset_peak(bench.device)
    start = time.perf_counter()
    try:
        player.prefill(ids)
        _wait(bench.device)
        seconds = time.perf_counter() - start
        on_device, on_host = player.held_bytes()
        return {
            "prefill_s": seconds,
            "device_bytes": on_device,
            "host_bytes": on_host,
            "peak_device_bytes": _peak(bench.device),
        }
    finally:
        player.close()
        _free(bench.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
