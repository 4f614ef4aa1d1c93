"""The growth of a model's whole cache: thousands of tokens generated through `icecache.attach`."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from common import build_config, environment, progress_bar, step_times
from rich.progress import Progress, TaskID
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

import icecache
from icecache.errors import InputError
from icecache.integrations.embedded import load


class StepTimer(BaseStreamer):
    """Notes when each token arrives; the first call is the prompt."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task
        self.arrivals: list[float] = []
        self.arrivals_cpu: list[float] = []

    def put(self, value: Tensor) -> None:
        self.arrivals.append(time.perf_counter())
        self.arrivals_cpu.append(time.process_time())
        self._bar.update(self._task, completed=len(self.arrivals) - 1)

    def end(self) -> None:
        pass

    @property
    def prefill_seconds(self) -> float:
        return self.arrivals[1] - self.arrivals[0]

    def step_times(self) -> dict[str, dict[str, float]]:
        """Wall and processor time of the decode steps."""
        found = {"step": self.arrivals[1:], "step_cpu": self.arrivals_cpu[1:]}
        return {
            part: step_times([after - before for before, after in pairwise(times)])
            for part, times in found.items()
        }


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str | None, tokens: int) -> Tensor:
    """The first `tokens` tokens of a text, or of a made-up inventory: `[1, tokens]`."""
    if text is None:
        things = ("lamp", "boat", "violin", "garden", "letter", "engine", "mirror")
        places = ("Oslo", "Lima", "Kyoto", "Cairo", "Perth")
        text = " ".join(
            f"Item {i}: the {things[i % 7]} from {places[i * i % 5]} was sold for {i * 37 % 911}."
            for i in range(tokens)
        )
    found = tokenizer(text, return_tensors="pt")["input_ids"][:, :tokens]
    if found.shape[1] < tokens:
        raise InputError(f"the prompt has {found.shape[1]} tokens, --start asks for {tokens}")
    return found


def run_model(options: argparse.Namespace, overrides: dict[str, Any]) -> dict[str, Any]:
    """Generate `options.tokens` sampled tokens after a prompt of `options.start`; the report."""
    stamp = environment()
    config = build_config(options.variant, options.budget, overrides)
    model, tokenizer = load(options.model, options.dtype)
    text = options.prompt_file.read_text(encoding="utf-8") if options.prompt_file else None
    token_ids = prompt_ids(tokenizer, text, options.start)
    torch.manual_seed(0)
    with progress_bar() as bar, icecache.attach(model, **asdict(config)) as attachment:
        timer = StepTimer(bar, bar.add_task("tokens", total=options.tokens))
        output = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            streamer=timer,
            do_sample=True,
            min_new_tokens=options.tokens,
            max_new_tokens=options.tokens,
        )
        for managed in attachment.cache.managed.values():
            managed.core.check_integrity()
        stats = attachment.cache.stats()
        layers = list(stats.layers.values())
    # the last token is answered and never given back to the model
    given = output.shape[1] - 1
    return {
        "benchmark": "growth_model",
        "model": str(options.model),
        "dtype": options.dtype,
        "budget": config.budget,
        "overrides": overrides,
        "environment": stamp,
        "prompt_tokens": token_ids.shape[1],
        "generated": output.shape[1] - token_ids.shape[1],
        "tokens_held": min(layer.tokens for layer in layers),
        "tokens_lost": sum(given - layer.tokens for layer in layers),
        "min_fill_grown": min(layer.fill for layer in layers),
        "mean_fill_grown": sum(layer.fill for layer in layers) / len(layers),
        "tokens_attended": stats.tokens_attended,
        "sparse_steps": stats.sparse_steps,
        "dense_steps": stats.dense_steps,
        "prefill_s": timer.prefill_seconds,
        **timer.step_times(),
    }
