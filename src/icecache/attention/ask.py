"""What one step is asked: the query and how the model scales it."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Ask"]


class Ask(NamedTuple):
    """A query of one token.

    Attributes
    ----------
    query : shape [rows, heads, head_dim], float32, contiguous. The query heads of each KV head.
    scaling : float. Of the logits.
    softcap : float, optional. Logits become softcap * tanh(logits / softcap).
    sink_logits : shape [rows, heads], optional. Learned logits without a value.
    positions : shape [rows, most], integer, optional. Tokens to attend, not to choose; -1 behind.
    """

    query: Tensor
    scaling: float
    softcap: float | None
    sink_logits: Tensor | None
    positions: Tensor | None = None

    @classmethod
    def of_layer(
        cls,
        query: Tensor,
        num_kv_heads: int,
        scaling: float,
        softcap: float | None,
        sink_logits: Tensor | None,
        positions: Tensor | None = None,
    ) -> "Ask":
        """Put the query heads of a KV head in one row.

        query: shape [batch, num_q_heads, 1, head_dim]; sink_logits: shape [num_q_heads].
        """
        rows = query.shape[0] * num_kv_heads
        grouped = query.reshape(rows, -1, query.shape[3]).float().contiguous()
        if sink_logits is not None:
            sink_logits = sink_logits.view(1, -1).expand(query.shape[0], -1).reshape(rows, -1)
        return cls(grouped, scaling, softcap, sink_logits, positions)
