"""Layers of many requests, told apart by the blocks that an engine grants them."""

from collections.abc import Iterator

import pytest
import torch

from icecache import IceCacheConfig, IceCacheLayer
from icecache.cache.granted import Granted
from icecache.cache.granting import GrantedLayers, Row
from icecache.errors import IntegrityError
from tests.helpers import SMALL, SMALL_DIM, SMALL_HEADS, make_query, make_tokens

CONFIG = IceCacheConfig(**SMALL)


@pytest.fixture
def layers() -> Iterator[GrantedLayers]:
    made = GrantedLayers(CONFIG)
    yield made
    made.close()


@pytest.fixture
def pool() -> torch.Tensor:
    """Four blocks, full of what was there before."""
    return torch.full((4, SMALL_HEADS, Granted.tokens_of(CONFIG), 2 * SMALL_DIM), torch.nan)


def packed(seeds_nums: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the tokens of several requests in one piece, as engines hold them."""
    each = [(make_query(s + 1, 1, 4, n), *make_tokens(s, 1, n)) for s, n in seeds_nums]
    query, keys, values = (torch.cat([x[0].transpose(0, 1) for x in part]) for part in zip(*each))
    return query, keys, values


def test_rows_of_a_batch_are_layers_of_their_own(layers: GrantedLayers, pool: torch.Tensor) -> None:
    alone = [
        IceCacheLayer(CONFIG, num_kv_heads=SMALL_HEADS, head_dim=SMALL_DIM, dtype=torch.float32)
        for _ in range(2)
    ]
    layers.begin("a", [1])
    layers.begin("b", [3])
    past = [0, 0]
    for step, nums in enumerate([(90, 5), (1, 7), (30, 1), (1, 1), (1, 60), (1, 1)]):
        seeds = (10 * step, 10 * step + 5)
        batch = packed(list(zip(seeds, nums)))
        for i, block in enumerate((1, 3)):
            row = Row(block, i * nums[0], i * nums[0] + nums[i], past[i])
            out = layers.attend(row, "layer", pool[block], batch)
            query, tokens = (
                make_query(seeds[i] + 1, 1, 4, nums[i]),
                make_tokens(seeds[i], 1, nums[i]),
            )
            alone[i].append(*tokens)
            torch.testing.assert_close(out, alone[i].attend(query)[0].transpose(0, 1))
            past[i] += nums[i]
    assert pool[[0, 2]].isnan().all()


def test_reports_count_what_is_new_and_ends_free_all(
    layers: GrantedLayers, pool: torch.Tensor
) -> None:
    layers.begin("a", [1])
    layers.begin("b", [2])
    layers.attend(Row(1, 0, 200, 0), "first", pool[1], packed([(0, 200)]))
    layers.attend(Row(2, 0, 20, 0), "first", pool[2], packed([(1, 20)]))
    layers.attend(Row(1, 0, 1, 200), "first", pool[1], packed([(2, 1)]))
    report = layers.report()
    assert (report.work, report.ended) == ((1, 2), [])
    assert report.host_bytes == layers.host_bytes > 0
    layers.attend(Row(1, 0, 1, 201), "first", pool[1], packed([(3, 1)]))
    ended = layers.end("a")
    assert ended is not None
    assert ended[:3] == ("a", 202, (2, 1)) and ended.freed_bytes > 0
    assert layers.end("a") is None
    report = layers.report()
    assert (report.work, report.ended, report.host_bytes) == ((1, 0), [ended], 0)
    layers.end("b")
    assert layers.report().work == (0, 0)
    assert layers.num_running == 0


def test_a_block_begins_anew_with_its_next_request(
    layers: GrantedLayers, pool: torch.Tensor
) -> None:
    layers.begin("a", [1])
    first = layers.attend(Row(1, 0, 50, 0), "x", pool[1], packed([(0, 50)]))
    layers.end("a")
    layers.begin("b", [1])
    assert torch.equal(layers.attend(Row(1, 0, 50, 0), "x", pool[1], packed([(0, 50)])), first)


def test_what_the_engine_and_we_count_must_agree(layers: GrantedLayers, pool: torch.Tensor) -> None:
    layers.begin("a", [1])
    layers.attend(Row(1, 0, 50, 0), "x", pool[1], packed([(0, 50)]))
    with pytest.raises(IntegrityError, match="a holds 50 tokens in x, the engine counts 7"):
        layers.layer(1, "x", pool[1], 7)
    with pytest.raises(IntegrityError, match=r"b was given blocks \[1\] that are in use"):
        layers.begin("b", [0, 1])
    with pytest.raises(IntegrityError, match="block 2 is used by a request that never began"):
        layers.layer(2, "x", pool[2], 0)
    assert layers.layer(1, "x", pool[1], 50).num_tokens == 50
