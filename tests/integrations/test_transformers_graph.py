"""Decode steps of the device path recorded and replayed, with a stand-in for a CUDA graph."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_model import SMALL, generate, make_model, prompt
from torch import Tensor
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import icecache
from icecache.errors import IntegrityError, UnsupportedModel
from icecache.integrations.transformers import graph
from icecache.integrations.transformers.graph import GraphStep, require_recordable


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Of two layers."""
    return make_model()


class _Replayed:
    """Acts as a CUDA graph does: recording does nothing, replaying counts nothing."""

    def __init__(self, failing: BaseException | None = None) -> None:
        self.cache: Callable[[], icecache.IceCache] | None = None
        self.recorded = 0
        self.failing = failing
        self.interrupts = False

    def record(self, call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        cores = [layer.core for layer in self.cache().layers]
        assert not any(_outbound(core)._is_under_way for core in cores)
        before = [_tensors(core) for core in cores]
        kept = [[x.clone() for x in tensors] for tensors in before]
        result = call()
        for tensors, copies in zip(before, kept, strict=True):
            for x, copy in zip(tensors, copies, strict=True):
                x.copy_(copy)
        if self.failing is not None:
            raise self.failing
        self.recorded += 1

        def replay() -> None:
            assert not any(_outbound(core)._is_under_way for core in cores)
            marks = [core.mark() for core in cores]
            columns = [layer.num_columns for layer in self.cache().layers]
            for core in cores:
                window = core._held.index.window
                window.lens, window.left = ([n - 1 for n in x] for x in window.mark())
            result.copy_(call())
            for core, mark, layer, num in zip(cores, marks, self.cache().layers, columns):
                core.rewind(mark)
                layer.num_columns = num
            self.cache().forward_pass.settle()
            if self.interrupts:
                raise KeyboardInterrupt

        return result, replay


def _outbound(core: Any) -> Any:
    return core._held.index._outbound


def _tensors(core: Any) -> list[Tensor]:
    index = core._held.index
    parts = [*index.tree, *index.pages, *index.window.fixed[:4], index.step_number]
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("failing", [False, True])
def test_replayed_steps_give_the_same_tokens(model: LlamaForCausalLM, failing: bool) -> None:
    ids = prompt(90)
    recorder = _Replayed(RuntimeError("this operation cannot be captured") if failing else None)
    with icecache.attach(model, **SMALL) as attachment:
        truth = generate(model, ids)
        eager = attachment.cache.stats()
    with icecache.attach(model, **SMALL, compile=False) as attachment:
        recorder.cache = lambda: attachment.cache
        step = GraphStep(model, recorder)
        attachment.decode = step
        model._valid_auto_compile_criteria = attachment._may_compile
        model.get_compiled_call = attachment._decode_call
        try:
            assert torch.equal(generate(model, ids), truth)
        finally:
            del model._valid_auto_compile_criteria, model.get_compiled_call
        stats = attachment.cache.stats()
        for layer in attachment.cache.layers:
            layer.core.check_integrity()
    assert step.steps == (0 if failing else 16)
    assert recorder.recorded == (0 if failing else 1)
    for layer, other in zip(stats.layers.values(), eager.layers.values(), strict=True):
        # what the last step attended is the recording's own tensor, which only CUDA refills
        assert dataclasses.replace(layer, tokens_attended=0) == dataclasses.replace(
            other, tokens_attended=0
        )


def test_a_pool_that_moves_is_recorded_anew(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icecache.cache.device.settings._MARGIN", 16)
    ids, recorder = prompt(90), _Replayed()
    settings = {**SMALL, "max_context": 90}
    with icecache.attach(model, **settings) as attachment:
        recorder.cache = lambda: attachment.cache
        step = GraphStep(model, recorder)
        cache = icecache.IceCache(model, **settings)
        attachment.cache = cache
        model(ids, past_key_values=cache)
        for i in range(150):
            output = step(input_ids=ids[:, i % 90][:, None], past_key_values=cache)
            assert bool(output.logits.isfinite().all())
        for layer in cache.layers:
            layer.core.check_integrity()
    assert recorder.recorded >= 3
    assert cache.stats().tokens == 240 == cache.get_seq_length()


def _played(
    model: LlamaForCausalLM, step: Any, recorder: _Replayed | None = None
) -> tuple[icecache.IceCache, Callable[[], Tensor]]:
    """A cache past its budget, and what gives its next step's logits."""
    ids, cache = prompt(90), icecache.IceCache(model, **SMALL)
    model(ids, past_key_values=cache)

    def play() -> Tensor:
        if recorder is not None:
            recorder.cache = lambda: cache
        i = cache.get_seq_length() % 90
        return step(input_ids=ids[:, i : i + 1], past_key_values=cache).logits

    return cache, play


class _Stream:
    """Stands in for a CUDA stream that copies."""

    def __init__(self) -> None:
        self.awaited: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.awaited.append(other)

    def synchronize(self) -> None:
        pass


def _begin_transfer(cache: icecache.IceCache) -> None:
    for layer in cache.layers:
        _outbound(layer.core)._stream, _outbound(layer.core)._is_under_way = _Stream(), True


def test_replays_wait_for_pages_on_their_way(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorder refuses to record or replay before that: a graph does not wait by itself."""
    current, recorder = _Stream(), _Replayed()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    with icecache.attach(model, **SMALL):
        step = GraphStep(model, recorder)
        cache, play = _played(model, step, recorder)
        for _ in range(6):
            _begin_transfer(cache)
            play()
    assert step.steps == 3 and recorder.recorded == 1
    streams = [_outbound(layer.core)._stream for layer in cache.layers]
    assert current.awaited[-len(streams) :] == streams


def test_another_cache_takes_a_step_before_it_is_recorded(model: LlamaForCausalLM) -> None:
    recorder = _Replayed()
    with icecache.attach(model, **SMALL):
        step = GraphStep(model, recorder)
        _, play = _played(model, step, recorder)
        for _ in range(5):
            play()
        assert (step.steps, recorder.recorded) == (2, 1)
        _, play = _played(model, step, recorder)
        play()
        assert (step.steps, recorder.recorded) == (2, 1)
        play()
        assert (step.steps, recorder.recorded) == (3, 2)


def test_memory_in_the_place_of_other_memory_is_not_the_same(model: LlamaForCausalLM) -> None:
    with icecache.attach(model, **SMALL):
        cache, play = _played(model, model)
        core = cache.layers[0].core
        before, index = core.addresses(), core._held.index
        play()
        assert core.addresses() == before
        old = index.pool
        index._pool = old.grown(old.shape._replace(leaves=old.shape.leaves + 8))
        # as an allocator that gives the same places again would have it
        index.pool.tree = index.tree._replace(key_mean=old.tree.key_mean)
        index.pool.pages = index.pages._replace(host=old.pages.host)
        assert core.addresses() != before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no kernel")], ids=repr)
def test_a_recording_that_breaks_off_counts_no_token(
    model: LlamaForCausalLM, error: BaseException
) -> None:
    recorder = _Replayed(error)
    with icecache.attach(model, **SMALL):
        _, plain = _played(model, model)
        truth = [plain() for _ in range(6)]
        step = GraphStep(model, recorder)
        cache, play = _played(model, step, recorder)
        ours = [play() for _ in range(3)]
        with pytest.raises(type(error)):
            play()
        assert cache.get_seq_length() == cache.stats().tokens == 93
        assert cache.stats().sparse_steps == 2 * 3
        recorder.failing = None
        ours += [play() for _ in range(3)]
        for layer in cache.layers:
            layer.core.check_integrity()
    assert torch.equal(torch.cat(ours), torch.cat(truth))
    assert step.steps == 3


def test_an_interrupt_before_a_replay_counts_no_token(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, recorder = graph._count_replay, _Replayed()

    def interrupted(*args: Any) -> None:
        count(*args)
        raise KeyboardInterrupt

    with icecache.attach(model, **SMALL):
        _, plain = _played(model, model)
        truth = [plain() for _ in range(7)]
        step = GraphStep(model, recorder)
        cache, play = _played(model, step, recorder)
        ours = [play() for _ in range(5)]
        with monkeypatch.context() as patch:
            patch.setattr(graph, "_count_replay", interrupted)
            with pytest.raises(KeyboardInterrupt):
                play()
        assert cache.get_seq_length() == cache.stats().tokens == 95
        ours += [play() for _ in range(2)]
        for layer in cache.layers:
            layer.core.check_integrity()
    assert torch.equal(torch.cat(ours), torch.cat(truth))
    assert step.steps == 4


@pytest.mark.parametrize("after", [3, 5], ids=["as it was recorded", "later"])
def test_a_replay_that_is_interrupted_leaves_a_cache_that_says_so(
    model: LlamaForCausalLM, after: int
) -> None:
    recorder = _Replayed()
    with icecache.attach(model, **SMALL):
        step = GraphStep(model, recorder)
        cache, play = _played(model, step, recorder)
        for _ in range(after):
            play()
        recorder.interrupts = True
        with pytest.raises(KeyboardInterrupt):
            play()
        recorder.interrupts = False
        assert not any(layer.core.is_steady() for layer in cache.layers)
        with pytest.raises(IntegrityError, match="call reset"):
            play()
        cache.reset()
        model(prompt(90), past_key_values=cache)
        assert bool(play().isfinite().all())


def test_a_layer_with_its_own_cache_is_not_recorded(model: LlamaForCausalLM) -> None:
    require_recordable(model)
    config = Qwen2Config(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, use_sliding_window=True, sliding_window=16,
        max_window_layers=1, pad_token_id=0,
    )  # fmt: skip
    mixed = Qwen2ForCausalLM(config).eval()
    refused = r"layer 1 of qwen2 \(sliding_attention\) keeps its own; pass graph=False"
    with pytest.raises(UnsupportedModel, match=refused):
        icecache.attach(mixed, **SMALL, graph=True)
    with icecache.attach(mixed, **SMALL):
        step = GraphStep(mixed, _Replayed())
        _, play = _played(mixed, step)
        for _ in range(6):
            play()
    assert step.steps == 0
