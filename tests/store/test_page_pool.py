"""The pool against a dict that says what each page holds, over random traces."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icecache.errors import IntegrityError
from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from tests.helpers import rng

PAGE, DIM = 4, 3
OPS = ("allocate", "share", "release", "copy", "write", "clear", "reserve")

Trace = list[tuple[str, int]]


@dataclass
class Model:
    """What the pool should hold: per page its holders, and per slot the number written."""

    holders: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, dict[int, int]] = field(default_factory=dict)
    written: int = 0

    def pick(self, number: int) -> int | None:
        """Return one of the pages in use."""
        pages = sorted(self.holders)
        return pages[number % len(pages)] if pages else None


def _vector(number: int) -> torch.Tensor:
    return torch.full((DIM,), float(number))


def _apply(pool: PagePool, model: Model, op: str, number: int) -> None:
    page = model.pick(number)
    if op == "allocate":
        pages = pool.allocate(number % 4)
        assert not set(pages) & set(model.holders), "a page in use was given out again"
        model.holders.update(dict.fromkeys(pages, 1))
        model.tokens.update({p: {} for p in pages})
    elif op == "reserve":
        pool.reserve(number % 9)
    elif page is not None:
        _apply_to(pool, model, op, page, number)


def _apply_to(pool: PagePool, model: Model, op: str, page: int, number: int) -> None:
    if op == "share":
        pool.share([page])
        model.holders[page] += 1
    elif op == "release":
        pool.release([page])
        model.holders[page] -= 1
        if model.holders[page] == 0:
            del model.holders[page], model.tokens[page]
    elif op == "copy":
        copy = pool.copy_page(page)
        assert copy not in model.holders
        model.holders[copy], model.tokens[copy] = 1, dict(model.tokens[page])
    elif op == "write":
        _write(pool, model, page, 1 + number % PAGE)
    elif op == "clear" and model.tokens[page]:
        slot = sorted(model.tokens[page])[number % len(model.tokens[page])]
        pool.clear([page * PAGE + slot])
        del model.tokens[page][slot]


def _write(pool: PagePool, model: Model, page: int, num: int) -> None:
    free = [slot for slot in range(PAGE) if slot not in model.tokens[page]]
    assert pool.free_slots(page) == free
    if len(free) < num:
        with pytest.raises(IntegrityError, match=f"page {page}: {num} slots claimed"):
            pool.claim(page, num)
        return
    slots = pool.claim(page, num)
    assert slots == free[:num]
    numbers = [model.written + i for i in range(num)]
    vectors = torch.stack([_vector(n) for n in numbers])
    at = torch.tensor([page * PAGE + slot for slot in slots])
    pool.write(at, vectors, vectors + 0.5, torch.tensor(numbers))
    model.tokens[page].update(zip(slots, numbers, strict=True))
    model.written += num


def _compare(pool: PagePool, model: Model) -> None:
    held = [[page] * 1 for page, holders in model.holders.items() for _ in range(holders)]
    pool.check_integrity(held)
    assert pool.num_pages == len(model.holders)
    assert pool.num_tokens == sum(len(slots) for slots in model.tokens.values())
    assert pool.nbytes == len(model.holders) * PAGE * (2 * DIM * 4 + 4)
    for page, slots in model.tokens.items():
        assert pool.is_shared(page) == (model.holders[page] > 1)
        tokens, positions = pool.tokens_of([page])
        by_number = sorted(slots, key=slots.__getitem__)
        assert tokens.tolist() == [page * PAGE + slot for slot in by_number]
        assert positions.tolist() == sorted(slots.values())
        assert torch.equal(pool.positions_of(tokens), positions)
        keys, values = pool.read(tokens)
        assert torch.equal(keys, positions[:, None].expand(-1, DIM).float())
        assert torch.equal(values, keys + 0.5)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 60)), max_size=40))
def test_random_traces(trace: Trace) -> None:
    pool, model = PagePool(PAGE, DIM, torch.float32), Model()
    for op, number in trace:
        _apply(pool, model, op, number)
        pool.poison()
        _compare(pool, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_size", [1, 15, 16, 17])
def test_written_is_read_bit_for_bit(page_size: int, dtype: torch.dtype) -> None:
    pool = PagePool(page_size, 80, dtype)
    pool.allocate(7)
    pool.poison()
    at = torch.randperm(7 * page_size, generator=rng(0))[: 5 * page_size]
    keys, values = (torch.randn(at.numel(), 80, generator=rng(s)).to(dtype) for s in (1, 2))
    pool.write(at, keys, values, torch.arange(at.numel()))
    read_keys, read_values = pool.read(at)
    assert torch.equal(read_keys, keys)
    assert torch.equal(read_values, values)
    grid_keys, _ = pool.read(at.view(5, -1))
    assert torch.equal(grid_keys.flatten(0, 1), keys)


def test_poison_reaches_every_free_slot_and_no_other() -> None:
    pool = PagePool(PAGE, DIM, torch.float32)
    pool.reserve(3)
    (page,) = pool.allocate(1)
    slots = pool.claim(page, 2)
    at = torch.tensor([page * PAGE + slot for slot in slots])
    pool.write(at, torch.ones(2, DIM), torch.ones(2, DIM), torch.tensor([5, 6]))
    pool.poison()
    everything = torch.arange(3 * PAGE)
    for x in pool.read(everything):
        assert bool(torch.isnan(x[~torch.isin(everything, at)]).all())
        assert bool((x[at] == 1).all())


def test_growing_keeps_the_tokens() -> None:
    pool = PagePool(PAGE, DIM, torch.float32)
    (page,) = pool.allocate(1)
    at = torch.tensor([page * PAGE + slot for slot in pool.claim(page, 1)])
    pool.write(at, torch.ones(1, DIM), torch.ones(1, DIM), torch.tensor([3]))
    pages = pool.allocate(1000)
    assert len({page, *pages}) == 1001
    assert pool.read(at)[0].tolist() == [[1.0] * DIM]
    assert pool.positions_of(at).tolist() == [3]
    assert pool.free_slots(pages[-1]) == list(range(PAGE))


@pytest.mark.parametrize("how", ["not held", "held twice", "held too often", "leaked", "not empty"])
def test_check_integrity_notices(how: str) -> None:
    pool = PagePool(PAGE, DIM, torch.float32)
    first, second = pool.allocate(2)
    held = [[first, second]]
    if how == "not held":
        held = [[first]]
    elif how == "held twice":
        held = [[first, first]]
    elif how == "held too often":
        held = [[first, second], [second]]
    elif how == "leaked":
        pool.release([second])
        pool._free.pop()
        held = [[first]]
    else:
        pool.release([second])
        pool._positions[second, 1] = 4
        held = [[first]]
    with pytest.raises(IntegrityError):
        pool.check_integrity(held)


def test_a_row_grows_by_a_64th_of_its_pages() -> None:
    pool = PagePool(PAGE, DIM, torch.float32)
    table = PageTable(pool, 2)
    for held, more in ((0, 1), (1, 1), (126, 1), (128, 2), (510, 7)):
        have = int(table.num_pages[0])
        table.hold(0, pool.allocate(held - have), [0] * (held - have))
        table.grow(0)
        assert table.num_pages.tolist() == [held + more, 0]
        assert table.free[0, held : held + more].tolist() == [PAGE] * more
        assert pool.num_pages == held + more
        assert table.fullest_with(0, PAGE) >= held
