"""Distances of distributions, and what a probe sees of each layer."""

from typing import Any

import pytest
import torch

from icecache.evaluation.engine.attend import Selection, attend_selected
from icecache.evaluation.engine.attention import Call, evaluation_attention
from icecache.evaluation.engine.fidelity import LayerProbe, compare
from icecache.evaluation.engine.tokens import PromptTokens, Tokens
from icecache.evaluation.methods.full import Full
from icecache.evaluation.methods.icecache import IceCacheMethod
from icecache.evaluation.methods.snapkv import SnapKV
from icecache.evaluation.methods.streaming import Streaming
from tests.evaluation.small import ICE, IDS, RUNNABLE, small_method
from tests.evaluation.support import (
    RULE,
    full_answer,
    steps,
)
from tests.integrations.zoo import build, family


def test_kl_and_top1_of_known_distributions() -> None:
    full = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    other = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    found = compare(full, other)
    kl = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    assert found.kl == pytest.approx(float(kl) / 2, rel=1e-6)
    assert found.top1 == 0.5
    assert compare(full, full).kl == 0.0
    # not symmetric
    assert compare(other, full).kl != pytest.approx(found.kl, rel=1e-3)


def test_a_probe_measures_mass_and_error_of_what_was_attended() -> None:
    model = build(family("llama"))
    prefill, reference = full_answer(model, IDS, steps(3))
    method = Streaming(sink=4)
    with torch.inference_mode(), evaluation_attention(model):
        run = method.open(model, prefill, 20)
        probe = LayerProbe(prefill, run.attended)
        model(torch.tensor([[reference.tokens[0]]]), past_key_values=run.cache, probe=probe)
    # the same by hand, from the layer's own query over all 61 keys
    seen: list[Call] = []

    class Spy:
        def see(self, call: Call, output: torch.Tensor) -> None:
            seen.append(call)

    with torch.inference_mode(), evaluation_attention(model):
        cache = method.open(model, prefill, 20).cache
        model(torch.tensor([[reference.tokens[0]]]), past_key_values=cache, probe=Spy())
    call, prompt = seen[2], prefill.prompts[2]
    keys = torch.cat([prompt.keys, call.key[0]], 1).repeat_interleave(2, 0)
    values = torch.cat([prompt.values, call.value[0]], 1).repeat_interleave(2, 0)
    weights = (call.query[0] @ keys.transpose(1, 2) * call.rule.scaling).softmax(-1)
    kept = [*range(4), *range(45, 61)]
    assert probe.mass[2] == pytest.approx(float(weights[..., kept].sum(-1).mean()), rel=1e-5)
    part = weights[..., kept] / weights[..., kept].sum(-1, keepdim=True)
    full, found = weights @ values, part @ values[:, kept]
    error = (found - full).norm(dim=-1) / full.norm(dim=-1)
    assert probe.error[2] == pytest.approx(float(error.mean()), rel=1e-4)


