"""One sparse step of a layer: compiled where it can be, its twin elsewhere."""

from typing import NamedTuple

import torch
from torch import Tensor

from icecache.attention.ask import Ask
from icecache.attention.attend import SparseStep, Stored, attend_sparse
from icecache.attention.native import (
    attend_native,
    attend_spans,
    can_attend,
    can_attend_spans,
    search_native,
)
from icecache.cache.check import check_finite_output
from icecache.cache.context import Context
from icecache.cache.stats import Counters
from icecache.config import IceCacheConfig
from icecache.ops.dispatch import ops_for

__all__ = ["Attended", "SearchResult", "attend_one", "inspect_step", "search_step"]


class SearchResult(NamedTuple):
    """What a step would select.

    Attributes
    ----------
    positions : shape [rows, most], int32
        Positions in the context of the selected tokens of each row (batch x KV heads), sink and
        window not among them; -1 behind the last.
    nodes_scored, leaves_scored : int
        Work done, over all rows.
    """

    positions: Tensor
    nodes_scored: int
    leaves_scored: int


class Attended(NamedTuple):
    """What a step gave.

    Attributes
    ----------
    out : shape [rows, heads, head_dim], float32
    positions : shape [rows, most], int32, optional
        As in `SearchResult`, where layers reuse selections.
    """

    out: Tensor
    positions: Tensor | None


def attend_one(
    context: Context, config: IceCacheConfig, backend: str, ask: Ask, counters: Counters
) -> Attended | None:
    """Attend one query token per head.

    None of a context without an index where the compiled step cannot attend to all of it.
    """
    if context.indexed is None:
        if backend != "native" or not can_attend_spans(ask.query, context.tail.dtype):
            return None
        step = Attended(attend_spans(ask, context.whole(), config), None)
        counters.count_dense(max(context.row_lens))
    else:
        step = _attend_sparse(context, config, backend, ask, counters)
    check_finite_output(step.out)
    return step


def _attend_sparse(
    context: Context, config: IceCacheConfig, backend: str, ask: Ask, counters: Counters
) -> Attended:
    stored = _stored(context)
    counters.reused_steps += ask.positions is not None
    if backend == "native" and can_attend(config, ask.query, stored.pool.dtype):
        step = attend_native(ask, context.spans(), stored, config)
        counters.count_sparse(step.nodes_scored, step.leaves_scored, step.num_attended)
        assert step.out is not None
        return Attended(step.out, step.positions if ask.positions is None else ask.positions)
    twin = inspect_step(context, config, backend, ask)
    counters.count_sparse(twin.nodes_scored, twin.leaves_scored, twin.num_attended)
    if config.layer_reuse == 1:
        return Attended(twin.out, None)
    chosen = _positions_of(twin.chosen, context, config)
    return Attended(twin.out, chosen if ask.positions is None else ask.positions)


def search_step(context: Context, config: IceCacheConfig, backend: str, ask: Ask) -> SearchResult:
    """Search only; the twin attends on top."""
    stored = _stored(context)
    if backend == "native" and can_attend(config, ask.query, stored.pool.dtype):
        found = search_native(ask, context.spans(), stored, config)
        assert found.positions is not None
        return SearchResult(found.positions, found.nodes_scored, found.leaves_scored)
    twin = inspect_step(context, config, backend, ask)
    positions = _positions_of(twin.chosen, context, config)
    return SearchResult(positions, twin.nodes_scored, twin.leaves_scored)


def inspect_step(context: Context, config: IceCacheConfig, backend: str, ask: Ask) -> SparseStep:
    """Run the twin, which returns all that it did."""
    return attend_sparse(ask, context.fixed(), _stored(context), config, ops_for(backend))


def _stored(context: Context) -> Stored:
    indexed = context.indexed
    assert indexed is not None
    return Stored(indexed.tree, indexed.pool, indexed.pages, indexed.residency)


def _positions_of(chosen: Tensor, context: Context, config: IceCacheConfig) -> Tensor:
    assert context.indexed is not None
    tokens, real = context.indexed.tokens()
    # the tree chooses leaves, the two other selections tokens
    taken = chosen[..., None] & real if config.selection == "tree" else chosen.view(real.shape)
    found = [context.indexed.pool.positions_of(t[mask]) for t, mask in zip(tokens, taken)]
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1).int()
