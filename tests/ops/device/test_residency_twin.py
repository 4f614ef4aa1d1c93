"""The device's residency against the plain ints of the store, after any trace."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icecache.ops.device import twin
from icecache.ops.device.testing import CaseShape, random_case
from icecache.store.residency import LeastRecentlyUsed

PAGES, MOST = 12, 4
# steps from which a trace passes 31 bits: of what slots are stamped with, and of the steps
STARTS = (0, (1 << 31) // (2 * MOST) - 8, (1 << 31) - 8)
WANTED = st.lists(st.integers(0, PAGES - 1), unique=True, max_size=MOST)


@settings(max_examples=60, deadline=None)
@given(
    num_slots=st.integers(MOST, 9),
    trace=st.lists(st.tuples(WANTED, WANTED), min_size=1, max_size=25),
    pace=st.integers(1, 3),
    start=st.sampled_from(STARTS),
)
def test_slots_and_missing_pages_are_those_of_the_plain_rule(num_slots, trace, pace, start):
    shape = CaseShape(kv_heads=2, head_dim=2, pages=PAGES, slots=num_slots)
    pages = random_case(shape).pages
    rows = [LeastRecentlyUsed(num_slots) for _ in range(2)]
    for number, step in enumerate(trace):
        selected = torch.full((2, MOST), -1, dtype=torch.int32)
        for row, wanted in enumerate(step):
            selected[row, : len(wanted)] = torch.tensor(wanted, dtype=torch.int32)
        counter = torch.tensor([start + pace * number], dtype=torch.int64)
        slots, missing = twin.resolve(selected, pages, counter)
        twin.gather(pages, slots, missing)
        for row, wanted in enumerate(step):
            plan = rows[row].plan(wanted)
            assert slots[row].tolist() == plan.slots + [-1] * (MOST - len(wanted))
            fetched = [
                (page, slot) for page, slot in zip(missing[row].tolist(), slots[row].tolist())
            ]
            assert [pair for pair in fetched if pair[0] >= 0] == list(zip(plan.missing, plan.into))
            resident, host = pages.resident[row, plan.slots], pages.host[row, wanted]
            assert torch.equal(resident.nan_to_num(7.0), host.nan_to_num(7.0))
