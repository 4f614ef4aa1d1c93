"""dense_until: exact beyond the budget, then one layer after the other becomes sparse."""

import torch
from zoo import SMALL, build, family, greedy

import icecache
from icecache.cache.stats import Phase


def test_exact_up_to_there_and_one_layer_a_step_from_there() -> None:
    model = build(family("llama"))
    ids = torch.randint(3, 128, (2, 50), generator=torch.Generator().manual_seed(0))
    full = greedy(model, ids, steps=10)
    with icecache.attach(model, **SMALL, dense_until=60) as attachment:
        ours = greedy(model, ids, steps=10)
        assert torch.equal(ours.ids, full.ids)
        torch.testing.assert_close(ours.logits, full.logits, rtol=1e-4, atol=1e-5)
        cache = attachment.cache
        assert cache.stats().sparse_steps == 0
        indexed = []
        token = ours.ids[:, -1:]
        for _ in range(9):
            with torch.no_grad():
                model(input_ids=token, past_key_values=cache)
            phases = [layer.phase for layer in cache.stats().layers.values()]
            indexed.append(phases.count(Phase.INDEXED))
    assert indexed == [0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_longer_prompt_is_indexed_at_once() -> None:
    model = build(family("llama"))
    ids = torch.randint(3, 128, (1, 100), generator=torch.Generator().manual_seed(0))
    with icecache.attach(model, **SMALL, dense_until=60) as attachment:
        greedy(model, ids, steps=3)
        phases = {layer.phase for layer in attachment.cache.stats().layers.values()}
        assert phases == {Phase.INDEXED}
    # a budget beyond it leaves it without effect
    settings = {**SMALL, "budget": 64}
    with icecache.attach(model, **settings, dense_until=60) as attachment:
        greedy(model, ids[:, :58], steps=8)
        phases = [layer.phase for layer in attachment.cache.stats().layers.values()]
        assert phases == [Phase.INDEXED] * 4
