"""Many requests at once: each gets its own answer, whoever else is served."""

from collections import Counter

import pytest
import torch

import icecache
from icecache import IceCacheConfig, IceCacheLayer
from icecache.engine import Engine, EngineSettings, Finish, Sampling
from icecache.engine.sampling import next_token
from icecache.errors import (
    ConfigError,
    HostMemoryExceeded,
    InputError,
    QueueFull,
    UnsupportedModel,
)
from tests.engine.asking import CACHE, engine_of, llama, prompt, run
from tests.integrations.zoo import build, family, greedy

LENGTHS = [5, 200, 33, 64, 90, 1, 130, 47]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "phi", "gemma", "granite", "opt"])
def test_within_the_budget_answers_are_the_full_caches(name: str) -> None:
    model = build(family(name))
    prompts = [prompt(i, length) for i, length in enumerate([5, 40, 33, 64])]
    truth = [greedy(model, torch.tensor([ids]), steps=8).ids[0, len(ids) :] for ids in prompts]
    with engine_of(model, IceCacheConfig(budget=512)) as engine:
        requests = [engine.add(ids, Sampling(max_tokens=8)) for ids in prompts]
        while engine.has_work:
            engine.step()
    assert [request.answer for request in requests] == [each.tolist() for each in truth]
    # and the model is itself again
    assert torch.equal(greedy(model, torch.tensor([prompts[0]]), steps=8).ids[0, 5:], truth[0])


def _logits_of(engine: Engine) -> dict[int, list[torch.Tensor]]:
    """Record the logits that each request sees."""
    seen: dict[int, list[torch.Tensor]] = {}
    take = engine._take_token

    def record(request, logits):
        seen.setdefault(request.number, []).append(logits.clone())
        return take(request, logits)

    engine._take_token = record
    return seen


def test_answers_do_not_depend_on_the_company() -> None:
    """Bit for bit, far beyond the budget, with requests that come and go."""
    model, sampling = llama(), Sampling(max_tokens=20)
    prompts = [prompt(i, length) for i, length in enumerate(LENGTHS)]
    alone: list[list[torch.Tensor]] = []
    for ids in prompts:
        with engine_of(model) as engine:
            seen = _logits_of(engine)
            request = run(engine, ids, sampling)
            alone.append(seen[request.number])
            assert len(request.answer) == 20
    with engine_of(model, max_running=5, threads=3) as engine:
        seen = _logits_of(engine)
        requests = []
        for ids in prompts:
            requests.append(engine.add(ids, sampling))
            for _ in range(3):
                engine.step()
        while engine.has_work:
            engine.step()
        stats = engine.stats()
    assert stats.sparse_steps > 0
    for request, logits in zip(requests, alone, strict=True):
        assert torch.equal(torch.stack(seen[request.number]), torch.stack(logits))


def test_a_long_prompt_holds_nobody_up() -> None:
    """Every step gives every running answer a token, and short prompts overtake long ones."""
    with engine_of(llama()) as engine:
        first = engine.add(prompt(0, 20), Sampling(max_tokens=200))
        engine.step()
        long, short = (engine.add(prompt(n, n), Sampling(max_tokens=3)) for n in (900, 40))
        for step in range(2, 8):
            numbers = Counter(output.request.number for output in engine.step())
            assert numbers[first.number] == 1
            assert len(first.answer) == step
        assert short.is_finished
        assert not long.answer
        while not long.is_finished:
            engine.step()
        assert long.num_prefilled == 900


def test_requests_wait_in_their_order() -> None:
    with engine_of(llama(), max_running=2, max_waiting=3) as engine:
        requests = [engine.add(prompt(i, 10), Sampling(max_tokens=4)) for i in range(3)]
        with pytest.raises(QueueFull, match="3 requests wait already"):
            engine.add(prompt(9, 10))
        ended = []
        while engine.has_work:
            assert engine.num_running <= 2
            ended += [output.request for output in engine.step() if output.finish]
        assert ended == requests


def test_an_aborted_request_gives_its_memory_back() -> None:
    with engine_of(llama()) as engine:
        requests = [engine.add(prompt(i, 100), Sampling(max_tokens=50)) for i in range(3)]
        for _ in range(8):
            engine.step()
        assert engine.stats().reserved_bytes == sum(each.reserved for each in requests)
        engine.abort(requests[0])
        engine.abort(requests[0])
        assert requests[0].finish is Finish.ABORT
        assert engine.stats().reserved_bytes == sum(each.reserved for each in requests[1:])
        while engine.has_work:
            assert all(output.request is not requests[0] for output in engine.step())
        assert engine.stats().reserved_bytes == 0


def test_each_request_has_its_own_budget() -> None:
    model = llama()
    ids = prompt(0, 300)
    with engine_of(model) as engine:
        wide = engine.add(ids, cache=CACHE.replace(budget=512))
        narrow = engine.add(ids)
        while engine.has_work:
            engine.step()
    full = greedy(model, torch.tensor([ids]), steps=64).ids[0, 300:]
    assert wide.answer == full.tolist()
    assert narrow.answer != wide.answer


