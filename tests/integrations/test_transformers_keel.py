"""With room for the whole context, SmolLM2 says the same with IceCache as with the full cache."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, pipeline
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

import icecache

ROOM = 2048
STORY = (
    "The lighthouse keeper wrote in his log every evening. On Monday the wind came from the north "
    "and two ships passed. On Tuesday a whale was seen near the harbour, and the children ran down "
    "to the pier. On Wednesday the lamp went out for an hour, and the keeper repaired it with a "
    "copper wire that he had found in the cellar. On Thursday nothing happened at all. "
)
LONG, MIDDLE, SHORT = (
    STORY * 2 + "What did the keeper find in the cellar, and what did he use it for?",
    STORY + "Which animal was seen on Tuesday?",
    "Name the capital of France.",
)

SmolLM2 = tuple[Model, Tokenizer]


@pytest.fixture(scope="module")
def tokens(smollm2: SmolLM2) -> Callable[..., dict[str, torch.Tensor]]:
    _, tokenizer = smollm2
    tokenizer.padding_side = "left"

    def encode(*prompts: str) -> dict[str, torch.Tensor]:
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        return dict(tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False))

    return encode


def _both(
    model: Model, inputs: dict[str, torch.Tensor], **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate with the full cache and with IceCache."""
    kwargs = {"max_new_tokens": 16, "do_sample": False, **kwargs}
    full = model.generate(**inputs, **kwargs)
    with icecache.attach(model, budget=ROOM) as attachment:
        ours = model.generate(**inputs, **kwargs)
        stats = attachment.cache.stats()
    assert stats.dense_steps >= len(stats.layers) == model.config.num_hidden_layers
    assert stats.sparse_steps == 0
    return full, ours


def test_one_prompt(smollm2: SmolLM2, tokens: Any) -> None:
    full, ours = _both(smollm2[0], tokens(LONG), max_new_tokens=24)
    assert torch.equal(ours, full)


@pytest.mark.parametrize("size", [50, 64])
def test_chunked_prefill(smollm2: SmolLM2, tokens: Any, size: int) -> None:
    full, ours = _both(smollm2[0], tokens(LONG), prefill_chunk_size=size)
    assert torch.equal(ours, full)


@pytest.mark.parametrize("size", [None, 150])
def test_left_padded_batch_of_three(smollm2: SmolLM2, tokens: Any, size: int | None) -> None:
    inputs = tokens(LONG, MIDDLE, SHORT)
    assert inputs["attention_mask"].sum(1).unique().numel() == 3
    full, ours = _both(smollm2[0], inputs, prefill_chunk_size=size)
    assert torch.equal(ours, full)


def test_two_turns(smollm2: SmolLM2, tokens: Any) -> None:
    model, tokenizer = smollm2

    def talk(cache: Any) -> torch.Tensor:
        options = {"past_key_values": cache, "max_new_tokens": 12, "do_sample": False}
        first = model.generate(**tokens(MIDDLE), **options)
        question = (
            "<|im_end|>\n<|im_start|>user\nAnd on Wednesday?<|im_end|>\n<|im_start|>assistant\n"
        )
        more = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids
        both = torch.cat([first, more], 1)
        return model.generate(both, attention_mask=torch.ones_like(both), **options)

    full = talk(DynamicCache(config=model.config))
    with icecache.attach(model, budget=ROOM):
        cache = icecache.IceCache(model, budget=ROOM)
        ours = talk(cache)
        assert torch.equal(ours, full)
        # all but the last token, which nobody has attended yet
        assert cache.num_tokens == cache.get_seq_length() == ours.shape[1] - 1


def test_prompt_lookup(smollm2: SmolLM2, tokens: Any) -> None:
    full, ours = _both(smollm2[0], tokens(LONG), prompt_lookup_num_tokens=5)
    assert torch.equal(ours, full)


def test_assisted_by_another_model(smollm2: SmolLM2, tokens: Any) -> None:
    model, _ = smollm2
    config = AutoConfig.for_model(
        "llama",
        vocab_size=model.config.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
    )
    torch.manual_seed(0)
    assistant = AutoModelForCausalLM.from_config(config).eval()
    # its drafts are wrong: every step is taken back
    full, ours = _both(model, tokens(MIDDLE), assistant_model=assistant, max_new_tokens=8)
    assert torch.equal(ours, full)


@pytest.mark.parametrize("prompts", [(MIDDLE,), (MIDDLE, SHORT)], ids=["one", "padded"])
def test_beam_search(smollm2: SmolLM2, tokens: Any, prompts: tuple[str, ...]) -> None:
    full, ours = _both(smollm2[0], tokens(*prompts), num_beams=3, max_new_tokens=10)
    assert torch.equal(ours, full)


def test_two_caches_in_two_threads(smollm2: SmolLM2, tokens: Any) -> None:
    model, _ = smollm2
    options = {"max_new_tokens": 12, "do_sample": False}
    prompts = [tokens(MIDDLE), tokens(SHORT)]
    full = [model.generate(**prompt, **options) for prompt in prompts]
    with icecache.attach(model, budget=ROOM), ThreadPoolExecutor(2) as pool:
        caches = [icecache.IceCache(model, budget=ROOM) for _ in prompts]
        jobs = [
            pool.submit(model.generate, **prompt, past_key_values=cache, **options)
            for prompt, cache in zip(prompts, caches)
        ]
        ours = [job.result() for job in jobs]
    assert all(torch.equal(a, b) for a, b in zip(ours, full))
    assert [cache.get_seq_length() for cache in caches] == [x.shape[1] - 1 for x in full]


def test_pipeline(smollm2: SmolLM2) -> None:
    model, tokenizer = smollm2
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False}
    full = generator(MIDDLE, **options)
    with icecache.attach(model, budget=ROOM) as attachment:
        assert generator(MIDDLE, **options) == full
        assert attachment.cache.stats().dense_steps == 8 * model.config.num_hidden_layers
