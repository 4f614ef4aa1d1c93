"""From samples to token ids: templates, lengths, slices."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from icecache.errors import InputError
from icecache.evaluation.prompting import Prompter
from icecache.evaluation.tasks.base import Sample, Source, Task
from tests.conftest import SmolLM2


@pytest.fixture(scope="module")
def tokenizer(smollm2: SmolLM2) -> PreTrainedTokenizerBase:
    return smollm2[1]


def _echo(count: int = 5, words: int = 40) -> Task:
    def load(source: Source) -> Any:
        for number in range(count):
            text = " ".join(f"w{i}" for i in range(words + number))
            yield Sample(id=str(number), prompt=f"start {text} end", answers=("x",))

    def score(answer: str, sample: Sample) -> float:
        return 0.0

    return Task(name="echo", group="test", load=load, score=score, max_new_tokens=4)


def _choose(prompter: Prompter, task: Task, most: int, limit: int | None) -> list[Any]:
    return prompter.choose(
        task, task.load(Source(data=None, haystack=None, length=1, tokenizer=None)), most, limit
    )


def test_a_chat_template_is_used_where_the_task_and_the_model_have_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (prompt,) = _choose(Prompter(tokenizer, "skip"), _echo(), 2000, 1)
    text = tokenizer.decode(prompt.token_ids)
    assert "<|im_start|>user\nstart w0" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_without_a_chat_template_the_prompt_is_plain(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    plain = AutoTokenizer.from_pretrained(tiny_model)
    plain.chat_template = None
    (prompt,) = _choose(Prompter(plain, "skip"), _echo(), 2000, 1)
    assert plain.decode(prompt.token_ids) == prompt.sample.prompt


def test_overlong_prompts_lose_their_middle_or_are_passed_over(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    task = _echo()
    whole = _choose(Prompter(tokenizer, "middle"), task, 2000, None)
    most = len(whole[2].token_ids)
    cut = _choose(Prompter(tokenizer, "middle"), task, most, None)
    assert [len(prompt.token_ids) for prompt in cut[:3]] == [
        len(prompt.token_ids) for prompt in whole[:3]
    ]
    assert len(cut) == 5
    for prompt in cut[3:]:
        assert most - 4 <= len(prompt.token_ids) <= most
        text = tokenizer.decode(prompt.token_ids)
        assert "start w0" in text and " end<|im_end|>" in text
    kept = _choose(Prompter(tokenizer, "skip"), task, most, None)
    assert [prompt.sample.id for prompt in kept] == ["0", "1", "2"]


@pytest.mark.parametrize("overlong", ["middle", "skip"])
def test_a_generated_prompt_that_is_too_long_is_an_error(
    overlong: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = dataclasses.replace(_echo(), is_generated=True)
    with pytest.raises(InputError, match=r"at most 60 fit; lower --lengths"):
        _choose(Prompter(tokenizer, overlong), task, 60, 2)
    with pytest.raises(InputError, match="echo is generated without end: give --limit"):
        _choose(Prompter(tokenizer, overlong), task, 2000, None)


def test_an_empty_slice_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    prompter = Prompter(tokenizer, "skip")
    with pytest.raises(InputError, match="echo: no sample with a prompt of at most 20 tokens"):
        _choose(prompter, _echo(), 20, None)
    with pytest.raises(InputError, match="no sample"):
        _choose(prompter, _echo(count=0), 2000, None)
