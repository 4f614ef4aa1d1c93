"""Models and settings that have no native step: refused where it was asked for, and said why."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo import SMALL, Family, build, family, greedy

import icecache
from icecache.errors import BackendUnavailable, InputError, UnsupportedModel
from icecache.integrations.transformers import one_call
from icecache.integrations.transformers.pace import PacedStep

# scales its queries by their position beyond the first 64
MINISTRAL = Family(
    "ministral3",
    "ministral3",
    extra={
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 64,
        },
    },
)


def prompt(tokens: int = 40) -> Tensor:
    return torch.randint(3, 128, (1, tokens), generator=torch.Generator().manual_seed(1))


def test_a_model_that_is_changed_meanwhile_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model, ids, calls = build(family("llama")), prompt(), []
    with icecache.attach(model, native=True) as attachment:
        hook = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        with caplog.at_level(logging.WARNING):
            ours = greedy(model, ids)
        assert "hooks or another forward on model.layers.0" in caplog.text
        assert attachment.native_steps == 0
        assert len(calls) == 10
        hook.remove()
        assert torch.equal(greedy(model, ids).ids, ours.ids)
        assert attachment.native_steps == 9


class Adapted(nn.Linear):
    """What adapters do: the same weights, and something more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean()


def _adapt(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj.__class__ = Adapted


def _hook(model: PreTrainedModel) -> None:
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: None)


def _replace_forward(model: PreTrainedModel) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: x


def _add_module(model: PreTrainedModel) -> None:
    model.model.layers[3].mlp.extra = nn.Linear(4, 4)


def _add_parameter(model: PreTrainedModel) -> None:
    model.model.layers[3].register_parameter("gain", nn.Parameter(torch.ones(4)))


def _shift_norm(model: PreTrainedModel) -> None:
    class Shifted(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1.0

    model.model.norm.__class__ = Shifted


def _hook_all(model: PreTrainedModel) -> None:
    model.register_forward_hook(lambda module, inputs, output: None)


class Quantized(Tensor):
    """Says that it is a tensor of bfloat16, and holds something else."""


def _wrap_weight(model: PreTrainedModel) -> None:
    projection = model.model.layers[0].self_attn.o_proj
    projection.weight = nn.Parameter(projection.weight.detach().as_subclass(Quantized))


def _unequal(model: PreTrainedModel) -> None:
    mlp = model.model.layers[2].mlp
    mlp.gate_proj, mlp.up_proj = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)
    mlp.down_proj = nn.Linear(32, 64, bias=False)


def _widen_head(model: PreTrainedModel) -> None:
    model.lm_head = nn.Linear(64, model.config.vocab_size + 8, bias=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_widen_head, "a head of another shape than its embeddings"),
        (_adapt, "up_proj of the kind Adapted"),
        (_hook, "hooks or another forward on model.layers.1"),
        (_replace_forward, "hooks or another forward on model.layers.0.mlp"),
        (_add_module, "a mlp with extra"),
        (_add_parameter, "model.layers.3.gain, which has no place"),
        (_shift_norm, "norm of the kind Shifted"),
        (_hook_all, "hooks or another forward on itself"),
        (_wrap_weight, "o_proj.weight in another layout"),
        (_unequal, "blocks of several shapes"),
        (lambda model: model.half(), "in torch.float16 on cpu"),
        (lambda model: model.double(), "in torch.float64 on cpu"),
    ],
)
def test_what_a_native_step_would_miss_is_refused(
    change: Callable[[PreTrainedModel], None], said: str
) -> None:
    model = build(family("llama"))
    before = model.config._attn_implementation, set(vars(model))
    change(model)
    with pytest.raises(UnsupportedModel, match=said):
        icecache.attach(model, native=True)
    assert (model.config._attn_implementation, set(vars(model))) == before
    with icecache.attach(model) as attachment:
        greedy(model, prompt(), steps=3)
    assert attachment.native_steps == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gemma3", "layer 0 of gemma3_text keeps its own"),
        ("olmo2", "a block without input_layernorm and with post_feedforward_layernorm"),
        ("mixtral", "a mlp without down_proj"),
        # as Llama to look at, but its rotary embedding turns other pairs
        ("ernie4_5", "answers otherwise than the native step"),
        # as Llama up to some position
        ("ministral3", "answers otherwise than the native step"),
    ],
)
def test_other_families_say_why_not(name: str, said: str) -> None:
    model = build(MINISTRAL if name == "ministral3" else family(name))
    implementation = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=said):
        icecache.attach(model, native=True)
    assert model.config._attn_implementation == implementation


def test_a_model_that_answers_otherwise_goes_on_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = build(family("ernie4_5")), prompt()
    full = greedy(model, ids)
    with caplog.at_level(logging.WARNING), icecache.attach(model) as attachment:
        assert torch.equal(greedy(model, ids).ids, full.ids)
        greedy(model, ids)
    assert attachment.native_steps == 0
    # said once
    assert sum("no native decode steps" in r.message for r in caplog.records) == 1


def test_settings_that_contradict_each_other_are_refused() -> None:
    model = build(family("llama"))
    for other in ({"compile": True}, {"graph": True}):
        with pytest.raises(InputError, match="pass one as True"):
            icecache.attach(model, native=True, **other)
    for settings in ({"layer_reuse": 2}, {"max_host_memory": 1 << 30}):
        with pytest.raises(InputError, match="neither share selections nor ask for memory"):
            icecache.attach(model, native=True, **settings)
        with icecache.attach(model, **settings) as attachment:
            assert isinstance(attachment.decode, PacedStep)
    with pytest.raises(BackendUnavailable, match="the backend is 'torch' here"):
        icecache.attach(model, native=True, backend="torch")
    with icecache.attach(model, native=False, compile=False) as attachment:
        assert attachment.decode is None


def test_a_check_that_is_interrupted_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(family("ernie4_5")), prompt()
    full = greedy(model, ids)
    with icecache.attach(model) as attachment:

        def interrupt(*_: object) -> float:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(one_call, "_difference", interrupt)
            with pytest.raises(KeyboardInterrupt):
                greedy(model, ids)
        assert torch.equal(greedy(model, ids).ids, full.ids)
    assert attachment.native_steps == 0


def test_disable_compile_leaves_native_steps() -> None:
    model, ids = build(family("llama")), prompt()
    with icecache.attach(model, native=True, **SMALL) as attachment:
        greedy(model, ids, disable_compile=True)
    assert attachment.native_steps == 9
