"""A step of the device path, computed anew: one row and one head at a time, from plain tokens."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.cache.device.layer import DeviceLayer
from icecache.ops.device.bits import has_bit
from icecache.ops.device.records import DevicePages, DeviceTree, Selected
from tests.helpers import PlainRows

__all__ = ["Before", "slow_device_step"]

SCALING = 0.25


class Before(NamedTuple):
    """The tree and pages as a step finds them: its insert comes last."""

    tree: DeviceTree
    pages: DevicePages

    @classmethod
    def of(cls, layer: DeviceLayer) -> "Before":
        """Return a copy of what a layer holds, None of a short context."""
        index = layer._held.index
        return cls(index.tree.to(torch.device("cpu")), index.pages.to(torch.device("cpu")))


def slow_device_step(
    layer: DeviceLayer, before: Before, rows: PlainRows, query: Tensor
) -> tuple[Tensor, list[int]]:
    """Return what the latest step must have given for the tokens that it selected.

    query: shape [batch, heads, 1, dim]. Returns the output and how many tokens each row attended
    exactly. Keys and values are the plain model's; only summaries come from the layer.
    """
    index, heads = layer._held.index, layer.num_kv_heads
    selected = layer._counters._last.selected
    out, attended = torch.empty_like(query), []
    group = query.shape[1] // heads
    for row in range(len(rows.lens) * heads):
        b, head = divmod(row, heads)
        in_pages = _positions(before, row, selected)
        in_tree = {p for p in before.pages.positions[row].flatten().tolist() if p >= 0}
        fixed = [p for p in range(rows.lens[b]) if p not in in_tree]
        exact = fixed + in_pages
        assert len(set(exact)) == len(exact), "a token is attended twice"
        leaves = _leaves_beside(before, row, set(in_pages))
        attended.append(len(exact))
        own = slice(head * group, (head + 1) * group)
        keys, values = rows.keys[b][head, exact].float(), rows.values[b][head, exact].float()
        for i, q in enumerate(query[b, own, 0].float(), own.start):
            logits = SCALING * (keys @ q)
            more, means = _rest(layer, before, row, leaves, rows, q)
            share = torch.softmax(torch.cat([logits, more]), 0)
            out[b, i, 0] = share @ torch.cat([values, means])
    assert index is layer._held.index
    return out, attended


def _positions(before: Before, row: int, selected: Selected) -> list[int]:
    """Return the positions of a row's selected tokens."""
    found = []
    for page, tokens in zip(selected.pages[row].tolist(), selected.tokens[row]):
        if page >= 0:
            own = before.pages.positions[row, page]
            found += own[has_bit(tokens, own.shape[0])].tolist()
    assert -1 not in found, "a slot without a token is attended"
    return found


def _leaves_beside(before: Before, row: int, attended: set[int]) -> list[int]:
    """Return the leaves whose tokens are not attended; none may be so in part."""
    tree, leaves = before.tree, []
    for leaf in range(int(tree.num_leaves[row])):
        own = before.pages.positions[row, int(tree.leaf_page[row, leaf])]
        tokens = set(own[has_bit(tree.leaf_slots[row, leaf], own.shape[0])].tolist())
        assert tokens <= attended or not tokens & attended, "a leaf is attended in part"
        if not tokens & attended:
            leaves.append(leaf)
    return leaves


def _rest(
    layer: DeviceLayer, before: Before, row: int, leaves: list[int], rows: PlainRows, q: Tensor
) -> tuple[Tensor, Tensor]:
    tree = before.tree
    logits, means = [], []
    if not layer.config.estimates_remainder:
        leaves = []
    for leaf in leaves:
        page = int(tree.leaf_page[row, leaf])
        own = has_bit(tree.leaf_slots[row, leaf], layer.config.page_size)
        positions = before.pages.positions[row, page][own].tolist()
        keys = rows.keys[row // layer.num_kv_heads][row % layer.num_kv_heads, positions].float()
        spread = float((keys - keys.mean(0)).square().sum(1).mean())
        mean = tree.centre[row] + tree.key_mean[row, leaf].float() * tree.key_scale[row, leaf]
        correction = 0.5 * SCALING**2 * float(q @ q) * spread / q.numel()
        logit = SCALING * float(q @ mean) + math.log(len(positions))
        logits.append(logit + layer.config.spread_weight * correction)
        means.append(tree.value_mean[row, leaf].float() * tree.value_scale[row, leaf])
    if not leaves:
        return torch.zeros(0), torch.zeros(0, q.numel())
    return torch.tensor(logits), torch.stack(means)
