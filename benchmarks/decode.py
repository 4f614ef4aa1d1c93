"""Time per output token of IceCache beside the caches of transformers, in one process.

    python benchmarks/decode.py --context 256 2048 8192 32768 --json -
    python benchmarks/decode.py --model qwen-0.5b-shape --caches icecache dynamic --png tpot.png

Real contexts are a prompt, prefilled by each cache in the same chunks of 2,048 tokens. Synthetic
ones are clustered random keys and values of the model's shape, the same in every cache: without
prefill, for lengths and models for which that would take too long (`--synthetic auto`: above 8,192
tokens, or with random weights). The caches take turns in blocks of 8 steps, so that whatever else
the machine does hits all alike; the first block is not timed.

`ratio` is how often a cache's step fits into DynamicCache's, the median over the blocks.
DynamicCache answers greedily and the others are given its tokens; `agreement` is the share of timed
steps in which they would have said the next one too, in real contexts. `icecache` runs its steps as
`attach` does by default, natively where the model has such a step; `icecache:torch` as the model
does them, `icecache:compiled` through torch.compile; `llama.cpp` the same model in 4 bits a weight,
where it is installed. `native_steps` counts those of a cache's steps that ran natively.
`prefill_s` ends with the prompt's last logits; `settle_s` is what a cache's
own threads took after that, before anything else ran. `kv_bytes` is what a cache holds at the end,
index and reserved room included. `peak_rss` is sampled every 20 ms by a thread during a cache's own
prefill and blocks, with nothing subtracted: the process holds the model, and the other caches that
are filled by then.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
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
from decode_caches import COMPILED, OPENERS, TORCH, sort_out
from decode_measure import BLOCK, CHUNK, Case, measure
from decode_model import SHAPES, Subject, check_model, load_subject, prompt_ids

from icecache.errors import BackendUnavailable, HostMemoryExceeded, InputError

CONTEXTS = [256, 2048, 8192, 32768]
LONGEST_PREFILL = 8192
_LARGEST = 1 << 24


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="embedded",
        help=f"embedded, {', '.join(SHAPES)} (random weights), or the folder of a model",
    )
    parser.add_argument("--context", type=int, nargs="+", default=CONTEXTS, help="tokens")
    parser.add_argument(
        "--caches",
        nargs="+",
        default=[name for name in OPENERS if name not in (COMPILED, TORCH)],
        metavar="NAME",
        help=f"of {', '.join(OPENERS)} (default: all but IceCache's two other kinds of step; those "
        "that cannot run are named)",
    )
    parser.add_argument("--synthetic", choices=["auto", "always", "never"], default="auto")
    parser.add_argument("--text", type=Path, metavar="FILE", help="of the real contexts")
    parser.add_argument("--steps", type=int, default=64, help="timed steps of each cache")
    parser.add_argument("--budget", type=int, default=256, help="of IceCache")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw time over context")
    add_common_options(parser)
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise `InputError` on the first option out of its rule; nothing is loaded then."""
    limits = [("--context", tokens, _LARGEST) for tokens in options.context]
    limits += [("--steps", options.steps, 1 << 16), ("--threads", options.threads, 1024)]
    for name, value, high in limits:
        if value is not None and not 1 <= value <= high:
            raise InputError(f"{name} must be from 1 to {high}, got {value}")
    for name in options.caches:
        if name not in OPENERS:
            raise InputError(f"--caches must be of {', '.join(OPENERS)}, got {name!r}")
    check_model(options.model)
    if options.text and not options.text.is_file():
        raise InputError(f"--text must be an existing file, got {options.text}")
    for path in (options.png, options.json if options.json != "-" else None):
        if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise InputError(f"--png and --json must be files in existing folders, got {path}")
    if options.png and find_spec("matplotlib") is None:
        raise BackendUnavailable("--png needs matplotlib: pip install matplotlib")


