"""Which columns of a conversation are padding, and which tokens of a forward are real."""

from typing import Any

import torch

from icecache.errors import InputError

__all__ = ["Padding"]


class Padding:
    """The padding mask of one cache, column by column, as the attention masks told it.

    A cache cannot hide a token that its layers already hold, so a mask that says something else of
    an old token than before raises instead of being half obeyed.
    """

    def __init__(self) -> None:
        self._columns: torch.Tensor | None = None  # [batch, columns], None: no padding so far
        self._mask: torch.Tensor | None = None  # of the running forward, as it was given
        self._current: torch.Tensor | None = None  # the same, [batch, columns]
        self._new: torch.Tensor | None = None

    def take(self, mask: torch.Tensor | None, past: int, tokens: int) -> torch.Tensor | None:
        """Return which new tokens are real, ``[batch, tokens]`` bool, or None if all are."""
        if mask is None:
            return None
        # all layers of a forward get the same tensor: one check serves them
        if mask is not self._mask:
            columns = _as_columns(mask, past + tokens)
            self._check_old(columns, past)
            new = columns[:, past:]
            if bool((new[:, :-1] & ~new[:, 1:]).any()):
                raise InputError(
                    "attention_mask has padding behind tokens; pad on the left "
                    '(tokenizer.padding_side = "left")'
                )
            self._mask, self._current = mask, columns
            self._new = None if bool(new.all()) else new
        return self._new

    @property
    def is_ragged(self) -> bool:
        """Whether some new tokens of the running forward are padding."""
        return self._new is not None

    def is_padded(self, first: int) -> bool:
        """Return whether a column from `first` on is padding in some row."""
        return self._columns is not None and not bool(self._columns[:, first:].all())

    def commit(self) -> None:
        """Make the running forward's mask part of the record."""
        if self._current is not None:
            self._columns = self._current
        self.discard()

    def discard(self) -> None:
        """Forget the running forward's mask."""
        self._mask = self._current = self._new = None

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Let row i be what row ``rows[i]`` was."""
        self.commit()
        if self._columns is not None:
            self._columns = self._columns.index_select(0, rows.to(self._columns.device))

    def state(self) -> dict[str, Any]:
        """Return the record, by name."""
        self.commit()
        return {"columns": self._columns}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take a record back."""
        self.clear()
        self._columns = state["columns"]

    def clear(self) -> None:
        """Forget everything."""
        self.discard()
        self._columns = None

    def _check_old(self, columns: torch.Tensor, past: int) -> None:
        old, known = columns[:, :past], self._columns
        width = 0 if known is None else min(known.shape[1], past)
        same = bool(old[:, width:].all())
        if known is not None:
            same = same and torch.equal(old[:, :width], known[:, :width].to(old.device))
        if not same:
            raise InputError(
                "attention_mask differs from before for tokens that the cache already holds, which "
                "it cannot hide later; keep the mask of earlier turns, or use a new cache"
            )


def _as_columns(mask: torch.Tensor, num_columns: int) -> torch.Tensor:
    is_padding = mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] == 1
    if not is_padding or mask.dtype != torch.bool:
        raise InputError(
            f"attention_mask must be a padding mask [batch, tokens], got a mask of shape "
            f"{list(mask.shape)} and dtype {mask.dtype} at the attention layer; IceCache layers "
            "attend causally: custom 4-D masks (and image tokens that see each other) are not "
            "supported, pass the 2-D mask or detach IceCache"
        )
    if mask.shape[-1] != num_columns:
        raise InputError(
            f"attention_mask must cover the whole conversation, {num_columns} tokens with the "
            f"cached ones, got {mask.shape[-1]}; concatenate the masks of the earlier turns"
        )
    return mask[:, 0, 0, :]
