"""The thread that owns the engine: the only one that touches model and caches."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icecache.config import IceCacheConfig
from icecache.engine import Engine, EngineSettings, Finish, Output, Sampling
from icecache.errors import IceCacheError, InputError
from icecache.serve.job import Event, Job, Wish
from icecache.serve.live import figures
from icecache.serve.metrics import Metrics
from icecache.serve.text import AnswerText, check_tokenizer

__all__ = ["EngineFailed", "Worker"]

_logger = logging.getLogger(__name__)
_IDLE_SECONDS = 0.5
_DEFAULT_TOKENS = 1024
# no text has fewer tokens than a part of its letters: longer ones are refused unread
_MOST_LETTERS_PER_TOKEN = 32

Command = Callable[[], None]


class EngineFailed(IceCacheError, RuntimeError):
    """The engine's thread has ended, or a forward failed; the message says what to do."""


class Worker:
    """Runs an engine in a thread of its own.

    Parameters
    ----------
    model, tokenizer : as loaded
    engine_settings : EngineSettings
    cache : IceCacheConfig
    metrics : Metrics
    most_tokens : int, optional
        Tokens that an answer may have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        engine_settings: EngineSettings,
        cache: IceCacheConfig,
        metrics: Metrics,
        most_tokens: int | None = None,
    ) -> None:
        check_tokenizer(tokenizer)
        self._tokenizer, self._metrics, self._most_tokens = tokenizer, metrics, most_tokens
        self._engine = Engine(model, engine_settings, cache, decode=self._decode)
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._is_alive = True
        self._thread = threading.Thread(target=self._run, name="icecache-worker", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return self._is_alive and self._thread.is_alive()

    async def submit(self, wish: Wish) -> Job:
        """Queue a request; raises what the engine raises if it refuses it."""
        job = Job(wish, asyncio.get_running_loop())
        taken: Future[None] = Future()

        def add() -> None:
            if not taken.set_running_or_notify_cancel():
                return
            try:
                self._add(job)
            except IceCacheError as error:
                taken.set_exception(error)
            else:
                taken.set_result(None)

        self._command(add)
        try:
            await asyncio.wrap_future(taken)
        except asyncio.CancelledError:
            self.cancel(job)
            raise
        return job

    def cancel(self, job: Job) -> None:
        """End a request that nobody waits for any more."""
        if self.is_alive:
            self._command(lambda: self._abort(job))

    def close(self) -> None:
        """End the thread; conversations are written to disk before."""
        self._commands.put(None)
        self._thread.join()

    def _command(self, command: Command) -> None:
        if not self.is_alive:
            raise EngineFailed("the engine has stopped; restart the server")
        self._commands.put(command)

    def _run(self) -> None:
        try:
            while self._obey():
                if self._engine.has_work:
                    self._step()
                else:
                    self._engine.rest()
                self._metrics.update(self._engine)
        finally:
            self._is_alive = False
            for job in list(self._jobs.values()):
                job.tell(Event(error=EngineFailed("the server is stopping")))
            self._engine.close()

    def _obey(self) -> bool:
        """Carry out all commands, waiting for one while there is nothing else; False to end."""
        wait = not self._engine.has_work
        while True:
            try:
                command = self._commands.get(wait, _IDLE_SECONDS if wait else None)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except (RuntimeError, MemoryError) as error:
            # the engine has ended the requests of this step; the others and new ones go on
            _logger.exception("a forward failed")
            failed = EngineFailed(f"the model failed ({type(error).__name__}); try again")
            for job in [j for j in self._jobs.values() if j.request and j.request.is_finished]:
                self._finish(job, Event(error=failed))
            return
        for output in outputs:
            self._hand_on(output)

    def _hand_on(self, output: Output) -> None:
        job = self._jobs.get(output.request.number)
        if job is None:
            return
        assert job.text is not None
        if output.token is None:
            if output.finish is not None:
                self._finish(job, Event(error=output.request.error))
            elif job.wish.live:
                job.tell(Event(live=self._live(job)))
            return
        if len(output.request.answer) == 1:
            self._metrics.first_token(output.request)
        is_end = output.finish is Finish.STOP
        text = "" if is_end else job.text.add(output.token)
        if job.text.is_stopped:
            self._engine.stop(output.request)
            self._finish(job, Event(text, "stop", live=self._live(job)))
        elif output.finish is not None:
            reason = "stop" if is_end else "length"
            self._finish(job, Event(text + job.text.end(), reason, live=self._live(job)))
        elif text or job.wish.live:
            job.tell(Event(text, live=self._live(job)))

    def _live(self, job: Job) -> dict[str, Any] | None:
        assert job.request is not None
        # a request that has ended holds nothing any more: what it held last is told
        if job.wish.live and not job.request.is_finished:
            job.live = figures(job.request)
        return job.live

    def _finish(self, job: Job, event: Event) -> None:
        assert job.request is not None
        self._jobs.pop(job.request.number, None)
        self._metrics.ended(job.request)
        job.tell(event)

    def _abort(self, job: Job) -> None:
        if job.request is not None and job.request.number in self._jobs:
            del self._jobs[job.request.number]
            self._engine.abort(job.request)
            self._metrics.ended(job.request)

    def _add(self, job: Job) -> None:
        wish, cache = job.wish, self._engine.cache
        if wish.budget is not None:
            cache = cache.replace(budget=wish.budget)
        ids = self._tokens(wish, cache)
        most = self._answer_tokens(wish, len(ids))
        sampling = Sampling(
            max_tokens=most,
            temperature=wish.temperature,
            top_p=wish.top_p,
            # OpenAI's seeds have a sign, torch's do not
            seed=None if wish.seed is None else wish.seed % (1 << 63),
        )
        text = wish.prompt if isinstance(wish.prompt, str) else None
        job.request = self._engine.add(ids, sampling, cache=cache, text=text, watch=wish.live)
        job.text = AnswerText(self._tokenizer, wish.stops)
        self._jobs[job.request.number] = job

    def _tokens(self, wish: Wish, cache: IceCacheConfig) -> list[int]:
        if not isinstance(wish.prompt, str):
            return wish.prompt
        limit = self._engine.longest_context
        if limit is not None and len(wish.prompt) > limit * _MOST_LETTERS_PER_TOKEN:
            raise InputError(
                f"the prompt has {len(wish.prompt):,} letters, far more than fit in the model's "
                f"context of {limit:,} tokens"
            )
        known, rest = self._engine.tokens_of(wish.prompt, cache)
        special = not wish.is_template and not known
        ids: list[int] = self._tokenizer(rest, add_special_tokens=special, verbose=False)[
            "input_ids"
        ]
        return [*known, *ids]

    def _answer_tokens(self, wish: Wish, read: int) -> int:
        limit = self._engine.longest_context
        if wish.most_tokens is None:
            left = _DEFAULT_TOKENS if limit is None else max(1, limit - read)
            return min(_DEFAULT_TOKENS, left, self._most_tokens or left)
        if self._most_tokens is not None and wish.most_tokens > self._most_tokens:
            raise InputError(
                f"max_tokens must be at most {self._most_tokens:,}, got {wish.most_tokens:,}"
            )
        return wish.most_tokens

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text
