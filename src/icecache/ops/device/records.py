"""What the ops of a device read and write: tensors of fixed shape, one set a layer.

Letters in shapes: R rows (batch row x KV head), B batch rows, G query heads a KV head, D head_dim,
L leaves and P pages that a row has room for, S pages that a step selects at most, C device slots a
row, T page_size, N pieces that a result comes in. Masks of slots have a bit a slot, so T is at
most 64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DevicePages", "DeviceTree", "Fixed", "Leaving", "Part", "Scores", "Selected"]


class DeviceTree(NamedTuple):
    """The leaves of one layer.

    A leaf's mean key is `centre + key_mean * key_scale`, its mean value `value_mean * value_scale`.

    Attributes
    ----------
    centre : shape [R, D], float32. What mean keys are kept as differences from.
    key_mean, value_mean : shape [R, L, D], int8
    key_scale, value_scale : shape [R, L], float32
    spread : shape [R, L], float32. Mean squared distance of a leaf's keys from their mean.
    num_tokens : shape [R, L], int32. Tokens; 0 where there is no leaf.
    leaf_page : shape [R, L], int32. The leaf's page within the row.
    leaf_slots : shape [R, L], int64. The leaf's slots in that page, a bit each.
    num_leaves : shape [R], int32
    page_used : shape [R, P], int64. Occupied slots, a bit each; 0 from `num_pages` on.
    num_pages : shape [R], int32
    open_page : shape [R], int32. Where leaves go that leave a full page; -1 for none.
    full : shape [R], int32. Set to 1 by an insert that found no room; the token was dropped.
    """

    centre: Tensor
    key_mean: Tensor
    key_scale: Tensor
    value_mean: Tensor
    value_scale: Tensor
    spread: Tensor
    num_tokens: Tensor
    leaf_page: Tensor
    leaf_slots: Tensor
    num_leaves: Tensor
    page_used: Tensor
    num_pages: Tensor
    open_page: Tensor
    full: Tensor

    def to(self, device: torch.device) -> "DeviceTree":
        """Return a copy on a device."""
        return DeviceTree(*(field.to(device, copy=True) for field in self))


class DevicePages(NamedTuple):
    """The pages of one layer: all of them in `host`, copies of some in `resident`.

    Without offloading there are no slots: the last five are None, `host` lies on the device in the
    model's dtype and is read in place.

    Attributes
    ----------
    host : shape [R, P, 2, T, D], the model's dtype or int8. Keys, then values; always complete.
    scales : shape [R, P, 2, T], float32, beside `host`; None unless that is int8.
    positions : shape [R, P, T], int32, beside `host`. -1 where a slot is free.
    resident : shape [R, C, 2, T, D], the model's dtype
    slot_of_page : shape [R, P], int32. -1 for a page that is not resident.
    page_in_slot : shape [R, C], int32. -1 for a free slot.
    last_used : shape [R, C], int64. Larger is later; never equal for two slots that hold pages.
    work : shape [R, 2], int64. Pages that `resolve` was asked for so far, and those that were
        missing.
    """

    host: Tensor
    scales: Tensor | None
    positions: Tensor
    resident: Tensor | None
    slot_of_page: Tensor | None
    page_in_slot: Tensor | None
    last_used: Tensor | None
    work: Tensor | None

    def to(self, device: torch.device) -> "DevicePages":
        """Return a copy on a device, `host` included."""
        host, positions = self.host.to(device, copy=True), self.positions.to(device, copy=True)
        scales = None if self.scales is None else self.scales.to(device, copy=True)
        slots = (None if field is None else field.to(device, copy=True) for field in self[3:])
        return DevicePages(host, scales, positions, *slots)


class Fixed(NamedTuple):
    """Sink and window of one layer.

    Attributes
    ----------
    keys, values : shape [R, sink + window, D], the model's dtype. The sink, then the window as a
        ring: position p >= sink lies at sink + (p - sink) % window.
    lens : shape [B], int32. All tokens of the batch row.
    left : shape [B], int32. The first position of the ring: real are positions below the sink and
        from `left` on, as far as `lens`. Those between are in the tree, or leaving.
    sink : int
    """

    keys: Tensor
    values: Tensor
    lens: Tensor
    left: Tensor
    sink: int

    def to(self, device: torch.device) -> "Fixed":
        """Return a copy on a device."""
        keys, values, lens, left = (field.to(device, copy=True) for field in self[:4])
        return Fixed(keys, values, lens, left, self.sink)


class Leaving(NamedTuple):
    """What the latest token displaced: in neither ring nor tree until it is inserted.

    Attributes
    ----------
    keys, values : shape [R, D], the model's dtype. 0 where nothing leaves.
    leaves : shape [R], bool
    position : shape [R], int32. -1 where nothing leaves.
    """

    keys: Tensor
    values: Tensor
    leaves: Tensor
    position: Tensor


class Scores(NamedTuple):
    """What a scan of the leaves found; -inf and 0 where there is no leaf.

    Attributes
    ----------
    priority : shape [R, G, L], float32. Log of a leaf's expected weight, spread included.
    estimate : shape [R, G, L], float32. The log weight by which an unselected leaf is attended.
    doubt : shape [R, G, L], float32. Relative error of the estimate: the root of the second-order
        correction, at most `twin.MOST_DOUBT`.
    nearest : shape [R, N], int32. The leaf nearest to the leaving key in each of N runs of leaves,
        the first of equals; -1 if a run has none or nothing leaves.
    distance : shape [R, N], float32. Squared distance of `nearest` less a constant; inf for none.
    priority_lse : shape [R, N, G], float32. Log-sum-exp of `priority` over each run.
    """

    priority: Tensor
    estimate: Tensor
    doubt: Tensor
    nearest: Tensor
    distance: Tensor
    priority_lse: Tensor


class Selected(NamedTuple):
    """What a step attends exactly beside sink and window: whole leaves, each in one page.

    Attributes
    ----------
    pages : shape [R, S], int32. Distinct pages of a row; -1 where there is none.
    tokens : shape [R, S], int64. The attended slots of each page, a bit each; 0 where none is.
    """

    pages: Tensor
    tokens: Tensor


class Part(NamedTuple):
    """Attention over some tokens, in pieces that `combine` merges.

    Attributes
    ----------
    out : shape [R, N, G, D], float32. 0 for a piece without tokens.
    lse : shape [R, N, G], float32. -inf for a piece without tokens.
    """

    out: Tensor
    lse: Tensor