def test_a_request_that_fails_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = llama(), Sampling(max_tokens=10)
    with engine_of(model, native=False) as engine:
        good = run(engine, prompt(1, 60), sampling).answer
    append, broken = IceCacheLayer.append, []

    def fail(layer, keys, values, mask=None):
        if layer in broken:
            raise HostMemoryExceeded(1, 0)
        append(layer, keys, values, mask)

    monkeypatch.setattr(IceCacheLayer, "append", fail)
    # the compiled call appends by itself
    with engine_of(model, native=False) as engine:
        bad = engine.add(prompt(2, 60), sampling)
        other = engine.add(prompt(1, 60), sampling)
        for _ in range(6):
            engine.step()
        broken.append(bad.layers[2])
        ends = [o for o in engine.step() if o.finish]
        assert [(o.request, o.finish, o.token) for o in ends] == [(bad, Finish.ERROR, None)]
        assert isinstance(bad.error, HostMemoryExceeded)
        while engine.has_work:
            engine.step()
        assert engine.stats().reserved_bytes == 0
    assert other.answer == good


def test_memory_is_asked_for_before_it_is_taken() -> None:
    with engine_of(llama()) as engine:
        needed = engine.add(prompt(0, 100), Sampling(max_tokens=28)).reserved
    assert needed > 0
    with engine_of(llama(), max_host_memory=3 * needed) as engine:
        held = [engine.add(prompt(i, 100), Sampling(max_tokens=28)) for i in range(3)]
        with pytest.raises(HostMemoryExceeded):
            engine.add(prompt(4, 100), Sampling(max_tokens=28))
        for _ in range(6):
            engine.step()
        stats = engine.stats()
        assert 0 < stats.running_bytes <= stats.reserved_bytes == 3 * needed
        while engine.has_work:
            engine.step()
        # what is kept of them gives way
        assert engine.stats().conversation_bytes > 0
        held = [engine.add(prompt(10 + i, 100), Sampling(max_tokens=28)) for i in range(3)]
        assert engine.stats().conversation_bytes == 0
        assert all(request.reserved == needed for request in held)


def test_seeds_make_draws_repeatable_in_any_company() -> None:
    drawn = Sampling(max_tokens=12, temperature=1.5, top_p=0.9, seed=7)
    with engine_of(llama()) as engine:
        alone = run(engine, prompt(0, 50), drawn).answer
        other = run(engine, prompt(0, 50), Sampling(max_tokens=12, temperature=1.5, seed=8)).answer
        engine.add(prompt(3, 80), Sampling(max_tokens=12, temperature=1.0))
        again = engine.add(prompt(0, 50), drawn)
        while engine.has_work:
            engine.step()
    assert again.answer == alone != other


def test_top_p_draws_from_the_likeliest_alone() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(top_p: float) -> set[int]:
        sampling = Sampling(temperature=1.0, top_p=top_p)
        return {next_token(logits, sampling, generator) for _ in range(300)}

    assert drawn(1.0) == {0, 1, 2, 3}
    assert drawn(0.8) == {0, 1}
    assert drawn(0.81) == {0, 1, 2}
    assert drawn(0.01) == drawn(1e-300) == {0}


def test_what_is_not_finite_ends_its_request_alone() -> None:
    model = llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.nan
    with engine_of(model) as engine:
        bad = engine.add([7, 8, 5], Sampling(max_tokens=5))
        good = engine.add([7, 8, 9], Sampling(max_tokens=5))
        while engine.has_work:
            engine.step()
    assert bad.finish is Finish.ERROR
    assert isinstance(bad.error, InputError)
    assert good.finish is Finish.LENGTH
    with pytest.raises(InputError, match="logits are not finite"):
        next_token(torch.tensor([0.0, torch.nan]), Sampling(), None)


def test_stop_tokens_end_an_answer() -> None:
    with engine_of(llama()) as engine:
        answer = run(engine, prompt(0, 50), Sampling(max_tokens=20)).answer
        stop = Sampling(max_tokens=20, stop_ids=(answer[5],))
        request = run(engine, prompt(0, 50), stop)
    assert request.finish is Finish.STOP
    assert request.answer == answer[: answer.index(answer[5]) + 1]


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([], "at least one token"),
        ([5, 128], "token ids from 0 to 127"),
        ([5, -1], "token ids from 0 to 127"),
        ([5] * 1000, "more than the model's context of 1,024"),
    ],
)
def test_prompts_that_cannot_be_served(ids: list[int], match: str) -> None:
    with engine_of(llama()) as engine:
        with pytest.raises(InputError, match=match):
            engine.add(ids, Sampling(max_tokens=30))
        assert engine.stats().reserved_bytes == 0


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_tokens": 0}, {"seed": -1}]
)
def test_sampling_is_checked(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        Sampling(**settings)


@pytest.mark.parametrize("settings", [{"max_running": 0}, {"prefill_chunk": 5}, {"max_disk": "1"}])
def test_settings_are_checked(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EngineSettings(**settings)


def test_models_that_cannot_run_packed_are_left_as_they_were() -> None:
    model = build(family("gemma3"))
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match="full attention only, but layer 0"):
        Engine(model)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    scaled = build(family("llama"), rope_parameters=rope)
    with pytest.raises(UnsupportedModel, match="longest context of a batch"):
        Engine(scaled)
    assert model.config._attn_implementation == before


def test_the_model_is_the_engines_own_until_it_is_closed() -> None:
    model, ids = llama(), torch.tensor([prompt(0, 20)])
    with engine_of(model), pytest.raises(InputError, match=r"belongs to an icecache\.Engine"):
        model(ids)
    with icecache.attach(model, budget=64):
        assert greedy(model, ids, steps=3).ids.shape == (1, 23)
