"""Run one question over one document with IceCache and, when asked, with the full cache too."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from transformers import Cache, DynamicCache

from icecache.cli.display import Display
from icecache.cli.report import Comparison, Row
from icecache.cli.resume import encode_follow_up, save_conversation
from icecache.cli.session import Run, decode, encode, mean_divergence, prefill, replay
from icecache.config import IceCacheConfig
from icecache.integrations.transformers import CacheStats, IceCache, attach, supports

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FULL", "ICECACHE", "Comparer"]

ICECACHE = "IceCache"
FULL = "full cache"


class Comparer:
    """A loaded model and the terminal on which its runs are shown."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        config: IceCacheConfig,
        console: Console,
        save_to: Path | None = None,
    ) -> None:
        self._save_to = save_to
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._console, self._display = console, Display(console)

    def ask(
        self, document: str, question: str, *, max_new_tokens: int, with_full: bool
    ) -> Comparison:
        """Answer with IceCache; with `with_full` also with the full cache, and compare the two.

        Raises
        ------
        InputError
            The prompt does not fit in the model's context.
        UnsupportedModel
            IceCache cannot run this model.
        """
        ids = encode(self._model, self._tokenizer, document, question, max_new_tokens)
        ids = ids.to(self._model.device)
        full_row, full_run = None, None
        if with_full:
            full_row, full_run = self._ask_full(ids, max_new_tokens)
        with attach(self._model, self._config):
            ice_cache = IceCache(self._model, self._config)
            run, seconds = self._run(ICECACHE, ids, ice_cache, max_new_tokens)
            self._save(ice_cache, run)
            divergence = None if full_run is None else self._divergence(ids, full_run, run)
        row = self._ice_row(run, ids.shape[1], seconds, ice_cache.stats())
        return Comparison(
            question=question,
            rows=(row,) if full_row is None else (row, full_row),
            divergence=divergence,
            settings=dataclasses.asdict(self._config),
        )

    def go_on(self, cache: IceCache, question: str, *, max_new_tokens: int) -> Comparison:
        """Answer a further question of a conversation that was loaded.

        Raises
        ------
        InputError
            The conversation would not fit in the model's context.
        """
        ids = encode_follow_up(self._model, self._tokenizer, cache, question, max_new_tokens)
        tokens = cache.num_tokens + ids.shape[1]
        with attach(self._model, cache.settings):
            run, seconds = self._run(ICECACHE, ids, cache, max_new_tokens)
            self._save(cache, run)
        return Comparison(
            question=question,
            rows=(self._ice_row(run, tokens, seconds, cache.stats()),),
            divergence=None,
            settings=dataclasses.asdict(cache.settings),
        )

    def _save(self, cache: IceCache, run: Run) -> None:
        if self._save_to is not None:
            save_conversation(self._save_to, cache, self._model, run)
            self._console.print(f"saved: {self._save_to}", style="dim")

    def _run(
        self, name: str, ids: torch.Tensor, cache: Cache, max_new_tokens: int
    ) -> tuple[Run, float]:
        with self._display.run(name, ids.shape[1], max_new_tokens) as shown:
            start = time.perf_counter()
            logits = prefill(self._model, ids, cache, shown.advance)
            seconds = time.perf_counter() - start
            run = decode(self._model, self._tokenizer, logits, cache, max_new_tokens, shown.piece)
        return run, seconds

    def _divergence(self, ids: torch.Tensor, full: Run, run: Run) -> float:
        if run.token_ids == full.token_ids:
            # the same tokens went in, so the run itself was forced on the full cache's answer
            return mean_divergence(full.log_probs, run.log_probs)
        cache = IceCache(self._model, self._config)
        with self._display.run("IceCache, forced", ids.shape[1], 0) as shown:
            logits = prefill(self._model, ids, cache, shown.advance)
            found = replay(self._model, logits, cache, full.token_ids)
        return mean_divergence(full.log_probs, found)

    def _ask_full(self, ids: torch.Tensor, max_new_tokens: int) -> tuple[Row, Run]:
        cache = DynamicCache(config=self._model.config)
        run, seconds = self._run(FULL, ids, cache, max_new_tokens)
        # only what IceCache would manage too, so that the rows of the table compare
        report = supports(self._model)
        managed = [cache.layers[each.index] for each in report.layers if each.status == "managed"]
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in managed)
        row = Row(
            name=FULL,
            answer=run.text,
            tokens=ids.shape[1],
            attended=float(cache.get_seq_length()),
            exact_bytes=held,
            summary_bytes=0,
            full_bytes=held,
            prefill_s=seconds,
            tokens_per_s=run.tokens_per_second,
        )
        return row, run

    def _ice_row(self, run: Run, tokens: int, seconds: float, stats: CacheStats) -> Row:
        layers = stats.layers.values()
        return Row(
            name=ICECACHE,
            answer=run.text,
            tokens=tokens,
            attended=stats.tokens_attended if stats.sparse_steps else float(stats.tokens),
            exact_bytes=sum(layer.kv_bytes for layer in layers),
            summary_bytes=stats.index_bytes,
            full_bytes=sum(layer.full_cache_bytes for layer in layers),
            prefill_s=seconds,
            tokens_per_s=run.tokens_per_second,
        )
