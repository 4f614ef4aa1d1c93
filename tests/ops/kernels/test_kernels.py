"""Each kernel against its twin, from the same layer; what is not real is NaN or nonsense."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_cases import SCALING, SHAPES, SOFTCAPS, Step, assert_near, assert_same, copy_of, step_of

from icecache.errors import InputError
from icecache.ops import triton as kernels
from icecache.ops.device import twin
from icecache.ops.device.bits import count_bits
from icecache.ops.device.check import check_device_tree
from icecache.ops.device.records import DevicePages, DeviceTree, Part, Selected
from icecache.ops.device.testing import CaseShape, empty_case, random_case
from icecache.ops.device.twin_insert import nearest_leaf

# the interpreter computes bfloat16 wrongly
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)
IDS = [f"G{s.group}-D{s.head_dim}-T{s.page_size}" for s in SHAPES]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=SHAPES, ids=IDS)
def step_of_ints(request: pytest.FixtureRequest, device: torch.device) -> Step:
    """A step for ops that no dtype comes into."""
    return step_of(request.param, None, device)


@pytest.fixture(params=zip(SHAPES, SOFTCAPS), ids=IDS)
def step(request: pytest.FixtureRequest, dtype: torch.dtype, device: torch.device) -> Step:
    shape, softcap = request.param
    return step_of(replace(shape, dtype=dtype), softcap, device)


Select = Callable[[torch.Tensor, DeviceTree, int, int], Selected]
Selects = tuple[Select, Select]


def merged(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    return twin.combine([part], None), part.lse.logsumexp(1)


def test_push_and_attention_to_sink_and_window(step: Step, device: torch.device) -> None:
    fixed = random_case(step.shape).fixed.to(device)
    other = fixed.to(device)
    for _ in range(2):
        expected, got = twin.push(fixed, *step.new), kernels.push(other, *step.new)
        for mine, theirs in zip((*got, *other[:4]), (*expected, *fixed[:4])):
            assert_same(mine, theirs)
        asked = (step.case.query, fixed, expected, SCALING, step.softcap)
        part = kernels.attend_fixed(*asked)
        for mine, theirs in zip(merged(part), merged(twin.attend_fixed(*asked))):
            assert_near(mine, theirs)


def test_score_and_vote(step: Step) -> None:
    query, tree = step.case.query, step.case.tree
    scores = kernels.score(query, tree, step.leaving, SCALING, step.softcap, 0.3)
    for mine, theirs in zip(scores[:3], step.scores[:3]):
        assert_near(mine, theirs)
    assert_near(scores.priority_lse.logsumexp(1), step.scores.priority_lse.logsumexp(1))
    assert_same(nearest_leaf(scores), nearest_leaf(step.scores))
    votes = kernels.vote(scores, step.fixed, tree)
    assert_near(votes / twin.VOTE_UNIT, step.votes / twin.VOTE_UNIT)
    assert_same(kernels.vote(scores, step.fixed, tree), votes)


SELECTS = [
    (kernels.select_leaves, twin.select_leaves),
    (kernels.select_pages, twin.select_pages),
]


@pytest.mark.parametrize("selects", SELECTS, ids=["leaves", "pages"])
@pytest.mark.parametrize("room", [0, 21, 10_000])
def test_select(step_of_ints: Step, selects: Selects, room: int) -> None:
    step, (ours, truth) = step_of_ints, selects
    tree = step.case.tree
    # the second time many equals, among them leaves without a vote
    for votes, most in ((step.votes, step.shape.pages + 2), (step.votes >> 33 << 33, 2)):
        expected = truth(votes, tree, room, most)
        for mine, theirs in zip(ours(votes, tree, room, most), expected, strict=True):
            assert_same(mine, theirs)


@pytest.mark.parametrize("room", [9, 70, 160])
def test_select_among_pages_of_all_sizes(room: int, device: torch.device) -> None:
    used = torch.randint(-(1 << 62), 1 << 62, (3, 45)) >> torch.randint(0, 64, (3, 45))
    used = torch.where(torch.rand(3, 45) < 0.2, 0, used).to(device)
    sizes = count_bits(used)
    tree = _leaves_of(used, torch.arange(45).expand(3, -1), used)
    # what a token is worth does not hang on the size of its page
    votes = torch.randint(0, 1 << 34, (3, 45)).to(device) * sizes
    expected = twin.select_pages(votes, tree, room, 11)
    for mine, theirs in zip(kernels.select_pages(votes, tree, room, 11), expected):
        assert_same(mine, theirs)
    # something was too large and something behind it was not
    best = (votes // sizes.clamp(min=1)).masked_fill(sizes == 0, -1).topk(11).indices
    assert any(
        set(row[row >= 0].tolist()) - set(first[: int((row >= 0).sum())].tolist())
        for row, first in zip(expected.pages, best)
    )


@pytest.mark.parametrize(("room", "most"), [(3, 2), (30, 500), (50, 9)])
def test_select_among_many_leaves_of_all_sizes(
    room: int, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More leaves than tiles of tiles hold, of 1 to 8 tokens, 5 a page; one row has none."""
    monkeypatch.setattr("icecache.ops.triton.best._LEAST_TILE", 64)
    monkeypatch.setattr("icecache.ops.triton.best._MOST_TILE", 64)
    num = 355
    bits = torch.randint(1, 256, (2, num))
    bits[0] = 0
    leaf_page = torch.stack([torch.randperm(num) // 5 for _ in range(2)])
    # a page's leaves lie in different slots, up to the one that is the sign
    place = torch.empty(2, num, dtype=torch.int64)
    place.scatter_(1, leaf_page.argsort(dim=1), 8 * (torch.arange(num) % 5).repeat(2, 1))
    leaf_slots = bits << (place + 24)
    used = torch.zeros(2, num // 5, dtype=torch.int64).scatter_add_(1, leaf_page, leaf_slots)
    tree = _leaves_of(leaf_slots.to(device), leaf_page, used.to(device))
    votes = (torch.randint(0, 2000, (2, num)) << 20).to(device)
    expected = twin.select_leaves(votes, tree, room, most)
    for mine, theirs in zip(kernels.select_leaves(votes, tree, room, most), expected):
        assert_same(mine, theirs)
    taken, pages = count_bits(expected.tokens).sum(1), (expected.pages >= 0).sum(1)
    assert int(taken[0]) == 0 < int(taken[1]) <= room
    assert int(pages[1]) == most or most > 9 or room < 50, "the pages are what bounds"


def _leaves_of(slots: torch.Tensor, page: torch.Tensor, used: torch.Tensor) -> DeviceTree:
    """Return a tree whose leaves hold these slots of these pages, without summaries."""
    num = count_bits(slots).int()
    fields = dict.fromkeys(DeviceTree._fields, torch.zeros(1, device=slots.device))
    page = torch.where(num > 0, page.to(num.device), 1 << 30).int()
    own = {"num_tokens": num, "leaf_page": page, "leaf_slots": slots, "page_used": used}
    num_leaves = torch.full((num.shape[0],), num.shape[1], dtype=torch.int32, device=num.device)
    return DeviceTree(**{**fields, **own, "num_leaves": num_leaves})


def test_resolve_and_gather(step: Step, device: torch.device) -> None:
    case = copy_of(random_case(step.shape), device)
    pages, other = case.pages, case.pages.to(device)
    for number in range(3):
        wanted = step.selected.pages
        wanted = wanted.flip(1) if number == 1 else wanted
        wanted = torch.where((wanted >= 0) & (wanted % 3 == number % 2), -1, wanted)
        counter = torch.tensor([number + 1], dtype=torch.int64, device=device)
        expected, got = (
            twin.resolve(wanted, pages, counter),
            kernels.resolve(wanted, other, counter),
        )
        twin.gather(pages, *expected)
        kernels.gather(other, *expected)
        for mine, theirs in zip((*got, *other), (*expected, *pages)):
            assert_same(mine, theirs)


def test_resolve_compares_many_pages_with_many_slots(device: torch.device) -> None:
    """As at a budget of eight hundred tokens: one tile of pages after the other."""
    shape = CaseShape(kv_heads=3, head_dim=2, pages=320, slots=160)
    pages = empty_case(shape).pages.to(device)
    other = pages.to(device)
    for number in range(3):
        wanted = torch.rand(shape.rows, shape.pages).argsort(1)[:, :145].int().to(device)
        # nothing, a few and all of them
        wanted[0], wanted[1, number * 50 :] = -1, -1
        counter = torch.tensor([number], device=device)
        expected = twin.resolve(wanted, other, counter)
        got = kernels.resolve(wanted, pages, counter)
        for mine, theirs in zip((*got, *pages[4:]), (*expected, *other[4:])):
            assert_same(mine, theirs)
    assert 0 < int(pages.work[2, 1]) < int(pages.work[2, 0]) == 3 * 145


@pytest.mark.parametrize("by_pages", [False, True], ids=["leaves", "pages"])
def test_attention_to_what_is_selected_and_to_the_rest(step: Step, by_pages: bool) -> None:
    if by_pages:
        step = step_of(step.shape, step.softcap, step.case.query.device, by_pages)
    tree = step.case.tree
    asked = (step.case.query, step.case.pages, step.selected, step.slots)
    exact = kernels.attend_pages(*asked, SCALING, step.softcap)
    expected = twin.attend_pages(*asked, SCALING, step.softcap)
    rest = kernels.attend_rest(step.scores, tree, step.selected)
    expected_rest = twin.attend_rest(step.scores, tree, step.selected)
    for mine, theirs in zip((exact, rest), (expected, expected_rest)):
        for a, b in zip(merged(mine), merged(theirs)):
            assert_near(a, b)
    sinks = torch.randn(step.shape.rows, step.shape.group).to(step.case.query.device)
    for parts, sink in (([step.fixed, exact, rest], None), ([exact, rest], sinks), ([rest], None)):
        assert_near(kernels.combine(parts, sink), twin.combine(parts, sink))


def test_insert(step: Step, device: torch.device) -> None:
    mine, theirs = copy_of(step.case, device), copy_of(step.case, device)
    kernels.insert(mine.tree, mine.pages, step.leaving, step.scores, step.shape.leaf_size)
    twin.insert(theirs.tree, theirs.pages, step.leaving, step.scores, step.shape.leaf_size)
    assert_layers_agree(mine.tree, mine.pages, theirs.tree, theirs.pages)
    check_device_tree(mine.tree, mine.pages, step.shape.leaf_size)


def assert_layers_agree(
    tree: DeviceTree, pages: DevicePages, other_tree: DeviceTree, other_pages: DevicePages
) -> None:
    """Compare layers: means to a unit of their codes, all that says where tokens are exactly."""
    for name, mine, theirs in zip(tree._fields, tree, other_tree):
        if mine.dtype == torch.int8:
            assert int((mine.int() - theirs.int()).abs().max()) <= 1, name
        elif mine.dtype == torch.float32:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
        else:
            assert torch.equal(mine, theirs), name
    for mine, theirs in zip(pages, other_pages):
        assert_same(mine, theirs)


def test_what_an_op_cannot_do_is_refused(device: torch.device) -> None:
    step = step_of(SHAPES[0], None, device)
    tree = step.case.tree
    for select in (kernels.select_leaves, kernels.select_pages):
        with pytest.raises(InputError, match=r"votes must be contiguous, got shape .* strides"):
            select(step.votes.mT, tree, 20, 4)
    wide = torch.full((step.shape.rows, step.shape.slots + 1), -1, dtype=torch.int32)
    for ops in (twin, kernels):
        with pytest.raises(InputError, match="must have a slot for each of the 6 pages"):
            ops.resolve(wide, step.case.pages, torch.zeros(1, dtype=torch.int64))
        with pytest.raises(InputError, match="one to three parts, got 0"):
            ops.combine([], None)
    many = torch.zeros(1, (1 << 20) + 1, dtype=torch.int64)
    with pytest.raises(InputError, match="at most 1048576 leaves, got 1048577"):
        kernels.select_leaves(many, _leaves_of(many, many, many[:, :1]), 20, 4)
    with pytest.raises(InputError, match="at most 1048576 pages, got 1048577"):
        kernels.select_pages(many[:, :1], _leaves_of(many[:, :1], many[:, :1], many), 20, 4)
