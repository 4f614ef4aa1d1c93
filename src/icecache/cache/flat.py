"""Tokens of all rows in one piece."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FlatTokens"]


class FlatTokens(NamedTuple):
    """Tokens of all rows, one row after the other.

    Attributes
    ----------
    keys, values : shape [tokens, head_dim]
    row : shape [tokens], int64, rising
    positions : shape [tokens], int64. Position in the row's context, counted without padding.
    """

    keys: Tensor
    values: Tensor
    row: Tensor
    positions: Tensor

    def row_starts(self, num_rows: int) -> list[int]:
        """Return where each row's tokens start, and their number at the end."""
        starts: list[int] = torch.searchsorted(self.row, torch.arange(num_rows + 1)).tolist()
        return starts

    def pick(self, which: Tensor) -> "FlatTokens":
        """Return some of the tokens; which: a mask or rising indices."""
        return FlatTokens(*(part[which] for part in self))
