"""Selection in plain torch: what leaves deserve, and which of them a step attends exactly.

Pages travel, leaves are attended: `select_leaves` takes leaves by what a token of theirs deserves,
from a bounded number of pages; `select_pages` takes whole pages.
"""

import torch
from torch import Tensor

from icecache.ops.device.bits import count_bits
from icecache.ops.device.records import DeviceTree, Part, Scores, Selected

__all__ = ["VOTE_UNIT", "select_leaves", "select_pages", "vote"]

VOTE_UNIT = 2.0**32


def vote(scores: Scores, fixed: Part, tree: DeviceTree) -> Tensor:
    """Return how much each leaf deserves to be attended exactly, shape [R, L], int64.

    That is its estimated share of a head's attention times its doubt, as `attention.select` has it,
    summed over heads in units of 1 / `VOTE_UNIT`; 0 where there is no leaf.
    """
    total = torch.logaddexp(scores.priority_lse.logsumexp(1), fixed.lse.logsumexp(1))
    share = torch.exp(scores.priority - total.clamp(min=-1e30)[:, :, None])
    units = torch.floor(share * scores.doubt * VOTE_UNIT + 0.5).long().sum(1)
    return torch.where(tree.num_tokens > 0, units, 0)


def select_leaves(votes: Tensor, tree: DeviceTree, room: int, most: int) -> Selected:
    """Select leaves by falling vote a token; of the `room` best, what still fits in `room` tokens.

    They come from the first `most` pages that the best leaves lie in: leaves of other pages are
    passed over.

    Returns
    -------
    Selected
        Pages in the order of their best leaves. The lowest leaf is the first of equals.
    """
    size = tree.num_tokens.long()
    worth = torch.where(size > 0, votes // size.clamp(min=1), -1)
    order = worth.argsort(dim=1, descending=True, stable=True)[:, :room]
    num_rows, num_pages = tree.page_used.shape
    rows = torch.arange(num_rows, device=votes.device)
    # by page: the order in which it was found, `most` for a page that was not, or too late
    found = torch.full((num_rows, num_pages), most, device=votes.device)
    num_found = torch.zeros_like(rows)
    # an entry more, for what is not taken
    pages = torch.full((num_rows, most + 1), -1, dtype=torch.int32, device=votes.device)
    tokens = torch.zeros(num_rows, most + 1, dtype=torch.int64, device=votes.device)
    left = torch.full_like(rows, room)
    for leaf in order.unbind(1):
        live = worth[rows, leaf] >= 0
        page = torch.where(live, tree.leaf_page[rows, leaf], 0).long()
        is_new = live & (found[rows, page] == most) & (num_found < most)
        found[rows, page] = torch.where(is_new, num_found, found[rows, page])
        num_found = num_found + is_new
        needed = size[rows, leaf]
        takes = live & (found[rows, page] < most) & (needed <= left)
        left = left - torch.where(takes, needed, 0)
        into = torch.where(takes, found[rows, page], most)
        pages[rows, into] = page.int()
        tokens[rows, into] |= tree.leaf_slots[rows, leaf]
    return Selected(pages[:, :most].contiguous(), tokens[:, :most].contiguous())


def select_pages(votes: Tensor, tree: DeviceTree, room: int, most: int) -> Selected:
    """Select whole pages by falling vote a token; of the best `most`, what still fits in `room`.

    votes: shape [R, L], int64, a page's vote is the sum of its leaves'.

    Returns
    -------
    Selected
        Best first, the lowest page first of equals, -1 behind them. Empty pages are never taken.
    """
    live = tree.num_tokens > 0
    of_page = torch.zeros(tree.page_used.shape, dtype=torch.int64, device=votes.device)
    page_of_leaf = torch.where(live, tree.leaf_page, 0).long()
    of_page.scatter_add_(1, page_of_leaf, torch.where(live, votes, 0))
    size = count_bits(tree.page_used)
    worth = torch.where(size > 0, of_page // size.clamp(min=1), -1)
    order = worth.argsort(dim=1, descending=True, stable=True)[:, :most]
    num_rows = worth.shape[0]
    pages = torch.full((num_rows, most), -1, dtype=torch.int32, device=votes.device)
    left = torch.full((num_rows,), room, device=votes.device)
    taken = torch.zeros_like(left)
    rows = torch.arange(num_rows, device=votes.device)
    for page in order.unbind(1):
        needed = size[rows, page]
        fits = (worth[rows, page] >= 0) & (needed <= left)
        pages[rows[fits], taken[fits]] = page[fits].int()
        left = left - torch.where(fits, needed, 0)
        taken = taken + fits
    used = tree.page_used.gather(1, pages.clamp(min=0).long())
    return Selected(pages, torch.where(pages < 0, 0, used))
