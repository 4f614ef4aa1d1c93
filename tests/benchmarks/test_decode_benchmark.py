"""The decode benchmark on a tiny model: both caches hold the same context, one of them sparsely."""

import decode
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel


@pytest.fixture
def model() -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_both_caches_are_measured_on_the_same_context(model: PreTrainedModel) -> None:
    with torch.no_grad():
        ice, dynamic = decode.measure(model, 300, 8, {"budget": 64})
    assert (ice["cache"], dynamic["cache"]) == ("icecache", "dynamic")
    assert ice["context"] == dynamic["context"] == 300
    assert ice["ratio"] == pytest.approx(dynamic["tpot_ms_median"] / ice["tpot_ms_median"])
    # 2 layers, keys and values, 2 KV heads of 16 float32 numbers; 16 steps were taken
    assert dynamic["kv_bytes"] == 316 * 2 * 2 * 2 * 16 * 4


def test_the_filled_cache_runs_sparse_steps(model: PreTrainedModel) -> None:
    with torch.no_grad():
        caches = decode.filled_caches(model, 300, {"budget": 64})
        with decode.attach(model, budget=64):
            decode.run_block(model, caches["icecache"], 3)
        decode.run_block(model, caches["dynamic"], 3)
    stats = caches["icecache"].stats()
    assert stats.sparse_steps == 6
    assert stats.tokens == caches["dynamic"].get_seq_length() == 303
