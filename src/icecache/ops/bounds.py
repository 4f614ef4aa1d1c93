"""Numbers from a file, looked at before compiled code follows them."""

import numpy as np
from torch import Tensor

from icecache.errors import SnapshotMismatch

__all__ = ["check_range"]


def check_range(name: str, numbers: "Tensor | np.ndarray | None", low: int, high: int) -> None:
    """Raise `SnapshotMismatch` unless all of the numbers, if any, are from `low` to `high`."""
    if numbers is None:
        return
    array = np.asarray(numbers)
    if array.size and not (low <= array.min() and array.max() <= high):
        raise SnapshotMismatch(
            f"the snapshot is damaged: {name} must be from {low} to {high}, "
            f"got {array.min()} to {array.max()}"
        )
