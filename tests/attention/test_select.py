"""The vote and the budget, by hand and against a slow twin."""

import math

import pytest
import torch
from torch import Tensor

from icecache.attention.select import (
    choose_best_tokens,
    choose_leaves,
    choose_pages_of_best_tokens,
)
from icecache.ops import batched, reference
from icecache.tree.search import LeafScores
from tests.helpers import rng

NO_FIXED = -math.inf


def _scores(weights: list[list[float]], beside: float = NO_FIXED) -> LeafScores:
    """Return one row's scores from each head's weights; log 0 is no leaf."""
    logits = torch.tensor([weights]).log()
    return _found(logits, torch.zeros_like(logits), torch.full(logits.shape[:2], beside))


def _found(logits: Tensor, correction: Tensor, beside: Tensor) -> LeafScores:
    return LeafScores(logits, correction, beside, None, 0, logits.shape[0] * logits.shape[2])


def _leaves(scores: LeafScores, sizes: list[int], room: int, remainder: bool = False) -> list[int]:
    count = torch.tensor([sizes])
    choice = choose_leaves(scores, count, None, room, remainder, batched.choose_within)
    return choice.chosen[0].nonzero()[:, 0].tolist()


def test_heads_vote_by_their_shares_not_by_their_logits() -> None:
    """A head with huge logits has one vote; two heads that agree outvote it."""
    scores = _scores([[1e6, 1.0, 1.0], [1.0, 8.0, 1.0], [1.0, 8.0, 1.0]])
    assert _leaves(scores, [1, 1, 1], room=1) == [1]


def test_a_leaf_is_worth_its_share_per_token() -> None:
    scores = _scores([[6.0, 5.0, 4.0]])
    assert _leaves(scores, [6, 2, 2], room=6) == [1, 2]
    assert _leaves(scores, [6, 6, 6], room=6) == [0]


def test_what_does_not_fit_is_passed_over() -> None:
    scores = _scores([[9.0, 8.0, 1.0]])
    assert _leaves(scores, [3, 3, 2], room=5) == [0, 2]


def test_a_place_without_a_leaf_is_never_chosen() -> None:
    scores = _scores([[5.0, 0.0, 1.0]])
    assert _leaves(scores, [2, 0, 2], room=100) == [0, 2]


def test_with_a_remainder_a_leaf_of_equal_keys_is_worth_nothing() -> None:
    """It is estimated without error; the room goes to the one that is not."""
    scores = _scores([[9.0, 1.0]])._replace(correction=torch.tensor([[[0.0, 0.5]]]))
    assert _leaves(scores, [2, 2], room=2, remainder=True) == [1]
    assert _leaves(scores, [2, 2], room=2, remainder=False) == [0]


def test_shares_are_of_everything_that_is_attended() -> None:
    scores = _scores([[1.0, 3.0]], beside=math.log(4.0))
    choice = choose_leaves(scores, torch.tensor([[1, 1]]), None, 2, False, batched.choose_within)
    torch.testing.assert_close(choice.share, torch.tensor([[[0.125, 0.375]]]))


def test_pages_are_chosen_whole_and_paid_in_full() -> None:
    scores = _scores([[9.0, 1.0, 6.0, 1.0]])
    count, page = torch.tensor([[2, 4, 2, 1]]), torch.tensor([[7, 7, 9, 9]])
    for room, expected in ((9, [0, 1, 2, 3]), (6, [2, 3]), (3, [2, 3]), (2, [])):
        choice = choose_leaves(scores, count, page, room, False, batched.choose_within)
        assert choice.chosen[0].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("remainder", [False, True])
def test_choose_leaves_equals_its_slow_twin(remainder: bool) -> None:
    for seed in range(10):
        generator = rng(seed)
        count = torch.randint(0, 9, (3, 50), generator=generator)
        logits = 3 * torch.randn(3, 5, 50, generator=generator)
        logits = logits.masked_fill(count[:, None] == 0, -math.inf)
        correction = 2 * torch.rand(3, 5, 50, generator=generator)
        fixed = torch.randn(3, 5, generator=generator)
        scores = _found(logits, correction, fixed)
        choice = choose_leaves(scores, count, None, 61, remainder, batched.choose_within)
        worth = torch.zeros(3, 50)
        for row in range(3):
            for head in range(5):
                weight = (logits[row, head] + correction[row, head]).exp()
                share = weight / (weight.sum() + fixed[row, head].exp())
                worth[row] += share * correction[row, head].sqrt() if remainder else share
        worth = (worth / count.clamp(min=1)).masked_fill(count == 0, -1.0)
        expected = reference.choose_within(worth, count, 61)
        assert torch.equal(choice.chosen, expected)


def test_best_tokens_are_the_top_of_the_summed_shares() -> None:
    scores = _scores([[1.0, 2.0, 4.0, 0.0, 1.0], [5.0, 2.0, 0.5, 0.0, 0.5]])
    chosen = choose_best_tokens(scores, 2).chosen
    assert chosen[0].nonzero()[:, 0].tolist() == [0, 2]
    everything = choose_best_tokens(scores, 50).chosen
    assert everything[0].tolist() == [True, True, True, False, True]


def test_the_papers_heads_take_turns() -> None:
    """Each head names its best page in turn; a page named twice counts once."""
    scores = _scores([[9.0, 8.0, 7.0, 1.0, 1.0], [1.0, 1.0, 1.0, 7.0, 9.0]])
    page = torch.tensor([[0, 1, 2, 3, 4]])
    for num_pages, expected in ((1, [0]), (2, [0, 4]), (3, [0, 1, 4]), (4, [0, 1, 3, 4])):
        chosen = choose_pages_of_best_tokens(scores, page, num_pages).chosen
        assert chosen[0].nonzero()[:, 0].tolist() == expected


def test_the_papers_pages_are_ranked_by_their_best_token() -> None:
    scores = _scores([[9.0, 0.1, 5.0, 5.0, 5.0, 0.0]])
    page = torch.tensor([[3, 3, 8, 8, 8, 0]])
    chosen = choose_pages_of_best_tokens(scores, page, 1).chosen
    assert chosen[0].nonzero()[:, 0].tolist() == [0, 1]