def test_a_head_that_puts_nothing_out_has_no_error() -> None:
    model = build(family("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.zero_()
    prefill, reference = full_answer(model, IDS, steps(1))
    with torch.inference_mode(), evaluation_attention(model):
        run = Streaming(sink=4).open(model, prefill, 20)
        probe = LayerProbe(prefill, run.attended)
        model(torch.tensor([reference.tokens]), past_key_values=run.cache, probe=probe)
    assert probe.error == [0.0] * len(probe.error)


def test_a_probe_counts_no_position_for_minus_one() -> None:
    model = build(family("llama"))
    prefill, reference = full_answer(model, IDS, steps(1))
    masses = []
    for positions in ([[7, 9], [7, 9]], [[7, -1], [7, -1]], [[0, 7], [0, 7]]):
        attended = torch.tensor(positions)
        probe = LayerProbe(prefill, lambda layer, call, attended=attended: attended)
        with torch.inference_mode(), evaluation_attention(model):
            cache = Full().open(model, prefill, 0).cache
            model(torch.tensor([reference.tokens]), past_key_values=cache, probe=probe)
        masses.append(probe.mass[0])
    assert masses[1] < masses[0]
    assert masses[1] < masses[2]


@pytest.mark.parametrize(
    "settings", [{}, {"selection": "exact"}, {"unit": "page"}, {"layer_reuse": 2}]
)
def test_the_positions_of_icecache_are_those_it_attended(settings: dict[str, Any]) -> None:
    model = build(family("llama"))
    prefill, reference = full_answer(model, IDS, steps(3))
    tokens = {index: Tokens(prompt) for index, prompt in prefill.prompts.items()}
    method = IceCacheMethod({**ICE, "remainder": False, **settings})

    class Spy:
        def see(self, call: Call, output: torch.Tensor) -> None:
            layer = call.module.layer_idx
            tokens[layer].append(call.key[0], call.value[0])
            positions = run.attended(layer, call)
            chosen = Selection(positions.long().clamp(min=0), positions >= 0)
            query = call.query[0].view(2, -1, 16)
            expected = attend_selected(query, tokens[layer], chosen, call.rule)
            torch.testing.assert_close(output.view(expected.shape), expected)

    with torch.inference_mode(), evaluation_attention(model):
        run = method.open(model, prefill, 24)
        for token in reference.tokens:
            model(torch.tensor([[token]]), past_key_values=run.cache, probe=Spy())
        run.close()


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_probe_sees_every_layer_of_every_method(name: str) -> None:
    model = build(family("gemma3"))
    prefill, reference = full_answer(model, IDS, steps(2))
    with torch.inference_mode(), evaluation_attention(model):
        run = small_method(name).open(model, prefill, 20)
        probe = LayerProbe(prefill, run.attended)
        for token in reference.tokens:
            model(torch.tensor([[token]]), past_key_values=run.cache, probe=probe)
        run.close()
    assert len(probe.mass) == len(probe.error) == 2
    if name == "full":
        assert probe.mass == pytest.approx([1.0, 1.0])
        assert probe.error == pytest.approx([0.0, 0.0], abs=1e-6)
    else:
        assert all(0.0 < mass < 0.999 for mass in probe.mass)
        assert all(error > 1e-4 for error in probe.error)


def test_topk_holds_the_most_mass_of_all_that_choose_as_many_tokens() -> None:
    model = build(family("llama"))
    prefill, reference = full_answer(model, IDS, steps(4))
    masses = {}
    for name in ("topk", "streaming", "snapkv", "pqcache", "omnikv"):
        with torch.inference_mode(), evaluation_attention(model):
            run = small_method(name).open(model, prefill, 20)
            probe = LayerProbe(prefill, run.attended)
            model(torch.tensor([[reference.tokens[0]]]), past_key_values=run.cache, probe=probe)
        # the first layer's query is the same for all
        masses[name] = probe.mass[0]
    assert max(masses, key=lambda name: masses[name]) == "topk"


def test_snapkv_observes_what_the_model_asked() -> None:
    model = build(family("llama"))
    prefill, _ = full_answer(model, IDS, steps(1))
    queries = []

    def note(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        queries.append(output)

    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(note)
    with torch.inference_mode():
        model(torch.tensor([IDS]))
    hook.remove()
    # before the rotary embedding norms are the same as behind it
    expected = queries[0].view(60, 4, 16).transpose(0, 1)[:, -60:].norm(dim=-1)
    found = prefill.prompts[0].queries.flatten(0, 1).norm(dim=-1)
    torch.testing.assert_close(found, expected)
    policy = SnapKV(window=8).policies(20, 4)[0]
    policy.start(Tokens(prefill.prompts[0]))
    assert isinstance(prefill.prompts[0], PromptTokens)
    assert RULE.scaling == prefill.prompts[0].scaling
