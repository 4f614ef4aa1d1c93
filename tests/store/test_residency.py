"""Wanted pages against resident ones, against a slow model of least recent use."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icecache.errors import PoolExhausted
from icecache.store.residency import InPlace, LeastRecentlyUsed

SLOTS = 4
_trace = st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 9), max_size=6)), max_size=30)


class _Model:
    """What lies in the slots, and when each page was last wanted."""

    def __init__(self) -> None:
        self.slots: list[int | None] = [None] * SLOTS
        self.last_wanted: dict[int, int] = {}

    def follow(self, wanted: list[int], missing: list[int], into: list[int], step: int) -> None:
        """Carry out a plan, and say whether it was a good one."""
        resident = {page for page in self.slots if page is not None}
        assert missing == [p for p in dict.fromkeys(wanted) if p not in resident]
        assert len(set(into)) == len(into) == len(missing)
        given_up = [self.slots[slot] for slot in into if self.slots[slot] is not None]
        assert not set(given_up) & set(wanted), "a wanted page gave way"
        # no more gives way than must, and nothing that was wanted later than what stays
        assert len(given_up) == max(0, len(missing) - self.slots.count(None))
        for slot, page in zip(into, missing, strict=True):
            self.slots[slot] = page
        stays = set(resident) - set(given_up) - set(wanted)
        if given_up and stays:
            latest = max(self.last_wanted[page] for page in given_up if page is not None)
            assert latest <= min(self.last_wanted[page] for page in stays)
        self.last_wanted.update(dict.fromkeys(wanted, step))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(_trace)
def test_least_recently_used(trace: list[tuple[bool, list[int]]]) -> None:
    pool, model = LeastRecentlyUsed(SLOTS), _Model()
    for step, (forgets, pages) in enumerate(trace):
        if forgets:
            pool.forget(pages)
            model.slots = [None if page in pages else page for page in model.slots]
            continue
        if len(set(pages)) > SLOTS:
            with pytest.raises(PoolExhausted, match=f"{len(set(pages))} pages needed, {SLOTS} of"):
                pool.plan(pages)
            continue
        plan = pool.plan(pages)
        model.follow(pages, plan.missing, plan.into, step)
        assert [model.slots[slot] for slot in plan.slots] == pages


def test_what_stays_is_not_fetched_again() -> None:
    pool = LeastRecentlyUsed(3)
    assert sorted(pool.plan([5, 6]).missing) == [5, 6]
    assert pool.plan([6, 5, 6]).missing == []
    assert pool.plan([7, 8, 6]).missing == [7, 8]
    assert pool.plan([5]).missing == [5]


def test_a_forgotten_page_is_fetched_again() -> None:
    pool = LeastRecentlyUsed(2)
    pool.plan([1, 2])
    pool.forget([2, 9])
    assert pool.plan([1, 2]).missing == [2]


def test_in_place_fetches_nothing() -> None:
    plan = InPlace().plan([4, 2, 4])
    assert plan.slots == [4, 2, 4]
    assert plan.missing == plan.into == []
    InPlace().forget([4])
