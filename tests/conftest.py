"""Fixtures that every test folder shares."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from icecache.integrations.embedded import load

SmolLM2 = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> SmolLM2:
    """The embedded model in float32 and its tokenizer; converted in the user's cache when new."""
    return load("embedded", torch.float32)


@pytest.fixture(scope="session")
def tiny_model(smollm2: SmolLM2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer llama and the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = smollm2[1]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
