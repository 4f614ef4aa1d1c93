"""Answers taken in by one compiled call: the same as torch's, in any company, counted."""

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel

from icecache import IceCacheConfig
from icecache.engine import Engine, EngineSettings, Finish, Sampling
from icecache.errors import ConfigError, InputError, UnsupportedModel
from icecache.integrations.transformers import one_call
from icecache.store.pool import PagePool
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


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set how many threads torch and the compiled ops have, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_do_not_depend_on_the_company(
    dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """Nor on how many threads there are."""
    model = llama().to(dtype)
    threads(1)
    alone = logits_of(model, True, together=False)
    for num in (1, 2, 3):
        threads(num)
        together = logits_of(model, True, together=True)
        for ours, theirs in zip(alone, together, strict=True):
            # the first token's are of the prompt, which is torch's
            assert torch.equal(ours[1:], theirs[1:])


def test_a_pool_that_grows_for_one_lies_elsewhere_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions about one document share its pages; each page that is needed moves the pool."""
    beginning, sampling = prompt(0, 300), Sampling(max_tokens=40)
    questions = [[*beginning, *prompt(seed, 8)] for seed in (1, 2, 3)]
    alone = []
    for ids in questions:
        with engine_of(llama(), native=True) as engine:
            alone.append(run(engine, ids, sampling).answer)
    allocate, moved = PagePool.allocate, []

    def move(pool: PagePool, num_pages: int) -> list[int]:
        old = pool._data, pool._positions, pool._holders
        pool.reserve(len(pool._free) + 1)
        pages = allocate(pool, num_pages)
        # what still looks there finds nothing
        old[0].fill_(torch.nan)
        old[1].fill(-1)
        old[2].fill(0)
        moved.append(pool)
        return pages

    with engine_of(llama(), native=True) as engine:
        run(engine, questions[0], Sampling(max_tokens=1))
        requests = [engine.add(ids, sampling) for ids in questions]
        while any(len(request.answer) < 2 for request in requests):
            engine.step()
        pools = [{id(layer._context.indexed.pool) for layer in r.layers} for r in requests]
        assert pools[1] == pools[2]
        monkeypatch.setattr(PagePool, "allocate", move)
        while engine.num_running == 3:
            engine.step()
        while engine.has_work:
            engine.step()
    assert moved
    assert [request.answer for request in requests] == alone


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


def test_weights_that_move_are_seen_by_the_next_request() -> None:
    model, ids = llama(), prompt(0, 40)
    mlp = model.model.layers[0].mlp
    with engine_of(model, native=True) as engine:
        before = run(engine, ids).answer
        mlp.down_proj.weight = torch.nn.Parameter(-3.0 * mlp.down_proj.weight.detach())
        after = run(engine, [*ids, 7]).answer
        assert engine.stats().native_steps == 14
    with engine_of(model, native=True) as engine:
        assert run(engine, [*ids, 7]).answer == after != before


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
    """Of an answer, so in the compiled call."""
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
        assert "must be finite" in str(bad.error)
        while engine.has_work:
            engine.step()
    assert other.answer == good


def test_a_window_of_one_token_fails_alone_too() -> None:
    """Its token cannot be taken back from the first layer: none is left in the window."""
    model = llama()
    second = model.model.layers[1].input_layernorm.weight
    with engine_of(model) as engine:
        bad = engine.add(prompt(2, 60), cache=CACHE.replace(window=1))
        while len(bad.answer) < 4:
            engine.step()
        reading = engine.add(prompt(1, 60), Sampling(max_tokens=4))
        before = second.detach().clone()
        second.data.fill_(torch.nan)
        # what cannot be read of a prompt ends that request, and neither ends the step
        assert [output.request for output in engine.step()] == [bad, reading]
        second.data.copy_(before)
        assert isinstance(bad.error, InputError)
        assert isinstance(reading.error, InputError)
        assert run(engine, prompt(1, 60)).finish is Finish.LENGTH


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
