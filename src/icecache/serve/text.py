"""Tokens to text as they come, and the texts that end an answer."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from icecache.errors import UnsupportedModel

__all__ = ["AnswerText", "check_tokenizer"]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UnsupportedModel` unless the tokenizer can decode a stream."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} has no fast version, which the server needs"
        )


class AnswerText:
    """The text of one answer.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    stops : sequence of str
        The answer ends before the first of these in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = stops
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Return what can be said for certain after one more token."""
        return self._pass(self._stream.step(self._backend, token) or "")

    def end(self) -> str:
        """Return what was held back, at the end of the answer."""
        rest, self._held = self._held, ""
        return "" if self.is_stopped else rest

    def _pass(self, piece: str) -> str:
        text, self._held = self._held + piece, ""
        if self.is_stopped:
            return ""
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        # the end of it may be the beginning of a stop
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return how much of the end of `text` is the beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
