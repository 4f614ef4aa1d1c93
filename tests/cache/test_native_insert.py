"""The compiled insert beside its twin: the same leaves, in the same slots."""

import pytest
import torch

from icecache import IceCacheConfig, IceCacheLayer
from tests.helpers import clustered


def _grown(
    backend: str, dtype: torch.dtype, dim: int, steps: int, **settings: int
) -> IceCacheLayer:
    config = IceCacheConfig.from_kwargs(backend=backend, **settings)
    layer = IceCacheLayer(config, num_kv_heads=3, head_dim=dim, dtype=dtype)
    keys = clustered(1, 3 * (400 + steps), dim, centres=40).view(1, 3, -1, dim).to(dtype)
    values = clustered(2, 3 * (400 + steps), dim, centres=40).view(1, 3, -1, dim).to(dtype)
    layer.prefill(keys[:, :, :400], values[:, :, :400])
    layer.attend(keys[:, :, :1])
    for i in range(400, 400 + steps):
        layer.append(keys[:, :, i : i + 1], values[:, :, i : i + 1])
    return layer


@pytest.mark.parametrize(
    "settings",
    [{}, {"leaf_size": 4, "leaf_target": 3, "page_size": 8}, {"leaf_size": 16, "page_size": 16}],
    ids=["default", "small", "leaf-is-page"],
)
@pytest.mark.parametrize(
    ("dtype", "dim"), [(torch.float32, 80), (torch.bfloat16, 64), (torch.float16, 128)]
)
def test_the_same_leaves_in_the_same_slots(
    settings: dict[str, int], dtype: torch.dtype, dim: int
) -> None:
    native, twin = (_grown(name, dtype, dim, 150, **settings) for name in ("native", "torch"))
    for layer in (native, twin):
        layer.check_integrity()
        assert layer.stats().inserted == 3 * 150
    ours, theirs = (layer._context.indexed.leaves for layer in (native, twin))  # type: ignore[union-attr]
    assert ours.num.tolist() == theirs.num.tolist()
    assert torch.equal(ours.counts(), theirs.counts())
    for mine, other in zip(ours.tokens(), theirs.tokens(), strict=True):
        assert torch.equal(mine, other)
    spreads = (table.view().spread.float() for table in (ours, theirs))
    torch.testing.assert_close(*spreads, rtol=1e-2, atol=1e-5)
    # a mean summed in another order may round to the neighbouring code
    codes = (ours.view().key_mean.int() - theirs.view().key_mean.int()).abs()
    assert int(codes.max()) <= 1
    assert float((codes > 0).float().mean()) < 0.01


def test_shared_pages_are_left_to_the_twin() -> None:
    layer = _grown("native", torch.float32, 64, 40)
    layer.reorder(torch.tensor([0, 0]))
    for step in range(40):
        keys = clustered(step, 6, 64, centres=2).view(2, 3, 1, 64)
        layer.append(keys, keys)
        layer.check_integrity()
