"""Conversations that ended, kept for the requests that go on with them.

A conversation is found by its tokens: blocks of them are hashed, each with the hash before it, and
the longest kept one that a new prompt begins with is forked: pages and tree are shared until one
of the two writes. Idle ones are written to disk, and the least recently used give way first.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from icecache.cache.layer import IceCacheLayer
from icecache.config import IceCacheConfig

__all__ = ["BLOCK", "Conversation", "Conversations"]

BLOCK = 64


@dataclass(eq=False, slots=True)
class Conversation:
    """A conversation up to some token.

    Parameters
    ----------
    tokens : ndarray, int32
        What the layers hold.
    settings : IceCacheConfig
        Of the layers.
    layers : list of IceCacheLayer, optional
        None while it is on disk only.
    logits : Tensor, optional
        Of the token that follows, shape [vocabulary]; of whole prompts.
    text : str, optional
        What the tokens say, where that is known.
    used_at : float
        When it was last used, on the clock of the engine.
    is_ended : bool
        Whether it holds an answer; otherwise it is a prompt, or the beginning of one.
    """

    tokens: np.ndarray
    settings: IceCacheConfig
    layers: list[IceCacheLayer] | None
    logits: Tensor | None = None
    text: str | None = None
    used_at: float = 0.0
    is_ended: bool = False
    keys: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = list(block_keys(self.tokens, self.settings))

    @property
    def name(self) -> str:
        """A name made of the content."""
        rest = self.tokens[len(self.tokens) // BLOCK * BLOCK :]
        return hashlib.sha256(self.keys[-1] + rest.tobytes()).hexdigest()[:32]

    def continues(self, other: "Conversation") -> bool:
        """Whether it begins with all of another and goes on."""
        length, blocks = len(other.tokens), len(other.keys)
        return (
            len(self.tokens) > length
            and self.keys[blocks - 1] == other.keys[-1]
            and np.array_equal(self.tokens[:length], other.tokens)
        )

    def release(self) -> None:
        """Let the layers go."""
        for layer in self.layers or ():
            layer.release()
        self.layers = None


class Conversations:
    """Those in memory and on disk, found by their tokens."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, list[Conversation]] = {}

    def __iter__(self) -> Iterator[Conversation]:
        return (each for group in list(self._by_key.values()) for each in list(group))

    def __len__(self) -> int:
        return sum(len(group) for group in self._by_key.values())

    @property
    def nbytes(self) -> int:
        """Bytes that those in memory take; pages that several share count once."""
        total, pools = 0, set()
        for each in self:
            for layer in each.layers or ():
                own, pool, pool_bytes = layer.shared_bytes()
                total += own
                if pool is not None and pool not in pools:
                    pools.add(pool)
                    total += pool_bytes
        return total

    def find(self, prompt: Sequence[int], settings: IceCacheConfig) -> Conversation | None:
        """Return the longest conversation that a prompt begins with.

        One of the whole prompt counts only if it knows what logits follow.
        """
        tokens = np.asarray(prompt, dtype=np.int32)
        keys = list(block_keys(tokens, settings))
        for number in range(len(keys) - 1, 0, -1):
            fitting = [
                each
                for each in self._by_key.get(keys[number], ())
                if _begins_with(tokens, each, number * BLOCK)
            ]
            if fitting:
                return max(fitting, key=lambda each: len(each.tokens))
        return None

    def find_text(self, text: str, settings: IceCacheConfig) -> Conversation | None:
        """Return the conversation with the longest text that `text` goes on with."""
        fitting = [
            each
            for each in self
            if each.text and each.settings == settings and text.startswith(each.text)
        ]
        return max(fitting, key=lambda each: len(each.text or ""), default=None)

    def add(self, conversation: Conversation) -> bool:
        """Keep a conversation; False if it is too short, or kept already."""
        if len(conversation.keys) < 2:
            return False
        group = self._by_key.setdefault(conversation.keys[-1], [])
        if any(np.array_equal(each.tokens, conversation.tokens) for each in group):
            return False
        group.append(conversation)
        return True

    def remove(self, conversation: Conversation) -> None:
        """Forget a conversation and let its memory go."""
        group = self._by_key[conversation.keys[-1]]
        group.remove(conversation)
        if not group:
            del self._by_key[conversation.keys[-1]]
        conversation.release()


def block_keys(tokens: np.ndarray, settings: IceCacheConfig) -> Iterator[bytes]:
    """Yield the hash of nothing, of the first block, of the first two, ..."""
    key = hashlib.sha256(repr(settings).encode()).digest()
    yield key
    for first in range(0, len(tokens) - BLOCK + 1, BLOCK):
        block = tokens[first : first + BLOCK]
        key = hashlib.sha256(key + block.tobytes()).digest()
        yield key


def _begins_with(tokens: np.ndarray, conversation: Conversation, same: int) -> bool:
    """Whether tokens go on with a conversation, given that the first `same` are the same."""
    length = len(conversation.tokens)
    if length > len(tokens) or (length == len(tokens) and conversation.logits is None):
        return False
    return np.array_equal(conversation.tokens[same:], tokens[same:length])
