"""Random conversations against a plain model: nothing lost, nothing doubled, nothing mixed up."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from icecache import IceCacheLayer, Phase
from icecache.cache.device.layer import DeviceLayer
from tests.device_truth import Before, slow_device_step
from tests.helpers import (
    FAST_BACKENDS,
    HAS_NATIVE,
    PlainRows,
    assert_full,
    largest_error,
    left_padded,
    make_query,
    make_tokens,
    poison,
    selected_by_leaves,
    slow_sparse,
    small_layer,
)
from tests.trees import assert_true_summaries

Step = tuple[str, int]

HEADS = 4
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["append", "append one", "append ragged", "attend", "attend one", "crop", "reorder"]
        ),
        st.integers(0, 1 << 16),
    ),
    min_size=4,
    max_size=22,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "tree": {},
    "no sink, no remainder": {"sink": 0, "window": 1, "remainder": False, "budget": 12},
    "pages": {"unit": "page", "page_size": 5},
    "exact": {"selection": "exact"},
    "paper": {"selection": "paper", "unit": "page"},
    "a leaf a page": {"page_size": 4},
    "leaves of one": {"leaf_size": 1, "leaf_target": 1, "page_size": 1},
}
DEVICE_VARIANTS: dict[str, dict[str, Any]] = {
    "offloaded": {"offload": "host"},
    "on the device": {"offload": "none"},
    "few slots": {"offload": "host", "device_slots": 10, "budget": 20},
    "no sink, no remainder": {"sink": 0, "window": 1, "remainder": False, "budget": 12},
    "small room": {"max_context": 30, "leaf_size": 2, "leaf_target": 2},
    "whole pages": {"unit": "page"},
}
# more than a draft has been attended, and then as much as a draft is to be taken back
PAST_A_DRAFT = [("append", 18), ("append", 7), ("attend", 8), ("crop", 3)]
# leaves of one or two tokens: a row of a few hundred has levels, and inserts raise their tops
DEEP: dict[str, Any] = {
    "leaf_size": 2,
    "leaf_target": 1,
    "page_size": 5,
    "crossover": 0,
    "field_of_view": 6,
}


@dataclass
class Conversation:
    """A layer, the tokens it was given, and how many of them may still be taken back."""

    layer: IceCacheLayer
    rows: PlainRows
    latest: int
    may_crop: int
    seeds: int = 0
    is_deep: bool = False
    done: list[str] = field(default_factory=list)

    def seed(self) -> int:
        """Return a new seed."""
        self.seeds += 10
        return self.seeds

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return len(self.rows.lens)


def _append(talk: Conversation, num: int, lens: list[int]) -> None:
    tokens = make_tokens(talk.seed(), talk.batch, num)
    mask = left_padded(lens, num)
    talk.layer.append(*tokens, mask)
    talk.rows.append(tokens, mask)
    talk.latest = num
    kept = min(lens) if num > 1 else 0
    # what is longer than a draft may have left the window as soon as it has been attended
    config = talk.layer.config
    talk.may_crop = kept if num <= config.draft else min(kept, config.window)


def _attend_one(talk: Conversation) -> None:
    layer, query = talk.layer, make_query(talk.seed(), talk.batch, HEADS)
    if isinstance(layer, DeviceLayer):
        out = _attend_one_on_device(talk, layer, query)
    else:
        out = layer.attend(query)
    talk.may_crop = min(talk.may_crop, layer.config.window)
    for row, length in enumerate(talk.rows.lens):
        if length <= layer.config.budget:
            truth = talk.rows.attend(row, query[row])
            assert largest_error(out[row], truth) <= 1e-5, f"row {row} of {length} tokens"
    is_on_cpu = isinstance(layer, IceCacheLayer)
    if is_on_cpu and layer.phase is Phase.INDEXED and layer.config.selection == "tree":
        step = layer.inspect(query)
        selected = selected_by_leaves(layer, step.chosen)
        truth = slow_sparse(layer, talk.rows, query, selected, scaling=0.25)
        assert largest_error(out, truth) <= _tolerance(layer)
        assert int(step.num_attended.max()) <= layer.config.budget


def _attend_one_on_device(talk: Conversation, layer: DeviceLayer, query: Tensor) -> Tensor:
    if layer._held.fresh is not None:
        # as the step would do first
        layer._held.settle()
    before = Before.of(layer) if layer.phase is Phase.INDEXED else None
    out = layer.attend(query)
    if before is not None:
        truth, attended = slow_device_step(layer, before, talk.rows, query)
        assert largest_error(out, truth) <= 1e-4
        assert max(attended) <= layer.config.budget
    return out


def _tolerance(layer: IceCacheLayer) -> float:
    """Return how far a step may be from the twin of what `inspect` chose.

    The compiled step rounds otherwise than `inspect`: of two leaves of nearly equal worth it may
    take the other one. With a remainder that changes little; single steps are tested to 1e-5.
    """
    if layer.stats().backend != "native":
        return 1e-5
    return 1e-2 if layer.config.estimates_remainder else 1.0


def _reorder(talk: Conversation, number: int) -> None:
    size = 1 + number % 4
    order = [(number >> (3 * i)) % talk.batch for i in range(size)]
    talk.layer.reorder(torch.tensor(order))
    talk.rows.reorder(order)


def _take(talk: Conversation, name: str, number: int) -> None:
    if name == "append":
        num = 2 + number % 20
        _append(talk, num, [num] * talk.batch)
    elif name == "extend":
        num = 100 + number % 300
        _append(talk, num, [num] * talk.batch)
    elif name == "append one":
        for _ in range(1 + number % 3):
            _append(talk, 1, [1] * talk.batch)
    elif name == "append ragged":
        num = 1 + number % 9
        lens = [(number >> (2 * i)) % (num + 1) for i in range(talk.batch)]
        _append(talk, num, lens)
    elif name == "attend":
        queries = min(talk.latest, 1 + number % 12)
        if queries > 1:
            assert_full(talk.layer, talk.rows, make_query(talk.seed(), talk.batch, HEADS, queries))
    elif name == "attend one":
        _attend_one(talk)
    elif name == "crop":
        num = min(number % 9, talk.may_crop, min(talk.rows.lens) - 1)
        talk.layer.crop(num)
        talk.rows.crop(num)
        talk.may_crop -= num
        talk.latest = max(0, talk.latest - num)
    else:
        _reorder(talk, number)


def _check(talk: Conversation) -> None:
    layer = talk.layer
    layer.check_integrity()
    poison(layer)
    assert layer.row_lens == talk.rows.lens
    stats = layer.stats()
    assert stats.tokens == max(talk.rows.lens)
    assert stats.full_cache_bytes == sum(talk.rows.lens) * 2 * 2 * 16 * 4
    if isinstance(layer, DeviceLayer):
        return
    if talk.is_deep and layer._context.indexed is not None:
        assert_true_summaries(layer._context.indexed)
    if layer.phase is Phase.INDEXED:
        assert max(layer._context.tail.lens) >= 0
        assert stats.pages == layer._context.indexed.pool.num_pages


def _converse(
    trace: list[Step], first: int, is_deep: bool = False, **variant: Any
) -> IceCacheLayer:
    layer = small_layer(**variant)
    lens = [1 + first % 50, 1 + first % 7, 1 + first % 23][: 1 + first % 3]
    if is_deep:
        lens = [150 + first % 300, 1 + first % 200, 1 + first % 23][: 1 + first % 3]
    prompt, mask = make_tokens(first, len(lens), max(lens)), left_padded(lens)
    layer.prefill(*prompt, mask)
    talk = Conversation(layer, PlainRows.of(prompt, mask), max(lens), 0, first, is_deep)
    _check(talk)
    for name, number in trace:
        talk.done.append(name)
        _take(talk, name, number)
        _check(talk)
    _append(talk, 3, [3] * talk.batch)
    assert_full(layer, talk.rows, make_query(talk.seed(), talk.batch, HEADS, 3))
    return layer


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(trace=STEPS, first=st.integers(0, 1 << 12))
def test_random_conversations(trace: list[Step], first: int, backend: str) -> None:
    _converse(trace, first, backend=backend)


@pytest.mark.parametrize("variant", DEVICE_VARIANTS)
@settings(derandomize=True, deadline=None, max_examples=8)
@example(trace=PAST_A_DRAFT, first=6)
@given(trace=STEPS, first=st.integers(0, 1 << 12))
def test_random_conversations_on_a_device(trace: list[Step], first: int, variant: str) -> None:
    _converse(trace, first, backend="twin", **DEVICE_VARIANTS[variant])


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "tree"])
@settings(derandomize=True, deadline=None, max_examples=25)
@example(trace=PAST_A_DRAFT, first=6)
@given(trace=STEPS, first=st.integers(0, 1 << 12))
def test_random_conversations_of_variants(trace: list[Step], first: int, variant: str) -> None:
    _converse(trace, first, **VARIANTS[variant])


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_random_conversations_of_deep_trees(backend: str) -> None:
    """Chunks become subtrees, inserts split nodes, beams share pages until one of them writes."""
    heights = []
    names = ["append", "append one", "append ragged", "attend one", "crop", "reorder", "extend"]
    steps = st.tuples(st.sampled_from(names), st.integers(0, 1 << 16))

    # the twin takes some milliseconds for every insert
    @settings(derandomize=True, deadline=None, max_examples=14 if backend == "native" else 4)
    @given(trace=st.lists(steps, min_size=3, max_size=10), first=st.integers(0, 1 << 12))
    def converse(trace: list[Step], first: int) -> None:
        layer = _converse(trace, first, is_deep=True, backend=backend, **DEEP)
        tree = layer._context.indexed.tree
        heights.append(max(tree.top(row) for row in range(tree.num_rows)))

    converse()
    assert max(heights) >= 2


@pytest.mark.skipif(not HAS_NATIVE, reason="the compiled ops are not installed")
@pytest.mark.parametrize("remainder", [True, False])
def test_a_long_conversation_of_beams(remainder: bool) -> None:
    """Levels are raised by inserts alone while rows part, one shared page after the other."""
    trace = [("extend", 50), ("attend one", 0), ("reorder", 0b001001)]
    for step in range(7):
        trace += [("extend", step), ("append one", 2), ("attend one", 0), ("crop", step)]
        trace += [("reorder", (0b000001, 0b001010, 0b000101)[step % 3] * 4 + 1)]
    layer = _converse(trace, 0, is_deep=True, backend="native", remainder=remainder, **DEEP)
    tree = layer._context.indexed.tree
    assert tree.top(0) >= 2 and layer.stats().inserted > 300
