"""What the tests of the evaluation share."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from icecache.evaluation.engine.attend import Rule, Selection
from icecache.evaluation.engine.attention import evaluation_attention
from icecache.evaluation.engine.cache import Policy
from icecache.evaluation.engine.decode import (
    Forced,
    Limits,
    Reference,
    Row,
    answer_reference,
    force,
)
from icecache.evaluation.engine.prefill import Prefill, run_prefill
from icecache.evaluation.engine.tokens import PromptTokens, Tokens
from icecache.evaluation.methods.base import Method, SelectionMethod
from icecache.evaluation.methods.full import Full

__all__ = [
    "RULE",
    "chosen",
    "forced_answer",
    "full_answer",
    "grow",
    "make_tokens",
    "query",
    "started",
    "steps",
]

HEADS, QUERIES, DIM = 2, 3, 16
RULE = Rule(DIM**-0.5)


def make_tokens(num_tokens: int, seed: int = 0, num_queries: int = 40) -> Tokens:
    """Return random prompt tokens of two KV heads with three query heads each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, DIM, generator=generator)

    keys, values = 2 * draw(HEADS, num_tokens), draw(HEADS, num_tokens)
    return Tokens(PromptTokens(keys, values, draw(HEADS, QUERIES, num_queries), RULE.scaling))


def grow(tokens: Tokens, count: int, seed: int = 1) -> Tokens:
    """Append random tokens."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        pair = torch.randn(2, HEADS, 1, DIM, generator=generator)
        tokens.append(2 * pair[0], pair[1])
    return tokens


def query(seed: int = 2) -> Tensor:
    """Return a query of all heads."""
    return torch.randn(HEADS, QUERIES, DIM, generator=torch.Generator().manual_seed(seed))


def started(method: SelectionMethod, tokens: Tokens, budget: int) -> Policy:
    """Return the method's first policy, having seen the prompt."""
    policy = method.policies(budget, 1)[0]
    policy.start(tokens)
    return policy


def chosen(selection: Selection | None, head: int = 0) -> list[int]:
    """Return the positions that a KV head attends, sorted."""
    assert selection is not None
    positions = selection.positions[head]
    if selection.valid is not None:
        positions = positions[selection.valid[head]]
    return sorted(positions.tolist())


def steps(count: int, longest: int | None = None) -> Limits:
    """Return limits of `count` forced steps and an answer of `longest` tokens."""
    return Limits(count, count if longest is None else longest, lambda token_ids: False)


def full_answer(
    model: PreTrainedModel, ids: list[int], limits: Limits
) -> tuple[Prefill, Reference]:
    """Return the prefill and the full cache's answer."""
    with evaluation_attention(model):
        prefill = run_prefill(model, ids)
        cache = Full().open(model, prefill, 0).cache
        return prefill, answer_reference(model, prefill, cache, limits)


def forced_answer(
    model: PreTrainedModel, prefill: Prefill, reference: Reference, method: Method, budget: int
) -> Forced:
    """Force the reference's tokens through another method."""
    with torch.inference_mode(), evaluation_attention(model):
        run = method.open(model, prefill, budget)
        (forced,) = force(model, reference, [Row(run.cache, run.num_attended)])
        run.close()
    return forced
