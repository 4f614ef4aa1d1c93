"""The index benchmark's yardsticks: the exact scan, the error and the attention mass found."""

from __future__ import annotations

from typing import NamedTuple

import torch
from baseline import attention_logits, relative_errors, topk_mask, weigh_values
from index_case import Case
from torch import Tensor

from icecache import IceCacheConfig


class Scan(NamedTuple):
    """Every key, in float32: the search without an index.

    Attributes
    ----------
    keys : shape [kv_heads, tokens, head_dim]
    fixed_keys : shape [kv_heads, sink + window, head_dim]. They take part in the shares only.
    scaling : float
    room : int
        Tokens to choose.
    """

    keys: Tensor
    fixed_keys: Tensor
    scaling: float
    room: int

    def search(self, query: Tensor) -> Tensor:
        """Choose the tokens of largest summed softmax share, numbers `[kv_heads, room]`.

        query: shape [q_heads, head_dim], float32.
        """
        grouped = query.unflatten(0, (self.keys.shape[0], -1))
        chosen = []
        for heads, keys, fixed in zip(grouped, self.keys, self.fixed_keys, strict=True):
            logits = heads @ keys.T * self.scaling
            anyhow = (heads @ fixed.T * self.scaling).logsumexp(-1)
            total = torch.logaddexp(logits.logsumexp(-1), anyhow)
            votes = (logits - total[:, None]).exp_().sum(0)
            chosen.append(votes.topk(min(self.room, votes.shape[0])).indices)
        return torch.stack(chosen)


def scan_of(case: Case, config: IceCacheConfig) -> Scan:
    room = config.budget - case.fixed_keys.shape[1]
    return Scan(case.keys.float(), case.fixed_keys.float(), case.scaling, room)


class Quality(NamedTuple):
    """Means over KV heads, query heads and steps.

    Attributes
    ----------
    errors : relative error of each output beside full attention
    topk_error : of the exact top-k tokens at the same budget
    recalls : attention mass of the tokens of each selection, over that of the exact top-k ones
    """

    errors: dict[str, float]
    topk_error: float
    recalls: dict[str, float]


def measure_quality(
    case: Case,
    config: IceCacheConfig,
    outputs: dict[str, Tensor],
    selections: dict[str, list[Tensor]],
) -> Quality:
    """Compare with full attention in float64, one KV head at a time.

    Parameters
    ----------
    outputs : of [steps, q_heads, head_dim]
    selections : of one tensor a step, `[kv_heads, most]`, positions with -1 behind the last
    """
    errors: dict[str, list[Tensor]] = {name: [] for name in (*outputs, "")}
    recalls: dict[str, list[Tensor]] = {name: [] for name in selections}
    heads = torch.arange(case.queries.shape[1]).chunk(case.kv_heads)
    scaling = case.scaling
    # a layer is given its queries in the dtype of its keys
    queries = case.queries.to(case.keys.dtype).double()
    for row, which in enumerate(heads):
        keys, values = case.head(row)
        logits = attention_logits(queries[:, which], keys, scaling)
        full = weigh_values(logits, values)
        mask = topk_mask(logits, config.budget, config.sink, config.window)
        votes = logits.softmax(-1).sum(1)[0]
        topk = weigh_values(logits.masked_fill_(~mask[:, None], float("-inf")), values)
        errors[""].append(relative_errors(topk, full))
        for name, output in outputs.items():
            errors[name].append(relative_errors(output[:, which], full))
        mask[..., : config.sink] = False
        mask[..., case.tokens - config.window :] = False
        best = (votes * mask[0]).sum(-1)
        for name, positions in selections.items():
            found = torch.stack([mass(votes[s], one[row]) for s, one in enumerate(positions)])
            recalls[name].append(found / best)
    mean = {name: torch.stack(found).mean().item() for name, found in errors.items()}
    return Quality(
        {name: mean[name] for name in outputs},
        mean[""],
        {name: torch.stack(found).mean().item() for name, found in recalls.items()},
    )


def mass(votes: Tensor, positions: Tensor) -> Tensor:
    """Summed votes of the positions; -1 stands for none."""
    return votes[positions[positions >= 0].long()].sum()
