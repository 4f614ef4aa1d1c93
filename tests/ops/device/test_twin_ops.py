"""The twins against the plain reference of the CPU's ops, and against loops."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icecache.ops import reference
from icecache.ops.device import twin
from icecache.ops.device.bits import count_bits, has_bit, mask_of
from icecache.ops.device.quantize import quantize
from icecache.ops.device.records import DeviceTree, Fixed, Leaving, Selected
from icecache.ops.device.testing import CaseShape, random_case
from icecache.ops.device.twin_insert import upper_half
from icecache.tree.cluster import split_oversized

SHAPE = CaseShape(kv_heads=3, group=3, head_dim=12, leaves=20, int8_pages=True, batch=2)
SCALING = 0.3

Select = Callable[[torch.Tensor, DeviceTree, int, int], Selected]


def nothing_leaves(rows: int, dim: int) -> Leaving:
    none = torch.zeros(rows, dim)
    return Leaving(none, none, torch.zeros(rows, dtype=torch.bool), torch.full((rows,), -1))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scores_are_those_of_the_reference(softcap: float | None) -> None:
    query, _, tree, _ = random_case(SHAPE)
    keys = torch.randn(SHAPE.rows, SHAPE.head_dim)
    leaving = Leaving(keys, keys, torch.ones(SHAPE.rows, dtype=torch.bool), torch.zeros(1))
    scores = twin.score(query, tree, leaving, SCALING, softcap, 0.25)
    logits, correction = reference.score_leaves(
        query,
        tree.centre,
        tree.key_mean,
        tree.key_scale,
        tree.num_tokens,
        tree.spread,
        SCALING,
        softcap,
    )
    torch.testing.assert_close(scores.priority, logits + correction)
    torch.testing.assert_close(scores.estimate, logits + 0.25 * correction)
    torch.testing.assert_close(scores.doubt, correction.sqrt())
    means = tree.centre[:, None] + tree.key_mean.float() * tree.key_scale.nan_to_num()[..., None]
    for row in range(SHAPE.rows):
        held = int(tree.num_leaves[row])
        first = reference.nearest(keys[row], means[row, :held], 1).tolist() if held else [-1]
        assert scores.nearest[row].tolist() == first


@pytest.mark.parametrize("room", [0, 7, 31, 1000])
def test_leaves_are_chosen_as_on_a_cpu_where_no_page_is_one_too_many(room: int) -> None:
    tree = random_case(SHAPE).tree
    votes = torch.randint(0, 1 << 34, (SHAPE.rows, SHAPE.leaves))
    # some deserve nothing, some the same
    votes = torch.where(votes < 1 << 32, 0, votes >> 30 << 30)
    chosen = _chosen(tree, twin.select_leaves(votes, tree, room, SHAPE.pages))
    size = tree.num_tokens.long()
    worth = torch.where(size > 0, (votes // size.clamp(min=1)).double(), -1.0)
    expected = reference.choose_within(worth, size, room)
    assert chosen.tolist() == expected.tolist()
    assert bool(expected.any()) == (room > 0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 16), room=st.integers(1, 60), most=st.integers(1, SHAPE.pages + 1))
def test_leaves_come_from_the_pages_of_the_best(seed: int, room: int, most: int) -> None:
    """By plain sorting: the best leaves' pages first, then what fits of the leaves there."""
    torch.manual_seed(seed)
    tree = random_case(SHAPE).tree
    votes = torch.randint(0, 50, (SHAPE.rows, SHAPE.leaves))
    selected = twin.select_leaves(votes, tree, room, most)
    chosen = _chosen(tree, selected)
    for row in range(SHAPE.rows):
        size, page = tree.num_tokens[row].tolist(), tree.leaf_page[row].tolist()
        live = [leaf for leaf, tokens in enumerate(size) if tokens]
        best = sorted(live, key=lambda leaf: (-(int(votes[row, leaf]) // size[leaf]), leaf))[:room]
        pages = list(dict.fromkeys(page[leaf] for leaf in best))[:most]
        left, taken = room, set()
        for leaf in best:
            if page[leaf] in pages and size[leaf] <= left:
                taken.add(leaf)
                left -= size[leaf]
        assert set(chosen[row].nonzero()[:, 0].tolist()) == taken
        held = [of for of in selected.pages[row].tolist() if of >= 0]
        assert held == [of for of in pages if of in {page[leaf] for leaf in taken}]


def _chosen(tree: DeviceTree, selected: Selected) -> torch.Tensor:
    """Say which leaves are attended, [rows, leaves]; asserts that none is in part."""
    chosen = torch.zeros(tree.num_tokens.shape, dtype=torch.bool)
    for row in range(chosen.shape[0]):
        masks = dict(zip(selected.pages[row].tolist(), selected.tokens[row].tolist()))
        for leaf in range(int(tree.num_leaves[row])):
            own = int(tree.leaf_slots[row, leaf])
            taken = own & masks.get(int(tree.leaf_page[row, leaf]), 0)
            assert taken in (0, own), "a leaf is attended in part"
            chosen[row, leaf] = taken == own
    size = torch.where(chosen, tree.num_tokens, 0).sum(1)
    assert torch.equal(size, count_bits(selected.tokens).sum(1)), "tokens of no leaf"
    return chosen


def test_votes_are_shares_times_doubt() -> None:
    query, _, tree, _ = random_case(SHAPE)
    scores = twin.score(query, tree, nothing_leaves(SHAPE.rows, 12), SCALING, None, 0.0)
    fixed = twin.Part(torch.zeros(SHAPE.rows, 2, 3, 12), torch.randn(SHAPE.rows, 2, 3))
    votes = twin.vote(scores, fixed, tree) / twin.VOTE_UNIT
    for row in range(SHAPE.rows):
        expected = torch.zeros(SHAPE.leaves, dtype=torch.float64)
        for head in range(SHAPE.group):
            logits = torch.cat([scores.priority[row, head], fixed.lse[row, :, head]]).double()
            share = logits.softmax(0)[: SHAPE.leaves]
            expected += share * scores.doubt[row, head]
        torch.testing.assert_close(votes[row].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("select", [twin.select_leaves, twin.select_pages])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_one_step_is_the_references_attention(
    select: Select, softcap: float | None, sinks: bool
) -> None:
    query, fixed, tree, pages = random_case(SHAPE)
    sink_logits = torch.randn(SHAPE.rows, SHAPE.group) if sinks else None
    leaving = twin.push(fixed, *torch.randn(2, SHAPE.rows, SHAPE.head_dim))
    near = twin.attend_fixed(query, fixed, leaving, SCALING, softcap)
    scores = twin.score(query, tree, leaving, SCALING, softcap, 0.25)
    selected = select(twin.vote(scores, near, tree), tree, 25, 4)
    slots, missing = twin.resolve(selected.pages, pages, torch.zeros(1, dtype=torch.int64))
    twin.gather(pages, slots, missing)
    exact = twin.attend_pages(query, pages, selected, slots, SCALING, softcap)
    out = twin.combine([near, exact, twin.attend_rest(scores, tree, selected)], sink_logits)
    tokens = pages.host.float() * pages.scales.nan_to_num()[..., None]
    for row in range(SHAPE.rows):
        length, left = (int(x[row // SHAPE.kv_heads]) for x in (fixed.lens, fixed.left))
        there = [*range(min(fixed.sink, length)), *range(left, length)]
        ring = [
            p if p < fixed.sink else fixed.sink + (p - fixed.sink) % SHAPE.window for p in there
        ]
        parts = [torch.stack([fixed.keys[row, ring], fixed.values[row, ring]])]
        if leaving.leaves[row]:
            parts.append(torch.stack([leaving.keys[row], leaving.values[row]])[:, None])
        chosen = torch.zeros(SHAPE.leaves, dtype=torch.bool)
        for page, mask in zip(selected.pages[row].tolist(), selected.tokens[row]):
            if page < 0:
                assert int(mask) == 0
                continue
            parts.append(tokens[row, page][:, has_bit(mask, SHAPE.page_size)])
            chosen |= (tree.leaf_page[row] == page) & (tree.leaf_slots[row] & mask != 0)
        keys, values = torch.cat(parts, 1)
        expected = reference.attend_parts(
            query[row][None],
            keys[None],
            values[None],
            torch.ones(1, keys.shape[0], dtype=torch.bool),
            scores.estimate[row][None].masked_fill(chosen, -math.inf),
            tree.value_mean[row][None],
            tree.value_scale[row][None],
            None if sink_logits is None else sink_logits[row][None],
            SCALING,
            softcap,
        )
        torch.testing.assert_close(out[row][None], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sink", [0, 3])
def test_sink_and_window_hold_the_first_and_the_latest(sink: int) -> None:
    window, rows = 4, 2
    nan = torch.full((rows, sink + window, 1), math.nan)
    lens = torch.zeros(1, dtype=torch.int32)
    fixed = Fixed(nan.clone(), nan.clone(), lens, torch.full_like(lens, sink), sink)
    left = []
    for position in range(15):
        token = torch.full((rows, 1), float(position))
        leaving = twin.push(fixed, token, -token)
        if leaving.leaves.all():
            assert leaving.keys[:, 0].tolist() == [int(leaving.position[0])] * rows
            assert torch.equal(leaving.keys, -leaving.values)
            left.append(int(leaving.position[0]))
        held = fixed.keys[0, :, 0].tolist()
        known = [int(p) for p in held if not math.isnan(p)]
        assert sorted(known) == [p for p in range(position + 1) if p not in left]
        assert all(held[p] == p for p in range(min(sink, position + 1)))
    assert left == list(range(sink, 15 - window))


def test_the_cut_is_that_of_a_build() -> None:
    for num in (3, 8, 9, 17):
        keys = torch.randn(num, 6)
        ids, _ = split_oversized(
            keys, torch.zeros(num, dtype=torch.int64), 1, num - 1, torch.zeros(1)
        )
        assert torch.equal(upper_half(keys), ids == 1)


def test_masks_count_their_bits() -> None:
    masks = [0, 1, -1, 1 << 62, -(1 << 63), 0x5555555555555555, -2]
    counted = count_bits(torch.tensor(masks)).tolist()
    assert counted == [(mask & (1 << 64) - 1).bit_count() for mask in masks]
    assert mask_of([0, 63]) == 1 - (1 << 63)
    assert has_bit(torch.tensor(mask_of([1, 63])), 64).nonzero()[:, 0].tolist() == [1, 63]


def test_codes_are_within_half_a_unit() -> None:
    x = torch.randn(5, 33) * torch.tensor([0.0, 1e-30, 1.0, 1e4, 1e30])[:, None]
    codes, scale = quantize(x)
    assert int(codes.abs().max()) == 127 and not codes[0].any()
    assert ((codes.float() * scale[:, None] - x).abs() <= 0.5001 * scale[:, None]).all()
