"""Whatever would make an answer wrong in silence raises, names the mend and leaves the cache be."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from zoo import SMALL, build, family, greedy, left_padded

import icecache
from icecache.cache.estimate import transient_bytes
from icecache.errors import (
    ConfigError,
    HostMemoryExceeded,
    IceCacheError,
    InputError,
    UnsupportedModel,
)
from icecache.integrations.transformers.threads import most_unfinished
from icecache.store import memory

IDS, MASK = left_padded([30, 40])


@pytest.fixture
def model() -> PreTrainedModel:
    return build(family("llama"))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _columns(cache: icecache.IceCache) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_wrong_attention_implementation(name: str, implementation: str) -> None:
    model = build(family(name))
    model.set_attn_implementation(implementation)
    cache = icecache.IceCache(model)
    with pytest.raises(InputError, match=r"another attention.*icecache\.attach\(model\)"):
        model(IDS, past_key_values=cache)
    assert set(_columns(cache)) == {0}
    # the same cache serves once the implementation is right
    with icecache.attach(model):
        logits = model(IDS, past_key_values=cache).logits
    assert set(_columns(cache)) == {40}
    assert torch.allclose(logits, model(IDS).logits, atol=1e-5)


def test_a_wrong_attention_implementation_in_mid_conversation(model: PreTrainedModel) -> None:
    cache = icecache.IceCache(model)
    with icecache.attach(model):
        model(IDS, past_key_values=cache)
    with pytest.raises(InputError, match="another attention"):
        model(IDS[:, :1], past_key_values=cache)
    assert _columns(cache) == [40] * 4


def test_a_foreign_cache(model: PreTrainedModel) -> None:
    with icecache.attach(model):
        past = model(IDS, past_key_values=DynamicCache(config=model.config)).past_key_values
        with pytest.raises(InputError, match=r"another cache.*IceCache\(model\)"):
            model(IDS[:, :1], past_key_values=past)
        with pytest.raises(InputError, match=r"generate would run with a DynamicCache"):
            model.generate(IDS, past_key_values=DynamicCache(), max_new_tokens=2)
        with pytest.raises(InputError, match=r"cache_implementation='static'.*drop it"):
            model.generate(IDS, cache_implementation="static", max_new_tokens=2)
        with pytest.raises(InputError, match="drop use_cache=False"):
            model.generate(IDS, use_cache=False, max_new_tokens=2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_four_dimensional_mask(name: str, dtype: torch.dtype) -> None:
    model = build(family(name))
    cache = icecache.IceCache(model)
    causal = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    mask = causal if dtype == torch.bool else torch.where(causal, 0.0, -1e9)
    masks: Any = mask
    if name == "gemma3":
        masks = {"full_attention": mask, "sliding_attention": mask}
    with icecache.attach(model), pytest.raises(InputError, match=r"custom 4-D masks.*2-D mask"):
        model(IDS, attention_mask=masks, past_key_values=cache)
    assert set(_columns(cache)) == {0}


def test_output_attentions(model: PreTrainedModel) -> None:
    cache = icecache.IceCache(model)
    with icecache.attach(model):
        with pytest.raises(InputError, match=r"output_attentions=True.*detach"):
            model(IDS, output_attentions=True, past_key_values=cache)
        with pytest.raises(InputError, match="output_attentions=True"):
            model.generate(
                IDS, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2
            )
    assert _columns(cache) == [0] * 4
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(InputError, match=r"model\.config\.output_attentions"):
        icecache.attach(model)


def test_training(model: PreTrainedModel) -> None:
    with icecache.attach(model):
        with torch.enable_grad():
            logits = model(IDS, past_key_values=icecache.IceCache(model)).logits
            with pytest.raises(InputError, match="inference only"):
                logits.sum().backward()
        with pytest.raises(InputError, match=r"model\.eval\(\)"):
            model.train()(IDS, past_key_values=icecache.IceCache(model))


def _with_padding(model: PreTrainedModel, cache: icecache.IceCache) -> None:
    model(IDS, attention_mask=MASK, past_key_values=cache)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 41), "differs from before"),
        (torch.ones(2, 1), "must cover the whole conversation, 41 tokens"),
        (torch.cat([MASK, MASK], 1), "must cover the whole conversation, 41 tokens"),
    ],
    ids=["changed", "short", "long"],
)
def test_a_mask_that_does_not_continue(model: PreTrainedModel, mask: Tensor, message: str) -> None:
    with icecache.attach(model):
        cache = icecache.IceCache(model)
        _with_padding(model, cache)
        hidden = mask.clone()
        hidden[0, 12:14] = 0
        with pytest.raises(InputError, match=message):
            model(IDS[:, :1], attention_mask=hidden, past_key_values=cache)
        assert _columns(cache) == [40] * 4


def test_padding_on_the_right(model: PreTrainedModel) -> None:
    cache = icecache.IceCache(model)
    with icecache.attach(model), pytest.raises(InputError, match="padding_side"):
        model(IDS, attention_mask=MASK.flip(1), past_key_values=cache)
    assert _columns(cache) == [0] * 4


@pytest.mark.parametrize("settings", [{}, SMALL], ids=["room", "sparse"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_another_batch_in_mid_conversation(name: str, settings: dict[str, Any]) -> None:
    model = build(family(name))
    with icecache.attach(model):
        cache, twin = (icecache.IceCache(model, **settings) for _ in range(2))
        for each in (cache, twin):
            model(IDS, past_key_values=each)
        for wrong in (IDS[:1, :1], torch.cat([IDS, IDS])[:, :1]):
            with pytest.raises(InputError, match="batch size must stay 2"):
                model(wrong, past_key_values=cache)
        assert _columns(cache) == [40] * 4
        assert cache.stats() == twin.stats()
        after = [model(IDS[:, :1], past_key_values=each).logits for each in (cache, twin)]
    assert torch.equal(*after)


@pytest.mark.parametrize("settings", [{}, SMALL], ids=["room", "sparse"])
@pytest.mark.parametrize("past", [0, 40])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_forward_that_fails_half_way(name: str, past: int, settings: dict[str, Any]) -> None:
    model = build(family(name))
    weight = model.model.layers[3].self_attn.k_proj.weight
    with icecache.attach(model):
        cache, twin = (icecache.IceCache(model, **settings) for _ in range(2))
        for each in (cache, twin) if past else ():
            model(IDS, past_key_values=each)
        good = weight[0, 0].clone()
        weight[0, 0] = float("nan")
        new = IDS[:, : 2 if past else 40]
        with pytest.raises(InputError, match="finite"):
            model(new, past_key_values=cache)
        weight[0, 0] = good
        assert _columns(cache) == [past] * 4
        after = [model(new, past_key_values=each).logits for each in (cache, twin)]
    assert torch.equal(*after)
    assert _columns(cache) == [past + new.shape[1]] * 4


def test_a_forward_that_fails_leaves_no_mask(model: PreTrainedModel) -> None:
    weight = model.model.layers[3].self_attn.k_proj.weight
    with icecache.attach(model):
        cache = icecache.IceCache(model)
        good = weight[0, 0].clone()
        weight[0, 0] = float("nan")
        with pytest.raises(InputError, match="finite"):
            model(IDS, attention_mask=MASK, past_key_values=cache)
        weight[0, 0] = good
        model(IDS, past_key_values=cache)
        hidden = torch.tensor([[0, 1], [1, 1]])
        mask = torch.cat([torch.ones_like(MASK), hidden], 1)
        model(IDS[:, :2], attention_mask=mask, past_key_values=cache)
    assert _columns(cache) == [42] * 4


def test_a_forward_that_somebody_else_broke(model: PreTrainedModel) -> None:
    cache = icecache.IceCache(model)
    with icecache.attach(model):
        model(IDS, past_key_values=cache)
        last, model.model.layers[3] = model.model.layers[3], torch.nn.Linear(1, 1)
        with pytest.raises((TypeError, AttributeError)):
            model(IDS[:, :2], past_key_values=cache)
        model.model.layers[3] = last
        with pytest.raises(InputError, match=r"half-way.*holds 40 tokens again: repeat"):
            model(IDS[:, :2], past_key_values=cache)
        assert _columns(cache) == [40] * 4
        model(IDS[:, :2], past_key_values=cache)
    assert _columns(cache) == [42] * 4


def test_a_failure_that_cannot_be_taken_back(model: PreTrainedModel) -> None:
    weight = model.model.layers[3].self_attn.k_proj.weight
    with icecache.attach(model):
        cache = icecache.IceCache(model, **SMALL, draft=2)
        model(IDS, past_key_values=cache)
        good = weight[0, 0].clone()
        weight[0, 0] = float("nan")
        with pytest.raises(InputError, match="finite"):
            model(IDS, past_key_values=cache)
        weight[0, 0] = good
        for _ in range(2):
            with pytest.raises(InputError, match=r"cannot be taken back.*call reset\(\)"):
                model(IDS, past_key_values=cache)
        cache.reset()
        model(IDS, past_key_values=cache)
    assert _columns(cache) == [40] * 4


def test_an_empty_prompt(model: PreTrainedModel) -> None:
    with icecache.attach(model):
        with pytest.raises(InputError, match="at least one token, got an empty one"):
            model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)
        with pytest.raises(InputError, match="at least one token, got an empty one"):
            model.generate(IDS, attention_mask=MASK * torch.tensor([[0], [1]]), max_new_tokens=2)
        cache = icecache.IceCache(model)
        for shape in ((2, 2, 0, 16), (0, 2, 3, 16)):
            with pytest.raises(InputError, match="at least one token, got batch"):
                cache.update(torch.ones(shape), torch.ones(shape), layer_idx=0)
        model(IDS, past_key_values=cache)
    assert _columns(cache) == [40] * 4


def test_memory_is_asked_for_all_layers_at_once(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(200).view(1, -1) % 90
    with icecache.attach(model):
        cache = icecache.IceCache(model)
        model(ids[:, :100], past_key_values=cache)
        before = _columns(cache)
        one_layer = cache.layers[0].core.estimate_bytes(1, 100)
        unfinished = most_unfinished() * transient_bytes(2, 100, 16, torch.float32)
        # enough for the first layer and what it needs in passing, but not for all four
        monkeypatch.setattr(memory, "available_host_bytes", lambda: 3 * one_layer)
        with pytest.raises(
            HostMemoryExceeded, match=f"{4 * one_layer + unfinished:,} bytes needed"
        ):
            model(ids[:, 100:], past_key_values=cache)
        monkeypatch.undo()
        assert _columns(cache) == before
        model(ids[:, 100:], past_key_values=cache)
    assert _columns(cache) == [200] * 4


@pytest.mark.parametrize("call", [icecache.attach, icecache.IceCache], ids=["attach", "IceCache"])
def test_settings(model: PreTrainedModel, call: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="budget"):
        call(model, budget=8)
    with pytest.raises(ConfigError, match="unknown setting 'bugdet'"):
        call(model, bugdet=128)
    with pytest.raises(ConfigError, match="unknown setting 'bugdet'"):
        call(model, icecache.IceCacheConfig(), bugdet=128)
    assert model.config._attn_implementation == "sdpa"
    settings = icecache.IceCacheConfig(budget=128)
    assert call(model, settings, window=16).settings == settings.replace(window=16)


def test_a_model_that_changes_its_values_behind_the_cache() -> None:
    model = build(family("diffllama"))
    with icecache.attach(model), pytest.raises(UnsupportedModel, match="changes its values"):
        model(IDS, past_key_values=icecache.IceCache(model))


def test_values_of_another_width() -> None:
    model = build(family("mimo_v2_flash"))
    with icecache.attach(model), pytest.raises(UnsupportedModel, match="side by side"):
        model(IDS, past_key_values=icecache.IceCache(model))


def test_what_an_attention_function_may_not_drop(model: PreTrainedModel) -> None:
    call = AttentionInterface._global_mapping["icecache"]
    with icecache.attach(model):
        cache = icecache.IceCache(model)
        module = model.model.layers[0].self_attn
        for extra, error in (
            ({"position_bias": torch.zeros(1)}, "position bias"),
            ({"is_causal": False}, "both directions"),
            ({"dropout": 0.1}, "eval"),
            ({"indices": torch.zeros(1)}, "selection"),
        ):
            keys, values = cache.update(*torch.ones(2, 1, 2, 3, 16), layer_idx=0)
            with pytest.raises(IceCacheError, match=error):
                call(module, torch.ones(1, 4, 3, 16), keys, values, None, **extra)
            assert _columns(cache) == [0] * 4


def test_another_models_cache() -> None:
    cache = icecache.IceCache(build(family("llama")).config)
    bigger = build(family("llama"), num_hidden_layers=6)
    with icecache.attach(bigger), pytest.raises(InputError, match="layer 4 is not among the 4"):
        bigger(IDS, past_key_values=cache)


def test_a_closed_cache(model: PreTrainedModel) -> None:
    with icecache.attach(model):
        cache = icecache.IceCache(model)
        greedy(model, IDS, past_key_values=cache, steps=2)
        cache.close()
        assert cache.num_tokens == 0
        with pytest.raises(InputError, match="closed"):
            model(IDS, past_key_values=cache)
