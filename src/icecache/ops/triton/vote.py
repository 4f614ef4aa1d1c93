"""Vote: what each leaf deserves, in fixed point, since sums of integers have no order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from icecache.ops.device.records import DeviceTree, Part, Scores
from icecache.ops.device.twin import VOTE_UNIT
from icecache.ops.triton.arithmetic import divisor, logsumexp
from icecache.ops.triton.launch import on_device_of, tile

__all__ = ["vote"]

_LEAF_TILE = 256


def vote(scores: Scores, fixed: Part, tree: DeviceTree) -> Tensor:
    """As `twin.vote`."""
    num_rows, group, capacity = scores.priority.shape
    votes = torch.empty(num_rows, capacity, dtype=torch.int64, device=scores.priority.device)
    leaf_tile = min(_LEAF_TILE, tile(capacity))
    with on_device_of(votes):
        _vote_kernel[(num_rows, triton.cdiv(capacity, leaf_tile))](
            scores.priority,
            scores.doubt,
            scores.priority_lse,
            fixed.lse,
            tree.num_leaves,
            votes,
            capacity,
            scores.priority_lse.shape[1],
            fixed.lse.shape[1],
            G=group,
            UNIT=VOTE_UNIT,
            BG=tile(group),
            BL=leaf_tile,
            BN=tile(scores.priority_lse.shape[1]),
            BF=tile(fixed.lse.shape[1]),
        )
    return votes


@triton.jit(do_not_specialize=["L", "N", "F"])
def _vote_kernel(
    priority,
    doubt,
    priority_lse,
    fixed_lse,
    num_leaves,
    votes,
    L,
    N,
    F,
    G: tl.constexpr,
    UNIT: tl.constexpr,
    BG: tl.constexpr,
    BL: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
):
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_leaf = i_tile * BL + tl.arange(0, BL)
    m_leaf = o_leaf < tl.minimum(tl.load(num_leaves + i_row), L)
    o_group, o_run, o_piece = tl.arange(0, BG), tl.arange(0, BN), tl.arange(0, BF)
    m_group = (o_group < G)[None, :]
    none = -float("inf")
    p_run = (i_row * N + o_run)[:, None] * G + o_group[None, :]
    p_piece = (i_row * F + o_piece)[:, None] * G + o_group[None, :]
    b_run = tl.load(priority_lse + p_run, (o_run < N)[:, None] & m_group, other=none)
    b_piece = tl.load(fixed_lse + p_piece, (o_piece < F)[:, None] & m_group, other=none)
    runs, pieces = logsumexp(b_run, 0), logsumexp(b_piece, 0)  # [BG]
    largest = tl.maximum(tl.maximum(runs, pieces), -1e30)
    total = tl.exp(runs - largest) + tl.exp(pieces - largest)
    total = largest + tl.log(divisor(total))

    p_score = (i_row * G + o_group)[:, None] * L + o_leaf[None, :]
    mask = (o_group < G)[:, None] & m_leaf[None, :]
    b_priority = tl.load(priority + p_score, mask, other=none)  # [BG, BL]
    b_doubt = tl.load(doubt + p_score, mask, other=0.0)
    worth = tl.exp(b_priority - total[:, None]) * b_doubt
    units = tl.sum(tl.floor(worth * UNIT + 0.5).to(tl.int64), 0)
    tl.store(votes + i_row * L + o_leaf, tl.where(m_leaf, units, 0), o_leaf < L)
