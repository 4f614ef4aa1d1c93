"""Time of an engine's step over many answers: natively, and by torch.

    python benchmarks/engine.py --requests 1 4 16 --context 300 --threads 2

Every request has a random prompt of about `--context` tokens. Steps are timed while all answers go
on and no prompt is read; native and torch's engines take turns. `ratio` is how often a native step
fits into one by torch.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    BAD_INPUT,
    add_common_options,
    environment,
    parse_overrides,
    print_table,
    progress_bar,
    set_threads,
    step_times,
    write_json,
)
from decode_model import SHAPES, Subject, load_subject

from icecache import IceCacheConfig
from icecache.engine import Engine, EngineSettings, Request, Sampling
from icecache.errors import InputError

ROUNDS = 2


def step_seconds(
    subject: Subject,
    settings: IceCacheConfig,
    requests: int,
    context: int,
    steps: int,
    native: bool,
) -> tuple[list[float], int]:
    """Seconds of each step that all answers take part in, and how many tokens went natively."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = subject.decoder.vocab_size
    lengths = [context + 7 * i for i in range(requests)]
    prompts = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    with Engine(
        subject.model, EngineSettings(native=native, max_running=requests), settings
    ) as engine:
        # nobody ends before the last one's steps are timed
        most = requests * (context // engine.settings.prefill_chunk + 2) + steps + 2
        asked = [engine.add(ids, Sampling(max_tokens=most)) for ids in prompts]
        # the first steps of all, which check and prepare
        while any(len(request.answer) < 2 for request in asked):
            _require_going_on(asked)
            engine.step()
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - begin)
        _require_going_on(asked)
        return seconds, engine.stats().native_steps


def _require_going_on(requests: list[Request]) -> None:
    for request in requests:
        if request.finish is not None:
            raise InputError(
                f"an answer ended ({request.finish.value}) after {len(request.answer)} tokens, "
                "before its steps were timed; ask for another --context or fewer --steps"
            )


def measure(
    subject: Subject, settings: IceCacheConfig, requests: int, context: int, steps: int
) -> dict[str, Any]:
    """The figures of so many requests."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    ratios, native_steps = [], 0
    for _ in range(ROUNDS):
        for native in (True, False):
            found, counted = step_seconds(subject, settings, requests, context, steps, native)
            seconds[native] += found
            native_steps += counted
        ratios.append(median(seconds[False][-steps:]) / median(seconds[True][-steps:]))
    return {
        "requests": requests,
        "context": context,
        "native_ms": step_times(seconds[True])["median_ms"],
        "torch_ms": step_times(seconds[False])["median_ms"],
        "ratio": median(ratios),
        "native_steps": native_steps,
    }


def make_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    known = f"embedded, {', '.join(SHAPES)}, or the folder of a model"
    parser.add_argument("--model", default="smollm2-shape", help=known)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=300, help="tokens of the shortest prompt")
    parser.add_argument("--steps", type=int, default=16, help="timed steps of each engine's turn")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    add_common_options(parser)
    return parser


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """The report that the options ask for."""
    if min(*options.requests, options.context, options.steps) < 1:
        raise InputError("--requests, --context and --steps must be at least 1")
    settings = IceCacheConfig.from_kwargs(**parse_overrides(options.overrides))
    set_threads(options.threads)
    report: dict[str, Any] = {
        "benchmark": "engine",
        "environment": environment(),
        "model": Path(options.model).name,
        "dtype": options.dtype,
        "rows": [],
    }
    subject = load_subject(options.model, getattr(torch, options.dtype))
    with progress_bar() as bar:
        for requests in bar.track(options.requests, description="engine"):
            row = measure(subject, settings, requests, options.context, options.steps)
            report["rows"].append(row)
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        report = measure_all(options)
    except BAD_INPUT as problem:
        parser.error(str(problem))
    if options.json:
        write_json(report, options.json)
    if options.json != "-":
        title = f"engine: {report['model']}, {report['dtype']}, milliseconds a step of all"
        names = ["requests", "context", "native_ms", "torch_ms", "ratio", "native_steps"]
        print_table(title, report["rows"], names)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
