"""Decode steps as one compiled call: the model's own answers, whatever happens on the way."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo import SMALL, build, family, greedy, left_padded

import icecache
from icecache.errors import InputError
from icecache.integrations.transformers import one_call
from icecache.integrations.transformers.native import NativeStep
from icecache.integrations.transformers.rooms import Rooms

NATIVE = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3")
STEPS = 24


def prompt(batch: int = 1, tokens: int = 40) -> Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(1))


def with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Biases are zeros in a fresh model; here they decide."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()))
    return model


@pytest.mark.parametrize("name", NATIVE)
def test_native_steps_give_the_answers_of_the_models_own(name: str) -> None:
    model = with_biases(build(family(name)))
    ids = prompt(batch=3)
    full = greedy(model, ids, steps=STEPS)
    with icecache.attach(model) as attachment:
        ours = greedy(model, ids, steps=STEPS)
        stats = attachment.cache.stats()
    assert attachment.native_steps == STEPS - 1
    assert attachment.compiled_steps == 0
    assert torch.equal(ours.ids, full.ids)
    assert (ours.logits - full.logits).abs().max() <= 1e-4
    for layer in stats.layers.values():
        # the prompt, and every step
        assert (layer.dense_steps, layer.sparse_steps) == (STEPS, 0)
        assert layer.tokens == 40 + STEPS - 1


@pytest.mark.parametrize("name", NATIVE)
def test_native_steps_beyond_the_budget_are_the_models_own(name: str) -> None:
    model, ids = with_biases(build(family(name))), prompt(batch=2, tokens=100)
    with icecache.attach(model, native=True, **SMALL), torch.no_grad():
        step = NativeStep(model)
        caches = [icecache.IceCache(model, **SMALL) for _ in range(2)]
        for cache in caches:
            model(ids[:, :60], past_key_values=cache)
        errors = []
        for i in range(60, 100):
            token = ids[:, i : i + 1]
            told = model(input_ids=token, past_key_values=caches[0]).logits[:, -1]
            ours = step(input_ids=token, past_key_values=caches[1]).logits[:, -1]
            errors.append((ours - told).abs().amax(-1))
    assert step.steps == 40
    error = torch.stack(errors)
    # a last bit may choose another leaf now and then, and the keys that follow differ too
    assert (error <= 1e-4).float().mean() >= 0.8
    assert error.max() <= 0.5
    for layer in caches[1].managed.values():
        assert layer.stats().sparse_steps == 40
        layer.core.check_integrity()


def test_rows_of_a_prompt_shorter_than_the_budget_cross_it() -> None:
    model, ids = build(family("llama")), prompt(tokens=6)
    with icecache.attach(model, native=False, compile=False, **SMALL):
        expected = greedy(model, ids, steps=40)
    with icecache.attach(model, native=True, **SMALL) as attachment:
        ours = greedy(model, ids, steps=40)
    assert torch.equal(ours.ids, expected.ids)
    # the step in which a tree is built is torch's
    assert attachment.native_steps == 38


def test_a_bfloat16_step_is_nearer_to_its_weights_than_torchs() -> None:
    model = build(family("llama"), num_hidden_layers=6).bfloat16()
    ids = prompt(tokens=60)
    truth = build(family("llama"), num_hidden_layers=6)
    truth.load_state_dict(model.state_dict())
    exact = truth(ids).logits[0, 1:]
    errors = {}
    for is_native in (True, False):
        with icecache.attach(model, native=is_native, compile=False), torch.no_grad():
            step: Callable = NativeStep(model) if is_native else model
            cache = icecache.IceCache(model)
            model(ids[:, :1], past_key_values=cache)
            logits = [
                step(input_ids=ids[:, i : i + 1], past_key_values=cache).logits[0, -1]
                for i in range(1, 60)
            ]
        errors[is_native] = (torch.stack(logits).float() - exact).square().mean()
        assert logits[0].dtype == torch.bfloat16
    assert errors[True] < 0.5 * errors[False]


def test_threads_do_not_change_a_bit() -> None:
    model = build(family("qwen3"), hidden_size=256, intermediate_size=1024, vocab_size=4096)
    ids, threads, logits = prompt(tokens=50), torch.get_num_threads(), []
    try:
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            with icecache.attach(model, native=True, **SMALL):
                # prompts are torch's, and depend on its threads
                torch.set_num_threads(1)
                cache = icecache.IceCache(model, **SMALL)
                model(ids, past_key_values=cache)
                torch.set_num_threads(num)
                step = NativeStep(model)
                with torch.no_grad():
                    found = [
                        step(input_ids=ids[:, i : i + 1], past_key_values=cache).logits
                        for i in range(30)
                    ]
            # the check before the first step is torch's too
            assert step.steps == 30
            logits.append(torch.cat(found))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_padded_rows() -> None:
    model, (ids, mask) = build(family("qwen2")), left_padded([30, 41])
    full = greedy(model, ids, mask, steps=STEPS)
    with icecache.attach(model) as attachment:
        ours = greedy(model, ids, mask, steps=STEPS)
        assert attachment.native_steps == STEPS - 1
        assert [layer.core.row_lens for layer in attachment.cache.managed.values()] == 4 * [
            [30 + STEPS - 1, 41 + STEPS - 1]
        ]
        # the next turn is told the same padding
        more = torch.cat([ours.ids, ids[:, -9:]], 1)
        longer = torch.cat([mask, torch.ones(2, STEPS + 9, dtype=torch.int64)], 1)
        again = greedy(model, more, longer, past_key_values=attachment.cache)
        assert attachment.native_steps == STEPS - 1 + 9
    assert torch.equal(ours.ids, full.ids)
    assert torch.equal(again.ids, greedy(model, more, longer).ids)


def test_padding_that_was_none_before_is_refused() -> None:
    model, ids = build(family("llama")), prompt(batch=2)
    with icecache.attach(model, native=True), torch.no_grad():
        step, cache = NativeStep(model), icecache.IceCache(model)
        model(ids, past_key_values=cache)
        mask = torch.ones(2, 41, dtype=torch.int64)
        mask[1, 3] = 0
        with pytest.raises(InputError, match="differs from before"):
            step(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache)
        mask[1, 3] = 1
        step(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache)
        # a row that gets padding instead of a token is torch's to do
        mask = torch.cat([mask, torch.tensor([[0], [1]])], 1)
        step(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache)
        assert step.steps == 1
        assert cache.layers[3].core.row_lens == [41, 42]


def test_weights_are_read_where_they_lie() -> None:
    model, ids = build(family("llama")), prompt()
    with icecache.attach(model, native=True) as attachment:
        greedy(model, ids)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(-3.0)
            model.model.layers[2].self_attn.o_proj.weight = nn.Parameter(
                2.0 * model.model.layers[2].self_attn.o_proj.weight
            )
        before = attachment.native_steps
        ours = greedy(model, ids)
        assert attachment.native_steps == 2 * before
    full = greedy(model, ids)
    assert torch.equal(ours.ids, full.ids)
    assert (ours.logits - full.logits).abs().max() <= 1e-4


def test_a_token_that_is_none_is_the_models_to_refuse() -> None:
    model, ids = build(family("llama")), prompt()
    with icecache.attach(model, native=True), torch.no_grad():
        step, cache = NativeStep(model), icecache.IceCache(model)
        model(ids, past_key_values=cache)
        for token in (-1, 128):
            with pytest.raises(IndexError):
                step(input_ids=torch.tensor([[token]]), past_key_values=cache)
        step(input_ids=ids[:, :1], past_key_values=cache)
        assert step.steps == 1
        assert _lens(cache) == {41}


def _lens(cache: icecache.IceCache) -> set[int]:
    return {layer.core.num_tokens for layer in cache.managed.values()} | {
        layer.num_columns for layer in cache.managed.values()
    }


def _break(projections: list[nn.Linear], fault: str) -> None:
    with torch.no_grad():
        for projection in projections:
            if fault == "no number":
                projection.weight[3, 5] = float("nan")
            else:
                # finite, and their products are not
                projection.weight.mul_(1e20)


@pytest.mark.parametrize("settings", [{}, SMALL], ids=["dense", "sparse"])
@pytest.mark.parametrize(("fault", "said"), [("no number", "finite"), ("too large", "overflowed")])
def test_a_step_that_fails_in_the_middle_is_taken_back(
    fault: str, said: str, settings: dict
) -> None:
    model, ids = build(family("llama")), prompt()
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    attention = model.model.layers[2].self_attn
    with icecache.attach(model, native=True, **settings), torch.no_grad():
        step, caches = NativeStep(model), []
        for _ in range(2):
            caches.append(icecache.IceCache(model, **settings))
            model(ids, past_key_values=caches[-1])
            step(input_ids=ids[:, :1], past_key_values=caches[-1])
        _break([attention.q_proj, attention.k_proj], fault)
        with pytest.raises(InputError, match=said):
            step(input_ids=ids[:, 1:2], past_key_values=caches[0])
        with pytest.raises(InputError, match=said):
            model(input_ids=ids[:, 1:2], past_key_values=caches[1])
        assert step.steps == 2
        model.load_state_dict(kept)
        after, expected = (
            step(input_ids=ids[:, 1:2], past_key_values=cache).logits for cache in caches
        )
        for cache in caches:
            assert _lens(cache) == {42}
            for layer in cache.managed.values():
                layer.core.check_integrity()
    assert torch.allclose(after, expected, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, SMALL], ids=["dense", "sparse"])
def test_an_interrupt_behind_the_call_takes_the_step_back(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build(family("llama")), prompt()
    with icecache.attach(model, native=True, **settings), torch.no_grad():
        step, cache = NativeStep(model), icecache.IceCache(model, **settings)
        model(ids, past_key_values=cache)
        step(input_ids=ids[:, :1], past_key_values=cache)
        library = one_call.load_forward()

        class Interrupted:
            def icecache_forward(self, *arguments: object) -> int:
                assert library.icecache_forward(*arguments) == 0
                raise KeyboardInterrupt

        monkeypatch.setattr(one_call, "load_forward", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(input_ids=ids[:, 1:2], past_key_values=cache)
        monkeypatch.undo()
        assert _lens(cache) == {41}
        step(input_ids=ids[:, 1:2], past_key_values=cache)
        assert _lens(cache) == {42}
        for layer in cache.managed.values():
            layer.core.check_integrity()


@pytest.mark.parametrize("settings", [{}, SMALL], ids=["dense", "sparse"])
def test_an_interrupt_before_the_call_leaves_layers_as_they_were(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build(family("llama")), prompt()
    with icecache.attach(model, native=True, **settings), torch.no_grad():
        step, cache = NativeStep(model), icecache.IceCache(model, **settings)
        model(ids, past_key_values=cache)
        step(input_ids=ids[:, :1], past_key_values=cache)

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Rooms, "begin", interrupt)
            with pytest.raises(KeyboardInterrupt):
                step(input_ids=ids[:, 1:2], past_key_values=cache)
        assert _lens(cache) == {41}
        step(input_ids=ids[:, 1:2], past_key_values=cache)
        assert _lens(cache) == {42}
        assert step.steps == 2
        for layer in cache.managed.values():
            layer.core.check_integrity()


def test_a_second_thread_goes_through_torch_meanwhile() -> None:
    model, ids = build(family("llama")), prompt()
    with icecache.attach(model, native=True), torch.no_grad():
        step, cache = NativeStep(model), icecache.IceCache(model)
        model(ids, past_key_values=cache)
        with step._lock:
            step(input_ids=ids[:, :1], past_key_values=cache)
        assert step.steps == 0
        step(input_ids=ids[:, :1], past_key_values=cache)
        assert step.steps == 1
        assert _lens(cache) == {42}


def test_a_copy_of_an_attached_model_has_steps_of_its_own() -> None:
    model, ids = build(family("llama")), prompt()
    with icecache.attach(model, native=True) as attachment:
        expected = greedy(model, ids)
        other = copy.deepcopy(model)
        with torch.no_grad():
            model.model.embed_tokens.weight.zero_()
        assert torch.equal(greedy(other, ids).ids, expected.ids)
    assert attachment.native_steps == 9


def test_a_dropped_cache_is_gone_at_once() -> None:
    model, ids = build(family("llama")), prompt()
    with icecache.attach(model, native=False, compile=False), torch.no_grad():
        cache = icecache.IceCache(model)
        model(ids, past_key_values=cache)
        model(input_ids=ids[:, :1], past_key_values=cache)
        fused = cache.layers[0].core._fused
        assert fused is not None
        assert fused._pointed is None


def test_a_cache_of_another_model_or_backend_is_left_to_the_model() -> None:
    model, ids = build(family("llama")), prompt()
    with icecache.attach(model, native=True, **SMALL), torch.no_grad():
        step = NativeStep(model)
        for settings in ({"backend": "torch"}, {"layer_reuse": 2}, {"max_host_memory": 1 << 30}):
            # caches of other settings than the attachment's
            cache = icecache.IceCache(model, **SMALL, **settings)
            model(ids, past_key_values=cache)
            step(input_ids=ids[:, :1], past_key_values=cache)
            assert step.steps == 0
            assert _lens(cache) == {41}
