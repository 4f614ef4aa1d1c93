"""The truth: every op in plain PyTorch, float32, one row and one head at a time."""

import math

import torch
from torch import Tensor

__all__ = [
    "attend_dense",
    "attend_parts",
    "choose_within",
    "merge_summaries",
    "nearest",
    "quantize_rows",
    "score_leaves",
    "sum_groups",
    "summarize",
]

NEGLIGIBLE = 0.03


def sum_groups(x: Tensor, ids: Tensor, num: int) -> Tensor:
    """Return the sum of each group's elements, shape [elements, dim] -> [num, dim], float32."""
    total = torch.zeros(num, x.shape[1])
    for element, group in zip(x, ids.tolist(), strict=True):
        total[group] += element
    return total


def summarize(keys: Tensor, values: Tensor, ids: Tensor, num: int) -> tuple[Tensor, ...]:
    """Return count, mean key, mean value and spread (mean squared distance) of each group."""
    count = torch.zeros(num, dtype=torch.int64)
    key_mean, value_mean = torch.zeros(num, keys.shape[1]), torch.zeros(num, values.shape[1])
    spread = torch.zeros(num)
    for i in range(num):
        k, v = keys[ids == i].float(), values[ids == i].float()
        count[i] = k.shape[0]
        key_mean[i], value_mean[i] = k.mean(0), v.mean(0)
        spread[i] = ((k - key_mean[i]) ** 2).sum(1).mean()
    return count, key_mean, value_mean, spread


def merge_summaries(
    keys: Tensor, values: Tensor, spread: Tensor, count: Tensor, ids: Tensor, num: int
) -> tuple[Tensor, ...]:
    """Return count, mean key, mean value and spread of groups of summaries."""
    total = torch.zeros(num, dtype=torch.int64)
    key_mean, value_mean = torch.zeros(num, keys.shape[1]), torch.zeros(num, values.shape[1])
    merged = torch.zeros(num)
    for i in range(num):
        own = ids == i
        weight = count[own].float() / count[own].sum()
        total[i] = count[own].sum()
        key_mean[i], value_mean[i] = weight @ keys[own], weight @ values[own]
        apart = ((keys[own] - key_mean[i]) ** 2).sum(1)
        merged[i] = weight @ (spread[own].float() + apart)
    return total, key_mean, value_mean, merged


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes and the bfloat16 scale of each last-dim row."""
    flat = x.float().reshape(-1, x.shape[-1])
    codes, scales = torch.empty(flat.shape, dtype=torch.int8), torch.empty(flat.shape[0])
    scales = scales.bfloat16()
    for i, row in enumerate(flat):
        scales[i] = row.abs().max() / 127
        scale = scales[i].float()
        codes[i] = (row / scale).round().clamp(-127, 127) if scale > 0 else 0
    return codes.view(x.shape), scales.view(x.shape[:-1])


def score_leaves(
    query: Tensor,
    centre: Tensor,
    key_mean: Tensor,
    key_scale: Tensor,
    count: Tensor,
    spread: Tensor,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Return log(count) + scaling q.mean and the second-order correction of its log-sum-exp."""
    rows, heads, dim = query.shape
    logits = torch.full((rows, heads, count.shape[1]), -math.inf)
    correction = torch.zeros_like(logits)
    for r in range(rows):
        for g in range(heads):
            for i in range(count.shape[1]):
                if count[r, i] == 0:
                    continue
                q = query[r, g].float()
                mean = centre[r] + key_mean[r, i].float() * key_scale[r, i].float()
                logit = scaling * torch.dot(q, mean)
                slope = torch.ones(())
                if softcap is not None:
                    squashed = torch.tanh(logit / softcap)
                    logit, slope = softcap * squashed, 1 - squashed**2
                variance = scaling**2 * q.dot(q) * spread[r, i].float() / dim * slope**2
                logits[r, g, i] = logit + math.log(int(count[r, i]))
                correction[r, g, i] = 0.5 * variance
    return logits, correction


