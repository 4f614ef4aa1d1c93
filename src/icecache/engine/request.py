"""One request: what was asked, how far it is, and what comes out of it."""

import enum
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from icecache.cache.layer import IceCacheLayer
from icecache.config import IceCacheConfig
from icecache.engine.watch import Watch
from icecache.errors import IceCacheError, InputError

__all__ = ["Finish", "Output", "Phase", "Request", "Sampling"]


class Phase(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


class Finish(enum.Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer is drawn.

    Parameters
    ----------
    max_tokens : int, default 64
    temperature : float, default 0.0
        0 takes the likeliest token.
    top_p : float, default 1.0
        Tokens are drawn from the likeliest ones that together have this share.
    seed : int, optional
        The same seed, prompt and settings give the same answer, whoever else is served.
    stop_ids : tuple of int, default ()
        Tokens that end the answer, beside the model's own.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {self.max_tokens!r}")
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise InputError(f"temperature must be from 0 to 100, got {self.temperature!r}")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed must be from 0 to 2**63 - 1, got {self.seed!r}")


class Output(NamedTuple):
    """What a step did for a request.

    Attributes
    ----------
    request : Request
    token : int, optional
        The next token of its answer; None while its prompt is read, and at an error.
    finish : Finish, optional
        Why it has ended with this step.
    """

    request: "Request"
    token: int | None
    finish: Finish | None


@dataclass(eq=False, slots=True)
class Request:
    """A request of an `Engine`; read it, but leave changes to the engine.

    Parameters
    ----------
    number : int
    prompt : tuple of int
        Token ids.
    sampling : Sampling
    settings : IceCacheConfig
        Of its layers.
    reserved : int
        Bytes of host memory that it may take.
    text : str, optional
        What the prompt says.
    watch : Watch, optional
    """

    number: int
    prompt: tuple[int, ...]
    sampling: Sampling
    settings: IceCacheConfig
    reserved: int
    text: str | None = None
    watch: Watch | None = None
    phase: Phase = Phase.WAITING
    layers: Sequence[IceCacheLayer] = ()
    num_prefilled: int = 0
    num_cached: int = 0
    answer: list[int] = field(default_factory=list)
    finish: Finish | None = None
    error: IceCacheError | None = None
    generator: torch.Generator | None = None
    added_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None
    last_token_at: float | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.phase is Phase.FINISHED

    @property
    def taken_in(self) -> tuple[int, ...]:
        """The tokens that its layers hold."""
        if self.phase is Phase.DECODE or self.answer:
            return (*self.prompt, *self.answer[:-1])
        return self.prompt[: self.num_prefilled]

    @property
    def num_tokens(self) -> int:
        """Tokens that its layers hold."""
        return self.num_prefilled + max(0, len(self.answer) - 1)

    @property
    def host_bytes(self) -> int:
        """Bytes that its layers take now, pages that it shares among them."""
        return sum(layer.stats().host_bytes for layer in self.layers)

    @property
    def outstanding_bytes(self) -> int:
        """About how many of the reserved bytes it has not taken yet."""
        total = len(self.prompt) + self.sampling.max_tokens
        return int(self.reserved * (1.0 - self.num_tokens / total))

    @property
    def seconds_to_first_token(self) -> float | None:
        """Time from `add` to the first token of the answer."""
        return None if self.first_token_at is None else self.first_token_at - self.added_at

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time between the tokens of the answer."""
        steps = len(self.answer) - 1
        if self.first_token_at is None or self.last_token_at is None or steps < 1:
            return None
        return (self.last_token_at - self.first_token_at) / steps
