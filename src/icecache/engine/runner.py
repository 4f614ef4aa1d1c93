"""The model of an engine: one forward over the tokens of many requests.

A request's answer must not depend on who else is served. Matrix products of a handful of rows
take other paths than larger ones, and round otherwise; from eight rows on, in multiples of eight,
a row's result was found to be the same bit for bit, whatever the others are. So batches are filled
up to that, and everything else is done request by request.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from icecache.cache.layer import IceCacheLayer
from icecache.config import IceCacheConfig
from icecache.engine.native import NativeSteps
from icecache.engine.packed import KEYWORD, NAME, PackedBatch, Span, register_packed
from icecache.engine.watch import Watch
from icecache.errors import BackendUnavailable, InputError, UnsupportedModel
from icecache.integrations.transformers.attach import (
    attention_of,
    restore_attention,
    set_attention,
)
from icecache.integrations.transformers.one_call import Layers
from icecache.integrations.transformers.support import decoder_config, supports
from icecache.ops.threads import SoloThreads

__all__ = ["Piece", "Runner"]

_logger = logging.getLogger(__name__)
_ROWS = 8
_SPARE_TOKENS = 192
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


class Piece(NamedTuple):
    """The next tokens of one request.

    Attributes
    ----------
    layers : sequence of IceCacheLayer
    ids : sequence of int
    first : int
        The first one's position.
    wants_logits : bool
        Whether the last one's logits are wanted.
    watch : Watch, optional
    is_answer : bool, default False
        Whether it is the latest token of an answer, and not a piece of a prompt.
    """

    layers: Sequence[IceCacheLayer]
    ids: Sequence[int]
    first: int
    wants_logits: bool
    watch: Watch | None = None
    is_answer: bool = False


class _Shape(NamedTuple):
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


class Runner:
    """Owns the model's attention until `close`.

    Parameters
    ----------
    model : PreTrainedModel
    chunk : int
        Most tokens of a piece.
    threads : int, optional
        Threads that attend beside torch's; by default the cores that this process may use.
    native : bool, optional
        As in `EngineSettings`.

    Raises
    ------
    UnsupportedModel
        If the model cannot run packed, or natively as asked for; it is left as it was.
    BackendUnavailable
        If it is to run natively without the compiled ops.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chunk: int,
        threads: int | None = None,
        native: bool | None = None,
    ) -> None:
        _check_model(model)
        self._chunk = chunk
        self.model = model
        self.end_ids = _end_ids(model)
        threads = _num_cores() if threads is None else threads
        self._threads = threads
        self._executor = SoloThreads(threads, "icecache-engine")
        self._before = attention_of(model)
        register_packed()
        try:
            set_attention(model, NAME)
            self._shapes = self._probe()
            self._native = self._native_steps(native)
        except BaseException:
            self.close()
            raise

    @property
    def native_steps(self) -> int:
        """Tokens of answers that were taken in natively."""
        return 0 if self._native is None else self._native.steps

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def longest_context(self) -> int | None:
        """Positions that the model knows, None if it does not say."""
        limit = getattr(decoder_config(self.model.config), "max_position_embeddings", None)
        return None if limit is None else int(limit)

    def new_layers(self, settings: IceCacheConfig) -> list[IceCacheLayer]:
        """Return empty layers for a request."""
        return [IceCacheLayer(settings, **shape._asdict()) for shape in self._shapes]

    def estimate_bytes(self, settings: IceCacheConfig, tokens: int) -> int:
        """Return the host bytes that a request of so many tokens takes.

        The buffer of the latest tokens has room for as many again, up to a piece of a prompt.
        """
        tokens += _SPARE_TOKENS + settings.draft + min(tokens, self._chunk)
        return sum(layer.estimate_bytes(1, tokens) for layer in self.new_layers(settings))

    def renew(self) -> None:
        """Look at the model again if it is no longer built as it was."""
        if self._native is not None:
            self._native.renew()

    @torch.inference_mode()
    def forward(self, pieces: Sequence[Piece]) -> tuple[list[Tensor | None], list[Span]]:
        """Run the model over pieces; each takes its tokens in.

        Returns
        -------
        logits : list of Tensor, shape [vocabulary]
            One a piece; None where they were not wanted, without meaning after an error.
        spans : list of Span
            One a piece; where `error` is set, the piece's layers must not be used again.
        """
        spans = [Span(piece.layers, 0, len(piece.ids), piece.watch) for piece in pieces]
        done = self._take_answers(pieces, spans)
        rest = [i for i in range(len(pieces)) if i not in done and spans[i].error is None]
        done |= self._run_packed(pieces, spans, rest)
        return [done.get(i) for i in range(len(pieces))], spans

    def close(self) -> None:
        """Give the model its own attention back."""
        restore_attention(self._before)
        self._executor.shutdown()

    def _take_answers(self, pieces: Sequence[Piece], spans: list[Span]) -> dict[int, Tensor]:
        """Let answers go on natively; the logits of those that did."""
        answers = [i for i, piece in enumerate(pieces) if piece.is_answer]
        if self._native is None:
            return {}
        done = self._native.take(
            [spans[i] for i in answers],
            [pieces[i].ids[0] for i in answers],
            [pieces[i].first for i in answers],
        )
        return {answers[number]: logits for number, logits in done.items()}

    def _run_packed(
        self, pieces: Sequence[Piece], spans: list[Span], chosen: list[int]
    ) -> dict[int, Tensor]:
        """Run the model over some pieces; the logits of those that want them."""
        ids: list[int] = []
        positions: list[int] = []
        last: dict[int, int] = {}
        for i in chosen:
            piece, spans[i].start = pieces[i], len(ids)
            ids.extend(piece.ids)
            positions.extend(range(piece.first, piece.first + len(piece.ids)))
            if piece.wants_logits:
                last[i] = len(ids) - 1
        if not ids:
            return {}
        batch = PackedBatch([spans[i] for i in chosen], self._executor, self._threads)
        output = self._run(ids, positions, [*last.values()] or [0], batch)
        return dict(zip(last, output, strict=False))

    def _native_steps(self, native: bool | None) -> NativeSteps | None:
        if native is False:
            return None
        try:
            steps = NativeSteps(self.model, self._tell)
            if native:
                steps.check()
        except (UnsupportedModel, BackendUnavailable) as reason:
            if native:
                raise
            _logger.info("decode steps run through torch: %s", reason)
            return None
        return steps

    @contextmanager
    def _tell(self, token_ids: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Layers]]:
        ids, places = token_ids.tolist(), positions.tolist()
        settings = IceCacheConfig()
        all_at_once, first = self.new_layers(settings), self.new_layers(settings)
        wanted = list(range(len(ids)))
        told = self._run(ids, places, wanted, PackedBatch([Span(all_at_once, 0, len(ids))]))
        self._run(ids[:1], places[:1], [0], PackedBatch([Span(first, 0, 1)]))
        yield told[: len(ids)], first

    def _run(
        self, ids: list[int], positions: list[int], last: list[int], batch: PackedBatch
    ) -> Tensor:
        ids, positions = _filled(ids, ids[0]), _filled(positions, 0)
        device = self.model.device
        output = self.model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(_filled(last, last[-1]), device=device),
            **{KEYWORD: batch},
        )
        logits: Tensor = output.logits[0]
        return logits

    def _probe(self) -> list[_Shape]:
        """Find the shape of each layer's keys, and whether the model runs packed at all."""
        found: dict[int, _Shape] = {}
        with torch.inference_mode():
            self._run([0], [0], [0], _Probe(found))
        num_layers = len(supports(self.model).layers)
        if sorted(found) != list(range(num_layers)):
            raise UnsupportedModel(
                f"{type(self.model).__name__} attends in {len(found)} of its {num_layers} layers "
                "by the attention interface; run it with icecache.attach(model)"
            )
        return [found[index] for index in range(num_layers)]


