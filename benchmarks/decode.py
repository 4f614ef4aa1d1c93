"""Time per output token of IceCache and of transformers' DynamicCache, side by side.

    python benchmarks/decode.py --context 256 2048 8192 32768 --json -

Contexts are synthetic: clustered random keys and values of the embedded model's shape, put into
both caches; prefill is not measured. The caches take turns in blocks of steps in one process, so
that whatever else the machine does hits both alike. `ratio` is DynamicCache's median over
IceCache's.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import (
    build_config,
    environment,
    parse_overrides,
    print_table,
    progress_bar,
    set_threads,
    step_times,
    write_json,
)
from synthetic import clustered_record
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from icecache.integrations.embedded import load
from icecache.integrations.transformers import IceCache, attach

BLOCK = 8


def layer_tokens(model: PreTrainedModel, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """One layer's keys and values, `[1, kv_heads, tokens, head_dim]`, in the model's dtype."""
    config = model.config
    record = clustered_record(
        tokens,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        steps=1,
        seed=seed,
    )
    return record.keys[None].to(model.dtype), record.values[None].to(model.dtype)


def filled_caches(
    model: PreTrainedModel, tokens: int, settings: dict[str, Any]
) -> dict[str, Cache]:
    """Both caches, holding the same `tokens` tokens."""
    ice, dynamic = IceCache(model, **settings), DynamicCache(config=model.config)
    for index, layer in enumerate(ice.layers):
        keys, values = layer_tokens(model, tokens, index)
        dynamic.update(keys, values, index)
        layer.lazy_initialization(keys, values)
        layer.core.prefill(keys, values)
        layer.num_columns = tokens
    return {"icecache": ice, "dynamic": dynamic}


def run_block(model: PreTrainedModel, cache: Cache, steps: int) -> list[float]:
    """Seconds of `steps` decode steps."""
    token, seconds = torch.ones(1, 1, dtype=torch.long), []
    for _ in range(steps):
        start = time.perf_counter()
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        seconds.append(time.perf_counter() - start)
        token = logits[:, -1].argmax(-1, keepdim=True)
    return seconds


def measure(
    model: PreTrainedModel, tokens: int, steps: int, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of one context length, IceCache first."""
    caches = filled_caches(model, tokens, settings)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for block in range(1 + steps // BLOCK):
        with attach(model, **settings):
            ice = run_block(model, caches["icecache"], BLOCK)
        dynamic = run_block(model, caches["dynamic"], BLOCK)
        # the first block warms up: it builds the trees, and threads and caches settle
        if block:
            seconds["icecache"] += ice
            seconds["dynamic"] += dynamic
    times = {name: step_times(each) for name, each in seconds.items()}
    layers = caches["icecache"].stats().layers.values()
    held = {
        "icecache": sum(layer.host_bytes for layer in layers),
        "dynamic": sum(layer.full_cache_bytes for layer in layers),
    }
    ratio = times["dynamic"]["median_ms"] / times["icecache"]["median_ms"]
    return [
        {
            "cache": name,
            "context": tokens,
            "synthetic": True,
            "tpot_ms_median": found["median_ms"],
            "tpot_ms_p99": found["p99_ms"],
            "kv_bytes": held[name],
            "ratio": ratio,
        }
        for name, found in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, nargs="+", default=[256, 2048, 8192, 32768])
    parser.add_argument("--steps", type=int, default=64, help="timed steps of each cache")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--json", metavar="PATH", help="'-' is stdout, and nothing else")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    settings = {"budget": arguments.budget, **parse_overrides(arguments.set)}
    build_config("default", arguments.budget, parse_overrides(arguments.set))
    stamp = environment()
    model, _ = load("embedded", getattr(torch, arguments.dtype))
    rows: list[dict[str, Any]] = []
    with progress_bar() as bar, torch.no_grad():
        for tokens in bar.track(arguments.context, description="decode"):
            rows += measure(model, tokens, arguments.steps, settings)
    report = {"benchmark": "decode", "environment": stamp, "dtype": arguments.dtype, "rows": rows}
    if arguments.json:
        write_json(report, arguments.json)
    if arguments.json != "-":
        columns = ["context", "cache", "tpot_ms_median", "tpot_ms_p99", "kv_bytes", "ratio"]
        print_table(f"decode, budget {arguments.budget}", rows, columns)


if __name__ == "__main__":
    main()
