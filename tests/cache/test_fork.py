"""Layers that share pages and tree: nobody sees what the other does, and nothing is left behind."""

import pytest
import torch

from icecache import IceCacheLayer
from tests.cache.test_snapshot import grown
from tests.helpers import FAST_BACKENDS, make_query, make_tokens, small_layer


def step(layer: IceCacheLayer, seed: int, num: int = 1) -> torch.Tensor:
    """Append tokens and attend to all."""
    layer.append(*make_tokens(seed, 1, num))
    return layer.attend(make_query(seed + 1, 1, 4, num))


@pytest.mark.parametrize(
    ("prompt", "backend"),
    [(10, "auto"), (900, "auto"), *((60, backend) for backend in FAST_BACKENDS)],
)
def test_forks_go_on_as_layers_of_their_own(prompt: int, backend: str) -> None:
    shared = grown(small_layer(backend=backend), 1, prompt, 2)
    alone = [grown(small_layer(backend=backend), 1, prompt, 2) for _ in range(3)]
    together = [shared, shared.fork(), shared.fork()]
    for seed in range(12):
        for number, (ours, plain) in enumerate(zip(together, alone, strict=True)):
            num = 300 if seed == 7 and number == 1 else 1
            one = 100 * number + seed
            assert torch.equal(step(ours, one, num), step(plain, one, num))
    for ours, plain in zip(together, alone, strict=True):
        ours.check_integrity()
        assert ours.stats().leaves == plain.stats().leaves


def test_a_fork_takes_no_page_until_it_writes() -> None:
    layer = grown(small_layer(), 1, 900, 0)
    pool = layer._context.indexed.pool
    before = pool.num_pages
    fork = layer.fork()
    level, twin = layer._context.indexed.leaves, fork._context.indexed.leaves
    assert pool.num_pages == before
    assert level.array("key_mean").data_ptr() == twin.array("key_mean").data_ptr()
    for seed in range(10):
        step(fork, seed)
    assert before < pool.num_pages <= before + 2 * 10 * 2
    assert level.array("key_mean").data_ptr() != twin.array("key_mean").data_ptr()
    fork.release()
    assert pool.num_pages == before
    layer.check_integrity()
    assert layer.row_lens == [900]


def test_the_original_can_go_first() -> None:
    layer = grown(small_layer(), 1, 200, 0)
    pool, fork = layer._context.indexed.pool, layer.fork()
    for seed in range(10):
        step(layer, seed)
    layer.release()
    assert layer.row_lens == []
    fork.check_integrity()
    assert fork.row_lens == [200]
    fork.release()
    assert pool.num_pages == 0


def test_a_fork_of_a_fork_outlives_both() -> None:
    layer = grown(small_layer(), 1, 200, 0)
    first = layer.fork()
    step(first, 1)
    second = first.fork()
    plain = grown(small_layer(), 1, 200, 0)
    step(plain, 1)
    layer.release()
    first.release()
    for seed in range(2, 12):
        assert torch.equal(step(second, seed), step(plain, seed))
    second.check_integrity()
