"""LongBench prompts that a model can take whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from icecache.errors import InputError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One LongBench prompt with its token ids."""

    task: str
    id: str
    token_ids: list[int]

    @property
    def key(self) -> str:
        return f"{self.task}/{self.id}"


def choose_prompts(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    shortest: int,
    longest: int,
    tasks: list[str] | None = None,
) -> list[Prompt]:
    """`count` prompts of `shortest` to `longest` tokens, the same on every run.

    Tasks in alphabetical order give their fitting prompts in file order, one a round; where one
    round has more tasks than are needed, they are taken evenly spaced. Nothing is truncated.
    """
    fitting = []
    for path in _task_files(folder, tasks):
        found = _fitting_prompts(path, tokenizer, shortest, longest)
        if found:
            fitting.append(found)
    chosen: list[Prompt] = []
    for turn in range(max((len(one) for one in fitting), default=0)):
        available = [one[turn] for one in fitting if turn < len(one)]
        wanted = min(count - len(chosen), len(available))
        chosen += [available[i * len(available) // wanted] for i in range(wanted)]
    if len(chosen) < count:
        raise InputError(
            f"{folder} has {len(chosen)} prompts of {shortest}-{longest} tokens, {count} wanted"
        )
    return chosen


def _task_files(folder: Path, tasks: list[str] | None) -> list[Path]:
    files = sorted(folder.glob("*.jsonl"))
    if tasks is not None:
        files = [path for path in files if path.stem in tasks]
    if not files:
        raise InputError(f"no *.jsonl of LongBench tasks in {folder}")
    return files


def _fitting_prompts(
    path: Path, tokenizer: PreTrainedTokenizerBase, shortest: int, longest: int
) -> list[Prompt]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        # tokens average 1.5-5 characters: a prompt this long is not worth tokenizing
        if len(sample["prompt"]) > 12 * longest:
            continue
        token_ids = tokenizer(sample["prompt"])["input_ids"]
        if shortest <= len(token_ids) <= longest:
            found.append(Prompt(str(sample["task"]), str(sample["id"]), token_ids))
    return found
