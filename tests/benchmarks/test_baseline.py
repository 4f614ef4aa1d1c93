"""The yardsticks against cases that can be checked by hand."""

import math

import pytest
import torch
from baseline import (
    attention_logits,
    full_attention,
    relative_errors,
    topk_attention,
    topk_mask,
)
from torch.nn.functional import scaled_dot_product_attention


def test_full_attention_is_sdpa() -> None:
    queries, keys, values = torch.randn(3, 8, 16), torch.randn(2, 40, 16), torch.randn(2, 40, 16)
    expected = scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys.repeat_interleave(4, 0)[None],
        values.repeat_interleave(4, 0)[None],
        scale=0.3,
    )[0].transpose(0, 1)
    torch.testing.assert_close(full_attention(queries, keys, values, 0.3), expected)


def one_head(logits: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """A query and keys of head_dim 1 whose logits are the given numbers."""
    return torch.ones(1, 1, 1), torch.tensor(logits)[None, :, None]


def test_topk_by_hand() -> None:
    # sink: token 0; window: token 5; of tokens 1-4 the best one is token 3
    queries, keys = one_head([0.0, 1.0, -2.0, 2.0, 0.5, 0.0])
    values = torch.tensor([10.0, 0.0, 0.0, 20.0, 0.0, 40.0])[None, :, None]
    out = topk_attention(queries, keys, values, 1.0, budget=3, sink=1, window=1)
    weight = math.exp(2.0)
    assert out.item() == pytest.approx((10 + weight * 20 + 40) / (2 + weight), rel=1e-6)


def test_sink_and_window_do_not_use_up_the_choice() -> None:
    queries, keys = one_head([9.0, 0.0, 1.0, 0.5, 9.0])
    mask = topk_mask(attention_logits(queries, keys, 1.0), budget=3, sink=1, window=1)
    assert mask[0, 0].tolist() == [True, False, True, False, True]


def test_query_heads_vote_by_their_softmax_shares() -> None:
    # head 0 is sure of token 1; head 1 has larger logits but spreads its share over 2, 3 and 4
    queries = torch.eye(2)[None]
    keys = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 9.0], [0.0, 9.0], [0.0, 9.0], [0.0, 0.0]])
    mask = topk_mask(attention_logits(queries, keys[None], 1.0), budget=3, sink=1, window=1)
    assert mask[0, 0].tolist() == [True, True, False, False, False, True]


@pytest.mark.parametrize("budget", [50, 51, 1000])
def test_topk_is_exact_when_the_budget_holds_everything(budget: int) -> None:
    queries, keys, values = torch.randn(3, 4, 16), torch.randn(2, 50, 16), torch.randn(2, 50, 16)
    out = topk_attention(queries, keys, values, 0.25, budget=budget, sink=4, window=8)
    torch.testing.assert_close(out, full_attention(queries, keys, values, 0.25))


def test_topk_attends_exactly_the_budget_in_every_head_and_step() -> None:
    logits = attention_logits(torch.randn(5, 6, 16), torch.randn(3, 90, 16), 0.25)
    mask = topk_mask(logits, budget=30, sink=4, window=8)
    assert (mask.sum(-1) == 30).all()
    assert mask[..., :4].all()
    assert mask[..., -8:].all()


def test_relative_errors() -> None:
    truth = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    output = torch.tensor([[[3.0, 3.0], [0.0, 2.0]]])
    assert relative_errors(output, truth).tolist() == [[pytest.approx(0.2), 0.0]]
