"""Whole traces through the kernels: what is attended is what was pushed, wherever it went."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import assert_same, copy_of

from icecache.ops import triton as kernels
from icecache.ops.device import twin
from icecache.ops.device.bits import has_bit
from icecache.ops.device.check import check_device_tree
from icecache.ops.device.testing import CaseShape, empty_case

SCALING = 0.3
FUZZ = settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(
    seed=st.integers(0, 1 << 16),
    steps=st.integers(8, 18),
    leaf_size=st.integers(2, 4),
    int8=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    select=st.sampled_from([kernels.select_leaves, kernels.select_pages]),
)
def test_with_room_for_all_a_trace_equals_full_attention(
    device, seed, steps, leaf_size, int8, softcap, select
):
    torch.manual_seed(seed)
    shape = CaseShape(
        kv_heads=1,
        head_dim=16,
        leaves=20,
        pages=9,
        slots=9,
        sink=1,
        window=2,
        page_size=8,
        leaf_size=leaf_size,
        int8_pages=int8,
    )
    query, fixed, tree, pages = copy_of(empty_case(shape), device)
    kept = []
    for number in range(steps):
        kept.append(torch.randn(2, shape.rows, shape.head_dim).to(device))
        leaving = kernels.push(fixed, *kept[-1])
        near = kernels.attend_fixed(query, fixed, leaving, SCALING, softcap)
        scores = kernels.score(query, tree, leaving, SCALING, softcap, 0.0)
        selected = select(kernels.vote(scores, near, tree), tree, 60, shape.slots)
        counter = torch.tensor([number], dtype=torch.int64, device=device)
        slots, missing = kernels.resolve(selected.pages, pages, counter)
        kernels.gather(pages, slots, missing)
        exact = kernels.attend_pages(query, pages, selected, slots, SCALING, softcap)
        rest = kernels.attend_rest(scores, tree, selected)
        out = kernels.combine([near, exact, rest], None)
        kernels.insert(tree, pages, leaving, scores, leaf_size)
        keys, values = torch.stack(kept, 2)
        logits = SCALING * query @ keys.mT
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        expected = torch.softmax(logits, -1) @ values
        torch.testing.assert_close(out, expected, rtol=0, atol=0.05 if int8 else 1e-4)
    check_device_tree(tree, pages, leaf_size)
    used = has_bit(tree.page_used, shape.page_size)
    for row in range(shape.rows):
        positions = pages.positions[row][used[row]].sort().values
        assert positions.tolist() == list(range(1, steps - 2))


# the trace passes what 31 bits, and what the bits above a slot's number, count
@pytest.mark.parametrize("start", [(1 << 31) // 6 - 5, (1 << 43) // 6 - 5])
@FUZZ
@given(seed=st.integers(0, 1 << 16), num_slots=st.integers(3, 6), steps=st.integers(9, 15))
def test_slots_of_any_trace_are_the_twins(device, seed, num_slots, steps, start):
    torch.manual_seed(seed)
    shape = CaseShape(kv_heads=5, head_dim=2, pages=7, slots=num_slots)
    pages = empty_case(shape).pages.to(device)
    other = pages.to(device)
    for number in range(steps):
        wanted = torch.rand(shape.rows, shape.pages).argsort(1)[:, :3].int()
        wanted[:, 2] = torch.where(torch.rand(shape.rows) < 0.3, -1, wanted[:, 2])
        counter = torch.tensor([start + number], dtype=torch.int64, device=device)
        expected = twin.resolve(wanted.to(device), other, counter)
        for mine, theirs in zip(
            (*kernels.resolve(wanted.to(device), pages, counter), *pages[4:]),
            (*expected, *other[4:]),
        ):
            assert_same(mine, theirs)


@FUZZ
@given(
    seed=st.integers(0, 1 << 16),
    page_size=st.sampled_from([8, 16]),
    leaf_size=st.integers(2, 4),
    room=st.integers(3, 20),
    int8=st.booleans(),
)
def test_attended_pages_equal_the_hosts_after_any_trace(
    device, seed, page_size, leaf_size, room, int8
):
    """Few slots, so that pages come and go while inserts write through to them."""
    torch.manual_seed(seed)
    shape = CaseShape(
        kv_heads=1,
        batch=2,
        head_dim=8,
        leaves=20,
        pages=9,
        slots=3,
        sink=0,
        window=1,
        page_size=page_size,
        leaf_size=leaf_size,
        int8_pages=int8,
        dtype=torch.float16,
    )
    query, fixed, tree, pages = copy_of(empty_case(shape), device)
    for number in range(20):
        tokens = torch.randn(2, shape.rows, shape.head_dim).to(device, shape.dtype)
        leaving = kernels.push(fixed, *tokens)
        scores = twin.score(query, tree, leaving, SCALING, None, 0.0)
        wanted = torch.rand(shape.rows, shape.pages).argsort(1)[:, :3].to(device)
        wanted = torch.where(wanted < tree.num_pages[:, None], wanted, -1).int()
        wanted = wanted.sort(dim=1, descending=True).values
        before = pages.to(device)
        counter = torch.tensor([number], dtype=torch.int64, device=device)
        slots, missing = kernels.resolve(wanted, pages, counter)
        for mine, theirs in zip((slots, missing), twin.resolve(wanted, before, counter)):
            assert_same(mine, theirs)
        kernels.gather(pages, slots, missing)
        kernels.insert(tree, pages, leaving, scores, leaf_size)
        if number % 4 == 3:
            check_device_tree(tree, pages, leaf_size)
    assert not tree.full.any()


@pytest.mark.parametrize("lacking", [{"leaves": 2}, {"pages": 1}], ids=str)
def test_an_insert_without_room_changes_nothing_but_the_flag(device, lacking):
    sizes = {"kv_heads": 1, "head_dim": 8, "leaf_size": 2, "page_size": 8, "sink": 0, "window": 1}
    shape = CaseShape(**{**sizes, **lacking})
    query, fixed, tree, pages = copy_of(empty_case(shape), device)
    for _ in range(12):
        before = (*tree.to(device)[:-1], *pages.to(device))
        leaving = kernels.push(fixed, *torch.randn(2, 1, 8).to(device))
        scores = twin.score(query, tree, leaving, SCALING, None, 0.0)
        kernels.insert(tree, pages, leaving, scores, shape.leaf_size)
        check_device_tree(tree, pages, shape.leaf_size)
        if tree.full.any():
            for mine, theirs in zip((*tree[:-1], *pages), before):
                assert_same(mine, theirs)
            return
    raise AssertionError("the row never ran out of room")


@pytest.mark.parametrize("ops", [twin, kernels], ids=["twin", "kernels"])
def test_a_key_that_is_no_number_leaves_the_leaves_as_they_are(device, ops):
    shape = CaseShape(kv_heads=1, head_dim=8, leaf_size=2, page_size=8, sink=0, window=1)
    query, fixed, tree, pages = copy_of(empty_case(shape), device)
    for number in range(6):
        before = (*tree.to(device)[:-1], *pages.to(device))
        key, value = torch.randn(2, 1, 8).to(device)
        # what is pushed now leaves at the next turn
        leaving = ops.push(fixed, key * torch.nan if number == 4 else key, value)
        scores = ops.score(query, tree, leaving, SCALING, None, 0.0)
        ops.insert(tree, pages, leaving, scores, shape.leaf_size)
    check_device_tree(tree, pages, shape.leaf_size)
    assert tree.full.all()
    for mine, theirs in zip((*tree[:-1], *pages), before):
        assert_same(mine, theirs)
