"""What one layer holds on a device.

short context     tail (everything)
past the budget   index (sink, window, leaves and pages) | fresh (not yet entered)
"""

from types import ModuleType

import torch
from torch import Tensor

from icecache.cache.device.check import check_index
from icecache.cache.device.history import Asked, attend_history
from icecache.cache.device.index import DeviceIndex, Fresh
from icecache.cache.device.settings import DeviceSettings
from icecache.cache.tail import Tail
from icecache.errors import IntegrityError
from icecache.ops.batched import attend_dense

__all__ = ["DeviceContext"]

_TAIL_SLACK = 64


class DeviceContext:
    """Tokens of one layer.

    Parameters
    ----------
    settings : DeviceSettings
    ops : module
    batch : int
    """

    def __init__(self, settings: DeviceSettings, ops: ModuleType, batch: int) -> None:
        self.settings, self._ops = settings, ops
        shape = batch, settings.heads, settings.dim
        slack = _TAIL_SLACK + settings.config.draft
        self.tail: Tail | None = Tail(*shape, settings.dtype, slack, device=settings.device)
        self.index: DeviceIndex | None = None
        self.fresh: Fresh | None = None
        self.inserted = self.built = 0

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return len(self._held_lens())

    @property
    def row_lens(self) -> list[int]:
        """Tokens of each batch row."""
        fresh = [0] * self.batch_size if self.fresh is None else self.fresh.counts
        return [n + more for n, more in zip(self._held_lens(), fresh, strict=True)]

    @property
    def is_torn(self) -> bool:
        """Whether a call was interrupted while it moved tokens."""
        return self.index is not None and self.index.is_torn

    @property
    def may_crop(self) -> int:
        """Tokens that every row can lose."""
        if self.index is None:
            assert self.tail is not None
            return min(self.tail.lens)
        fresh = [0] * self.batch_size if self.fresh is None else self.fresh.counts
        return min(n + more for n, more in zip(self.index.window.may_crop, fresh, strict=True))

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Take new tokens in; shapes as in `DeviceLayer.append`."""
        self.check_whole()
        columns = keys.shape[2]
        counts = [columns] * keys.shape[0] if mask is None else mask.sum(1).tolist()
        longest = max(n + more for n, more in zip(self.row_lens, counts, strict=True))
        if self.tail is not None and longest <= self.settings.config.most_dense_tokens:
            self.tail.append(keys, values, mask)
            return
        self.settle()
        index = self._indexed()
        if columns == 1 and mask is None:
            index.push(keys, values)
        else:
            self.fresh = Fresh(keys, values, counts)
            if columns == 1:
                self.settle()

    def settle(self) -> None:
        """Let all tokens enter the index, if there is one."""
        if self.index is None:
            return
        self.check_whole()
        self.inserted += self.index.settle()
        if self.fresh is not None:
            fresh, self.fresh = self.fresh, None
            inserted, built = self.index.enter(fresh)
            self.inserted += inserted
            self.built += built

    def attend_all(
        self,
        query: Tensor,
        scaling: float,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Attend several latest tokens exactly to everything, or one to a short context."""
        self.check_whole()
        if self.tail is not None:
            valid = self.tail.valid() if self.tail.is_ragged else None
            dense = *self.tail.keys_values(), valid
        elif self.fresh is not None and not any(self._held_lens()):
            dense = self.fresh.keys, self.fresh.values, _valid(self.fresh)
        else:
            return self._attend_history(query, scaling, softcap, sink_logits)
        return attend_dense(query, *dense, scaling, softcap, sink_logits)

    def crop(self, num: int) -> None:
        """Drop the latest tokens of every row."""
        self.check_whole()
        if self.tail is not None:
            self.tail.drop_latest(num)
            return
        assert self.index is not None
        rest = [num] * self.batch_size
        if self.fresh is not None:
            rest = [max(0, num - count) for count in self.fresh.counts]
            self.fresh = _without_latest(self.fresh, num)
        if any(rest):
            self.inserted += self.index.crop(rest)

    def reorder(self, rows: Tensor) -> None:
        """Take batch rows in a new order, repeated or dropped."""
        self.check_whole()
        if self.tail is not None:
            self.tail.reorder(rows.to(self.settings.device))
            return
        assert self.index is not None
        if self.fresh is not None:
            where = rows.to(self.settings.device)
            counts = [self.fresh.counts[row] for row in rows.tolist()]
            self.fresh = Fresh(self.fresh.keys[where], self.fresh.values[where], counts)
        self.inserted += self.index.reorder(rows)

    def fork(self) -> "DeviceContext":
        """Return a copy that shares nothing that is written to."""
        self.check_whole()
        other = object.__new__(DeviceContext)
        other.__dict__.update(self.__dict__)
        other.tail = None if self.tail is None else self.tail.fork()
        other.index = None if self.index is None else self.index.fork()
        return other

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every token is in exactly one place, summaries true."""
        if self.index is not None:
            check_index(self.index)

    def close(self) -> None:
        """Let the memory go."""
        if self.index is not None:
            self.index.close()

    def _attend_history(
        self, query: Tensor, scaling: float, softcap: float | None, sink_logits: Tensor | None
    ) -> Tensor:
        index, heads = self._indexed(), self.settings.heads
        self.inserted += index.settle()
        asked = Asked.of_latest(query, self.row_lens, heads, scaling, softcap)
        sinks = None
        if sink_logits is not None:
            per_query = sink_logits.view(heads, -1, 1).expand(-1, -1, query.shape[2]).flatten(1)
            sinks = per_query.repeat(self.batch_size, 1)
        out = attend_history(asked, index, self.fresh, sinks)
        return out.view(query.shape).to(query.dtype)

    def _indexed(self) -> DeviceIndex:
        """Return the index; the first call moves all tokens of a short context to a new one."""
        if self.index is None:
            assert self.tail is not None
            index = DeviceIndex(self.settings, self._ops, len(self.tail.lens))
            inserted, built = self._moved_to(index, self.tail)
            self.inserted += inserted
            self.built += built
            # until here the tail holds everything, whatever happens
            self.index, self.tail = index, None
        return self.index

    @staticmethod
    def _moved_to(index: DeviceIndex, tail: Tail) -> tuple[int, int]:
        if not any(tail.lens):
            return 0, 0
        try:
            return index.enter(Fresh(*tail.keys_values(), list(tail.lens)))
        except BaseException:
            index.close()
            raise

    def _held_lens(self) -> list[int]:
        if self.tail is not None:
            return self.tail.lens
        assert self.index is not None
        return self.index.window.lens

    def check_whole(self) -> None:
        """Raise `IntegrityError` if a call was interrupted while it moved tokens."""
        if self.is_torn:
            raise IntegrityError(
                "an earlier call was interrupted while it moved tokens; call reset() to start anew"
            )


def _valid(fresh: Fresh) -> Tensor | None:
    columns = fresh.keys.shape[2]
    if min(fresh.counts) == columns:
        return None
    back = torch.arange(columns, 0, -1, device=fresh.keys.device)
    return back[None] <= torch.tensor(fresh.counts, device=back.device)[:, None]


def _without_latest(fresh: Fresh, num: int) -> Fresh | None:
    counts = [max(0, count - num) for count in fresh.counts]
    if not any(counts):
        return None
    end = fresh.keys.shape[2] - num
    return Fresh(fresh.keys[:, :, :end], fresh.values[:, :, :end], counts)
