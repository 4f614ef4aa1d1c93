"""KL from the full cache's next-token distribution, over LongBench prompts with SmolLM2.

    python benchmarks/end_to_end.py --longbench DIR --model embedded --json -

The prompt is prefilled once, densely; the full cache then answers greedily (32 tokens). Every
method starts from the same prefilled keys and values, takes the same answer tokens one by one and
attends its budget in every layer; the figure is KL(full || method) in nats, mean over the steps
after each answer token. The decode steps run in float32; `--prefill-dtype bfloat16` saves time on
CPUs with bf16 units and changes the prompt's keys and values alike for all methods.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
from prompts import Prompt, choose_prompts
from row_log import Row, RowLog
from teacher import (
    FullStore,
    IceStore,
    MakeStore,
    TopKStore,
    divergence,
    end_token_ids,
    fill,
    forced_steps,
    greedy_answer,
    prefill,
    use_stores,
)
from transformers import PreTrainedModel

from icecache import IceCacheConfig
from icecache.integrations.embedded import load

METHODS = ("icecache", "icecache-r", "topk", "paper", "exact", "full")


@dataclass(frozen=True, slots=True)
class Method:
    """A way to attend at a budget."""

    name: str
    config: IceCacheConfig

    def store_maker(self, steps: int) -> MakeStore:
        if self.name == "topk":
            return lambda keys, values: TopKStore(keys, values, steps, self.config)
        if self.name == "full":
            return lambda keys, values: FullStore(keys, values, steps)
        return IceStore.maker(self.config)


def make_methods(names: list[str], budgets: list[int], overrides: dict[str, Any]) -> list[Method]:
    """Every method at every budget; the baselines share the sink and window of IceCache."""
    variants = {"paper": "paper", "exact": "exact"}
    more = {"icecache-r": {"layer_reuse": 2}}
    return [
        Method(
            name,
            build_config(
                variants.get(name, "default"), budget, {**overrides, **more.get(name, {})}
            ),
        )
        for budget in budgets
        for name in names
    ]


def measure_prompt(
    prompt: Prompt,
    dense: PreTrainedModel,
    decoder: PreTrainedModel,
    methods: list[Method],
    steps: int,
) -> list[Row]:
    """One row per method for one prompt."""
    banned = end_token_ids(decoder)
    start = time.perf_counter()
    prompt_kv = prefill(dense, torch.tensor(prompt.token_ids), banned)
    prefilled = time.perf_counter()
    answer, full = greedy_answer(decoder, prompt_kv, steps, banned)
    rows = [fill(prompt_kv, method.store_maker(steps)) for method in methods]
    built = time.perf_counter()
    found = forced_steps(decoder, prompt_kv, answer, rows)
    seconds = {
        "prefill_s": prefilled - start,
        "answer_s": built - prefilled,
        "decode_s": time.perf_counter() - built,
    }
    return [
        {
            "task": prompt.task,
            "id": prompt.id,
            "tokens": len(prompt.token_ids),
            "budget": method.config.budget,
            "method": method.name,
            "kl": divergence(full, found[:, row]).mean().item(),
            "top1": (full.argmax(-1) == found[:, row].argmax(-1)).double().mean().item(),
            **seconds,
        }
        for row, method in enumerate(methods)
    ]


def totals(rows: list[Row]) -> dict[str, Any]:
    """Mean KL and top-1 agreement per method and budget, and IceCache's KL over exact top-k's."""
    means: dict[str, dict[str, dict[str, float]]] = {}
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        at_budget = [row for row in rows if row["budget"] == budget]
        means[str(budget)] = {
            name: _mean_row([row for row in at_budget if row["method"] == name])
            for name in dict.fromkeys(row["method"] for row in at_budget)
        }
    ratios = {
        budget: found["icecache"]["kl"] / found["topk"]["kl"]
        for budget, found in means.items()
        if "icecache" in found and found.get("topk", {}).get("kl")
    }
    return {"mean": means, "ratio": ratios}


def _mean_row(rows: list[Row]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in ("kl", "top1")} | {
        "prompts": len(rows)
    }


def run(
    prompts: Iterable[Prompt],
    measure: Callable[[Prompt], list[Row]],
    log: RowLog,
    advance: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Measure the prompts that the log lacks; rows and totals over all.

    Each row carries the commit that it was measured at, for a resumed log may mix several.
    """
    stamp = environment()
    for prompt in prompts:
        if not log.has(prompt):
            log.add([{**row, "commit": stamp["commit"]} for row in measure(prompt)])
        advance(prompt.key)
    return {"environment": stamp, "rows": log.rows, **totals(log.rows)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--longbench", type=Path, required=True, help="folder of *.jsonl")
    parser.add_argument("--model", default="embedded", help="folder of a model, or 'embedded'")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tasks", nargs="+", help="only these tasks (default: all)")
    parser.add_argument("--shortest", type=int, default=1500, help="tokens")
    parser.add_argument("--longest", type=int, default=8000, help="tokens")
    parser.add_argument("--budget", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["icecache", "topk"])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--prefill-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, help="JSON lines, written per prompt; resumed")
    add_common_options(parser)
    return parser


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    overrides = parse_overrides(options.overrides)
    methods = make_methods(options.methods, options.budget, overrides)
    settings = {
        "benchmark": "end_to_end",
        "model": options.model,
        "overrides": overrides,
        "methods": [f"{method.name}@{method.config.budget}" for method in methods],
        "steps": options.steps,
        "prefill_dtype": options.prefill_dtype,
    }
    log = RowLog(options.out, settings)
    decoder, tokenizer = load(options.model, torch.float32)
    use_stores(decoder)
    same = options.prefill_dtype == "float32"
    dense = decoder if same else load(options.model, torch.bfloat16)[0]
    prompts = choose_prompts(
        options.longbench, tokenizer, options.prompts, options.shortest, options.longest,
        options.tasks,
    )  # fmt: skip
    with progress_bar() as bar:
        task = bar.add_task("prompts", total=len(prompts))
        report = run(
            prompts,
            lambda prompt: measure_prompt(prompt, dense, decoder, methods, options.steps),
            log,
            lambda name: bar.update(task, advance=1, description=name),
        )
    return {**settings, **report}


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    try:
        report = measure_all(options)
        if options.json:
            write_json(report, options.json)
        else:
            columns = ["task", "id", "tokens", "budget", "method", "kl", "top1"]
            print_table("end to end, KL in nats", report["rows"], columns)
            print(json.dumps({key: report[key] for key in ("mean", "ratio")}, indent=2))
    except BAD_INPUT as problem:
        parser.error(str(problem))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
