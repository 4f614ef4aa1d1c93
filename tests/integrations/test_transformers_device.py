"""The device path through a model's own generate, on a CPU with the twins of the kernels."""

from typing import Any

import pytest
import torch
from device_model import SMALL, generate, make_model, prompt
from transformers import LlamaForCausalLM

import icecache
from icecache import IceCacheConfig
from icecache.cache.device.layer import DeviceLayer
from icecache.errors import (
    BackendUnavailable,
    ConfigError,
    HostMemoryExceeded,
    InputError,
)
from tests.conftest import SmolLM2


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Of two layers."""
    return make_model()


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("offload", ["host", "none"])
def test_a_budget_for_everything_changes_no_token(
    model: LlamaForCausalLM, offload: str, kwargs: dict[str, Any]
) -> None:
    """Past the budget of 48 while decoding: 40 tokens of prompt, then room for all again."""
    ids = prompt(40)
    truth = generate(model, ids, **kwargs)
    with icecache.attach(model, **{**SMALL, "budget": 64, "offload": offload}) as attachment:
        assert torch.equal(generate(model, ids, **kwargs), truth)
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
    ids = prompt(300)
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
    ids, mask = prompt(150, 3), torch.zeros(3, 150, dtype=torch.long)
    for row, length in enumerate(lens):
        mask[row, 150 - length :] = 1
    with icecache.attach(model, **SMALL):
        together = generate(model, ids * mask, attention_mask=mask)
        alone = [generate(model, ids[i : i + 1, 150 - n :]) for i, n in enumerate(lens)]
    assert torch.equal(together, torch.cat(alone))


def test_a_second_turn_extends_the_conversation(model: LlamaForCausalLM) -> None:
    """What the first turn left is attended exactly by the second one's prompt."""
    first, more = prompt(120), prompt(30)
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


@pytest.mark.parametrize("free", ["for all", "for one", "for none"])
def test_memory_is_asked_for_where_pages_will_live(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, free: str
) -> None:
    """Half of the device's free memory holds both layers, one of two, or nothing."""
    core = DeviceLayer(
        IceCacheConfig(**SMALL), num_kv_heads=2, head_dim=16, dtype=torch.float32, device="cpu"
    )
    shape = core._settings.pool_shape(1, 150, 60, 30)._replace(offloads=False)
    room = {"for all": 5, "for one": 3, "for none": 0}[free] * shape.device_bytes
    monkeypatch.setattr("icecache.cache.device.settings.free_device_bytes", lambda device: room)
    monkeypatch.setattr("icecache.store.memory.available_host_bytes", lambda: 1000)
    with icecache.attach(model, **SMALL):
        cache = icecache.IceCache(model, **SMALL)
        if free == "for all":
            model(prompt(150), past_key_values=cache)
            assert {layer.offload for layer in cache.stats().layers.values()} == {"none"}
            return
        taken = "icecache.cache.device.index.DevicePool"
        monkeypatch.setattr(taken, lambda *_: pytest.fail("taken before it was asked for"))
        with pytest.raises(HostMemoryExceeded):
            model(prompt(150), past_key_values=cache)
        assert cache.get_seq_length() == 0


def test_what_the_device_path_cannot_do_is_said(model: LlamaForCausalLM, tmp_path: Any) -> None:
    with pytest.raises(BackendUnavailable, match="graph=True needs a CUDA device"):
        icecache.attach(model, **SMALL, graph=True)
    with pytest.raises(BackendUnavailable, match="graph=True needs a model on a CUDA device"):
        icecache.attach(model, graph=True)
    with pytest.raises(InputError, match="compile=True compiles what graph=True records"):
        icecache.attach(model, **SMALL, compile=True)
    refused = pytest.raises(ConfigError, match="leaf_size must be at most half of page_size")
    with refused, icecache.attach(model, **{**SMALL, "leaf_size": 6}):
        generate(model, prompt(30))
    with icecache.attach(model, **SMALL) as attachment:
        generate(model, prompt(60))
        with pytest.raises(InputError, match="device path cannot be saved"):
            attachment.cache.save(tmp_path / "snapshot")
