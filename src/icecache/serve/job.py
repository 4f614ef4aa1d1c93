"""One client's request on its way through the worker."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from icecache.engine import Request
from icecache.errors import IceCacheError
from icecache.serve.text import AnswerText

__all__ = ["Event", "Job", "Wish"]


class Event(NamedTuple):
    """What a client gets next.

    Attributes
    ----------
    text : str
    finish : {"stop", "length"}, optional
    error : IceCacheError, optional
        The answer ended with it.
    live : dict, optional
        Figures for the live view.
    """

    text: str = ""
    finish: str | None = None
    error: IceCacheError | None = None
    live: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a client asks for, checked but not yet tokenized.

    Parameters
    ----------
    prompt : str or list of int
    is_template : bool
        Whether a chat template made it, which brings its own special tokens.
    most_tokens : int, optional
        Tokens of the answer at most.
    temperature, top_p : float
    seed : int, optional
    stops : list of str
    budget : int, optional
    live : bool
    """

    prompt: str | list[int]
    is_template: bool
    most_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stops: list[str]
    budget: int | None
    live: bool


@dataclass(eq=False, slots=True)
class Job:
    """A wish in the worker, and the queue of what comes of it.

    Parameters
    ----------
    wish : Wish
    loop : asyncio.AbstractEventLoop
        Of the client's task; events are handed over to it.
    """

    wish: Wish
    loop: asyncio.AbstractEventLoop
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)
    request: Request | None = None
    text: AnswerText | None = None
    live: dict[str, Any] | None = None

    def tell(self, event: Event) -> None:
        """Hand an event over, from the worker's thread."""
        # a server that is shutting down has closed its loop
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's count of tokens."""
        assert self.request is not None
        read, said = len(self.request.prompt), len(self.request.answer)
        return {
            "prompt_tokens": read,
            "completion_tokens": said,
            "total_tokens": read + said,
            "prompt_tokens_details": {"cached_tokens": self.request.num_cached},
        }
