"""layer_reuse: layers in a row share the selection of their first."""

from typing import Any

import pytest
import torch
from zoo import SMALL, build, family, greedy

import icecache
from icecache.cache.layer import IceCacheLayer


@pytest.mark.parametrize(
    ("name", "reuse", "leaders"),
    [("llama", 3, [0, 0, 0, 3]), ("llama", 1, [0, 1, 2, 3]), ("gemma3", 2, [1, 1])],
)
def test_layers_attend_to_their_leaders_selection(
    name: str, reuse: int, leaders: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family(name))
    ids = torch.randint(3, 128, (2, 60))
    given: list[tuple[IceCacheLayer, torch.Tensor | None]] = []
    attend, step = IceCacheLayer.attend, IceCacheLayer.step

    def spy(layer: IceCacheLayer, query: torch.Tensor, **options: Any) -> torch.Tensor:
        if query.shape[2] == 1 and "positions" in options:
            given.append((layer, options["positions"]))
        return attend(layer, query, **options)

    def spy_on_step(layer: IceCacheLayer, *token: torch.Tensor, **options: Any) -> torch.Tensor:
        # a step chooses for itself
        given.append((layer, None))
        return step(layer, *token, **options)

    monkeypatch.setattr(IceCacheLayer, "attend", spy)
    monkeypatch.setattr(IceCacheLayer, "step", spy_on_step)
    with icecache.attach(model, **SMALL, layer_reuse=reuse, native=False) as attachment:
        greedy(model, ids, steps=4)
        managed = attachment.cache.managed
        stats = attachment.cache.stats()
    numbers = sorted(managed)
    core = {i: managed[i].core for i in numbers}
    # the last step: what each layer was given is what its leader selected in it
    for (layer, positions), number, leader in zip(given[-len(numbers) :], numbers, leaders):
        assert layer is core[number]
        if number == leader:
            assert positions is None
            assert (layer.selection is None) == (reuse == 1)
        else:
            assert positions is core[leader].selection
            assert positions is not None and int((positions >= 0).sum()) > 0
    steps = {layer.sparse_steps for layer in stats.layers.values()}
    assert len(steps) == 1 and steps != {0}
    followers = sum(number != leader for number, leader in zip(numbers, leaders))
    assert stats.reused_steps == followers * steps.pop()


def test_a_budget_beyond_the_context_is_exact() -> None:
    model = build(family("llama"))
    ids = torch.randint(3, 128, (1, 50))
    full = greedy(model, ids, steps=6)
    with icecache.attach(model, **{**SMALL, "budget": 64}, layer_reuse=4) as attachment:
        ours = greedy(model, ids, steps=6)
        assert attachment.cache.stats().reused_steps == 0
    assert torch.equal(ours.ids, full.ids)
    torch.testing.assert_close(ours.logits, full.logits, rtol=1e-4, atol=1e-5)
