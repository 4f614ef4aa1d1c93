"""The index alone, from a thousand tokens to a million: build, search, insert, bytes, error.

    python benchmarks/index.py --threads 1 --json index.json --png index.png
    python benchmarks/index.py --sizes 8192 32768 --heads 2 --head-dim 64 --threads 1 --json -
    python benchmarks/index.py --kv DIR --sizes 1024 4096 8192 --json -

A row is one layer and one length of context. Search is scoring and choosing within the budget for
one query token and all its heads; the exact scan does the same over every key in float32, and takes
turns with it in one process, as the peers do (`search_ms`; alone, with warm and with cold caches:
`search_warm_ms`, `search_cold_ms`). `error_ratio` is the error of the attention output
over that of a flat scan of every leaf, `topk_ratio` over that of the exact top-k tokens, `recall`
the attention mass of the selected tokens over that of the exact top-k ones.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import index_peers
from common import (
    BAD_INPUT,
    add_common_options,
    build_config,
    environment,
    parse_overrides,
    print_table,
    progress_bar,
    set_threads,
    write_json,
)
from index_case import DTYPES, Job, Shape, recorded_jobs, synthetic_jobs
from index_measure import Settings, measure

from icecache import IceCacheConfig
from icecache.errors import BackendUnavailable, HostMemoryExceeded, InputError

SIZES = [1 << power for power in (10, 12, 14, 16, 18, 20)]
SHAPES = [Shape(2, 64, 7), Shape(8, 128, 4)]
LARGEST = 1 << 24


def run(
    jobs: list[Job],
    settings: Settings,
    *,
    skipped: list[dict[str, Any]] | None = None,
    advance: Callable[[str], None] = lambda name: None,
    save: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measure every job; the report as one JSON-able mapping, saved after each row."""
    report: dict[str, Any] = {
        "benchmark": "index",
        "environment": environment(),
        "config": dataclasses.asdict(settings.config),
        "peer_tokens": settings.peer_tokens if settings.peers else None,
        "rows": [],
        "skipped": list(skipped or []),
    }
    for job in jobs:
        advance(job.name)
        try:
            report["rows"].append(measure(job.make(), settings))
        except HostMemoryExceeded as error:
            left = {"source": job.name, "tokens": job.tokens, "reason": str(error)}
            report["skipped"].append(left)
        save(report)
    return report


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, help="tokens of context (default: 1k to 1M)"
    )
    parser.add_argument("--heads", type=int, help="KV heads (default: 2 x 64 and then 8 x 128)")
    parser.add_argument("--head-dim", type=int)
    parser.add_argument(
        "--group", type=int, help="query heads per KV head (default: 7 at 2 x 64, else 4)"
    )
    parser.add_argument("--kv", type=Path, help="recorded keys instead: *.safetensors, or one")
    parser.add_argument("--synthetic", action="store_true", help="random keys beside --kv")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8, help="query tokens")
    parser.add_argument("--inserts", type=int, default=256, help="tokens inserted one by one")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of the pages")
    parser.add_argument("--peers", nargs="+", default=[], choices=list(index_peers.PACKAGES))
    parser.add_argument("--peer-tokens", type=int, default=1 << 17, help="longest for the peers")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curves")
    add_common_options(parser)
    return parser


def shapes_of(options: argparse.Namespace) -> list[Shape]:
    """The synthetic layers that the options ask for."""
    given = (options.heads, options.head_dim)
    if given == (None, None):
        return [shape._replace(group=options.group or shape.group) for shape in SHAPES]
    if None in given:
        raise InputError("--heads and --head-dim must be given together, got one of them")
    usual = {(shape.kv_heads, shape.head_dim): shape.group for shape in SHAPES}
    return [Shape(*given, options.group or usual.get(given, 4))]