def choose_within(priority: Tensor, size: Tensor, room: int) -> Tensor:
    """Say what is chosen: of the `room` best, by falling priority, whatever still fits."""
    chosen = torch.zeros(priority.shape, dtype=torch.bool)
    for r in range(priority.shape[0]):
        left = room
        for i in torch.argsort(priority[r], descending=True, stable=True)[:room].tolist():
            if priority[r, i] >= 0 and size[r, i] <= left:
                chosen[r, i] = True
                left -= int(size[r, i])
    return chosen


def nearest(point: Tensor, means: Tensor, most: int) -> Tensor:
    """Return the numbers of the `most` nearest means, nearest first, the first of equals first."""
    distance = torch.stack([((mean - point) ** 2).sum() for mean in means])
    return torch.argsort(distance, stable=True)[:most]


def attend_parts(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor,
    remainder_logits: Tensor | None,
    value_mean: Tensor | None,
    value_scale: Tensor | None,
    sink_logits: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Attend exactly to keys and through summaries to the rest, in one softmax."""
    rows, heads, _ = query.shape
    out = torch.zeros(rows, heads, values.shape[2])
    for r in range(rows):
        k, v = keys[r][valid[r]].float(), values[r][valid[r]].float()
        rest, means = torch.zeros(heads, 0), v[:0]
        if remainder_logits is not None and value_mean is not None and value_scale is not None:
            live = remainder_logits[r, 0] > -math.inf
            rest = remainder_logits[r][:, live]
            means = value_mean[r][live].float() * value_scale[r][live].float()[:, None]
        exact_share, rest_share = torch.zeros(heads, k.shape[0]), torch.zeros(rest.shape)
        for g in range(heads):
            logits = scaling * (k @ query[r, g].float())
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = torch.cat([logits, rest[g]])
            if sink_logits is not None:
                logits = torch.cat([logits, sink_logits[r, g].float()[None]])
            if logits.numel() > 0:
                share = torch.softmax(logits, 0)
                exact_share[g] = share[: k.shape[0]]
                rest_share[g] = share[k.shape[0] : k.shape[0] + rest.shape[1]]
        out[r] = exact_share @ v + keep_entries(rest_share) @ means
    return out


def keep_entries(share: Tensor) -> Tensor:
    """Give the weight of entries that no head gives much to the others, head by head.

    share: shape [heads, entries], their part of all attention. What is dropped is below
    `NEGLIGIBLE` of 1 / entries each, and most of many entries.
    """
    kept = torch.zeros(share.shape)
    for i in range(share.shape[1]):
        if float(share[:, i].max()) >= NEGLIGIBLE / share.shape[1]:
            kept[:, i] = share[:, i]
    for g in range(share.shape[0]):
        if float(kept[g].sum()) > 0:
            kept[g] *= share[g].sum() / kept[g].sum()
    return kept


def attend_dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attend causally; the queries are the last tokens of each row."""
    batch, heads, num_queries, _ = query.shape
    group, num_keys = heads // keys.shape[1], keys.shape[2]
    out = torch.zeros(*query.shape[:3], values.shape[3])
    for b in range(batch):
        own = torch.arange(num_keys) if valid is None else valid[b].nonzero()[:, 0]
        for h in range(heads):
            for t in range(num_queries):
                seen = own[: max(0, own.numel() - num_queries + t + 1)]
                if seen.numel() == 0:
                    continue
                k, v = keys[b, h // group][seen].float(), values[b, h // group][seen].float()
                logits = scaling * (k @ query[b, h, t].float())
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if sink_logits is not None:
                    logits = torch.cat([logits, sink_logits[h].float()[None]])
                    v = torch.cat([v, torch.zeros(1, v.shape[1])])
                out[b, h, t] = torch.softmax(logits, 0) @ v
    return out
