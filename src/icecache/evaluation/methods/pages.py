"""Selection of pages by position, each told from the others by a digest of its keys."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from icecache.evaluation.engine.attend import Rule, Selection
from icecache.evaluation.engine.tokens import Tokens
from icecache.evaluation.methods.base import (
    SelectionMethod,
    fixed_logits,
    fixed_positions,
    vote,
)

__all__ = ["BoxPolicy", "PageMethod"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageMethod(SelectionMethod):
    """A method that selects pages of consecutive tokens, beginning behind the sink.

    Parameters
    ----------
    page_size : int
        Tokens of a page.
    """

    page_size: int = 16

    @property
    def unit(self) -> int:
        """Most tokens that one choice brings: a page."""
        return self.page_size


class BoxPolicy(ABC):
    """Pages behind boxes of keys, scored by the box's largest possible logit.

    The last page may be partial; what is in the window belongs to no page yet.
    """

    def __init__(self, budget: int, method: PageMethod) -> None:
        self._method = method
        self._num_pages = (budget - method.sink - method.window) // method.page_size
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    @abstractmethod
    def box(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return lower and upper corners ``[G, pages, D]`` of keys ``[G, pages, tokens, D]``."""

    def start(self, tokens: Tokens) -> None:
        """Digest the prompt's complete pages."""
        size, sink = self._method.page_size, self._method.sink
        count = max(0, tokens.num_tokens - sink - self._method.window) // size
        if count:
            keys = torch.unflatten(tokens.keys(sink, sink + count * size), 1, (count, size))
            self._low, self._high = self.box(keys)

    def select(self, query: Tensor, tokens: Tokens, rule: Rule) -> Selection:
        """Choose the pages with the most votes."""
        method = self._method
        end = tokens.num_tokens - method.window
        low, high = self._boxes(tokens, end)
        logits = (
            query.clamp(min=0) @ high.transpose(1, 2) + query.clamp(max=0) @ low.transpose(1, 2)
        ) * rule.scaling
        fixed = fixed_positions(tokens.num_tokens, method.sink, method.window)
        votes = vote(logits, fixed_logits(query, tokens, fixed, rule))
        best = votes.topk(min(self._num_pages, votes.shape[1]), dim=-1).indices
        start = method.sink + best * method.page_size
        index = (start[..., None] + torch.arange(method.page_size)).flatten(1)
        fixed = fixed.expand(len(index), -1)
        is_there = torch.cat([torch.ones_like(fixed, dtype=torch.bool), index < end], 1)
        return Selection(torch.cat([fixed, index.clamp(max=end - 1)], 1), is_there)

    def _boxes(self, tokens: Tokens, end: int) -> tuple[Tensor, Tensor]:
        """Return the boxes up to `end`; pages that became complete are kept."""
        size = self._method.page_size
        while self._start_of_next() + size <= end:
            self._keep(*self._box_of(tokens, self._start_of_next() + size))
        low, high = self._low, self._high
        if self._start_of_next() < end:
            partial = self._box_of(tokens, end)
            if low is None or high is None:
                return partial
            return torch.cat([low, partial[0]], 1), torch.cat([high, partial[1]], 1)
        assert low is not None and high is not None
        return low, high

    def _start_of_next(self) -> int:
        held = 0 if self._low is None else self._low.shape[1]
        return self._method.sink + held * self._method.page_size

    def _box_of(self, tokens: Tokens, end: int) -> tuple[Tensor, Tensor]:
        return self.box(tokens.keys(self._start_of_next(), end)[:, None])

    def _keep(self, low: Tensor, high: Tensor) -> None:
        self._low = low if self._low is None else torch.cat([self._low, low], 1)
        self._high = high if self._high is None else torch.cat([self._high, high], 1)
