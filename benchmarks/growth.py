"""What becomes of the tree while a model generates: fidelity, integrity, page fill, step times.

    python benchmarks/growth.py --kv DIR --json -          recorded keys, appended one by one
    python benchmarks/growth.py --synthetic --json -       the same with clustered random keys
    python benchmarks/growth.py --model embedded --json -  a model that generates, sampled

`ratio` is the error after the growth over the error of a layer built at once from the same tokens.
A step is one append and one attend; `step_cpu` is its processor time, which other programs on the
machine do not lengthen.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from baseline import full_attention, relative_errors
from common import (
    BAD_INPUT,
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
    step_times,
    write_json,
)
from synthetic import clustered_record

from icecache import IceCacheConfig, IceCacheLayer
from icecache.errors import InputError

Advance = Callable[[str], None]
Source = tuple[str, KVRecord]


def grow(layer: IceCacheLayer, record: KVRecord, start: int) -> dict[str, list[float]]:
    """Append the record's tokens from `start` on one by one, attending after each; seconds."""
    seconds: dict[str, list[float]] = {"append": [], "step": [], "step_cpu": []}
    keys, values = record.keys[None], record.values[None]
    queries = record.queries[:, None, :, None]  # [S, 1, H, 1, D]
    # the interpreter's first full collection walks every imported module, 0.1 s: not a step's cost
    gc.collect()
    for token in range(start, keys.shape[2]):
        before, before_cpu = time.perf_counter(), time.process_time()
        layer.append(keys[:, :, token : token + 1], values[:, :, token : token + 1])
        appended = time.perf_counter()
        layer.attend(queries[token % len(queries)], scaling=record.scaling)
        seconds["append"].append(appended - before)
        seconds["step"].append(time.perf_counter() - before)
        seconds["step_cpu"].append(time.process_time() - before_cpu)
    return seconds


def dense_error(layer: IceCacheLayer, record: KVRecord) -> float:
    """Error of the layer's exact path against full attention: 0 only if no token is lost.

    The two latest tokens are taken back and given again together: with two queries the layer reads
    every token that it stores.
    """
    layer.crop(2)
    layer.append(record.keys[None, :, -2:], record.values[None, :, -2:])
    pair = record.queries[:2].transpose(0, 1)[None]  # [1, H, 2, D]
    output = layer.attend(pair, scaling=record.scaling)[0, :, -1]
    last = record.queries[1:2].double()
    truth = full_attention(last, record.keys.double(), record.values.double(), record.scaling)
    return relative_errors(output[None], truth).max().item()


def measure_record(
    name: str, record: KVRecord, config: IceCacheConfig, start: int, tokens: int
) -> dict[str, Any]:
    """One row: a layer prefilled with `start` tokens and grown by up to `tokens` more."""
    record = record.head(start + tokens)
    total = record.keys.shape[1]
    if total <= start:
        raise InputError(f"{name} has {total} tokens, none to append after --start {start}")
    first = record.head(start)
    layer = prefilled_layer(config, first.keys, first.values)
    # the tree is built by the first attend, which is none of the timed steps
    attend_steps(layer, first.queries[:1], first.scaling)
    fill_built = layer.stats().fill
    seconds = grow(layer, record, start)
    layer.check_integrity()
    stats = layer.stats()
    at_once = prefilled_layer(config, record.keys, record.values)
    truth = full_attention(record.queries, record.keys, record.values, record.scaling)
    error, built_error = (
        relative_errors(attend_steps(one, record.queries, record.scaling), truth).mean().item()
        for one in (layer, at_once)
    )
    return {
        "file": name,
        "layer": record.layer,
        "budget": config.budget,
        "start": start,
        "tokens": total,
        "tokens_held": stats.tokens,
        "dense_error": dense_error(layer, record),
        "error": error,
        "error_at_once": built_error,
        "ratio": error / built_error,
        "fill_built": fill_built,
        "fill_grown": stats.fill,
        "fill_at_once": at_once.stats().fill,
        **{part: step_times(found) for part, found in seconds.items()},
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that the limits are about, the worst or the mean over the rows."""
    return {
        "mean_ratio": sum(row["ratio"] for row in rows) / len(rows),
        "max_ratio": max(row["ratio"] for row in rows),
        "min_fill_built": min(row["fill_built"] for row in rows),
        "min_fill_grown": min(row["fill_grown"] for row in rows),
        "max_dense_error": max(row["dense_error"] for row in rows),
        "tokens_lost": sum(row["tokens"] - row["tokens_held"] for row in rows),
        "max_step_over_median": max(row["step"]["max_over_median"] for row in rows),
        "max_step_cpu_over_median": max(row["step_cpu"]["max_over_median"] for row in rows),
        "max_p99_over_median": max(row["step"]["p99_over_median"] for row in rows),
    }


def run(
    sources: Iterator[Source] | list[Source],
    *,
    budget: int = 256,
    start: int = 2048,
    tokens: int = 4096,
    variant: str = "default",
    overrides: dict[str, Any] | None = None,
    advance: Advance = lambda name: None,
) -> dict[str, Any]:
    """Grow a layer from every source; the report as one JSON-able mapping."""
    stamp = environment()
    config = build_config(variant, budget, overrides or {})
    rows = []
    for name, record in sources:
        advance(f"{name} layer {record.layer}")
        rows.append(measure_record(name, record, config, start, tokens))
    return {
        "benchmark": "growth",
        "variant": variant,
        "overrides": overrides or {},
        "environment": stamp,
        "rows": rows,
        **summary(rows),
    }


def recorded(folder: Path, steps: int | None) -> Iterator[Source]:
    """Every recorded layer of every file of a folder."""
    for path in kv_files(folder):
        for record in read_records(path, steps):
            yield path.stem, record


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--kv", type=Path, help="folder of *.safetensors, or one")
    source.add_argument("--synthetic", action="store_true", help="clustered random keys")
    source.add_argument("--model", help="folder of a model, or 'embedded': generate with it")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--variant", choices=["default", "paper"], default="default")
    parser.add_argument("--start", type=int, default=2048, help="tokens prefilled")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens appended, at most")
    parser.add_argument("--steps", type=int, help="recorded queries used (default: all)")
    parser.add_argument("--prompt-file", type=Path, help="with --model: the prompt's text")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
                        help="with --model")  # fmt: skip
    add_common_options(parser)
    return parser


def measure(options: argparse.Namespace) -> dict[str, Any]:
    overrides = parse_overrides(options.overrides)
    if options.model:
        from growth_model import run_model

        return run_model(options, overrides)
    if options.synthetic:
        sources = [("synthetic", clustered_record(options.start + options.tokens))]
    else:
        sources = list(recorded(options.kv, options.steps))
    with progress_bar() as bar:
        task = bar.add_task("growth", total=len(sources))
        return run(
            sources, budget=options.budget, start=options.start, tokens=options.tokens,
            variant=options.variant, overrides=overrides,
            advance=lambda name: bar.update(task, advance=1, description=name),
        )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    try:
        report = measure(options)
    except BAD_INPUT as problem:
        parser.error(str(problem))
    if options.json:
        write_json(report, options.json)
    else:
        show(report)
    return 0


def show(report: dict[str, Any]) -> None:
    if "rows" in report:
        columns = ["file", "layer", "tokens", "error", "ratio", "fill_built", "fill_grown"]
        print_table("growth", report["rows"], columns)
    for key, value in report.items():
        if isinstance(value, int | float):
            print(f"{key}: {value:.4g}")


if __name__ == "__main__":
    raise SystemExit(main())
