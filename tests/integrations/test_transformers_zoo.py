"""Tiny models of many families: exact while the context fits the budget, sparse beyond it."""

import warnings

import pytest
import torch
from zoo import SMALL, ZOO, Family, build, greedy, left_padded

import icecache
from icecache.integrations.transformers import Attachment

IDS, MASK = left_padded([47, 60])


@pytest.mark.parametrize("family", ZOO, ids=lambda family: family.name)
def test_logits_equal_the_full_cache(family: Family) -> None:
    model = build(family)
    assert len(icecache.supports(model).managed) == family.managed
    full = greedy(model, IDS, MASK)
    with _attach(family, model) as attachment:
        ours = greedy(model, IDS, MASK)
        stats = attachment.cache.stats()
    assert torch.equal(ours.ids, full.ids)
    assert (ours.logits - full.logits).abs().max() <= 1e-5
    assert stats.sparse_steps == 0
    assert len(stats.layers) == family.managed
    assert all(layer.dense_steps >= 10 for layer in stats.layers.values())


@pytest.mark.parametrize("family", [f for f in ZOO if f.managed], ids=lambda family: family.name)
def test_a_budget_below_the_context_is_kept_and_seen(family: Family) -> None:
    model = build(family)
    full = greedy(model, IDS, MASK)
    with icecache.attach(model, **SMALL) as attachment:
        ours = greedy(model, IDS, MASK)
        stats = attachment.cache.stats()
    # attention is so large a part of these models that the comparison above must fail on a fault
    assert (ours.logits[1] - full.logits[1]).abs().max() > 1e-2
    assert torch.isfinite(ours.logits).all()
    assert all(layer.sparse_steps >= 9 for layer in stats.layers.values())
    assert 12 < stats.tokens_attended <= 20
    # the prompt itself is always attended in full
    assert torch.allclose(ours.logits[0], full.logits[0], atol=1e-5) or family.name == "gemma4"


def _attach(family: Family, model: torch.nn.Module) -> Attachment:
    if family.managed:
        return icecache.attach(model)
    with pytest.warns(UserWarning, match="manages nothing"):
        attachment = icecache.attach(model)
    # the attachment has said it; the caches that generate makes do not say it again
    warnings.simplefilter("error", UserWarning)
    return attachment
