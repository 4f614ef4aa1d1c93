"""Fidelity over the bytes of the index: leaves of several sizes, means of 8 bits, of 4 and of none.

    python benchmarks/memory.py --kv DIR --threads 1 --json memory.json --png memory.png

First table: for every leaf size and code width the error of the attention output over that of exact
top-k tokens (`ratio`, as in fidelity.py), and the index bytes per token and KV head. Second table:
for every fan-out and field of view, each search a descent, the bytes, the leaves and nodes scored
per query token and KV head, and the error over that of a flat scan of every leaf.

The library stores 8 bits. Rows of other codes are marked `simulated`: after the build the codes of
every leaf and node are requantised to 15 levels with a scale per row, the spread takes the coarser
rounding in, and bytes are counted as two codes would be packed in one. Without value means there is
nothing to estimate the remainder from, so it is dropped.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from baseline import full_attention, relative_errors, topk_attention
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
    write_json,
)
from memory_codes import CODES, Codes, narrowed, saved_bytes
from torch import Tensor

from icecache import IceCacheConfig, IceCacheLayer
from icecache.errors import BackendUnavailable, InputError
from icecache.tree.tree import Tree

Advance = Callable[[str], None]
Rows = list[dict[str, Any]]

_LEAF_FILL = 0.62
_EVERY_LEAF = 1 << 30
_VARIED = ("budget", "leaf_size", "leaf_target", "page_size", "fan_out", "field_of_view",
           "remainder", "selection")  # fmt: skip


class Sweep(NamedTuple):
    """What is varied."""

    leaf_sizes: tuple[int, ...] = (4, 6, 8, 12, 16, 32)
    fan_outs: tuple[int, ...] = (8, 12, 16)
    fields: tuple[int, ...] = (64, 128, 256, 512)


class Case(NamedTuple):
    """A recorded layer, its full attention, and the error of exact top-k tokens at a budget."""

    record: KVRecord
    full: Tensor
    topk_error: float


def case_of(record: KVRecord, config: IceCacheConfig) -> Case:
    tokens = record.keys.shape[1]
    if tokens <= config.budget:
        raise InputError(f"a recording of {tokens} tokens has no index at budget {config.budget}")
    queries, keys, values = record.queries.double(), record.keys.double(), record.values.double()
    full = full_attention(queries, keys, values, record.scaling)
    topk = topk_attention(
        queries, keys, values, record.scaling,
        budget=config.budget, sink=config.sink, window=config.window,
    )  # fmt: skip
    return Case(record, full, relative_errors(topk, full).mean().item())


def with_leaves(config: IceCacheConfig, leaf_size: int) -> IceCacheConfig | None:
    """The config with leaves of a size; None where the budget has no room for one of them."""
    if config.budget < config.sink + config.window + leaf_size:
        return None
    return config.replace(
        leaf_size=leaf_size,
        leaf_target=math.ceil(_LEAF_FILL * leaf_size),
        page_size=max(config.page_size, leaf_size),
    )


def built_layer(record: KVRecord, config: IceCacheConfig) -> IceCacheLayer:
    """A layer with its tree, which the first attend builds."""
    layer = prefilled_layer(config, record.keys, record.values)
    attend_steps(layer, record.queries[:1], record.scaling)
    return layer


def tree_of(layer: IceCacheLayer) -> Tree:
    context = layer._context
    assert context is not None and context.indexed is not None
    return context.indexed.tree


def sample(layer: IceCacheLayer, case: Case, codes: Codes) -> dict[str, float]:
    """Error and index of a layer, its means in the given widths."""
    record, tree = case.record, tree_of(layer)
    with narrowed(tree, codes):
        output = attend_steps(layer, record.queries, record.scaling)
    stats = layer.stats()
    entries = stats.leaves + stats.nodes
    saved = saved_bytes(codes, record.keys.shape[-1], entries)
    return {
        "error": relative_errors(output, case.full).mean().item(),
        "topk_error": case.topk_error,
        "index_bytes": stats.index_bytes - saved,
        "tokens": tree.leaves.num_tokens,
        "leaves": stats.leaves,
        "pages": stats.pages,
        "nodes": stats.nodes,
        "scored": (stats.nodes_scored + stats.leaves_scored) / stats.sparse_steps / tree.num_rows,
    }


def summary(samples: list[dict[str, float]]) -> dict[str, float]:
    """The recorded layers of a file as one; every layer has as many steps, heads and tokens."""
    mean = {name: fmean(one[name] for one in samples) for name in samples[0]}
    return {
        "ratio": mean["error"] / mean["topk_error"],
        "error": mean["error"],
        "topk_error": mean["topk_error"],
        "bytes_per_token": mean["index_bytes"] / mean["tokens"],
        "mean_leaf": mean["tokens"] / mean["leaves"],
        "tokens_per_page": mean["tokens"] / mean["pages"],
        "nodes_per_token": mean["nodes"] / mean["tokens"],
        "scored": mean["scored"],
    }


def leaf_rows(cases: list[Case], config: IceCacheConfig) -> Rows:
    """One leaf size of one file: a row for each code width."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for case in cases:
        layers = {}
        for name, codes in CODES.items():
            estimates = codes.values > 0
            if estimates not in layers:
                layers[estimates] = built_layer(case.record, config.replace(remainder=estimates))
            found[name].append(sample(layers[estimates], case, codes))
    sizes = {name: getattr(config, name) for name in ("leaf_size", "leaf_target", "page_size")}
    return [
        {**sizes, "codes": name, "simulated": CODES[name].simulated, **summary(samples)}
        for name, samples in found.items()
    ]


