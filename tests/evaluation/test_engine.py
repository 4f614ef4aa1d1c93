"""Prefill, policies inside a model, forced and free answers."""

import copy
from itertools import product

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from icecache.errors import UnsupportedModel
from icecache.evaluation.engine.attend import Rule, Selection, attend_all, attend_selected
from icecache.evaluation.engine.attention import NAME, evaluation_attention
from icecache.evaluation.engine.decode import Limits, Row, answer_freely, force
from icecache.evaluation.methods.full import Full
from icecache.evaluation.methods.icecache import IceCacheMethod, IceCacheReuse
from icecache.evaluation.methods.topk import TopK
from icecache.integrations.transformers import IceCache, attach
from tests.evaluation.small import ICE, IDS, RUNNABLE, small_method
from tests.evaluation.support import (
    RULE,
    forced_answer,
    full_answer,
    grow,
    make_tokens,
    query,
    steps,
)
from tests.integrations.zoo import SMALL, ZOO, Family, build, family


def test_tokens_of_prompt_and_tail_are_one_sequence() -> None:
    tokens = grow(make_tokens(50), 70)
    keys = tokens.keys(0, 120)
    assert keys.shape == (2, 120, 16)
    torch.testing.assert_close(tokens.keys(45, 55), keys[:, 45:55])
    torch.testing.assert_close(tokens.keys(60, 100), keys[:, 60:100])
    torch.testing.assert_close(tokens.logits(query()), query() @ keys.transpose(1, 2))
    index = torch.tensor([[0, 49, 50, 119], [119, 3, 51, 48]])
    found, values = tokens.gather(index)
    for head in range(2):
        torch.testing.assert_close(found[head], keys[head, index[head]])
    weights = torch.zeros(2, 3, 120).scatter_(2, index[:, None].expand(-1, 3, -1), 0.25)
    expected = values.mean(1, keepdim=True).expand(-1, 3, -1)
    torch.testing.assert_close(tokens.weigh(weights), expected)


def test_softcap_and_learned_sinks_are_those_of_the_formula() -> None:
    tokens, asked = make_tokens(20), query()
    rule = Rule(0.5, softcap=2.0, sinks=torch.linspace(-1, 1, 6))
    logits = 2.0 * torch.tanh(asked @ tokens.keys(0, 20).transpose(1, 2) * 0.5 / 2.0)
    column = rule.sinks.view(2, 3, 1)  # type: ignore[union-attr]
    weights = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(attend_all(asked, tokens, rule), weights @ tokens.prompt.values)


def test_attention_over_a_selection_is_a_softmax_over_it_and_its_weights() -> None:
    tokens, asked = make_tokens(20), query()
    positions = torch.tensor([[3, 7, 19, 0], [1, 2, 5, 0]])
    valid = torch.tensor([[True, True, True, False], [True, True, True, True]])
    bias = torch.randn(2, 3, 4)
    out = attend_selected(asked, tokens, Selection(positions, valid, bias), RULE)
    for head in range(2):
        kept = positions[head][valid[head]]
        logits = asked[head] @ tokens.keys(0, 20)[head, kept].T * RULE.scaling
        weights = (logits + bias[head][:, valid[head]]).softmax(-1)
        torch.testing.assert_close(out[head], weights @ tokens.prompt.values[head, kept])


def test_the_full_method_has_the_models_own_logits() -> None:
    model = build(family("llama"))
    prefill, reference = full_answer(model, IDS, steps(8))
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        logits = [model(torch.tensor([IDS]), past_key_values=cache).logits[0, -1]]
        logits += [
            model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            for token in reference.tokens
        ]
    torch.testing.assert_close(prefill.logits, logits[0])
    torch.testing.assert_close(reference.log_probs, torch.stack(logits[1:]).log_softmax(-1))
    assert reference.best == [int(x.argmax()) for x in logits[1:]]
    assert reference.tokens == [int(x.argmax()) for x in logits[:-1]]


@pytest.mark.parametrize("member", [f for f in ZOO if f.managed], ids=lambda f: f.name)
def test_a_budget_that_holds_the_context_gives_the_full_answers(member: Family) -> None:
    model = build(member)
    prefill, reference = full_answer(model, IDS, steps(6))
    for name in RUNNABLE:
        forced = forced_answer(model, prefill, reference, small_method(name), 80)
        assert forced.best == reference.best, name
        assert reference.is_shared_by(forced.best), name
        exact = not name.startswith("icecache")
        limit = 0.0 if exact else 1e-4
        assert (forced.log_probs - reference.log_probs).abs().max() <= limit, name


@pytest.mark.parametrize("member", [f for f in ZOO if f.managed], ids=lambda f: f.name)
def test_a_budget_below_the_context_is_kept_and_seen(member: Family) -> None:
    model = build(member)
    prefill, reference = full_answer(model, IDS, steps(3))
    for name in RUNNABLE:
        forced = forced_answer(model, prefill, reference, small_method(name), 20)
        assert torch.isfinite(forced.log_probs).all(), name
        if name != "full":
            assert (forced.log_probs - reference.log_probs).abs().max() > 1e-3, name
            assert 12 <= forced.num_attended <= 20, name


