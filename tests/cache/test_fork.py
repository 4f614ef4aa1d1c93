"""Layers that share pages and tree: nobody sees what the other does, and nothing is left behind."""

import pytest
import torch

from icecache import IceCacheLayer
from tests.cache.test_snapshot import grown
from tests.helpers import FAST_BACKENDS, left_padded, make_query, make_tokens, small_layer


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


def test_forks_go_on_by_fused_steps() -> None:
    """What a step has prepared points into its own layer's tree, also after a fork."""
    shared, alone = (grown(small_layer(), 1, 400, 2) for _ in range(2))
    token = lambda seed: (make_query(seed + 1, 1, 4, 1), *make_tokens(seed, 1, 1))  # noqa: E731
    assert torch.equal(shared.step(*token(50)), alone.step(*token(50)))
    fork, plain = shared.fork(), grown(small_layer(), 1, 400, 2)
    plain.step(*token(50))
    for seed in range(100, 130):
        assert torch.equal(fork.step(*token(seed)), plain.step(*token(seed)))
        other = 1000 + seed
        assert torch.equal(shared.step(*token(other)), alone.step(*token(other)))
    for layer in (fork, shared):
        layer.check_integrity()


def test_forks_of_a_short_row_count_means_from_centres_of_their_own() -> None:
    layer = small_layer()
    layer.prefill(*make_tokens(1, 2, 400), left_padded([400, 5]))
    layer.attend(make_query(2, 2, 4, 1))
    assert layer._context.indexed.leaves.num[-1] == 0
    fork = layer.fork()
    for each, shift in ((layer, 0.0), (fork, 50.0)):
        keys, values = make_tokens(7, 2, 300)
        each.prefill(keys + shift, values)
        each.attend(make_query(8, 2, 4, 1))
    centres = [each._context.indexed.leaves.centre[-1] for each in (layer, fork)]
    assert bool((centres[1] - centres[0] > 40).all())
    for each in (layer, fork):
        each.check_integrity()


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
