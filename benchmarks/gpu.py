"""Everything that only a GPU can show, in one command that ends within nine minutes.

    python benchmarks/gpu.py --json gpu.json

Kernels against their twins, gather bandwidth against record size, then decode (TPOT), prefill and
bytes for the shapes of Llama-3.1-8B and Qwen3-4B with random weights. Contexts are synthetic:
clustered random keys, the same in every cache. The JSON is written anew after every row; what the
clock leaves no time for, or a cache cannot run, is named in it. `--smoke` runs the same logic on a
CPU at toy sizes.

It ends with 0 if all was measured, 1 if a kernel differs from its twin, 2 without a CUDA device, 3
if cases were left out.

A row's `floor_ms` is what its bytes take at the rates that this run measured: weights, and what a
step must read of the cache, at the device's read rate; what was fetched, at the copy's.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gpu_gather
import gpu_kernels
import torch
from gpu_caches import make_player
from gpu_measure import Bench, measure_decode, measure_prefill
from gpu_model import make_model

from icecache.ops.dispatch import device_ops

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured, the most telling first."""

    shapes: tuple[str, ...] = ("llama-3.1-8b", "qwen3-4b")
    contexts: tuple[int, ...] = (131072, 32768, 8192, 262144)
    caches: tuple[str, ...] = (
        "icecache:host", "icecache:none", "dynamic", "icecache:host:compiled", "offloaded",
        "static", "icecache:int8",
    )  # fmt: skip
    prefills: tuple[int, ...] = (8192, 32768, 131072)
    steps: int = 64
    seconds: float = 520.0


SMOKE = Plan(
    shapes=("tiny",),
    contexts=(300, 700),
    caches=("icecache:host", "icecache:none", "icecache:int8", "dynamic", "static"),
    prefills=(200,),
    steps=4,
)


class Report:
    """The figures so far, on disk after every change."""

    def __init__(self, path: Path | None, about: Row) -> None:
        self._path = path
        self.content: Row = {**about, "kernels": [], "gather": [], "rows": [], "left_out": []}

    def add(self, part: str, *rows: Row) -> None:
        self.content[part].extend(rows)
        self._write()
        for row in rows:
            print(json.dumps(row), file=sys.stderr, flush=True)

    def _write(self) -> None:
        if self._path is not None:
            scratch = self._path.with_suffix(".part")
            scratch.write_text(json.dumps(self.content, indent=1))
            scratch.replace(self._path)


