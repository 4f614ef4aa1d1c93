"""One decode step on a device: fixed shapes, no wait for the device, fit for a CUDA graph."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.cache.device.index import DeviceIndex
from icecache.cache.device.settings import most_selected
from icecache.ops.device.bits import count_bits
from icecache.ops.device.records import Selected

__all__ = ["Stepped", "attend_step"]


class Stepped(NamedTuple):
    """What a step did.

    Attributes
    ----------
    out : shape [rows, heads, head_dim], float32
    selected : Selected
    num_fixed : tokens of each batch row attended exactly beside those.
    """

    out: Tensor
    selected: Selected
    num_fixed: list[int]

    def num_attended(self) -> Tensor:
        """Return the tokens attended exactly, shape [rows], int64."""
        sizes = count_bits(self.selected.tokens).sum(1)
        fixed = torch.tensor(self.num_fixed, device=sizes.device)
        return sizes + fixed.repeat_interleave(sizes.numel() // fixed.numel())


def attend_step(
    index: DeviceIndex,
    ops: ModuleType,
    query: Tensor,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Stepped:
    """Attend one token a row to what the index holds, then insert what leaves the window.

    Everything attends the same tree, which does not have the leaving token yet: that is attended
    beside the window, and inserted last.

    Parameters
    ----------
    index : DeviceIndex
    ops : module
    query : Tensor, shape [rows, heads, head_dim], the model's dtype
    sink_logits : Tensor, shape [rows, heads], optional
    """
    settings, tree, pages = index.settings, index.tree, index.pages
    leaving = index.leaving or index.window.nothing_leaves
    ask = scaling, softcap
    index.join_transfers()
    fixed = ops.attend_fixed(query, index.window.fixed, leaving, *ask)
    scores = ops.score(query, tree, leaving, *ask, settings.config.spread_weight)
    votes = ops.vote(scores, fixed, tree)
    select = ops.select_leaves if settings.config.unit == "leaf" else ops.select_pages
    selected = select(votes, tree, index.room, most_selected(settings.config))
    index.step_number.add_(1)
    slots, missing = ops.resolve(selected.pages, pages, index.step_number)
    ops.gather(pages, slots, missing)
    parts = [fixed, ops.attend_pages(query, pages, selected, slots, *ask)]
    if settings.config.estimates_remainder:
        parts.append(ops.attend_rest(scores, tree, selected))
    out = ops.combine(parts, sink_logits)
    if index.leaving is not None:
        ops.insert(tree, pages, leaving, scores, settings.config.leaf_size)
    return Stepped(out, selected, index.num_fixed)
