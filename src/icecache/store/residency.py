"""Wanted pages against resident ones: what a step must fetch, and what gives way.

Host pages are always complete, so a page gives way without being written back. `InPlace` is the
CPU's answer, where a step reads the host pool itself; `LeastRecentlyUsed` is the rule of a pool
of device slots, in plain ints.
"""

from collections import OrderedDict
from typing import NamedTuple, Protocol

from icecache.errors import PoolExhausted

__all__ = ["FetchPlan", "InPlace", "LeastRecentlyUsed", "Residency"]


class FetchPlan(NamedTuple):
    """How a step gets at its pages.

    Attributes
    ----------
    slots : the slot of each wanted page, in the order asked for.
    missing : pages to copy before the step, each once.
    into : the slot that each missing page is copied into.
    """

    slots: list[int]
    missing: list[int]
    into: list[int]


class Residency(Protocol):
    """Where wanted pages are, and which must be fetched."""

    def plan(self, wanted: list[int]) -> FetchPlan:
        """Return the plan for one step; its missing pages count as resident from then on."""

    def forget(self, pages: list[int]) -> None:
        """Take note that the host copies of pages have changed or are gone."""


class InPlace:
    """Every host page is its own slot; nothing is ever fetched."""

    def plan(self, wanted: list[int]) -> FetchPlan:
        """Return the wanted pages themselves."""
        return FetchPlan(list(wanted), [], [])

    def forget(self, pages: list[int]) -> None:
        """Do nothing: there is no second copy."""


class LeastRecentlyUsed:
    """A fixed number of slots; the page that was wanted longest ago gives way.

    Parameters
    ----------
    num_slots : int
        At least as many as one step wants.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._slot_of_page: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(num_slots - 1, -1, -1))

    def plan(self, wanted: list[int]) -> FetchPlan:
        """Return the plan for one step.

        Raises
        ------
        PoolExhausted
            If the step wants more pages than there are slots; nothing has changed then.
        """
        distinct = list(dict.fromkeys(wanted))
        if len(distinct) > self._num_slots:
            raise PoolExhausted(len(distinct), self._num_slots, self._num_slots)
        missing = [page for page in distinct if page not in self._slot_of_page]
        for page in distinct:
            if page in self._slot_of_page:
                self._slot_of_page.move_to_end(page)
        into = []
        for page in missing:
            if not self._free:
                _, slot = self._slot_of_page.popitem(last=False)
                self._free.append(slot)
            into.append(self._free.pop())
            self._slot_of_page[page] = into[-1]
        return FetchPlan([self._slot_of_page[page] for page in wanted], missing, into)

    def forget(self, pages: list[int]) -> None:
        """Free the slots of pages whose host copies have changed."""
        for page in pages:
            if page in self._slot_of_page:
                self._free.append(self._slot_of_page.pop(page))
