"""A layer, and a model's generate, run by the kernels: what the twins give."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import icecache
from icecache import IceCacheConfig, Phase
from icecache.cache.device.layer import DeviceLayer

# room for few leaves and pages: interpreted, every tile of them costs
SMALL: dict[str, Any] = {
    "budget": 22, "sink": 2, "window": 4, "leaf_size": 4, "leaf_target": 3, "page_size": 8,
    "draft": 8, "segment_tokens": 32, "max_context": 1, "offload": "host",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icecache.cache.device.settings._MARGIN", 8)


def _layer(backend: str, device: torch.device, **settings: Any) -> DeviceLayer:
    config = IceCacheConfig.from_kwargs(**{**SMALL, **settings}, backend=backend)
    shape = {"num_kv_heads": 1, "head_dim": 16, "dtype": torch.float32}
    return DeviceLayer(config, **shape, device=device)


@pytest.mark.parametrize("settings", [{}, {"offload": "none"}, {"page_dtype": "int8"}], ids=str)
def test_a_layer_gives_what_the_twins_give(settings: dict[str, Any], device: torch.device) -> None:
    layers = [_layer(name, device, **settings) for name in ("triton", "twin")]
    prompt = torch.randn(2, 1, 1, 40, 16).to(device)
    for layer in layers:
        layer.prefill(*prompt)
        layer.attend(torch.randn(1, 2, 40, 16).to(device))
    for _ in range(3):
        query = torch.randn(1, 2, 1, 16).to(device)
        token = torch.randn(2, 1, 1, 1, 16).to(device)
        ours, truth = (layer.step(query, *token) for layer in layers)
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-5)
    for layer in layers:
        assert layer.phase is Phase.INDEXED
        layer.check_integrity()
    ours, truth = (layer.stats() for layer in layers)
    assert (ours.backend, ours.leaves, ours.pages) == ("triton", truth.leaves, truth.pages)
    assert ours.inserted == truth.inserted == 3
    assert (ours.pages_selected, ours.pages_fetched) == (truth.pages_selected, truth.pages_fetched)


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def test_generate_runs_by_the_kernels(device: torch.device) -> None:
    model, ids = _model().to(device), torch.randint(1, 61, (1, 30)).to(device)
    tokens = {}
    for backend in ("triton", "twin"):
        with icecache.attach(model, **SMALL, backend=backend) as attachment:
            tokens[backend] = model.generate(ids, max_new_tokens=4, do_sample=False)
            assert attachment.cache.stats().sparse_steps == 3
    assert torch.equal(tokens["triton"], tokens["twin"])


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"offload": "none"}, {"page_dtype": "int8"}], ids=str)
def test_a_recorded_step_gives_the_tokens_of_the_cpu(settings: dict[str, Any]) -> None:
    """On CUDA: eager, recorded and the twins on a CPU generate the same tokens in float32."""
    model, ids = _model(), torch.randint(1, 61, (1, 200))
    with icecache.attach(model, **{**SMALL, **settings}, backend="twin"):
        truth = model.generate(ids, max_new_tokens=40, do_sample=False)
    model = model.cuda()
    for graph in (False, True):
        chosen = {**SMALL, **settings, "backend": "auto"}
        with icecache.attach(model, **chosen, graph=graph) as attachment:
            tokens = model.generate(ids.cuda(), max_new_tokens=40, do_sample=False)
            assert attachment.cache.stats().layers[0].backend == "triton"
            assert (attachment.compiled_steps > 0) == graph
        assert torch.equal(tokens.cpu(), truth)
