"""The device path through a model's own generate, on a CPU with the twins of the kernels."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import icecache
from icecache.errors import BackendUnavailable, ConfigError, InputError, UnsupportedModel
from icecache.integrations.transformers.graph import GraphStep, require_recordable
from tests.conftest import SmolLM2

SMALL: dict[str, Any] = {
    "backend": "twin", "budget": 48, "sink": 4, "window": 8, "leaf_size": 4, "leaf_target": 3,
    "page_size": 8, "draft": 8, "segment_tokens": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A random llama of two layers whose greedy tokens depend on the context."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def _prompt(length: int, batch: int = 1) -> Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def _generate(model: LlamaForCausalLM, ids: Tensor, **kwargs: Any) -> Tensor:
    settings = {"max_new_tokens": 20, "do_sample": False, **kwargs}
    return model.generate(ids, **settings)[:, ids.shape[1] :]


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("offload", ["host", "none"])
def test_a_budget_for_everything_changes_no_token(
    model: LlamaForCausalLM, offload: str, kwargs: dict[str, Any]
) -> None:
    """Past the budget of 48 while decoding: 40 tokens of prompt, then room for all again."""
    ids = _prompt(40)
    truth = _generate(model, ids, **kwargs)
    with icecache.attach(model, **{**SMALL, "budget": 64, "offload": offload}) as attachment:
        assert torch.equal(_generate(model, ids, **kwargs), truth)
        assert attachment.cache.stats().sparse_steps == 0


def test_smollm2_keeps_its_tokens_with_room_for_all(smollm2: SmolLM2) -> None:
    """Indexed from the start, since the draft is taken back, and yet all is attended."""
    model, tokenizer = smollm2
    ids = tokenizer("The ship left the harbour at dawn. " * 12, return_tensors="pt").input_ids
    truth = model.generate(ids, max_new_tokens=8, do_sample=False)
    settings = {"backend": "twin", "budget": 128, "dense_until": 0}
    room = ids.shape[1] + 12
    assert room <= 128
    with icecache.attach(model, **settings):
        ours = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, truth)


def test_sparse_steps_are_near_full_attention(model: LlamaForCausalLM) -> None:
    ids = _prompt(300)
    truth = model(ids).logits[:, -1].log_softmax(-1)
    divergence = {}
    for remainder in (True, False):
        with icecache.attach(model, **{**SMALL, "remainder": remainder}):
            cache = icecache.IceCache(model, **{**SMALL, "remainder": remainder})
            model(ids[:, :-1], past_key_values=cache)
            ours = model(ids[:, -1:], past_key_values=cache).logits[:, -1].log_softmax(-1)
        divergence[remainder] = float((truth.exp() * (truth - ours)).sum())
        assert cache.stats().sparse_steps == 2
    assert divergence[True] < 0.5 * divergence[False]


def test_rows_of_a_padded_batch_are_as_alone(model: LlamaForCausalLM) -> None:
    lens = [150, 60, 20]
    ids, mask = _prompt(150, 3), torch.zeros(3, 150, dtype=torch.long)
    for row, length in enumerate(lens):
        mask[row, 150 - length :] = 1
    with icecache.attach(model, **SMALL):
        together = _generate(model, ids * mask, attention_mask=mask)
        alone = [_generate(model, ids[i : i + 1, 150 - n :]) for i, n in enumerate(lens)]
    assert torch.equal(together, torch.cat(alone))


def test_a_second_turn_extends_the_conversation(model: LlamaForCausalLM) -> None:
    """What the first turn left is attended exactly by the second one's prompt."""
    first, more = _prompt(120), _prompt(30)
    with icecache.attach(model, **SMALL) as attachment:
        answer = model.generate(first, max_new_tokens=6, do_sample=False)
        cache = attachment.cache
        whole = torch.cat([answer, more], 1)
        logits = model(whole[:, cache.get_seq_length() :], past_key_values=cache).logits[:, -1]
    truth = model(whole).logits[:, -1]
    # the answer's own keys come from sparse steps
    near = torch.nn.functional.cosine_similarity(logits, truth)
    assert float(near) > 0.99
    assert cache.stats().tokens == whole.shape[1]


class _Replayed:
    """Acts as a CUDA graph does: recording does nothing, replaying counts nothing."""

    def __init__(self, failing: BaseException | None = None) -> None:
        self.cache: Callable[[], icecache.IceCache] | None = None
        self.recorded = 0
        self.failing = failing

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

        return result, replay


def _outbound(core: Any) -> Any:
    return core._held.index._outbound


def _tensors(core: Any) -> list[Tensor]:
    index = core._held.index
    parts = [*index.tree, *index.pages, *index.window.fixed[:4], index.step_number]
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("failing", [False, True])
def test_replayed_steps_give_the_same_tokens(model: LlamaForCausalLM, failing: bool) -> None:
    ids = _prompt(90)
    recorder = _Replayed(RuntimeError("this operation cannot be captured") if failing else None)
    with icecache.attach(model, **SMALL) as attachment:
        truth = _generate(model, ids)
        eager = attachment.cache.stats()
    with icecache.attach(model, **SMALL, compile=False) as attachment:
        recorder.cache = lambda: attachment.cache
        step = GraphStep(model, recorder)
        attachment.decode = step
        model._valid_auto_compile_criteria = attachment._may_compile
        model.get_compiled_call = attachment._decode_call
        try:
            assert torch.equal(_generate(model, ids), truth)
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
    ids, recorder = _prompt(90), _Replayed()
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
    ids, cache = _prompt(90), icecache.IceCache(model, **SMALL)
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


def test_what_the_device_path_cannot_do_is_said(model: LlamaForCausalLM, tmp_path: Any) -> None:
    with pytest.raises(BackendUnavailable, match="graph=True needs a CUDA device"):
        icecache.attach(model, **SMALL, graph=True)
    with pytest.raises(BackendUnavailable, match="graph=True needs a model on a CUDA device"):
        icecache.attach(model, graph=True)
    with pytest.raises(InputError, match="compile=True compiles what graph=True records"):
        icecache.attach(model, **SMALL, compile=True)
    refused = pytest.raises(ConfigError, match="leaf_size must be at most half of page_size")
    with refused, icecache.attach(model, **{**SMALL, "leaf_size": 6}):
        _generate(model, _prompt(30))
    with icecache.attach(model, **SMALL) as attachment:
        _generate(model, _prompt(60))
        with pytest.raises(InputError, match="device path cannot be saved"):
            attachment.cache.save(tmp_path / "snapshot")
