"""Error of the attention output on recorded keys, values and queries, beside exact top-k tokens.

    python benchmarks/fidelity.py --kv DIR --budget 256 64 --json -

For every file, layer, head and recorded step: |out - full| / |full|, for IceCache and for the exact
top-k tokens at the same budget, sink and window (no remainder). `ratio` is the one mean over the
other; below 1 the selection with its remainder beats the best that dropping tokens can do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baseline import full_attention, relative_errors, topk_attention
from common import (
    BAD_INPUT,
    VARIANTS,
    KVRecord,
    add_common_options,
    attend_steps,
    build_config,
    environment,
    kv_files,
    parse_overrides,
    prefilled_layer,
    print_table,
    progress_bar,
    read_records,
    set_threads,
    write_json,
)

from icecache import IceCacheConfig

Advance = Callable[[str], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PAGING = ("mean_leaf", "pages_per_step", "fetched_per_step")


def measure_record(
    record: KVRecord, config: IceCacheConfig, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Errors of one recorded layer: tensors `error` and `topk_error` `[steps, heads]`, seconds.

    `pages_per_step` and `fetched_per_step` are of a KV head, without the step that built the tree.
    """
    keys, values, queries = record.keys.double(), record.values.double(), record.queries.double()
    full = full_attention(queries, keys, values, record.scaling)
    topk = topk_attention(
        queries, keys, values, record.scaling,
        budget=config.budget, sink=config.sink, window=config.window,
    )  # fmt: skip
    start = time.perf_counter()
    layer = prefilled_layer(config, record.keys.to(dtype), record.values.to(dtype))
    # the tree is built by the first attend, which is none of the timed ones
    attend_steps(layer, record.queries[:1].to(dtype), record.scaling)
    built = time.perf_counter()
    before = layer.stats()
    begun = time.perf_counter()
    output = attend_steps(layer, record.queries.to(dtype), record.scaling)
    done = time.perf_counter()
    after = layer.stats()
    heads, tokens, _ = keys.shape
    steps = heads * len(output)
    return {
        "error": relative_errors(output, full),
        "topk_error": relative_errors(topk, full),
        "build_s": built - start,
        "attend_ms": 1e3 * (done - begun) / len(output),
        "mean_leaf": heads * (tokens - config.sink - config.window) / max(1, after.leaves),
        "pages_per_step": (after.pages_selected - before.pages_selected) / steps,
        "fetched_per_step": (after.pages_fetched - before.pages_fetched) / steps,
        "stats": after,
    }


def measure_file(
    path: Path, config: IceCacheConfig, steps: int | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """One row: a file at a budget, means over its recorded layers, steps and heads."""
    records = list(read_records(path, steps))
    found = [measure_record(record, config, DTYPES[dtype]) for record in records]
    error = torch.stack([one["error"] for one in found]).mean().item()
    topk_error = torch.stack([one["topk_error"] for one in found]).mean().item()
    last = found[-1]["stats"]
    return {
        "file": path.stem,
        "budget": config.budget,
        "error": error,
        "topk_error": topk_error,
        "ratio": error / topk_error if topk_error > 0 else None,
        "tokens": records[0].keys.shape[1],
        "steps": len(records[0].queries),
        "layers": [record.layer for record in records],
        "layer_errors": [one["error"].mean().item() for one in found],
        "tokens_attended": last.tokens_attended,
        "fill": last.fill,
        **{name: sum(one[name] for one in found) / len(found) for name in PAGING},
        "sparse_steps": sum(one["stats"].sparse_steps for one in found),
        "dense_steps": sum(one["stats"].dense_steps for one in found),
        "build_s": sum(one["build_s"] for one in found) / len(found),
        "attend_ms": sum(one["attend_ms"] for one in found) / len(found),
    }


def run(
    folder: Path,
    budgets: list[int],
    *,
    variant: str = "default",
    overrides: dict[str, Any] | None = None,
    steps: int | None = None,
    dtype: str = "float32",
    advance: Advance = lambda name: None,
) -> dict[str, Any]:
    """Measure every file of a folder at every budget; the report as one JSON-able mapping."""
    stamp = environment()
    configs = [build_config(variant, budget, overrides or {}) for budget in budgets]
    rows = []
    for path in kv_files(folder):
        for config in configs:
            advance(f"{path.stem} @ {config.budget}")
            rows.append(measure_file(path, config, steps, dtype))
    return {
        "benchmark": "fidelity",
        "variant": variant,
        "overrides": overrides or {},
        "dtype": dtype,
        "sink_window": {str(one.budget): [one.sink, one.window] for one in configs},
        "environment": stamp,
        "rows": rows,
        "mean_ratio": {str(one.budget): _mean_ratio(rows, one.budget) for one in configs},
    }


def _mean_ratio(rows: list[dict[str, Any]], budget: int) -> float | None:
    """Mean of the files' ratios; None where top-k is already exact (budget >= context)."""
    ratios = [row["ratio"] for row in rows if row["budget"] == budget]
    ratios = [ratio for ratio in ratios if ratio is not None]
    return sum(ratios) / len(ratios) if ratios else None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kv", type=Path, required=True, help="folder of *.safetensors, or one")
    parser.add_argument("--budget", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--variant", choices=VARIANTS, default="default")
    parser.add_argument("--steps", type=int, help="recorded steps, evenly spaced (default: all)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    add_common_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    try:
        with progress_bar() as bar:
            task = bar.add_task("fidelity", total=len(kv_files(options.kv)) * len(options.budget))

            def advance(name: str) -> None:
                bar.update(task, advance=1, description=name)

            report = run(
                options.kv, options.budget, variant=options.variant,
                overrides=parse_overrides(options.overrides), steps=options.steps,
                dtype=options.dtype, advance=advance,
            )  # fmt: skip
        if options.json:
            write_json(report, options.json)
        else:
            show(report)
    except BAD_INPUT as problem:
        parser.error(str(problem))
    return 0


def show(report: dict[str, Any]) -> None:
    columns = ["file", "tokens", "budget", "error", "topk_error", "ratio"]
    print_table(f"fidelity, variant {report['variant']}", report["rows"], columns)
    for budget, ratio in report["mean_ratio"].items():
        found = "top-k is exact" if ratio is None else f"{ratio:.3f}"
        print(f"mean ratio to exact top-k at {budget}: {found}")


if __name__ == "__main__":
    raise SystemExit(main())
