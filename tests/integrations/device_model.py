"""A small model for the device path's tests, and settings that make it sparse soon."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["SMALL", "generate", "make_model", "prompt"]

SMALL: dict[str, Any] = {
    "backend": "twin", "budget": 48, "sink": 4, "window": 8, "leaf_size": 4, "leaf_target": 3,
    "page_size": 8, "draft": 8, "segment_tokens": 32,
}  # fmt: skip


def make_model() -> LlamaForCausalLM:
    """Return a random llama of two layers whose greedy tokens depend on the context."""
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


def prompt(length: int, batch: int = 1) -> Tensor:
    """Return random tokens, the same for the same length."""
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def generate(model: LlamaForCausalLM, ids: Tensor, **kwargs: Any) -> Tensor:
    """Return the tokens that a model adds."""
    settings = {"max_new_tokens": 20, "do_sample": False, **kwargs}
    return model.generate(ids, **settings)[:, ids.shape[1] :]
