"""`IceCache` as a `Cache`: rows, cropping, resetting; attaching and detaching."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from zoo import SMALL, build, family, greedy, left_padded

import icecache
from icecache.errors import InputError

IDS, MASK = left_padded([30, 40, 35])
ROOM: dict[str, Any] = {}


@pytest.fixture(params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(family(request.param))


def _filled(model: PreTrainedModel, cache: Any, ids: Any = IDS, mask: Any = MASK) -> Any:
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def _next(model: PreTrainedModel, cache: Any, ids: torch.Tensor, mask: Any = None) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits


def _continued(mask: torch.Tensor, num_new: int) -> torch.Tensor:
    return torch.cat([mask, mask.new_ones(mask.shape[0], num_new)], 1)


@pytest.mark.parametrize(
    ("name", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([2, 2, 0]), [2, 2, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "select by mask", "repeat"],
)
@pytest.mark.parametrize("settings", [ROOM, SMALL], ids=["room", "sparse"])
def test_rows(
    model: PreTrainedModel, settings: dict[str, Any], name: str, argument: Any, rows: list[int]
) -> None:
    with icecache.attach(model):
        cache = _filled(model, icecache.IceCache(model, **settings))
        getattr(cache, name)(argument)
        # the mask follows its rows, and so does the check that it does not change
        mask = _continued(MASK[rows], 2)
        ids = IDS[rows, :2]
        got = _next(model, cache, ids, mask)
        want = _next(
            model, _filled(model, icecache.IceCache(model), IDS[rows], MASK[rows]), ids, mask
        )
        assert (got - want).abs().max() <= 1e-5
        with pytest.raises(InputError, match="batch size must stay"):
            _next(model, cache, torch.cat([ids, ids]))
    for layer in cache.managed.values():
        layer.core.check_integrity()


@pytest.mark.parametrize("settings", [ROOM, SMALL], ids=["room", "sparse"])
def test_crop_takes_tokens_back(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    with icecache.attach(model):
        cache = icecache.IceCache(model, **settings)
        cache.activate_past_recording()
        _filled(model, cache)
        want = _next(model, cache, IDS[:, :3], _continued(MASK, 3))
        cache.crop(-3)
        assert cache.get_seq_length() == 40
        cache.crop(0)
        got = _next(model, cache, IDS[:, :3], _continued(MASK, 3))
        assert (got - want).abs().max() <= 1e-5
        assert cache.num_tokens == 43


def test_crop_that_cannot_be(model: PreTrainedModel) -> None:
    with icecache.attach(model):
        cache = icecache.IceCache(model, **SMALL, draft=4)
        with pytest.raises(InputError, match="cannot remove 1 tokens of the 0"):
            cache.crop(-1)
        cache.activate_past_recording()
        _filled(model, cache, mask=None)
        _next(model, cache, IDS[:, :2])
        _next(model, cache, IDS[:, :1])
        before = cache.stats()
        for wrong, message in ((3, "negative number"), (-44, "of the 43"), (-42, "window")):
            with pytest.raises(InputError, match=message):
                cache.crop(wrong)
        assert [layer.get_seq_length() for layer in cache.layers] == [43] * 4
        assert cache.stats() == before


def test_crop_of_tokens_that_are_padding_in_some_rows(model: PreTrainedModel) -> None:
    with icecache.attach(model):
        cache = icecache.IceCache(model)
        cache.activate_past_recording()
        _filled(model, cache)
        mask = torch.cat([MASK, torch.tensor([[1, 1], [0, 1], [1, 1]])], 1)
        _next(model, cache, IDS[:, :2], mask)
        with pytest.raises(InputError, match="padding in some rows"):
            cache.crop(-2)
        cache.crop(-1)
        assert [layer.get_seq_length() for layer in cache.layers] == [41] * 4
        # the tokens that were cropped may be anything the next time
        _next(model, cache, IDS[:, :1], mask)


def test_crop_of_a_sliding_layer_that_keeps_no_past() -> None:
    model = build(family("gemma3"))
    with icecache.attach(model):
        cache = _filled(model, icecache.IceCache(model))
        with pytest.raises(InputError, match=r"layer 0.*activate_past_recording"):
            cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == [40] * 4


def test_reset_starts_a_new_conversation(model: PreTrainedModel) -> None:
    with icecache.attach(model):
        cache = icecache.IceCache(model, **SMALL)
        first = greedy(model, IDS, MASK, past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == cache.num_tokens == cache.stats().sparse_steps == 0
        # another batch size and another mask: nothing is left of the last one
        ids, mask = left_padded([50, 20], seed=2)
        assert greedy(model, ids, mask, past_key_values=cache).ids.shape == (2, 60)
        cache.reset()
        again = greedy(model, IDS, MASK, past_key_values=cache)
    assert torch.equal(first.logits, again.logits)


def test_what_transformers_asks_of_a_cache(model: PreTrainedModel) -> None:
    cache = icecache.IceCache(model)
    stock = DynamicCache(config=model.config)
    with icecache.attach(model):
        _filled(model, cache)
    _filled(model, stock)
    assert cache.get_seq_length() == stock.get_seq_length() == 40
    assert cache.is_sliding == stock.is_sliding
    assert len(cache) == len(stock) == 4
    assert not cache.is_compileable
    for index in range(4):
        assert cache.get_mask_sizes(3, index) == stock.get_mask_sizes(3, index)
        assert cache.get_max_length(index) == stock.get_max_length(index)
    cache.offload(3, only_non_sliding=False)
    cache.layers[3].prefetch()
    assert cache.num_tokens == 40
    assert cache.stats().tokens == 40


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
def test_beams_and_drafts_on_sliding_layers(options: dict[str, Any]) -> None:
    model = build(family("gemma3"))
    ids, mask = (IDS, MASK) if "num_beams" in options else (IDS[1:2].repeat(1, 2), None)
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    full = model.generate(ids, pad_token_id=0, **settings, **options)
    with icecache.attach(model):
        ours = model.generate(ids, pad_token_id=0, **settings, **options)
    assert torch.equal(ours, full)


def test_an_attached_assistant_with_sliding_layers() -> None:
    model, assistant = build(family("llama")), build(family("gemma3"))
    ids = IDS[1:2]
    full = greedy(model, ids).ids
    with icecache.attach(assistant) as attachment:
        ours = greedy(model, ids, assistant_model=assistant).ids
        assert attachment.cache.stats().dense_steps > 0
    assert torch.equal(ours, full)


def test_several_samples_of_one_prompt(model: PreTrainedModel) -> None:
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8}
    torch.manual_seed(3)
    full = model.generate(IDS[1:2], pad_token_id=0, **options)
    with icecache.attach(model):
        torch.manual_seed(3)
        ours = model.generate(IDS[1:2], pad_token_id=0, **options)
    assert torch.equal(ours, full)


def test_attach_and_detach_leave_no_trace(model: PreTrainedModel) -> None:
    before, state = greedy(model, IDS, MASK), dict(vars(model))
    implementation = model.config._attn_implementation
    attachment = icecache.attach(model, **SMALL)
    assert model.config._attn_implementation == "icecache"
    sparse = greedy(model, IDS, MASK)
    assert attachment.cache.stats().sparse_steps > 0
    with pytest.raises(InputError, match="attached to IceCache already"):
        icecache.attach(model)
    for _ in range(2):
        attachment.detach()
    assert model.config._attn_implementation == implementation
    assert vars(model) == state
    after = greedy(model, IDS, MASK)
    assert torch.equal(before.logits, after.logits)
    assert not torch.equal(before.logits, sparse.logits)
    # and again, as a context manager that an error leaves
    with pytest.raises(KeyError), icecache.attach(model):
        raise KeyError
    assert vars(model) == state


def test_the_cache_of_the_last_generate_goes_on(model: PreTrainedModel) -> None:
    with icecache.attach(model) as attachment:
        first = greedy(model, IDS[1:2], steps=4)
        cache = attachment.cache
        more = torch.cat([first.ids, IDS[:1, 31:]], 1)
        second = greedy(model, more, steps=4, past_key_values=cache)
        assert attachment.cache is cache
        assert torch.equal(second.ids, greedy(model, more, steps=4).ids)
        assert attachment.cache is not cache


def test_other_models_stay_as_they_are() -> None:
    model, other = build(family("llama")), build(family("llama"))
    with icecache.attach(model):
        assert other.config._attn_implementation == "sdpa"
        output = other.generate(IDS, max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0)
    assert type(output.past_key_values) is DynamicCache


def test_a_forward_without_a_cache_is_plain(model: PreTrainedModel) -> None:
    with torch.no_grad():
        full = model(IDS, attention_mask=MASK, use_cache=False).logits
        with icecache.attach(model, **SMALL):
            ours = model(IDS, attention_mask=MASK, use_cache=False).logits
    real = MASK.bool()
    assert (ours[real] - full[real]).abs().max() <= 1e-5


def test_importing_icecache_registers_nothing() -> None:
    code = (
        "import sys, icecache; assert 'transformers' not in sys.modules\n"
        "from icecache import IceCache\n"
        "from transformers import AttentionInterface as A\n"
        "assert 'icecache' not in A._global_mapping\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
