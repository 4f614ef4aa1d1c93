"""The tokens of one layer and one request: a prompt that caches share, and a tail of their own.

Shapes throughout: `G` KV heads, `R` query heads per KV head, `T` tokens, `D` head dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PromptTokens", "Tokens"]


class PromptTokens(NamedTuple):
    """What a prefill left in one layer; never written to.

    Attributes
    ----------
    keys, values : shape [G, T, D]
    queries : shape [G, R, W, D]. Of the latest `W` prompt tokens.
    scaling : float. Of the layer's logits.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scaling: float


class Tokens:
    """Keys and values of a prompt, shared, and of the tokens after it.

    Parameters
    ----------
    prompt : PromptTokens
    """

    def __init__(self, prompt: PromptTokens) -> None:
        self.prompt = prompt
        self.num_prompt = prompt.keys.shape[1]
        self.num_tokens = self.num_prompt
        self._keys = prompt.keys.new_empty(prompt.keys.shape[0], 0, prompt.keys.shape[2])
        self._values = prompt.values.new_empty(prompt.values.shape[0], 0, prompt.values.shape[2])

    def append(self, key: Tensor, value: Tensor) -> None:
        """Take in one token, shapes ``[G, 1, D]``."""
        held = self.num_tokens - self.num_prompt
        if held == self._keys.shape[1]:
            self._keys = _with_room(self._keys)
            self._values = _with_room(self._values)
        self._keys[:, held] = key[:, 0]
        self._values[:, held] = value[:, 0]
        self.num_tokens += 1

    def keys(self, start: int, end: int) -> Tensor:
        """Return the keys at positions `start` to `end`, shape ``[G, end - start, D]``."""
        return _span(self.prompt.keys, self._keys, start, end)

    def logits(self, query: Tensor) -> Tensor:
        """Return the unscaled logits of every token, ``[G, R, T]``; query: ``[G, R, D]``."""
        tail = self._keys[:, : self.num_tokens - self.num_prompt]
        found = [query @ self.prompt.keys.transpose(1, 2)]
        if tail.shape[1]:
            found.append(query @ tail.transpose(1, 2))
        return torch.cat(found, -1)

    def weigh(self, weights: Tensor) -> Tensor:
        """Return the weighted sum of all values, ``[G, R, D]``; weights: ``[G, R, T]``."""
        out = weights[..., : self.num_prompt] @ self.prompt.values
        if self.num_tokens > self.num_prompt:
            tail = self._values[:, : self.num_tokens - self.num_prompt]
            out = out + weights[..., self.num_prompt :] @ tail
        return out

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values at positions ``[G, n]``, shapes ``[G, n, D]``."""
        found = [
            _pick(held, index.clamp(max=self.num_prompt - 1))
            for held in (self.prompt.keys, self.prompt.values)
        ]
        if self.num_tokens > self.num_prompt:
            is_late = (index >= self.num_prompt)[..., None]
            tail = (index - self.num_prompt).clamp(min=0)
            for i, held in enumerate((self._keys, self._values)):
                found[i] = torch.where(is_late, _pick(held, tail), found[i])
        return found[0], found[1]


def _with_room(buffer: Tensor) -> Tensor:
    heads, held, dim = buffer.shape
    grown = buffer.new_empty(heads, max(32, 2 * held), dim)
    grown[:, :held] = buffer
    return grown


def _span(prompt: Tensor, tail: Tensor, start: int, end: int) -> Tensor:
    border = prompt.shape[1]
    if end <= border:
        return prompt[:, start:end]
    late = tail[:, max(0, start - border) : end - border]
    return late if start >= border else torch.cat([prompt[:, start:], late], 1)


def _pick(held: Tensor, index: Tensor) -> Tensor:
    """Return what is at ``[G, n]`` of ``[G, T, D]``, as rows of one matrix: the fastest way."""
    heads, length, dim = held.shape
    flat = index + torch.arange(heads, device=index.device)[:, None] * length
    return held.reshape(-1, dim).index_select(0, flat.flatten()).view(*index.shape, dim)
