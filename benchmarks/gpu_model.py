"""Models of known shapes with random weights on a device, and contexts to fill caches with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

_CENTRES, _SPREAD = 512, 0.7

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=1 << 20,
    rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
)
QWEN3_4B = Qwen3Config(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=1 << 20,
    rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    tie_word_embeddings=True,
)
TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    initializer_range=0.2,
)
SHAPES: dict[str, Any] = {"llama-3.1-8b": LLAMA_8B, "qwen3-4b": QWEN3_4B, "tiny": TINY}


class Context(NamedTuple):
    """Keys and values of one layer: `[1, num_kv_heads, tokens, head_dim]` twice."""

    keys: Tensor
    values: Tensor


def make_model(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=dtype)
    return model.eval()


def make_context(
    config: Any, tokens: int, layer: int, device: torch.device, dtype: torch.dtype
) -> Context:
    """Clustered random keys, as trained models have them, and random values."""
    generator = torch.Generator(device).manual_seed(layer)
    heads, dim = config.num_key_value_heads, config.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    label = torch.randint(_CENTRES, (heads, tokens), generator=generator, device=device)
    centres = normal(heads, _CENTRES, dim)
    keys = centres.gather(1, label[..., None].expand(-1, -1, dim))
    keys += _SPREAD * normal(heads, tokens, dim)
    return Context(keys[None], normal(1, heads, tokens, dim))


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads: all but the table of input embeddings."""
    total = sum(weight.nbytes for weight in model.parameters())
    tied = model.config.tie_word_embeddings
    return total if tied else total - model.get_input_embeddings().weight.nbytes