def check(options: argparse.Namespace, config: IceCacheConfig) -> None:
    """Raise `InputError` on the first option out of its range; nothing is measured then."""
    limits = [("--sizes", size, config.budget + 1, LARGEST) for size in options.sizes]
    limits += [
        ("--heads", options.heads, 1, 256),
        ("--head-dim", options.head_dim, 1, 1024),
        ("--group", options.group, 1, 256),
        ("--threads", options.threads, 1, 1024),
        ("--steps", options.steps, 1, 1 << 16),
        ("--inserts", options.inserts, 1, 1 << 20),
        ("--peer-tokens", options.peer_tokens, 1, LARGEST),
    ]
    for name, value, low, high in limits:
        if value is not None and not low <= value <= high:
            reason = " (above the budget)" if name == "--sizes" else ""
            raise InputError(f"{name} must be from {low}{reason} to {high}, got {value}")
    shaped = [n for n in ("heads", "head_dim", "group") if getattr(options, n) is not None]
    if shaped and options.kv and not options.synthetic:
        name = shaped[0].replace("_", "-")
        raise InputError(f"--{name} is of random keys: with --kv it needs --synthetic")
    for path in (options.png, options.json if options.json != "-" else None):
        if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise InputError(f"--png and --json must be files in existing folders, got {path}")
    for name in options.peers:
        index_peers.load(name)
    if options.png and find_spec("matplotlib") is None:
        raise BackendUnavailable("--png needs matplotlib: pip install matplotlib")


def find_jobs(
    options: argparse.Namespace, config: IceCacheConfig
) -> tuple[list[Job], list[dict[str, Any]]]:
    """What the options ask to be measured, and the lengths that the recordings do not have."""
    common = {
        "steps": options.steps,
        "inserts": options.inserts,
        "dtype": options.dtype,
        "config": config,
    }
    jobs: list[Job] = []
    skipped: list[dict[str, Any]] = []
    if options.kv:
        jobs, skipped = recorded_jobs(options.kv, options.sizes, **common)
    if options.synthetic or not options.kv:
        jobs += synthetic_jobs(shapes_of(options), options.sizes, **common)
    if not jobs:
        raise InputError(f"--sizes must be lengths that {options.kv} holds, got {options.sizes}")
    return jobs, skipped


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """The report that the options ask for; a JSON file and a picture are written as well."""
    config = build_config("default", options.budget, parse_overrides(options.overrides))
    check(options, config)
    set_threads(options.threads)
    jobs, skipped = find_jobs(options, config)
    to_file = options.json if options.json != "-" else None
    with progress_bar() as bar:
        task = bar.add_task("index", total=len(jobs))

        def advance(name: str) -> None:
            bar.update(task, description=name)

        def save(report: dict[str, Any]) -> None:
            bar.update(task, advance=1)
            if to_file:
                write_json(report, to_file)

        settings = Settings(config, options.peers, options.peer_tokens)
        report = run(jobs, settings, skipped=skipped, advance=advance, save=save)
    if options.png and report["rows"]:
        from index_plot import draw

        stamp = report["environment"]
        threads = f"{stamp['threads']} thread" + "s" * (stamp["threads"] > 1)
        title = f"One layer, budget {config.budget}: {stamp['cpu']}, {threads}"
        draw(report["rows"], title, options.png)
    return report


def show(report: dict[str, Any]) -> None:
    rows = [{**row, "case": _case_name(row)} for row in report["rows"]]
    times = [
        "case",
        "tokens",
        "build_s",
        "search_ms",
        "search_cold_ms",
        "exact_scan_ms",
        "insert_ms",
    ]
    rest = ["case", "tokens", "bytes_per_token", "topk_ratio", "error_ratio", "recall"]
    print_table(f"index, budget {report['config']['budget']}: time", rows, times)
    print_table("bytes of the index, error of the output, attention found", rows, rest)
    for row in report["rows"]:
        for name, peer in row["peers"].items():
            figures = ", ".join(f"{key} {peer[key]:.4g}" for key in list(peer)[1:])
            print(f"{_case_name(row)}, {row['tokens']} tokens: {name} {figures}")
    for one in report["skipped"]:
        print(f"left out {one['source']}: {one['reason']}")


def _case_name(row: dict[str, Any]) -> str:
    source = "" if row["source"] == "synthetic" else f"{row['source']} layer {row['layer']} "
    return f"{source}{row['kv_heads']} x {row['head_dim']}"


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        report = measure_all(options)
        if not options.json:
            show(report)
        elif options.json == "-":
            write_json(report, "-")
    except BAD_INPUT as problem:
        parser.error(str(problem))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
