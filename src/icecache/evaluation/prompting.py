"""From a sample to the token ids of its prompt."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from icecache.errors import InputError
from icecache.evaluation.settings import Overlong
from icecache.evaluation.tasks.base import Sample, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt", "Prompter"]

_PLAIN = "plain: the sample's text as it is, then the beginning of its answer"
_CHAT = "in the model's chat template, plain on few-shot and code tasks"


class Prompt(NamedTuple):
    """A sample and what the model reads."""

    sample: Sample
    token_ids: list[int]


class Prompter:
    """Wraps samples in the model's chat template, and cuts or passes over what is too long.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Without a chat template prompts are plain; `manner` says so.
    overlong : {"middle", "skip"}
        ``"middle"``: cut the middle out of a prompt that is too long, as LongBench does;
        ``"skip"``: pass over it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", overlong: Overlong) -> None:
        self._tokenizer, self._overlong = tokenizer, overlong

    @property
    def manner(self) -> str:
        """How prompts are put, in words."""
        return _PLAIN if self._tokenizer.chat_template is None else _CHAT

    def overhead(self, task: Task) -> int:
        """Return the tokens that the template adds."""
        return len(self._encode(task, Sample(id="", prompt="", answers=())))

    def choose(
        self, task: Task, samples: Iterator[Sample], most_tokens: int, limit: int | None
    ) -> list[Prompt]:
        """Return the first `limit` prompts of at most `most_tokens` tokens.

        Raises
        ------
        InputError
            If none is left, the task never ends and there is no limit, or a generated prompt is too
            long.
        """
        if limit is None and task.is_generated:
            raise InputError(f"{task.name} is generated without end: give --limit")
        if limit is not None and limit < 1:
            raise InputError(f"--limit must be at least 1, got {limit}: an empty slice")
        found = list(islice(self._fitting(task, samples, most_tokens), limit))
        if not found:
            raise InputError(
                f"{task.name}: no sample with a prompt of at most {most_tokens:,} tokens; raise "
                "--max-length, or use --overlong middle"
            )
        return found

    def _fitting(self, task: Task, samples: Iterator[Sample], most_tokens: int) -> Iterator[Prompt]:
        for sample in samples:
            token_ids = self._encode(task, sample)
            if len(token_ids) > most_tokens and task.is_generated:
                # a needle may lie in the middle, and those to come are as long
                raise InputError(
                    f"{task.name}: a prompt of {len(token_ids):,} tokens, at most {most_tokens:,} "
                    "fit; lower --lengths"
                )
            if len(token_ids) > most_tokens and self._overlong == "middle":
                token_ids = self._encode(task, self._cut(task, sample, most_tokens))
            if len(token_ids) <= most_tokens:
                yield Prompt(sample, token_ids)

    def _cut(self, task: Task, sample: Sample, most_tokens: int) -> Sample:
        plain = self._tokenizer(sample.prompt, add_special_tokens=False, verbose=False)["input_ids"]
        bare = Sample(id=sample.id, prompt="", answers=sample.answers, prefix=sample.prefix)
        half = (most_tokens - len(self._encode(task, bare))) // 2
        while half > 0:
            text = self._tokenizer.decode(plain[:half]) + self._tokenizer.decode(plain[-half:])
            shorter = Sample(
                id=sample.id,
                prompt=text,
                answers=sample.answers,
                prefix=sample.prefix,
                classes=sample.classes,
            )
            excess = len(self._encode(task, shorter)) - most_tokens
            if excess <= 0:
                return shorter
            # two halves put together may break into more tokens than they had
            half -= max(1, excess // 2)
        return sample

    def _encode(self, task: Task, sample: Sample) -> list[int]:
        is_chat = task.is_chat and self._tokenizer.chat_template is not None
        text = sample.prompt
        if is_chat:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        ids: list[int] = self._tokenizer(
            text + (sample.prefix.lstrip() if is_chat else sample.prefix),
            add_special_tokens=not is_chat,
            verbose=False,
        )["input_ids"]
        return ids
