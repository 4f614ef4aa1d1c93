"""How far a method is from the full cache: distributions, and attention layer by layer."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.evaluation.engine.attend import attend_all, weigh_all
from icecache.evaluation.engine.attention import Call
from icecache.evaluation.engine.prefill import Prefill
from icecache.evaluation.engine.tokens import Tokens

__all__ = ["Agreement", "LayerProbe", "compare"]

# a head may put nothing out (its values are zero, or a learned sink takes all)
_SMALLEST = torch.finfo(torch.float32).eps


class Agreement(NamedTuple):
    """Teacher-forced agreement with the full cache, means over the steps.

    Attributes
    ----------
    kl : float. KL(full || method) of the next-token distributions, nats.
    top1 : float. Share of the steps with the same likeliest token.
    """

    kl: float
    top1: float


def compare(full: Tensor, method: Tensor) -> Agreement:
    """Compare log-probabilities ``[steps, vocabulary]``."""
    # in double precision: what float32 leaves of a sum over the vocabulary is not KL
    sure, other = full.double().log_softmax(-1), method.double().log_softmax(-1)
    kl = (sure.exp() * (sure - other)).sum(-1).clamp(min=0.0)
    same = full.argmax(-1) == method.argmax(-1)
    return Agreement(float(kl.mean()), float(same.double().mean()))


class LayerProbe:
    """Measures each layer's step against full attention of the same query over the same tokens.

    Parameters
    ----------
    prefill : Prefill
    attended : callable
        Positions ``[G, n]`` that a layer, by index, attended exactly for a query ``[H, D]``, -1
        for none; None stands for all of them.
    """

    def __init__(self, prefill: Prefill, attended: Callable[[int, Call], Tensor | None]) -> None:
        self._tokens = {index: Tokens(prompt) for index, prompt in prefill.prompts.items()}
        self._attended = attended
        self._mass: dict[int, list[float]] = {index: [] for index in self._tokens}
        self._error: dict[int, list[float]] = {index: [] for index in self._tokens}

    @property
    def mass(self) -> list[float]:
        """Share of full attention that was attended exactly, per layer, mean over steps, heads."""
        return [sum(seen) / len(seen) for seen in self._mass.values()]

    @property
    def error(self) -> list[float]:
        """|output - full| / |full| per layer, mean over steps and heads."""
        return [sum(seen) / len(seen) for seen in self._error.values()]

    def see(self, call: Call, output: Tensor) -> None:
        """Take one decode step of one layer; layers left to the model are passed over."""
        layer = getattr(call.module, "layer_idx", None)
        if layer not in self._tokens:
            return
        tokens = self._tokens[layer]
        tokens.append(call.key[0], call.value[0])
        query = call.query[0].view(call.key.shape[1], -1, call.query.shape[3])
        full = attend_all(query, tokens, call.rule).double()
        found = output.view(full.shape).double()
        size = full.norm(dim=-1).clamp(min=_SMALLEST)
        self._error[layer].append(float(((found - full).norm(dim=-1) / size).mean()))
        self._mass[layer].append(self._mass_of(layer, call, weigh_all(query, tokens, call.rule)))

    def _mass_of(self, layer: int, call: Call, weights: Tensor) -> float:
        positions = self._attended(layer, call)
        if positions is None:
            return 1.0
        is_attended = torch.zeros(weights.shape[0], weights.shape[2] + 1, dtype=torch.bool)
        # -1 falls on the column that is cut off
        is_attended.scatter_(1, positions.long().cpu() % is_attended.shape[1], True)
        held = weights.cpu() * is_attended[:, None, :-1]
        # learned sinks take a share that no token has
        whole = weights.cpu().sum(-1).clamp(min=_SMALLEST)
        return float((held.sum(-1) / whole).mean())