def field_rows(cases: list[Case], config: IceCacheConfig, fields: tuple[int, ...]) -> Rows:
    """One fan-out of one file: a row for each field of view."""

    def measure(**settings: int) -> dict[str, float]:
        changed = config.replace(**settings)
        layers = [built_layer(case.record, changed) for case in cases]
        return summary([sample(*pair, CODES["int8"]) for pair in zip(layers, cases)])

    flat = measure(crossover=_EVERY_LEAF)
    rows = []
    for field in fields:
        row = measure(crossover=0, field_of_view=field)
        over = {"error_over_flat": row["error"] / flat["error"], "scored_flat": flat["scored"]}
        rows.append({"fan_out": config.fan_out, "field_of_view": field, **row, **over})
    return rows


def run(
    folder: Path,
    budgets: list[int],
    sweep: Sweep,
    *,
    overrides: dict[str, Any] | None = None,
    steps: int | None = 12,
    advance: Advance = lambda name: None,
) -> dict[str, Any]:
    """Measure every file at every budget; the report as one JSON-able mapping."""
    report: dict[str, Any] = {
        "benchmark": "memory",
        "overrides": overrides or {},
        "environment": environment(),
        "leaf_rows": [],
        "field_rows": [],
    }
    for path in kv_files(folder):
        records = list(read_records(path, steps))
        about = {"file": path.stem, "context": records[0].keys.shape[1]}
        about |= {"head_dim": records[0].keys.shape[2], "steps": len(records[0].queries)}
        for budget in budgets:
            config = build_config("default", budget, overrides or {})
            cases = [case_of(record, config) for record in records]
            for leaf_size in sweep.leaf_sizes:
                advance(f"{path.stem} @ {budget}, leaf_size {leaf_size}")
                sized = with_leaves(config, leaf_size)
                rows = [] if sized is None else leaf_rows(cases, sized)
                report["leaf_rows"] += [{**about, "budget": budget, **row} for row in rows]
            for fan_out in sweep.fan_outs:
                advance(f"{path.stem} @ {budget}, fan_out {fan_out}")
                rows = field_rows(cases, config.replace(fan_out=fan_out), sweep.fields)
                report["field_rows"] += [{**about, "budget": budget, **row} for row in rows]
    report["leaf_means"] = means(report["leaf_rows"], ("budget", "codes", "leaf_size"))
    report["field_means"] = means(report["field_rows"], ("budget", "fan_out", "field_of_view"))
    return report


