"""`supports`: per layer what is managed, what stays with the model, and what cannot run."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlavaForConditionalGeneration
from transformers.masking_utils import create_causal_mask
from zoo import COMMON, build, family, greedy, left_padded

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


def test_composite_models_are_judged_and_attached_by_their_decoder() -> None:
    decoder = {**COMMON, "model_type": "llama"}
    eyes = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model(
        "llava", text_config=decoder, vision_config=eyes, image_token_index=127
    )
    assert icecache.supports(config).managed == (0, 1, 2, 3)
    model = LlavaForConditionalGeneration(config).eval()
    ids, _ = left_padded([40])
    ids[0, 5:9] = 127
    image = torch.randn(1, 3, 28, 28)
    full = greedy(model, ids, pixel_values=image)
    with icecache.attach(model) as attachment:
        assert model.config.vision_config._attn_implementation == "sdpa"
        ours = greedy(model, ids, pixel_values=image)
        assert len(attachment.cache.stats().layers) == 4
    assert torch.equal(ours.ids, full.ids)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_image_tokens_that_see_each_other_get_their_full_mask() -> None:
    model = build(family("gemma3"))
    with icecache.attach(model):
        mask = create_causal_mask(
            model.config,
            torch.zeros(1, 6, 64),
            None,
            icecache.IceCache(model),
            block_sequence_ids=torch.tensor([[-1, 0, 0, 0, -1, -1]]),
        )
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0, 1, 3]