def test_methods_leave_the_shared_prompt_alone() -> None:
    model = build(family("gemma3"))
    prefill, reference = full_answer(model, IDS, steps(4))
    prompts = copy.deepcopy(prefill.prompts)
    layers = [copy.deepcopy(vars(layer)) for layer in prefill.layers]
    first = forced_answer(model, prefill, reference, small_method("quest"), 20)
    for name in RUNNABLE:
        forced_answer(model, prefill, reference, small_method(name), 20)
    again = forced_answer(model, prefill, reference, small_method("quest"), 20)
    assert torch.equal(first.log_probs, again.log_probs)
    for index, prompt in prefill.prompts.items():
        assert torch.equal(prompt.keys, prompts[index].keys)
        assert torch.equal(prompt.values, prompts[index].values)
    for layer, before in zip(prefill.layers, layers):
        assert torch.equal(layer.keys, before["keys"])


def test_icecache_on_the_shared_prefill_is_icecache_on_its_own() -> None:
    model = build(family("llama"))
    prefill, reference = full_answer(model, IDS, steps(8))
    forced = forced_answer(model, prefill, reference, IceCacheMethod(ICE), 20)
    with torch.inference_mode(), attach(model, **SMALL):
        cache = IceCache(model, **SMALL)
        model(torch.tensor([IDS]), past_key_values=cache)
        logits = [
            model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            for token in reference.tokens
        ]
        assert cache.stats().sparse_steps == 4 * 8
    torch.testing.assert_close(forced.log_probs, torch.stack(logits).log_softmax(-1))


def test_icecache_r_shares_selections_over_groups_of_layers() -> None:
    model = build(family("llama"))
    prefill, reference = full_answer(model, IDS, steps(5))
    assert IceCacheReuse().config(256).layer_reuse == 3
    with torch.inference_mode(), evaluation_attention(model):
        run = small_method("icecache-r").open(model, prefill, 20)
        force(model, reference, [Row(run.cache, run.num_attended)])
        stats = run.cache.stats()
        run.close()
    # of four layers the second and the fourth follow
    assert [stats.layers[index].reused_steps for index in range(4)] == [0, 5, 0, 5]


def test_the_models_attention_is_put_back() -> None:
    model = build(family("llama"))
    before = model.config._attn_implementation

    def fail_inside() -> None:
        with evaluation_attention(model):
            assert model.config._attn_implementation == NAME
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_inside()
    assert model.config._attn_implementation == before


def test_a_policy_refuses_several_tokens_at_once() -> None:
    model = build(family("llama"))
    prefill, _ = full_answer(model, IDS, steps(1))
    with torch.inference_mode(), evaluation_attention(model):
        cache = TopK().open(model, prefill, 64).cache
        with pytest.raises(UnsupportedModel, match="token by token"):
            model(torch.tensor([[5, 6]]), past_key_values=cache)


def _with_end(model: PreTrainedModel, token: int) -> PreTrainedModel:
    model.generation_config.eos_token_id = token
    return model


def test_the_reference_passes_over_the_end_of_text_and_the_answer_stops_there() -> None:
    model = build(family("llama"))
    _, free = full_answer(model, IDS, steps(12))
    end = free.tokens[3]
    until = free.tokens.index(end)
    prefill, reference = full_answer(_with_end(model, end), IDS, steps(12))
    assert reference.answer == free.tokens[:until]
    assert len(reference.tokens) == len(reference.best) == 12
    assert end not in reference.tokens
    assert reference.best[until - 1] == end if until else True
    assert reference.decisive == until
    with evaluation_attention(model):
        full = Full().open(model, prefill, 0).cache
        assert answer_freely(model, prefill, [full], steps(12)) == [reference.answer]


def test_answers_stop_at_their_longest_and_at_a_stop() -> None:
    model = build(family("llama"))
    _, reference = full_answer(model, IDS, steps(4, longest=9))
    assert len(reference.answer) == 9
    assert len(reference.log_probs) == 4
    assert reference.decisive == 8
    limits = Limits(4, 9, lambda token_ids: len(token_ids) == 5)
    _, stopped = full_answer(model, IDS, limits)
    assert stopped.answer == reference.answer[:5]
    assert len(stopped.tokens) == 4


@pytest.mark.parametrize("name", ["streaming", "snapkv", "icecache"])
def test_whoever_likes_the_same_tokens_answers_the_same(name: str) -> None:
    model = build(family("llama"))
    found = set()
    # 44 tokens fit the larger budget, which is the full cache; the smaller one parts from it
    for seed, budget in product(range(4), (44, 16)):
        ids = torch.randint(3, 127, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        prefill, reference = full_answer(model, ids, steps(2, longest=4))
        forced = forced_answer(model, prefill, reference, small_method(name), budget)
        with torch.inference_mode(), evaluation_attention(model):
            cache = small_method(name).open(model, prefill, budget).cache
            (answer,) = answer_freely(model, prefill, [cache], steps(2, longest=4))
        assert (answer == reference.answer) == reference.is_shared_by(forced.best)
        found.add(answer == reference.answer)
    assert found == {True, False}