class Clock:
    """What time is left, and whether a case will end within it."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._per_token: dict[str, float] = {}

    def has_time_for(self, kind: str, tokens: int) -> bool:
        """Whether a case like those before it may begin; one of a new kind needs a minute."""
        expected = 60.0 if kind not in self._per_token else 1.3 * self._per_token[kind] * tokens
        return self.left > expected

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def took(self, kind: str, tokens: int, seconds: float) -> None:
        self._per_token[kind] = seconds / tokens


def run(plan: Plan, bench: Bench, report: Report, clock: Clock) -> None:
    """Measure all of a plan that there is time for."""
    is_smoke = bench.device.type != "cuda"
    dtypes = (torch.float32,) if is_smoke else (torch.float32, torch.float16, torch.bfloat16)
    shapes = gpu_kernels.SMOKE if is_smoke else gpu_kernels.SHAPES
    ops = device_ops("twin" if is_smoke else "triton", bench.device)
    report.add("kernels", *gpu_kernels.check_kernels(shapes, dtypes, bench.device, ops))
    sweep = gpu_gather.SMOKE if is_smoke else gpu_gather.GatherSweep()
    report.add("gather", *gpu_gather.measure_gather(sweep, bench.device, ops))
    for shape in plan.shapes:
        model = make_model(shape, bench.device, bench.dtype)
        for kind, tokens, measure in _cases(plan, bench, model):
            _measure(shape, kind, tokens, measure, report, clock)
        del model


def _cases(plan: Plan, bench: Bench, model: Any) -> Iterator[tuple[str, int, Callable[[], Row]]]:
    for tokens in plan.contexts:
        for cache in plan.caches:
            yield (
                cache,
                tokens,
                lambda c=cache, t=tokens: measure_decode(
                    make_player(c, model, t, bench.settings), bench, plan.steps
                ),
            )
    for tokens in plan.prefills:
        for cache in ("icecache:host", "dynamic"):
            yield (
                f"prefill {cache}",
                tokens,
                lambda c=cache, t=tokens: measure_prefill(
                    make_player(c, model, t, bench.settings), bench, t
                ),
            )


def _measure(
    shape: str, kind: str, tokens: int, measure: Callable[[], Row], report: Report, clock: Clock
) -> None:
    about = {"shape": shape, "case": kind, "context": tokens}
    if not clock.has_time_for(f"{shape} {kind}", tokens):
        report.add("left_out", {**about, "reason": f"{clock.left:.0f} s left"})
        return
    start = time.monotonic()
    try:
        row = measure()
    # a cache that cannot run this case is a finding; whatever is no case of it goes on
    except (RuntimeError, MemoryError) as error:
        report.add("left_out", {**about, "reason": f"{type(error).__name__}: {error}"[:500]})
    else:
        report.add("rows", {**about, **row})
    clock.took(f"{shape} {kind}", tokens, time.monotonic() - start)


def environment(device: torch.device) -> Row:
    """Where and with what the figures are measured."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        commit = found.stdout.strip() or "unknown"
    except FileNotFoundError:
        commit = "unknown"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "benchmark": "gpu",
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the figures go, written as they come")
    parser.add_argument("--smoke", action="store_true", help="on a CPU, with the kernels' twins")
    parser.add_argument("--seconds", type=float, help="stop beginning cases after so long")
    parser.add_argument("--shapes", nargs="+", help="only these shapes")
    parser.add_argument("--contexts", nargs="+", type=int, help="only these context lengths")
    parser.add_argument("--caches", nargs="+", help="only these caches")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of IceCache; JSON values; repeatable",
    )  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    plan = SMOKE if options.smoke else Plan()
    chosen = {
        name: tuple(getattr(options, name))
        for name in ("shapes", "contexts", "caches")
        if getattr(options, name)
    }
    if options.seconds is not None:
        chosen["seconds"] = options.seconds
    plan = replace(plan, **chosen)
    if not options.smoke and not torch.cuda.is_available():
        print("gpu.py needs a CUDA device; --smoke runs on a CPU", file=sys.stderr)
        return 2
    clock = Clock(plan.seconds)
    device = torch.device("cpu" if options.smoke else "cuda")
    with torch.no_grad():
        bench = Bench.on(device, dict(_setting(item) for item in options.overrides))
        rates = {"read_bytes_per_second": bench.read, "copy_bytes_per_second": bench.copy}
        report = Report(options.json, {**environment(device), "settings": bench.settings, **rates})
        run(plan, bench, report, clock)
    if options.json is None:
        print(json.dumps(report.content, indent=1))
    return outcome(report.content)


def outcome(content: Row) -> int:
    """What the command ends with, said in a last line where it is not 0."""
    wrong = sum(not row["passed"] for row in content["kernels"])
    left_out = len(content["left_out"])
    if wrong:
        print(f"{wrong} kernel checks failed: no figure counts", file=sys.stderr)
    elif left_out:
        measured = len(content["rows"])
        print(f"{left_out} of {left_out + measured} cases were left out", file=sys.stderr)
    return 1 if wrong else 3 if left_out else 0


def _setting(item: str) -> tuple[str, Any]:
    """A setting of `KEY=VALUE`: a number, true, false or null, or else a string."""
    key, _, value = item.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


if __name__ == "__main__":
    sys.exit(main())
