"""`Engine`: one loop that serves many requests by packed forwards."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from icecache.config import IceCacheConfig
from icecache.engine.conversations import Conversation
from icecache.engine.memory import Ledger
from icecache.engine.request import Finish, Output, Phase, Request, Sampling
from icecache.engine.runner import Piece, Runner
from icecache.engine.sampling import next_token
from icecache.engine.schedule import Schedule
from icecache.engine.settings import EngineSettings
from icecache.engine.stats import Counts, EngineStats
from icecache.engine.store import Store
from icecache.engine.watch import Watch
from icecache.errors import IceCacheError, InputError, QueueFull
from icecache.store.memory import check_host_memory

__all__ = ["Engine"]


class Engine:
    """Serves requests together: their tokens share the model's matrix products, not their caches.

    A step takes the next token of every running answer and a piece of one prompt. Prompts take
    turns, so that a short one does not wait for a long one. A request's tokens are the same
    whoever else is served.

    Parameters
    ----------
    model : PreTrainedModel
        A causal decoder whose layers all attend to everything; the engine's own until `close`.
    settings : EngineSettings, optional
    cache : IceCacheConfig, optional
        Of every request that brings none of its own.
    decode : callable, optional
        Token ids to text; with it, conversations are found by their text too (`tokens_of`).

    Raises
    ------
    UnsupportedModel
        If the model cannot run packed, or natively as asked for; it is left as it was.
    BackendUnavailable
        If it is to run natively without the compiled ops.

    Notes
    -----
    An engine is used by one thread.

    Examples
    --------
    >>> with icecache.Engine(model) as engine:                    # doctest: +SKIP
    ...     requests = [engine.add(ids, Sampling(max_tokens=32)) for ids in prompts]
    ...     while engine.has_work:
    ...         for output in engine.step():
    ...             print(output.request.number, output.token, output.finish)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: EngineSettings | None = None,
        cache: IceCacheConfig | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.settings = EngineSettings() if settings is None else settings
        self.cache = IceCacheConfig() if cache is None else cache
        self._runner = Runner(
            model, self.settings.prefill_chunk, self.settings.threads, self.settings.native
        )
        try:
            self._ledger = Ledger(self.settings.max_host_memory)
            self._store = Store(self._runner, self.settings)
        except BaseException:
            self._runner.close()
            raise
        self._decode = decode
        self._counts = Counts()
        self._schedule = Schedule(self.settings.prefill_chunk)
        self._number = 0

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.num_waiting or self.num_running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._schedule.waiting)

    @property
    def num_running(self) -> int:
        """Requests that are worked on."""
        return len(self._schedule.running)

    @property
    def longest_context(self) -> int | None:
        """Tokens of prompt and answer that the model can hold, None if it does not say."""
        return self._runner.longest_context

    def add(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        *,
        cache: IceCacheConfig | None = None,
        text: str | None = None,
        watch: bool = False,
    ) -> Request:
        """Queue a request; the memory that it may need is set aside at once.

        Parameters
        ----------
        prompt : sequence of int
            Token ids.
        sampling : Sampling, optional
        cache : IceCacheConfig, optional
            Such as ``engine.cache.replace(budget=512)``.
        text : str, optional
            What the prompt says, for `tokens_of`.
        watch : bool, default False
            Keep ``request.watch``, at the price of looking closer at one layer a step.

        Raises
        ------
        InputError
            If the prompt is empty, holds other numbers than token ids, or does not fit in the
            model's context.
        HostMemoryExceeded
            If the memory for it is not there now; nothing was taken.
        QueueFull
            If too many requests wait already.
        """
        sampling = Sampling() if sampling is None else sampling
        cache = self.cache if cache is None else cache
        self._check_prompt(prompt, sampling)
        if self.num_waiting >= self.settings.max_waiting:
            raise QueueFull(self.num_waiting)
        needed = self._runner.estimate_bytes(cache, len(prompt) + sampling.max_tokens)
        self._reserve(needed)
        self._runner.renew()
        self._number += 1
        request = Request(self._number, tuple(prompt), sampling, cache, needed, text)
        request.watch = Watch() if watch else None
        if sampling.temperature > 0.0:
            request.generator = torch.Generator()
            seed = request.generator.seed() if sampling.seed is None else sampling.seed
            request.generator.manual_seed(seed)
        self._schedule.waiting.append(request)
        return request

    def step(self) -> list[Output]:
        """Do the next piece of work; returns what came of it, request by request."""
        self._store.tidy()
        ready = self._admit()
        chosen = self._schedule.choose()
        if not chosen:
            return ready
        try:
            return ready + self._serve(chosen)
        except BaseException:
            # what the layers hold now is not known, and nobody will hear of the others' tokens
            for request in [*(request for request, _ in chosen), *(o.request for o in ready)]:
                if not request.is_finished:
                    self._end(request, Finish.ERROR)
            raise

    def rest(self) -> None:
        """Do what there is to do while no request runs: write to disk, give back memory."""
        self._store.rest()

    def tokens_of(self, text: str, cache: IceCacheConfig | None = None) -> tuple[list[int], str]:
        """Return the tokens of a stored conversation that `text` goes on with, and what is left.

        A tokenizer may make others of an answer's text, which would not be found then.
        """
        found = self._store.find_text(text, self.cache if cache is None else cache)
        if found is None or found.text is None:
            return [], text
        return found.tokens.tolist(), text[len(found.text) :]

    def stats(self) -> EngineStats:
        """Return what the engine holds and has done."""
        held = sum(request.host_bytes for request in self._schedule.running)
        return EngineStats(
            running=self.num_running,
            waiting=self.num_waiting,
            reserved_bytes=self._ledger.reserved,
            limit_bytes=self._ledger.limit,
            running_bytes=held,
            conversations=len(self._store),
            conversation_bytes=self._store.nbytes,
            disk_bytes=self._store.disk_bytes,
            disk_failures=self._store.failures,
            native_steps=self._runner.native_steps,
            **dataclasses.asdict(self._counts),
        )

    def abort(self, request: Request) -> None:
        """End a request now; one that has ended already stays as it is."""
        if not request.is_finished:
            self._end(request, Finish.ABORT)

    def stop(self, request: Request) -> None:
        """End a request whose answer is complete, by a rule that the engine does not know."""
        if not request.is_finished:
            self._end(request, Finish.STOP)

    def close(self) -> None:
        """End all requests and give the model its own attention back."""
        for request in [*self._schedule.running, *self._schedule.waiting]:
            self._end(request, Finish.ABORT)
        self._store.close()
        self._runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _reserve(self, needed: int) -> None:
        """Set memory aside, which stored conversations give up if they must."""
        self._ledger.check(needed)
        kept = self._ledger.limit - self._ledger.reserved - needed
        self._store.make_room(kept)
        # what running requests have set aside and not taken yet is not free either
        unfinished = sum(request.outstanding_bytes for request in self._schedule.running)
        waiting = sum(request.reserved for request in self._schedule.waiting)
        check_host_memory(needed + unfinished + waiting)
        self._ledger.reserve(needed)

    def _admit(self) -> list[Output]:
        """Let waiting requests in; returns what those have at once whose prompt is stored."""
        outputs = []
        while self.num_waiting and self.num_running < self.settings.max_running:
            request = self._schedule.waiting.popleft()
            found = self._store.find(request.prompt, request.settings)
            if found is None or found.layers is None:
                request.layers = self._runner.new_layers(request.settings)
            else:
                request.layers = [layer.fork() for layer in found.layers]
                request.num_prefilled = request.num_cached = len(found.tokens)
                self._counts.cached_tokens += request.num_cached
            self._schedule.running.append(request)
            if found is not None and request.num_prefilled == len(request.prompt):
                assert found.logits is not None
                outputs.append(self._take_token(request, found.logits))
            else:
                request.phase = Phase.PREFILL
                self._schedule.prefilling.append(request)
        return outputs

    def _serve(self, chosen: list[tuple[Request, Piece]]) -> list[Output]:
        logits, spans = self._runner.forward([piece for _, piece in chosen])
        outputs: list[Output] = []
        for (request, piece), following, span in zip(chosen, logits, spans, strict=True):
            if span.error is not None:
                outputs.append(self._fail(request, span.error))
            else:
                outputs.append(self._advance(request, piece, following))
        return outputs

    def _fail(self, request: Request, error: IceCacheError) -> Output:
        request.error = error
        self._end(request, Finish.ERROR)
        return Output(request, None, Finish.ERROR)

    def _advance(self, request: Request, piece: Piece, logits: torch.Tensor | None) -> Output:
        if request.phase is Phase.PREFILL:
            request.num_prefilled += len(piece.ids)
            self._counts.prompt_tokens += len(piece.ids)
            if logits is None:
                if self._schedule.is_worth_sharing(request):
                    self._keep_fork(request, None)
                return Output(request, None, None)
            self._schedule.prefilling.remove(request)
            self._keep_fork(request, logits.clone())
        assert logits is not None
        return self._take_token(request, logits)

    def _take_token(self, request: Request, logits: torch.Tensor) -> Output:
        try:
            token = next_token(logits, request.sampling, request.generator)
        except IceCacheError as error:
            return self._fail(request, error)
        request.phase = Phase.DECODE
        request.answer.append(token)
        self._counts.answer_tokens += 1
        request.last_token_at = time.monotonic()
        if request.first_token_at is None:
            request.first_token_at = request.last_token_at
        finish = None
        if token in self._runner.end_ids or token in request.sampling.stop_ids:
            finish = Finish.STOP
        elif len(request.answer) >= request.sampling.max_tokens:
            finish = Finish.LENGTH
        if finish is not None:
            self._end(request, finish)
        return Output(request, token, finish)

    def _keep_fork(self, request: Request, logits: torch.Tensor | None) -> None:
        """Keep a prompt, or its last whole chunk, for others that begin with it."""
        layers = [layer.fork() for layer in request.layers]
        tokens = np.asarray(request.taken_in, dtype=np.int32)
        text = request.text if logits is not None else None
        self._store.keep(Conversation(tokens, request.settings, layers, logits, text))

    def _end(self, request: Request, finish: Finish) -> None:
        self._schedule.remove(request)
        self._counts.add(request)
        tokens = np.asarray(request.taken_in, dtype=np.int32)
        request.phase, request.finish = Phase.FINISHED, finish
        layers, request.layers = list(request.layers), ()
        if finish is Finish.ERROR or not layers:
            self._store.drop(layers)
        else:
            text = self._text_of(request)
            ended = Conversation(
                tokens, request.settings, layers, text=text, is_ended=bool(request.answer)
            )
            self._store.keep(ended)
        self._ledger.release(request.reserved)

    def _text_of(self, request: Request) -> str | None:
        if request.text is None or self._decode is None or not request.answer:
            return None
        answer: str = self._decode(request.answer[:-1])
        return request.text + answer

    def _check_prompt(self, prompt: Sequence[int], sampling: Sampling) -> None:
        if not len(prompt):
            raise InputError("the prompt must hold at least one token, got an empty one")
        if not all(isinstance(i, int) and 0 <= i < self._runner.vocabulary for i in prompt):
            raise InputError(
                f"the prompt must hold token ids from 0 to {self._runner.vocabulary - 1}"
            )
        limit = self.longest_context
        if limit is not None and len(prompt) + sampling.max_tokens > limit:
            raise InputError(
                f"the prompt has {len(prompt):,} tokens, with {sampling.max_tokens:,} new ones "
                f"more than the model's context of {limit:,}"
            )
