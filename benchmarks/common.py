"""What the benchmarks share: recorded KV files, configs from the command line, JSON, progress."""

from __future__ import annotations

import argparse
import ast
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor

from icecache import IceCacheConfig
from icecache.cache.make import AnyLayer, make_layer
from icecache.errors import IceCacheError, InputError

VARIANTS = ("default", "paper", "exact")
BAD_INPUT = (IceCacheError, OSError, SafetensorError)


@dataclass(frozen=True, slots=True)
class KVRecord:
    """One recorded attention layer: the prompt's keys and values and the queries after it."""

    layer: int
    keys: Tensor  # [G, T, D] float32
    values: Tensor  # [G, T, D] float32
    queries: Tensor  # [S, H, D] float32

    @property
    def scaling(self) -> float:
        return float(self.keys.shape[-1]) ** -0.5

    def head(self, tokens: int) -> KVRecord:
        """The same record cut to its first `tokens` tokens."""
        return KVRecord(self.layer, self.keys[:, :tokens], self.values[:, :tokens], self.queries)


def kv_files(folder: Path) -> list[Path]:
    """Every `*.safetensors` of a folder, by name; one file is a folder of its own."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"no *.safetensors with recorded keys and values in {folder}")
    return files


def read_records(path: Path, steps: int | None = None) -> Iterator[KVRecord]:
    """Each recorded layer of a file, cut to its prompt; `steps` queries evenly spaced, or all."""
    with safe_open(str(path), "pt") as tensors:
        meta = tensors.metadata() or {}
        if "layers" not in meta or "prompt_len" not in meta:
            raise InputError(f"{path} lacks the metadata 'layers' and 'prompt_len'")
        length = int(meta["prompt_len"])
        for layer in (int(name) for name in meta["layers"].split(",")):
            keys, values, queries = (
                tensors.get_tensor(f"layer{layer}.{part}").float()
                for part in ("keys", "values", "queries")
            )
            yield KVRecord(layer, keys[:, :length], values[:, :length], _spaced(queries, steps))


def _spaced(queries: Tensor, steps: int | None) -> Tensor:
    if steps is None or steps >= len(queries):
        return queries
    return queries[torch.arange(steps) * len(queries) // steps]


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`["leaf_size=8", "remainder=false"]` as keyword arguments for the config."""
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not (key and separator):
            raise InputError(f"--set takes key=value, got {pair!r}")
        overrides[key.strip()] = _literal(text.strip())
    return overrides


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def build_config(variant: str, budget: int, overrides: dict[str, Any]) -> IceCacheConfig:
    """The config of a named variant at a budget, with the overrides of `--set` on top."""
    settings = {"budget": budget, **overrides}
    if variant == "paper":
        return IceCacheConfig.paper(**settings)
    if variant == "exact":
        settings["selection"] = "exact"
    return IceCacheConfig.from_kwargs(**settings)


def prefilled_layer(config: IceCacheConfig, keys: Tensor, values: Tensor) -> AnyLayer:
    """A layer that holds `keys` and `values` (`[num_kv_heads, tokens, head_dim]`) as its prompt."""
    layer = make_layer(
        config, num_kv_heads=keys.shape[0], head_dim=keys.shape[-1], dtype=keys.dtype, device="cpu"
    )
    layer.prefill(keys[None], values[None])
    return layer


def attend_steps(layer: AnyLayer, queries: Tensor, scaling: float) -> Tensor:
    """Attend each query on the state as it is: `[steps, num_q_heads, head_dim]`."""
    outputs = [layer.attend(query[None, :, None], scaling=scaling) for query in queries]
    return torch.cat(outputs)[:, :, 0]


def step_times(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum in milliseconds, and the last two over the median."""
    times = torch.tensor(seconds, dtype=torch.float64) * 1e3
    median, p99, most = (times.quantile(q).item() for q in (0.5, 0.99, 1.0))
    return {
        "median_ms": median,
        "p99_ms": p99,
        "max_ms": most,
        "p99_over_median": p99 / median,
        "max_over_median": most / median,
    }


def environment() -> dict[str, Any]:
    """Where and with what a figure is measured; to be asked before the measuring begins."""
    return {
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """`--set`, `--json` and `--threads`, the same in every benchmark."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a config value; repeatable",
    )
    parser.add_argument(
        "--json", metavar="PATH", help="write the figures as JSON; '-' is stdout, and nothing else"
    )
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def progress_bar() -> Progress:
    """A progress bar on stderr, so that stdout stays clean for JSON."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def print_table(title: str, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """The given columns of the rows as a table on stdout; floats with four digits."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(row.get(column, "")) for column in columns))
    Console().print(table)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(report: dict[str, Any], target: str) -> None:
    """Write a report to a path, or to stdout for '-'."""
    text = json.dumps(report, indent=2) + "\n"
    if target == "-":
        stream: TextIO = sys.stdout
        stream.write(text)
    else:
        Path(target).write_text(text)
