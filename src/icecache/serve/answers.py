"""Answers in OpenAI's shapes: one body, or a stream of server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from icecache.errors import IceCacheError
from icecache.serve.guard import error_body
from icecache.serve.job import Event, Job

__all__ = ["Shape", "chat_shape", "completion_shape", "stream", "whole"]

# proxies close a stream that is silent for long, as it is while a prompt is read
_SILENCE_SECONDS = 10.0


class Shape:
    """How one kind of request is answered.

    Parameters
    ----------
    name, chunk_name : str
        The ``object`` of a body and of a stream's chunk.
    prefix : str
        Of the answer's id.
    model : str
    choice : callable
        Text, finish reason and whether it is the stream's first chunk (None: one body) to a choice.
    """

    def __init__(
        self,
        name: str,
        chunk_name: str,
        prefix: str,
        model: str,
        choice: Callable[[str, str | None, bool | None], dict[str, Any]],
    ) -> None:
        self._name, self._chunk_name, self._choice = name, chunk_name, choice
        self._head = {"id": prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def body(self, text: str, finish: str | None, usage: dict[str, Any]) -> dict[str, Any]:
        """Return a whole answer."""
        choice = {"index": 0, **self._choice(text, finish, None)}
        return {**self._head, "object": self._name, "choices": [choice], "usage": usage}

    def chunk(self, event: Event, is_first: bool) -> dict[str, Any]:
        """Return a piece of a stream."""
        choice = {"index": 0, **self._choice(event.text, event.finish, is_first)}
        piece = {**self._head, "object": self._chunk_name, "choices": [choice]}
        return piece if event.live is None else {**piece, "icecache": event.live}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the last piece of a stream that counts its tokens."""
        return {**self._head, "object": self._chunk_name, "choices": [], "usage": usage}


def chat_shape(model: str) -> Shape:
    """Return the shape of chat completions."""

    def choice(text: str, finish: str | None, is_first: bool | None) -> dict[str, Any]:
        content: dict[str, Any] = {"content": text} if text or finish is None else {}
        if is_first is None:
            message = {"role": "assistant", "content": text, "refusal": None}
            return {"message": message, "finish_reason": finish, "logprobs": None}
        if is_first:
            content = {"role": "assistant", "content": text}
        return {"delta": content, "finish_reason": finish, "logprobs": None}

    return Shape("chat.completion", "chat.completion.chunk", "chatcmpl-", model, choice)


def completion_shape(model: str) -> Shape:
    """Return the shape of plain completions."""

    def choice(text: str, finish: str | None, is_first: bool | None) -> dict[str, Any]:
        return {"text": text, "finish_reason": finish, "logprobs": None}

    return Shape("text_completion", "text_completion", "cmpl-", model, choice)


async def whole(job: Job, shape: Shape) -> dict[str, Any]:
    """Wait for a whole answer; raises the error that it ended with."""
    text = ""
    while True:
        event = await job.events.get()
        if event.error is not None:
            raise event.error
        text += event.text
        if event.finish is not None:
            return shape.body(text, event.finish, job.usage)


async def stream(
    job: Job,
    shape: Shape,
    with_usage: bool,
    status_of: Callable[[IceCacheError], int],
    on_end: Callable[[], None],
) -> AsyncIterator[str]:
    """Yield an answer's events as they come; a client that goes ends the request."""
    is_first = True
    try:
        while True:
            try:
                event = await asyncio.wait_for(job.events.get(), _SILENCE_SECONDS)
            except TimeoutError:
                yield ": still at work\n\n"
                continue
            if event.error is not None:
                kind = "server_error" if status_of(event.error) >= 500 else "invalid_request_error"
                yield _data(error_body(str(event.error), kind))
                break
            yield _data(shape.chunk(event, is_first))
            is_first = False
            if event.finish is not None:
                if with_usage:
                    yield _data(shape.usage_chunk(job.usage))
                break
        yield "data: [DONE]\n\n"
    finally:
        on_end()


def _data(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