def means(rows: Rows, keys: tuple[str, ...]) -> Rows:
    """Rows that agree in `keys` as one: means over the files of all figures that are floats."""
    groups: dict[tuple[Any, ...], Rows] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    merged = []
    for group in groups.values():
        same = {k: v for k, v in group[0].items() if all(row[k] == v for row in group)}
        figures = [name for name, value in group[0].items() if isinstance(value, float)]
        mean = {name: fmean(row[name] for row in group) for name in figures}
        merged.append({**same, **mean, "files": len(group)})
    return merged


def make_parser() -> argparse.ArgumentParser:
    sweep = Sweep()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kv", type=Path, required=True, help="folder of *.safetensors, or one")
    parser.add_argument("--budget", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--leaf-size", type=int, nargs="+", default=sweep.leaf_sizes)
    parser.add_argument("--fan-out", type=int, nargs="*", default=sweep.fan_outs)
    parser.add_argument("--field-of-view", type=int, nargs="*", default=sweep.fields)
    parser.add_argument("--steps", type=int, default=12, help="recorded steps (default: 12)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curves")
    add_common_options(parser)
    return parser


def check(options: argparse.Namespace) -> dict[str, Any]:
    """The overrides; `InputError` for what the benchmark varies, and for files it cannot write."""
    overrides = parse_overrides(options.overrides)
    if varied := [key for key in overrides if key in _VARIED]:
        raise InputError(f"--set must not name what is varied here, got {varied[0]!r}")
    for path in (options.png, options.json if options.json != "-" else None):
        if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise InputError(f"--png and --json must be files in existing folders, got {path}")
    if options.png and find_spec("matplotlib") is None:
        raise BackendUnavailable("--png needs matplotlib: pip install matplotlib")
    return overrides


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """The report that the options ask for; a picture is drawn as well."""
    overrides = check(options)
    set_threads(options.threads)
    sweep = Sweep(*(tuple(v) for v in (options.leaf_size, options.fan_out, options.field_of_view)))
    turns = len(sweep.leaf_sizes) + len(sweep.fan_outs)
    with progress_bar() as bar:
        total = len(kv_files(options.kv)) * len(options.budget) * turns
        task = bar.add_task("memory", total=total)

        def advance(name: str) -> None:
            bar.update(task, advance=1, description=name)

        report = run(
            options.kv, options.budget, sweep,
            overrides=overrides, steps=options.steps, advance=advance,
        )  # fmt: skip
    if options.png:
        from memory_plot import draw

        draw(report["leaf_means"], options.png)
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        report = measure_all(options)
        if options.json:
            write_json(report, options.json)
        if options.json != "-":
            show(report)
    except BAD_INPUT as problem:
        parser.error(str(problem))
    return 0


def show(report: dict[str, Any]) -> None:
    columns = ["budget", "codes", "leaf_size", "mean_leaf", "bytes_per_token", "ratio", "simulated"]
    title = "means over {} recordings: error over top-k's, by leaf size and codes"
    print_table(title.format(report["leaf_means"][0]["files"]), report["leaf_means"], columns)
    fields = ["budget", "fan_out", "field_of_view", "bytes_per_token", "scored", "error_over_flat"]
    longest = max(row["context"] for row in report["leaf_rows"])
    rows = [row for row in report["field_rows"] if row["context"] == longest]
    print_table("every search a descent: means over the recordings", report["field_means"], fields)
    print_table(f"the same, {longest} tokens", rows, [*fields, "scored_flat"])


if __name__ == "__main__":
    raise SystemExit(main())
