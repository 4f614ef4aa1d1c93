"""Decode steps through `torch.compile`: one graph, the same tokens."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM, PreTrainedModel
from zoo import SMALL, build, family, greedy, left_padded

import icecache
from icecache.errors import BackendUnavailable, InputError, UnsupportedModel
from icecache.integrations.transformers import compiled, pace
from icecache.integrations.transformers.compiled import CompiledStep
from icecache.integrations.transformers.pace import PacedStep


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graph, run op by op: nothing waits for a C++ compiler."""
    make = torch.compile

    def compile_plainly(function: Callable[..., Any], **options: Any) -> Any:
        return make(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_plainly)


def prompt(batch: int = 1, tokens: int = 40) -> torch.Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(1))


def generate(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return greedy(model, ids, steps=24, **options).ids


def test_one_graph_without_breaks_gives_the_same_tokens() -> None:
    model = build(family("llama"))
    ids = prompt()
    with icecache.attach(model, **SMALL, compile=False) as attachment:
        expected = generate(model, ids)
        assert attachment.compiled_steps == 0
    with icecache.attach(model, **SMALL, compile=True) as attachment:
        first = generate(model, ids)
        steps = attachment.compiled_steps
        again = generate(model, ids[:, :7])
        assert attachment.compiled_steps == 2 * steps == 2 * 23
        assert attachment.cache.stats().sparse_steps > 0
    assert torch.equal(first, expected)
    # the same graph from seven tokens to beyond the budget
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    with icecache.attach(model, **SMALL, compile=False):
        assert torch.equal(again, generate(model, ids[:, :7]))


@pytest.mark.parametrize("name", ["qwen3", "gemma", "granite", "olmo2", "phi3", "gpt_neox"])
def test_families_give_the_same_tokens(name: str, without_inductor: None) -> None:
    model = build(family(name))
    ids = prompt(2)
    with icecache.attach(model, **SMALL, compile=False):
        expected = generate(model, ids)
    with icecache.attach(model, **SMALL, compile=True) as attachment:
        assert torch.equal(generate(model, ids), expected)
        assert attachment.compiled_steps == 23
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def test_padded_rows_and_beams_run_as_they_are(without_inductor: None) -> None:
    model = build(family("llama"))
    ids, mask = left_padded([30, 25, 12])
    with icecache.attach(model, **SMALL, compile=False):
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        beams = model.generate(prompt(), max_new_tokens=8, num_beams=2, do_sample=False)
    with icecache.attach(model, **SMALL, compile=True) as attachment:
        ours = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert torch.equal(ours, expected)
        assert attachment.compiled_steps == 0
        ours = model.generate(prompt(), max_new_tokens=8, num_beams=2, do_sample=False)
        assert torch.equal(ours, beams)


@pytest.mark.parametrize("by_inductor", [True, False])
def test_a_failed_step_is_undone(
    by_inductor: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_inductor:
        request.getfixturevalue("without_inductor")
    model = build(family("llama"))
    with torch.no_grad(), icecache.attach(model, **SMALL, compile=True) as attachment:
        generate(model, prompt())
        cache, step = attachment.cache, attachment.decode
        assert cache is not None and isinstance(step, CompiledStep)
        held = cache.num_tokens
        token = torch.tensor([[5]])
        core = cache.managed[2].core
        with monkeypatch.context() as patch:

            def fail(*args: object, **kwargs: object) -> None:
                raise InputError("no")

            patch.setattr(core, "step", fail)
            with pytest.raises(InputError, match="no"):
                step(input_ids=token, past_key_values=cache)
        assert cache.num_tokens == held
        step(input_ids=token, past_key_values=cache)
        assert cache.num_tokens == held + 1
        with monkeypatch.context() as patch:

            def interrupt(*args: object, **kwargs: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(core, "step", interrupt)
            with pytest.raises(KeyboardInterrupt):
                step(input_ids=token, past_key_values=cache)


def test_changed_weights_make_a_new_graph(without_inductor: None) -> None:
    model = build(family("llama"))
    with icecache.attach(model, **SMALL, compile=True) as attachment:
        generate(model, prompt())
        made = attachment.decode._compiled
        generate(model, prompt())
        assert attachment.decode._compiled is made
        steps = attachment.compiled_steps
        generate(model, prompt(), disable_compile=True)
        assert attachment.compiled_steps == steps
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(-1.0)
        ours = generate(model, prompt())
        assert attachment.decode._compiled is not made
    with icecache.attach(model, **SMALL, compile=False):
        assert torch.equal(ours, generate(model, prompt()))


def test_detaching_takes_the_hooks_away(without_inductor: None) -> None:
    model = build(family("llama"))
    before = dict(vars(model))
    with icecache.attach(model, **SMALL, compile=True):
        assert set(vars(model)) - set(before) == {
            "_prepare_cache_for_generation", "_valid_auto_compile_criteria", "get_compiled_call",
        }  # fmt: skip
    assert dict(vars(model)) == before


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModel, match="layer 0 of gemma3_text keeps its own"):
        icecache.attach(build(family("gemma3")), **SMALL, compile=True)
    model = build(family("llama"))
    monkeypatch.setattr(compiled, "find_compiler", lambda: None)
    with pytest.raises(BackendUnavailable, match="needs a C\\+\\+ compiler"):
        icecache.attach(model, **SMALL, compile=True)
    assert model.config._attn_implementation == "sdpa"
    # by default that is no error: the steps stay as they are
    with icecache.attach(model, **SMALL, native=False) as attachment:
        generate(model, prompt())
        assert attachment.compiled_steps == 0


def test_a_compiler_is_looked_for_where_inductor_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiled.find_compiler() is None
    monkeypatch.setenv("CXX", "sh")
    assert compiled.find_compiler() is not None


@pytest.mark.parametrize("is_faster", [True, False])
def test_by_default_the_faster_way_is_kept(
    is_faster: bool, without_inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family("llama"))
    monkeypatch.setattr(pace, "_TRIAL", 4)
    monkeypatch.setattr(PacedStep, "_is_faster", lambda self: is_faster)
    with icecache.attach(model, **SMALL, compile=False):
        expected = generate(model, prompt())
    monkeypatch.setattr(PacedStep.__init__, "__defaults__", (10,))
    with icecache.attach(model, **SMALL, native=False) as attachment:
        assert torch.equal(generate(model, prompt()), expected)
        # 23 steps: 10 without, one that makes the graph, 4 on trial
        assert attachment.compiled_steps == (13 if is_faster else 5)


def test_the_medians_decide() -> None:
    step = PacedStep(build(family("llama")))
    step._eager, step._trial = [3.0, 2.0, 9.0], [1.0, 3.5, 3.5]
    assert not step._is_faster()
    step._trial = [1.0, 1.0, 9.0]
    assert step._is_faster()
    assert isinstance(step.model, LlamaForCausalLM)


def test_a_compiler_that_fails_leaves_steps_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(family("llama"))
    with icecache.attach(model, **SMALL, compile=False):
        expected = generate(model, prompt())

    def fail(*args: object) -> None:
        raise TorchDynamoException("no headers")

    monkeypatch.setattr(CompiledStep, "_compile", lambda self: fail)
    monkeypatch.setattr(PacedStep.__init__, "__defaults__", (10,))
    with icecache.attach(model, **SMALL, native=False) as attachment:
        assert torch.equal(generate(model, prompt()), expected)
        assert attachment.compiled_steps == 0
    assert "stay uncompiled: no headers" in caplog.text


def test_views_of_more_tokens_make_no_new_graph(without_inductor: None) -> None:
    model = build(family("llama"))
    tokens = prompt(2, 8)
    views = {
        "rows": tokens[:, 3:4],
        "columns": tokens.T.contiguous().T[:, 3:4],
        "repeated": tokens[:1, 3:4].expand(2, 1),
    }
    with torch.no_grad(), icecache.attach(model, **SMALL, compile=True) as attachment:
        generate(model, prompt(2))
        cache, step = attachment.cache, attachment.decode
        for token_ids in views.values():
            positions = torch.full((2, 9), cache.get_seq_length())[:, 5:6]
            step(input_ids=token_ids, past_key_values=cache)
            step(input_ids=token_ids, position_ids=positions + 1, past_key_values=cache)
    assert attachment.compiled_steps == 23 + 2 * len(views)
    assert counters["stats"]["unique_graphs"] == 1


def test_more_batch_sizes_than_graphs_run_as_they_are(
    without_inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family("llama"))
    monkeypatch.setattr(compiled, "_MOST_GRAPHS", 2)
    with icecache.attach(model, **SMALL, compile=True) as attachment:
        steps = []
        for batch in (1, 2, 3, 1):
            generate(model, prompt(batch))
            steps.append(attachment.compiled_steps)
    assert steps == [23, 46, 46, 69]


def test_undo_between_forwards_changes_nothing() -> None:
    model = build(family("llama"))
    with torch.no_grad(), icecache.attach(model, **SMALL) as attachment:
        generate(model, prompt())
        cache = attachment.cache
        assert cache is not None
        held = cache.num_tokens
        three = torch.randn(3, 4, 1, 16), *torch.randn(2, 3, 2, 1, 16)
        with pytest.raises(InputError, match="batch size"):
            cache.step(*three, 0, 0.25, None, None)
        cache.undo()
        assert cache.num_tokens == held


def test_a_bound_that_is_never_reached_can_be_set() -> None:
    model = build(family("llama"))
    cache = icecache.IceCache(model, dense_until=1 << 31)
    assert {layer.settings.dense_until for layer in cache.managed.values()} == {1 << 31}
