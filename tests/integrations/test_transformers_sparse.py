"""Beyond the budget: the sparse path runs, answers, and knows nothing of padding."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from zoo import SMALL, build, family, greedy, left_padded

import icecache

SmolLM2 = tuple[Model, Tokenizer]

FILLER = (
    "The baker opened his shop at dawn and sold rye bread to the sailors. ",
    "A grey cat slept on the warm roof of the customs house. ",
    "The mayor complained about the noise of the new steam crane. ",
    "Two boys counted the gulls above the market square. ",
    "The schoolteacher read a long letter from her sister in the mountains. ",
    "Rain fell for an hour and filled the barrels behind the inn. ",
    "The blacksmith shod three horses before noon. ",
    "A merchant from the south unloaded crates of oranges and salt. ",
)
FACT = "The secret code of the old lighthouse is 7294. "


def _ask(tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    lines = [*(FILLER * 2), FACT, *(FILLER * 4)]
    text = "".join(lines) + "\n\nWhat is the secret code of the old lighthouse?"
    chat = [{"role": "user", "content": text}]
    return dict(
        tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    )


def test_a_hidden_fact_is_found_within_the_budget(smollm2: SmolLM2) -> None:
    model, tokenizer = smollm2
    inputs = _ask(tokenizer)
    length = inputs["input_ids"].shape[1]
    with icecache.attach(model, budget=96, sink=8, window=16) as attachment:
        output = model.generate(**inputs, max_new_tokens=14, do_sample=False)
        stats = attachment.cache.stats()
    assert "7294" in tokenizer.decode(output[0, length:])
    steps = output.shape[1] - length - 1
    assert length > 5 * stats.budget
    assert {layer.sparse_steps for layer in stats.layers.values()} == {steps}
    assert {layer.dense_steps for layer in stats.layers.values()} == {1}
    assert stats.sparse_steps == steps * model.config.num_hidden_layers
    assert 0.9 * 96 < stats.tokens_attended <= 96
    assert stats.tokens == length + steps
    assert stats.pages > 0
    assert stats.host_bytes > 0


def test_a_second_turn_extends_the_cache(smollm2: SmolLM2) -> None:
    model, tokenizer = smollm2
    inputs = _ask(tokenizer)
    with icecache.attach(model):
        cache = icecache.IceCache(model, budget=96, sink=8, window=16)
        options = {"past_key_values": cache, "max_new_tokens": 16, "do_sample": False}
        first = model.generate(**inputs, **options)
        before = cache.stats()
        question = "<|im_end|>\n<|im_start|>user\nRepeat only the code.<|im_end|>\n"
        more = tokenizer(
            question + "<|im_start|>assistant\n", return_tensors="pt", add_special_tokens=False
        ).input_ids
        both = torch.cat([first, more], 1)
        second = model.generate(both, attention_mask=torch.ones_like(both), **options)
    after = cache.stats()
    assert "7294" in tokenizer.decode(second[0, both.shape[1] :])
    # one exact pass over the question, everything else within the budget; nothing read twice
    assert after.tokens == second.shape[1] - 1
    assert after.dense_steps - before.dense_steps == model.config.num_hidden_layers
    assert after.sparse_steps > before.sparse_steps
    for layer in cache.managed.values():
        layer.core.check_integrity()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma4", "gpt_oss", "llama4", "qwen3_next"])
def test_rows_of_a_padded_batch_equal_single_rows(name: str) -> None:
    model = build(family(name))
    lengths = [47, 90, 61]
    ids, mask = left_padded(lengths)
    with icecache.attach(model, **SMALL) as attachment:
        batch = greedy(model, ids, mask)
        assert attachment.cache.stats().sparse_steps > 0
        for row, length in enumerate(lengths):
            alone = greedy(model, ids[row : row + 1, -length:])
            assert torch.equal(batch.ids[row, -10:], alone.ids[0, -10:])
            # another choice of leaves would show in the first digits
            assert (batch.logits[:, row] - alone.logits[:, 0]).abs().max() <= 1e-3


@pytest.mark.parametrize("size", [16, 25])
def test_chunks_of_a_prompt_are_exact_beyond_the_budget(size: int) -> None:
    model = build(family("llama"))
    ids, mask = left_padded([80, 90])
    full = greedy(model, ids, mask, steps=1)
    with icecache.attach(model, **SMALL) as attachment:
        ours = greedy(model, ids, mask, steps=1, prefill_chunk_size=size)
        assert attachment.cache.stats().pages > 0
    assert (ours.logits - full.logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}],
    ids=["beams", "prompt lookup"],
)
def test_every_token_has_its_place_after(options: dict[str, Any]) -> None:
    model = build(family("gemma3"))
    ids, mask = left_padded([60, 90] if "num_beams" in options else [90])
    with icecache.attach(model, **SMALL) as attachment:
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=20, pad_token_id=0, do_sample=False, **options
        )
        cache = attachment.cache
    assert output.shape[1] == 110
    assert cache.stats().tokens == 109
    for layer in cache.managed.values():
        layer.core.check_integrity()


def test_several_queries_after_the_budget_are_exact_and_causal() -> None:
    model = build(family("qwen3"))
    ids, _ = left_padded([100])
    with torch.no_grad(), icecache.attach(model, **SMALL):
        want = model(ids).logits[:, 90:]
        cache = icecache.IceCache(model, **SMALL)
        model(ids[:, :90], past_key_values=cache)
        got = model(ids[:, 90:], past_key_values=cache).logits
    assert cache.stats().sparse_steps == 0
    assert (got - want).abs().max() <= 1e-5
