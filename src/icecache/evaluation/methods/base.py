"""What a method is: a set of parameters that opens a cache on a prefilled prompt."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from icecache.errors import ConfigError
from icecache.evaluation.engine.attend import Rule, Selection
from icecache.evaluation.engine.attention import Call
from icecache.evaluation.engine.cache import Policy, PolicyCache
from icecache.evaluation.engine.prefill import Prefill
from icecache.evaluation.engine.tokens import Tokens

__all__ = ["Method", "OpenCache", "SelectionMethod", "TokenScores", "best_tokens", "vote"]


class OpenCache(Protocol):
    """A cache of one request under way."""

    @property
    def cache(self) -> Cache:
        """What the model takes as ``past_key_values``."""

    def num_attended(self) -> float:
        """Return the tokens a KV head attended exactly in the last step, mean over the layers."""

    def attended(self, layer: int, call: Call) -> Tensor | None:
        """Return the positions a layer attended for this call, ``[G, n]``; None is all of them."""

    def close(self) -> None:
        """Free what the cache holds."""


class Method(ABC):
    """A way to hold and attend a context; its parameters are its fields.

    A new method is a frozen dataclass in a file of its own, added to the registry.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    has_budget: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """Make a method from ``key=value`` texts; `ConfigError` on an unknown key or bad value."""

    @abstractmethod
    def check(self, budget: int) -> None:
        """Raise `ConfigError` unless the method can run at this budget, in tokens."""

    @abstractmethod
    def open(self, model: PreTrainedModel, prefill: Prefill, budget: int) -> OpenCache:
        """Return a cache that holds the prompt and attends at most `budget` tokens a step."""


class PolicyRun:
    """A `PolicyCache` as an `OpenCache`."""

    def __init__(self, cache: PolicyCache) -> None:
        self.cache: PolicyCache = cache

    def num_attended(self) -> float:
        return self.cache.num_attended

    def attended(self, layer: int, call: Call) -> Tensor | None:
        return self.cache.attended_positions(layer)

    def close(self) -> None:
        """Do nothing: memory goes with the object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionMethod(Method):
    """A method that selects tokens of a full cache in plain PyTorch.

    The budget is the number of tokens a KV head attends in a step, sink and window included, in
    every layer; a context that fits is attended in full. The two fields are common to all.

    Parameters
    ----------
    sink, window : int
        First and latest tokens, always attended (where the method has such).
    """

    sink: int = 16
    window: int = 32

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            low = 0 if field.name in ("sink", "seed") else 1
            if field.type is int and (not isinstance(value, int) or value < low):
                raise ConfigError(
                    f"{self.name}: {field.name} must be an integer >= {low}, got {value!r}"
                )

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """Make a method from ``key=value`` texts."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        found: dict[str, Any] = {}
        for key, text in options.items():
            if key not in known:
                raise ConfigError(f"{cls.name} has no parameter {key!r}; known: {', '.join(known)}")
            found[key] = _parse(cls.name, key, text, known[key].type)
        return cls(**found)

    def check(self, budget: int) -> None:
        """Raise `ConfigError` unless sink, window and one unit of choice fit the budget."""
        least = self.sink + self.window + self.unit
        if budget < least:
            raise ConfigError(
                f"{self.name}: budget must be at least sink + window + {self.unit} = {least} "
                f"tokens, got {budget}"
            )

    @property
    def unit(self) -> int:
        """Most tokens that one choice brings."""
        return 1

    def open(self, model: PreTrainedModel, prefill: Prefill, budget: int) -> PolicyRun:
        """Return a cache under this method's policies."""
        policies = self.policies(budget, len(prefill.prompts))
        return PolicyRun(PolicyCache(prefill, [_WithinBudget(p, budget) for p in policies]))

    def policies(self, budget: int, num_layers: int) -> list[Policy]:
        """Return one policy per full-attention layer."""
        return [self.policy(budget, layer) for layer in range(num_layers)]

    @abstractmethod
    def policy(self, budget: int, layer: int) -> Policy:
        """Return the policy of one layer, counted among the full-attention layers."""


class _WithinBudget:
    """Attends to everything until the context is longer than the budget."""

    def __init__(self, policy: Policy, budget: int) -> None:
        self._policy, self._budget = policy, budget

    def start(self, tokens: Tokens) -> None:
        # also below the budget: generated tokens may pass it
        self._policy.start(tokens)

    def select(self, query: Tensor, tokens: Tokens, rule: Rule) -> Selection | None:
        if tokens.num_tokens <= self._budget:
            return None
        return self._policy.select(query, tokens, rule)


class TokenScores(ABC):
    """Sink, window and the best of the tokens between them, by an estimate of their logits.

    Parameters
    ----------
    budget, sink, window : int
    """

    def __init__(self, budget: int, sink: int, window: int) -> None:
        self.budget, self.sink, self.window = budget, sink, window

    @abstractmethod
    def start(self, tokens: Tokens) -> None:
        """Look at the prompt."""

    @abstractmethod
    def estimate(self, query: Tensor, tokens: Tokens, rule: Rule) -> Tensor:
        """Return scaled logits of the tokens between sink and window, ``[G, R, T - s - w]``."""

    def select(self, query: Tensor, tokens: Tokens, rule: Rule) -> Selection:
        """Choose the tokens with the most votes."""
        fixed = fixed_positions(tokens.num_tokens, self.sink, self.window)
        votes = vote(self.estimate(query, tokens, rule), fixed_logits(query, tokens, fixed, rule))
        return best_tokens(votes, fixed, self.budget, self.sink)


def vote(logits: Tensor, fixed: Tensor) -> Tensor:
    """Return the votes ``[G, m]``: each query head's softmax shares, summed over a KV head's.

    logits: shape [G, R, m], of what is chosen from; fixed: shape [G, R, f], of what is attended
    anyway and takes part in the softmax, so that a head that looks there has little to say.
    """
    total = torch.logaddexp(logits.logsumexp(-1), fixed.logsumexp(-1))
    return (logits - total[..., None]).exp().sum(1)


def fixed_positions(num_tokens: int, sink: int, window: int) -> Tensor:
    """Return the positions of sink and window."""
    return torch.cat([torch.arange(sink), torch.arange(num_tokens - window, num_tokens)])


def fixed_logits(query: Tensor, tokens: Tokens, fixed: Tensor, rule: Rule) -> Tensor:
    """Return the exact scaled logits of fixed positions, ``[G, R, f]``; -inf if there is none."""
    keys, _ = tokens.gather(fixed.expand(query.shape[0], -1))
    if keys.shape[1] == 0:
        return query.new_full((*query.shape[:2], 1), -math.inf)
    return query @ keys.transpose(1, 2) * rule.scaling


def best_tokens(votes: Tensor, fixed: Tensor, budget: int, sink: int) -> Selection:
    """Choose the fixed positions and the best voted of the tokens that begin at `sink`."""
    room = min(budget - fixed.numel(), votes.shape[1])
    best = votes.topk(room, dim=-1).indices + sink
    return Selection(torch.cat([fixed.expand(votes.shape[0], -1), best], 1))


def _parse(name: str, key: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{name}: {key} must be {kind.__name__}, got {text!r}") from error
