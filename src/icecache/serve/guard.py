"""What is looked at before a request is read: who asks, and how much comes."""

import asyncio
import hmac
import json
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard", "error_body"]

_MOST_DRAINED = 64 << 20
_DRAIN_SECONDS = 2.0
_OPEN = ("/", "/health", "/page.css", "/page.js")


def error_body(
    message: str, kind: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """Refuses requests without the key, and bodies that are too large, as they come in.

    Parameters
    ----------
    app : ASGI application
    api_key : str, optional
        Wanted as a bearer token everywhere but for the page itself and ``/health``.
    max_body_bytes : int
    on_refusal : callable
        Hears of the status.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        max_body_bytes: int,
        on_refusal: Callable[[int], None],
    ) -> None:
        self._app, self._max_body_bytes, self._on_refusal = app, max_body_bytes, on_refusal
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        length = int(declared) if declared.isdigit() and len(declared) < 19 else 1 << 62
        if not self._may_enter(scope["path"], headers):
            await _drain(receive, length)
            body = error_body("the API key is missing or wrong", "invalid_request_error")
            await self._refuse(send, 401, body, (b"www-authenticate", b"Bearer"))
            return
        if length > self._max_body_bytes:
            await _drain(receive, length)
            await self._refuse_body(send)
            return
        counted = _Counted(receive, self._max_body_bytes)
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            # what the application says of a body that was cut off is not the reason
            if not counted.is_too_large or started:
                started = True
                await send(message)

        await self._app(scope, counted, watched)
        if counted.is_too_large and not started:
            await _drain(receive, _MOST_DRAINED)
            await self._refuse_body(send)

    def _may_enter(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._key is None or path in _OPEN:
            return True
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # in constant time: how long it takes must not tell how much of the key was right
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key)

    async def _refuse_body(self, send: Send) -> None:
        message = f"the body must have at most {self._max_body_bytes:,} bytes"
        await self._refuse(send, 413, error_body(message, "invalid_request_error"))

    async def _refuse(
        self, send: Send, status: int, body: dict[str, Any], *headers: tuple[bytes, bytes]
    ) -> None:
        self._on_refusal(status)
        content = json.dumps(body).encode()
        all_headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
            *headers,
        ]
        await send({"type": "http.response.start", "status": status, "headers": all_headers})
        await send({"type": "http.response.body", "body": content})


async def _drain(receive: Receive, length: int) -> None:
    """Read what is refused and forget it: who is still sending would not read the answer."""
    if length > _MOST_DRAINED:
        return
    left = _MOST_DRAINED
    while left > 0:
        try:
            message = await asyncio.wait_for(receive(), _DRAIN_SECONDS)
        except TimeoutError:
            return
        if message["type"] != "http.request" or not message.get("more_body"):
            return
        left -= len(message.get("body", b""))


class _Counted:
    """A body that ends early once it is too large."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._left = receive, most
        self.is_too_large = False

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                self.is_too_large = True
                return {"type": "http.request", "body": b"", "more_body": False}
        return message
