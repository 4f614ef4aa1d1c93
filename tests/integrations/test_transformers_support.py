"""`supports`: per layer what is managed, what stays with the model, and what cannot run."""

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config
from zoo import build, family

import icecache
from icecache.errors import UnsupportedModel

TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def test_layers_of_a_mixed_model() -> None:
    for given in (build(family("gemma4")), build(family("gemma4")).config):
        report = icecache.supports(given)
        assert [layer.status for layer in report.layers] == ["model", "managed", "model", "model"]
        assert [layer.kind for layer in report.layers][1:3] == ["full_attention", "dummy"]
        assert report.managed == (1,)
        assert report.unsupported == ()
        assert report.is_supported
        text = str(report)
        assert "gemma4_text: 1 of 4 layers managed" in text
        assert "sliding window" in text
        assert "another layer's keys" in text


@pytest.mark.parametrize(
    ("model_type", "extra", "reason"),
    [
        ("deepseek_v2", {}, "MLA"),
        ("deepseek_v3", {}, "MLA"),
        ("t5", {}, "encoder-decoder"),
        ("bart", {}, "encoder-decoder"),
        ("bloom", {}, "attention interface"),
        ("falcon", {}, "attention interface"),
        ("minimax", {}, "cache of its own kind"),
        ("falcon_h1", {}, "hybrid keeps more than keys and values"),
        ("gpt2", {"add_cross_attention": True, "is_decoder": True}, "cross-attention"),
        ("llama", {"is_causal": False}, "not causal"),
    ],
)
def test_what_cannot_run_says_why(model_type: str, extra: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(model_type, **extra)
    report = icecache.supports(config)
    assert not report.is_supported
    assert report.managed == ()
    assert reason in str(report)
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        icecache.IceCache(config)
    assert "run it without IceCache" in str(caught.value)


@pytest.mark.parametrize("model_type", ["bloom", "falcon"])
def test_a_model_that_cannot_run_is_left_as_it_was(model_type: str) -> None:
    names = {"n_layer": 2, "n_head": 2} if model_type == "bloom" else {"num_hidden_layers": 2}
    config = AutoConfig.for_model(model_type, **{**TINY, **names})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    state = dict(vars(model))
    with pytest.raises(UnsupportedModel, match="attention interface"):
        icecache.attach(model)
    assert vars(model) == state
    assert model.config._attn_implementation == "eager"


def test_a_model_without_full_attention_warns() -> None:
    model = build(family("mistral-sliding"))
    with pytest.warns(UserWarning, match="manages nothing"):
        cache = icecache.IceCache(model)
    assert cache.managed == {}
    assert cache.stats().layers == {}
    with pytest.warns(UserWarning, match="manages nothing"), icecache.attach(model):
        pass


def test_composite_models_are_judged_by_their_decoder() -> None:
    config = AutoConfig.for_model("llava", text_config=GPT2Config(n_layer=3).to_dict())
    report = icecache.supports(config)
    assert report.managed == (0, 1, 2)
