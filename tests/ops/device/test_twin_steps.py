"""The twins over whole traces: what is attended is what was pushed, however it was moved."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icecache.ops.device import twin
from icecache.ops.device.bits import count_bits, has_bit
from icecache.ops.device.check import check_device_tree
from icecache.ops.device.testing import Case, CaseShape, empty_case, random_case

SCALING = 0.2


def step(
    case: Case,
    shape: CaseShape,
    number: int,
    room: int,
    softcap: float | None = None,
    by_pages: bool = False,
):
    """One decode step of random tokens; returns the tokens and what was attended."""
    most = 2 * math.ceil(room / shape.page_size) + 2
    tokens = torch.randn(2, shape.rows, shape.head_dim).to(shape.dtype)
    query = torch.randn(shape.rows, shape.group, shape.head_dim).to(shape.dtype)
    leaving = twin.push(case.fixed, *tokens)
    fixed = twin.attend_fixed(query, case.fixed, leaving, SCALING, softcap)
    scores = twin.score(query, case.tree, leaving, SCALING, softcap, 0.0)
    votes = twin.vote(scores, fixed, case.tree)
    select = twin.select_pages if by_pages else twin.select_leaves
    selected = select(votes, case.tree, room, most)
    slots, missing = twin.resolve(selected.pages, case.pages, torch.tensor([number]))
    twin.gather(case.pages, slots, missing)
    exact = twin.attend_pages(query, case.pages, selected, slots, SCALING, softcap)
    rest = twin.attend_rest(scores, case.tree, selected)
    out = twin.combine([fixed, exact, rest], None)
    twin.insert(case.tree, case.pages, leaving, scores, shape.leaf_size)
    return tokens, query, selected, out


def full_attention(query, keys, values, softcap=None):
    logits = SCALING * (query.float() @ keys.float().mT)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.softmax(logits, -1) @ values.float()


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1 << 16),
    steps=st.integers(1, 90),
    page_size=st.sampled_from([8, 16, 64]),
    leaf_size=st.sampled_from([2, 4]),
    int8=st.booleans(),
    offload=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
    by_pages=st.booleans(),
)
def test_with_room_for_all_a_trace_equals_full_attention(
    seed, steps, page_size, leaf_size, int8, offload, softcap, by_pages
):
    torch.manual_seed(seed)
    shape = CaseShape(
        kv_heads=2,
        head_dim=8,
        leaves=90,
        pages=40,
        slots=60,
        page_size=page_size,
        leaf_size=leaf_size,
        int8_pages=int8 and offload,
        offload=offload,
    )
    case = empty_case(shape)
    kept = []
    for number in range(steps):
        tokens, query, _, out = step(case, shape, number, 90, softcap, by_pages)
        kept.append(tokens)
        if number % 8 == 7:
            check_device_tree(case.tree, case.pages, leaf_size)
        keys, values = torch.stack(kept, 2)
        tolerance = 0.05 if shape.int8_pages else 1e-4
        torch.testing.assert_close(
            out, full_attention(query, keys, values, softcap), atol=tolerance, rtol=0
        )
    check_device_tree(case.tree, case.pages, leaf_size)
    assert not case.tree.full.any()
    held = count_bits(case.tree.page_used).sum(1)
    assert held.tolist() == [max(0, steps - shape.sink - shape.window)] * shape.rows
    index = torch.arange(steps)
    for row in range(shape.rows):
        used = has_bit(case.tree.page_used[row], page_size)
        positions = case.pages.positions[row][used].sort().values.long()
        assert torch.equal(positions, index[shape.sink : shape.sink + positions.numel()])


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1 << 16),
    room=st.integers(1, 60),
    int8=st.booleans(),
    slots=st.integers(0, 6),
    by_pages=st.booleans(),
)
def test_selected_pages_equal_the_hosts_and_fit(seed, room, int8, slots, by_pages):
    torch.manual_seed(seed)
    most = 2 * math.ceil(room / 16) + 2
    shape = CaseShape(head_dim=8, slots=most + slots, pages=25, leaves=60, int8_pages=int8)
    case = random_case(shape)
    for number in range(6):
        used = case.tree.page_used.clone()
        _, _, selected, out = step(case, shape, number, room, by_pages=by_pages)
        assert out.isfinite().all()
        check_device_tree(case.tree, case.pages, shape.leaf_size)
        used = torch.where(
            selected.pages >= 0, used.gather(1, selected.pages.clamp(min=0).long()), 0
        )
        assert torch.equal(selected.tokens & used, selected.tokens if not by_pages else used)
        assert ((selected.tokens != 0) == (selected.pages >= 0)).all()
        assert (count_bits(selected.tokens).sum(1) <= room).all()


@pytest.mark.parametrize("lacking", ["leaves", "pages"])
def test_an_insert_without_room_changes_nothing_but_the_flag(lacking):
    shape = CaseShape(head_dim=8, kv_heads=1, leaf_size=2, page_size=8)
    sizes = {"leaves": 3} if lacking == "leaves" else {"pages": 1}
    shape = CaseShape(**{**shape.__dict__, **sizes})
    case = empty_case(shape)
    for number in range(40):
        before = [field.clone() for field in (*case.tree[:-1], case.pages.host)]
        step(case, shape, number, room=8)
        check_device_tree(case.tree, case.pages, shape.leaf_size)
        if case.tree.full.any():
            after = (*case.tree[:-1], case.pages.host)
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after))
            return
    raise AssertionError("the row never ran out of room")
