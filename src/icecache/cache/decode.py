"""One sparse step of a layer: compiled where it can be, its twin elsewhere."""

from typing import NamedTuple

from torch import Tensor

from icecache.attention.attend import SparseStep, attend_sparse
from icecache.attention.native import attend_native, can_attend
from icecache.cache.context import Context
from icecache.config import IceCacheConfig
from icecache.ops.dispatch import ops_for

__all__ = ["Attended", "attend_step", "inspect_step"]


class Attended(NamedTuple):
    """What a step gives.

    Attributes
    ----------
    out : shape [rows, heads, head_dim], float32
    num_attended : shape [rows]. Tokens attended exactly.
    num_scored : leaves (or tokens, without summaries) scored, over all rows.
    """

    out: Tensor
    num_attended: Tensor
    num_scored: int


def attend_step(
    context: Context,
    config: IceCacheConfig,
    backend: str,
    query: Tensor,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Attended:
    """Attend one query token per head; query: [batch, num_q_heads, 1, head_dim]."""
    indexed = context.indexed
    assert indexed is not None
    grouped, sinks = _group(query, sink_logits, indexed.table.num_rows)
    if backend == "native" and can_attend(config, grouped.shape[1], indexed.pool.dtype):
        out, num_attended = attend_native(
            grouped, context.spans(), indexed.table, indexed.pool, config, scaling, softcap, sinks
        )
        return Attended(out, num_attended, sum(indexed.table.num_leaves))
    step = inspect_step(context, config, backend, query, scaling, softcap, sink_logits)
    return Attended(step.out, step.num_attended, step.num_scored)


def inspect_step(
    context: Context,
    config: IceCacheConfig,
    backend: str,
    query: Tensor,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> SparseStep:
    """Run the twin, which returns all that it did; arguments as in `attend_step`."""
    indexed = context.indexed
    assert indexed is not None
    grouped, sinks = _group(query, sink_logits, indexed.table.num_rows)
    return attend_sparse(
        grouped,
        context.fixed(),
        indexed.table,
        indexed.pool,
        indexed.residency,
        config,
        ops_for(backend),
        scaling,
        softcap,
        sinks,
    )


def _group(query: Tensor, sink_logits: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
    """Put the query heads of a KV head in one row: [rows, heads, head_dim], [rows, heads]."""
    grouped = query.reshape(rows, -1, query.shape[3]).float().contiguous()
    if sink_logits is None:
        return grouped, None
    sinks = sink_logits.view(1, -1).expand(query.shape[0], -1)
    return grouped, sinks.reshape(rows, -1)
