"""What must hold of a layer on a device between two calls."""

import torch

from icecache.cache.device.index import DeviceIndex
from icecache.errors import IntegrityError
from icecache.ops.device.check import check_device_tree

__all__ = ["check_index"]


def check_index(index: DeviceIndex) -> None:
    """Raise `IntegrityError` unless host and device agree and every token is in one place.

    Waits for the device; changes nothing.
    """
    index.wait_for_transfers()
    if bool(index.tree.full.any()):
        raise IntegrityError("an insert on the device found no room, and its token is lost")
    config, heads = index.settings.config, index.settings.heads
    window = index.window
    counted = window.fixed.lens.tolist(), window.fixed.left.tolist()
    if counted != (window.lens, window.left):
        raise IntegrityError("the device counts other lengths than the host")
    waiting = [0] * len(window.lens)
    if index.leaving is not None:
        waiting = index.leaving.leaves[::heads].tolist()
    for row, (left, waits) in enumerate(zip(window.left, waiting, strict=True)):
        expected = torch.arange(config.sink, left - waits, dtype=torch.int32)
        for own in index.pages.positions[row * heads : (row + 1) * heads].cpu():
            if not torch.equal(own[own >= 0].sort().values, expected):
                raise IntegrityError(
                    f"row {row}: positions in pages are not those from {config.sink} to {left}"
                )
    most = int(index.tree.num_leaves.max()), int(index.tree.num_pages.max())
    if most[0] > index.most_leaves or most[1] > index.most_pages:
        raise IntegrityError("the host counts fewer leaves or pages than the device has")
    check_device_tree(index.tree, index.pages, config.leaf_size)
