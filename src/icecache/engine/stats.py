"""What an engine holds and has done."""

from dataclasses import dataclass

from icecache.engine.request import Request

__all__ = ["Counts", "EngineStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Statistics of an `Engine`.

    Parameters
    ----------
    running, waiting : int
        Requests.
    reserved_bytes, limit_bytes : int
        Host memory that requests have set aside, and that there is for all.
    running_bytes, conversation_bytes, disk_bytes : int
        What running requests and stored conversations take, in memory and on disk.
    conversations : int
        Stored, in memory or on disk.
    disk_failures : int
        Conversations that could not be written.
    prompt_tokens, cached_tokens, answer_tokens : int
        Tokens read, taken from stored conversations instead, and answered.
    native_steps : int
        Of the tokens answered, those that were taken in by one compiled call.
    sparse_steps, dense_steps : int
        Attention calls of the requests that have ended, over their layers.
    """

    running: int
    waiting: int
    reserved_bytes: int
    limit_bytes: int
    running_bytes: int
    conversation_bytes: int
    disk_bytes: int
    conversations: int
    disk_failures: int
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    native_steps: int
    sparse_steps: int
    dense_steps: int


@dataclass(slots=True)
class Counts:
    """Work so far; fields as in `EngineStats`."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    sparse_steps: int = 0
    dense_steps: int = 0

    def add(self, request: Request) -> None:
        """Count a request's layers, which end with it."""
        stats = [layer.stats() for layer in request.layers]
        self.sparse_steps += sum(each.sparse_steps for each in stats)
        self.dense_steps += sum(each.dense_steps for each in stats)
