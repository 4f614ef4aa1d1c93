"""Answers taken in by one compiled call: the same as torch's, in any company, counted."""

import pytest
import torch
from transformers import PreTrainedModel

from icecache import IceCacheConfig
from icecache.engine import Engine, EngineSettings, Finish, Sampling
from icecache.errors import ConfigError, InputError, UnsupportedModel
from icecache.integrations.transformers import one_call
from tests.engine.asking import CACHE, engine_of, llama, prompt, run
from tests.integrations.zoo import build, family, greedy

LENGTHS = [5, 200, 33, 64, 90, 1, 130, 47]


def logits_of(model: PreTrainedModel, native: bool, together: bool) -> list[torch.Tensor]:
    """The logits that each of some requests sees, and that all of them went the same way."""
    seen: dict[int, list[torch.Tensor]] = {}
    prompts = [prompt(i, length) for i, length in enumerate(LENGTHS)]
    with engine_of(model, native=native, max_running=5, threads=2) as engine:
        take = engine._take_token

        def record(request, logits):
            seen.setdefault(request.number, []).append(logits.clone())
            return take(request, logits)

        engine._take_token = record
        for ids in prompts:
            engine.add(ids, Sampling(max_tokens=20))
            while engine.has_work and not together:
                engine.step()
        while engine.has_work:
            engine.step()
        stats = engine.stats()
    assert stats.sparse_steps > 0
    # a request's first token comes with its prompt, and some steps build a tree
    assert (stats.native_steps > 0.8 * 19 * len(LENGTHS)) == native
    assert native or stats.native_steps == 0
    return [torch.stack(seen[number]) for number in sorted(seen)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_do_not_depend_on_the_company(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    alone, together = (logits_of(model, True, together) for together in (False, True))
    for ours, theirs in zip(alone, together, strict=True):
        assert torch.equal(ours, theirs)


def test_answers_are_those_by_torch() -> None:
    model = llama()
    native, by_torch = (logits_of(model, native, True) for native in (True, False))
    for ours, theirs in zip(native, by_torch, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi3", "granite"])
def test_within_the_budget_answers_are_the_full_caches(name: str) -> None:
    model = build(family(name))
    prompts = [prompt(i, length) for i, length in enumerate([5, 40, 33])]
    truth = [greedy(model, torch.tensor([ids]), steps=8).ids[0, len(ids) :] for ids in prompts]
    with engine_of(model, IceCacheConfig(budget=512), native=True) as engine:
        requests = [engine.add(ids, Sampling(max_tokens=8)) for ids in prompts]
        while engine.has_work:
            engine.step()
        assert engine.stats().native_steps == 7 * len(prompts)
    assert [request.answer for request in requests] == [each.tolist() for each in truth]


def test_what_cannot_be_native_says_so() -> None:
    model = build(family("gpt2"))
    with pytest.raises(UnsupportedModel, match="native=False"):
        engine_of(model, native=True)
    # and the model is itself again, and runs by torch by default
    greedy(model, torch.tensor([prompt(0, 5)]), steps=2)
    with engine_of(model) as engine:
        assert run(engine, prompt(0, 5)).answer
        assert engine.stats().native_steps == 0
    with pytest.raises(ConfigError, match="native must be True, False or None, got 'yes'"):
        EngineSettings(native="yes")


def test_a_model_that_answers_otherwise_runs_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_call, "_difference", lambda *_: float("nan"))
    with engine_of(llama()) as engine:
        run(engine, prompt(0, 20))
        assert engine.stats().native_steps == 0
    with pytest.raises(UnsupportedModel, match="answers otherwise"):
        engine_of(llama(), native=True)


def test_what_shares_selections_goes_by_torch_alone() -> None:
    ids, sampling = prompt(0, 300), Sampling(max_tokens=10)
    with engine_of(llama()) as engine:
        shared = engine.add(ids, sampling, cache=CACHE.replace(layer_reuse=2))
        own = engine.add(ids, sampling)
        while engine.has_work:
            engine.step()
        assert engine.stats().native_steps == 9
    with engine_of(llama(), native=False) as engine:
        assert run(engine, ids, sampling, cache=shared.settings).answer == shared.answer
    with engine_of(llama(), native=True) as engine:
        assert run(engine, ids, sampling).answer == own.answer


def test_a_token_that_is_not_finite_ends_its_request_alone() -> None:
    """Of answers, so by the compiled call first and then by the model, which says what is wrong."""
    model = llama()
    sampling = Sampling(max_tokens=12)
    with engine_of(model) as engine:
        good = run(engine, prompt(1, 60), sampling).answer
    with engine_of(model) as engine:
        bad, other = engine.add(prompt(2, 60), sampling), engine.add(prompt(1, 60), sampling)
        while len(bad.answer) < 4:
            engine.step()
        with torch.no_grad():
            row = model.get_input_embeddings().weight[bad.answer[-1]]
            before = row.clone()
            row.fill_(torch.nan)
        ends = [output for output in engine.step() if output.finish]
        with torch.no_grad():
            row.copy_(before)
        assert [(output.request, output.finish) for output in ends] == [(bad, Finish.ERROR)]
        assert isinstance(bad.error, InputError)
        while engine.has_work:
            engine.step()
    assert other.answer == good


def test_who_watches_gets_the_same_answer() -> None:
    def watched(engine: Engine, is_watched: bool) -> tuple[list[int], float | None]:
        request = run(engine, prompt(0, 300), Sampling(max_tokens=12), watch=is_watched)
        return request.answer, None if request.watch is None else request.watch.mass

    found = {}
    for native in (True, False):
        for is_watched in (True, False):
            with engine_of(llama(), native=native) as engine:
                found[native, is_watched] = watched(engine, is_watched)
                assert (engine.stats().native_steps == 11) == native
    assert found[True, True][0] == found[True, False][0] == found[False, True][0]
    masses = [found[native, True][1] for native in (True, False)]
    assert all(mass is not None and 0.1 < mass < 1.0 for mass in masses)
    assert masses[0] == pytest.approx(masses[1], abs=0.05)