def make_cases(
    options: argparse.Namespace, subject: Subject, settings: dict[str, Any]
) -> list[Case]:
    """A case for each length, the real ones with the beginning of one prompt."""
    lengths = list(dict.fromkeys(options.context))
    auto = [n for n in lengths if n <= LONGEST_PREFILL and not subject.is_random]
    real = {"auto": auto, "always": [], "never": lengths}[options.synthetic]
    if options.text and not real:
        raise InputError("--text is of real contexts, and all that were asked for are synthetic")
    token_ids = prompt_ids(subject, max(real), options.text) if real else None
    return [
        Case(
            tokens,
            None if token_ids is None or tokens not in real else token_ids[:, :tokens],
            options.steps,
            settings,
        )
        for tokens in lengths
    ]


def run(
    subject: Subject,
    cases: list[Case],
    names: list[str],
    report: dict[str, Any],
    *,
    advance: Callable[[str], None] = lambda stage: None,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Measure every case into the report, which is saved after each."""
    for case in cases:
        try:
            report["rows"] += measure(
                subject, case, names, lambda stage, of=case.tokens: advance(f"{of}: {stage}")
            )
        except HostMemoryExceeded as error:
            report["left_out"] += [
                {"cache": name, "context": case.tokens, "reason": str(error), "install": None}
                for name in names
            ]
        save()


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """The report that the options ask for; a JSON file and a picture are written as well."""
    check(options)
    overrides = parse_overrides(options.overrides)
    build_config("default", options.budget, overrides)
    settings = {"budget": options.budget, **overrides}
    set_threads(options.threads)
    report: dict[str, Any] = {
        "benchmark": "decode",
        "environment": environment(),
        "model": options.model,
        "dtype": options.dtype,
        "settings": settings,
        "prefill_chunk": CHUNK,
        "block": BLOCK,
        "rows": [],
        "left_out": [],
    }
    subject = load_subject(options.model, getattr(torch, options.dtype))
    cases = make_cases(options, subject, settings)
    names = list(dict.fromkeys(options.caches))
    with progress_bar() as bar, torch.no_grad():
        names, report["left_out"] = sort_out(names, subject, settings)
        if not names:
            reasons = "; ".join(f"{one['cache']}: {one['reason']}" for one in report["left_out"])
            raise InputError(f"--caches must name one that can run here, got {reasons}")
        total = sum(case.num_stages(subject, len(names)) for case in cases)
        task = bar.add_task("decode", total=total)

        def save() -> None:
            if options.json and options.json != "-":
                write_json(report, options.json)

        def advance(stage: str) -> None:
            bar.update(task, advance=1, description=stage)

        run(subject, cases, names, report, advance=advance, save=save)
    if options.png and report["rows"]:
        from decode_plot import draw

        stamp = report["environment"]
        threads = f"{stamp['threads']} thread" + "s" * (stamp["threads"] > 1)
        title = f"{_title(report)}\n{stamp['cpu']}, {threads}"
        draw(report["rows"], title, options.png)
    return report


def _title(report: dict[str, Any]) -> str:
    model = Path(report["model"]).name
    return f"{model}, {report['dtype']}, IceCache's budget {report['settings']['budget']}"


def show(report: dict[str, Any]) -> None:
    """The rows as a table, and below it what was left out."""
    rows = [_cells(row) for row in report["rows"]]
    times = ["ratio", "cache", "context", "median ms", "p99 ms", "prefill s", "agreement"]
    print_table(f"decode: {_title(report)}; * synthetic", rows, times)
    print_table("memory", rows, ["cache", "context", "KV MiB", "peak RSS MiB"])
    for one in report["left_out"]:
        at = f" at {one['context']} tokens" if one["context"] else ""
        remedy = f" ({one['install']})" if one["install"] else ""
        print(f"left out {one['cache']}{at}: {one['reason']}{remedy}")


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    cells = {
        **row,
        "context": f"{row['context']}{'*' * row['synthetic']}",
        "median ms": row["tpot_ms_median"],
        "p99 ms": row["tpot_ms_p99"],
        "prefill s": row["prefill_s"],
        "KV MiB": row["kv_bytes"] / 2**20,
        "peak RSS MiB": row["peak_rss"] / 2**20,
    }
    return {name: "-" if value is None else value for name, value in cells.items()}


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