class _Probe(PackedBatch):
    """A batch of nobody, which takes note of shapes."""

    def __init__(self, found: dict[int, _Shape]) -> None:
        super().__init__([])
        self._found = found

    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, object]
    ) -> Tensor:
        self._found[index] = _Shape(key.shape[1], key.shape[3], key.dtype)
        return torch.zeros_like(query)


def _check_model(model: PreTrainedModel) -> None:
    report = supports(model)
    report.require()
    others = [layer for layer in report.layers if layer.status != "managed"]
    if others:
        raise UnsupportedModel(
            f"the engine runs models of full attention only, but layer {others[0].index} of "
            f"{report.model_type} is {others[0].kind}; use icecache.attach(model)"
        )
    if model.training:
        raise InputError("the engine runs inference only; call model.eval() first")
    rope = getattr(decoder_config(model.config), "rope_parameters", None) or {}
    if rope.get("rope_type") in _BATCH_DEPENDENT_ROPE:
        raise UnsupportedModel(
            f"{report.model_type} scales its positions by the longest context of a batch "
            f"(rope_type={rope['rope_type']!r}), so that requests would change each other's "
            "answers; use icecache.attach(model)"
        )


def _filled(numbers: list[int], filler: int) -> list[int]:
    return numbers + [filler] * (-len(numbers) % _ROWS)


def _num_cores() -> int:
    # what this process may use, which containers restrict
    can_ask = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1


def _end_ids(model: PreTrainedModel) -> frozenset[int]:
    config: Any = model.generation_config
    ends = config.eos_token_id if config is not None else None
    if ends is None:
        ends = getattr(decoder_config(model.config), "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)
