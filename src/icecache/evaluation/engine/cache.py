"""Caches whose layers attend what a policy selects, on a prompt that was prefilled once."""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from icecache.errors import UnsupportedModel
from icecache.evaluation.engine.attend import Rule, Selection, attend_all, attend_selected
from icecache.evaluation.engine.attention import Call, hang, run_plainly
from icecache.evaluation.engine.prefill import Prefill
from icecache.evaluation.engine.tokens import PromptTokens, Tokens

__all__ = ["Policy", "PolicyCache", "PolicyLayer"]


class Policy(Protocol):
    """Decides which tokens one layer attends; one object serves one layer of one prompt."""

    def start(self, tokens: Tokens) -> None:
        """Look at the prompt, once, before the first step."""

    def select(self, query: Tensor, tokens: Tokens, rule: Rule) -> Selection | None:
        """Choose for a query ``[G, R, D]``, the newest token being held; None is everything."""


class PolicyLayer(CacheLayerMixin):
    """One attention layer under a policy.

    Parameters
    ----------
    policy : Policy
    prompt : PromptTokens
        Shared with other caches, never written to.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, policy: Policy, prompt: PromptTokens) -> None:
        super().__init__()
        self.policy = policy
        self.tokens = Tokens(prompt)
        self.selection: Selection | None = None
        self._is_pending = False
        policy.start(self.tokens)
        self.is_initialized = True

    @property
    def num_attended(self) -> float:
        """Tokens that a KV head attended in the last step, mean over the heads."""
        chosen = self.selection
        return float(self.tokens.num_tokens) if chosen is None else chosen.num_attended

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: a layer is made with its prompt."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Announce one new token, to be taken when it is attended."""
        self._is_pending = True
        return key_states, value_states

    def __call__(self, call: Call) -> Tensor:
        """Take the announced token, select, attend."""
        if call.query.shape[0] != 1 or call.query.shape[2] != 1:
            raise UnsupportedModel(
                f"{type(call.module).__name__} attends {list(call.query.shape)} queries in one "
                "step; methods are compared on one sequence, token by token"
            )
        if self._is_pending:
            self.tokens.append(call.key[0], call.value[0])
            self._is_pending = False
        query = call.query[0].view(call.key.shape[1], -1, call.query.shape[3])
        self.selection = self.policy.select(query, self.tokens, call.rule)
        if self.selection is None:
            out = attend_all(query, self.tokens, call.rule)
        else:
            out = attend_selected(query, self.tokens, self.selection, call.rule)
        return out.reshape(1, 1, call.query.shape[1], -1)

    def get_seq_length(self) -> int:
        """Return the tokens held: positions count from here."""
        return self.tokens.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the mask for `query_length` new tokens."""
        return self.tokens.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit but memory."""
        return -1


class PolicyCache(Cache):
    """A transformers cache of one request: policies where attention is full, copies elsewhere.

    Parameters
    ----------
    prefill : Prefill
    policies : list of Policy
        One per full-attention layer, in the order of the layers.
    """

    def __init__(self, prefill: Prefill, policies: list[Policy]) -> None:
        # sliding windows and recurrent states change with every token, so each cache has its own
        layers: list[Any] = [copy.deepcopy(layer) for layer in prefill.kept_layers()]
        for policy, (index, prompt) in zip(policies, prefill.prompts.items(), strict=True):
            layers[index] = PolicyLayer(policy, prompt)
        super().__init__(layers=layers)

    @property
    def policed(self) -> dict[int, PolicyLayer]:
        """The layers under a policy, by index."""
        return {i: x for i, x in enumerate(self.layers) if isinstance(x, PolicyLayer)}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values of one layer over; called by the model."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        hang(keys, layer if isinstance(layer, PolicyLayer) else run_plainly)
        return keys, values

    @property
    def num_attended(self) -> float:
        """Tokens attended in the last step, mean over the layers under a policy."""
        counts = [layer.num_attended for layer in self.policed.values()]
        return sum(counts) / len(counts)

    def attended_positions(self, layer: int) -> Tensor | None:
        """Return the positions a layer attended, ``[G, n]``, -1 for none; None is all of them."""
        chosen = self.policed[layer].selection
        if chosen is None:
            return None
        valid = torch.ones_like(chosen.positions, dtype=torch.bool)
        valid = valid if chosen.valid is None else chosen.valid
        return chosen.positions.masked_fill(~valid, -1)
