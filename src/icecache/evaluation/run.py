"""A run: every method at every budget on every sample, from one prefill a sample."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icecache.errors import InputError
from icecache.evaluation.engine.attention import evaluation_attention
from icecache.evaluation.engine.decode import (
    Forced,
    Limits,
    Reference,
    Row,
    answer_freely,
    answer_reference,
    force,
)
from icecache.evaluation.engine.fidelity import LayerProbe, compare
from icecache.evaluation.engine.prefill import Prefill, run_prefill
from icecache.evaluation.environment import environment
from icecache.evaluation.methods.base import OpenCache
from icecache.evaluation.methods.registry import NamedMethod, parse_methods
from icecache.evaluation.prompting import Prompt, Prompter
from icecache.evaluation.results.record import Key, Record
from icecache.evaluation.results.store import ResultStore
from icecache.evaluation.settings import RunSettings
from icecache.evaluation.tasks.base import Source, Task
from icecache.evaluation.tasks.registry import find_tasks
from icecache.integrations.transformers.support import decoder_config, supports

__all__ = ["Progress", "Runner", "check_names"]

# tokens that may come on top where a prompt and its template meet
_JOINTS = 4


class Progress(Protocol):
    """Hears how a run goes on."""

    def plan(self, results: int, done: int) -> None:
        """Say how many results there will be and how many are there already."""

    def begin(self, what: str) -> None:
        """Say what comes next."""

    def advance(self) -> None:
        """Say that a result is there."""


class Cell(NamedTuple):
    """A method at a budget; None of a method without one."""

    method: NamedMethod
    budget: int | None


class Work(NamedTuple):
    """The prompts of one task at one length."""

    label: str
    task: Task
    prompts: list[Prompt]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A sample under way: its prefill and the full cache's answer."""

    work: Work
    prompt: Prompt
    prefill: Prefill
    limits: Limits
    reference: Reference


class Runner:
    """Runs an evaluation; what is wrong with samples or model is found before it begins.

    Parameters
    ----------
    settings : RunSettings
    model, tokenizer
        In evaluation mode.

    Raises
    ------
    InputError
        If a name is unknown, or samples cannot be read, are none, or are longer than the context.
    ConfigError
        As `check_names`.
    UnsupportedModel
        If the model cannot run with IceCache.
    """

    def __init__(
        self, settings: RunSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.settings, self._model, self._tokenizer = settings, model, tokenizer
        report = supports(model)
        report.require()
        if not report.managed:
            raise InputError(f"{report.model_type} has no layer with full attention to compare")
        self._cells = check_names(settings)
        self._full = self._cells[0]
        # the same whatever a session lacks, so that a resumed run rounds as an unbroken one
        self._groups = [
            [self._full, *self._cells[start : start + settings.together]]
            for start in range(1, max(2, len(self._cells)), settings.together)
        ]
        self._prompter = Prompter(tokenizer, settings.overlong)
        self.works = [self._choose(task, n) for task, n in self._tasks()]

    def run(self, folder: Path, progress: Progress, *, mix: bool = False) -> None:
        """Add to the folder whatever it lacks of this run; `mix` and errors: `ResultStore.open`."""
        session = {**environment(), "prompts": self._prompter.manner}
        with ResultStore.open(folder, self.settings, session, mix=mix) as store:
            jobs = self._jobs()
            keys = [_key(work, prompt, cell) for work, prompt in jobs for cell in self._cells]
            progress.plan(len(keys), sum(key in store for key in keys))
            for work, prompt in jobs:
                missing = [cell for cell in self._cells if _key(work, prompt, cell) not in store]
                if missing:
                    for record in self._measure(work, prompt, missing, progress):
                        store.add(record)
                        progress.advance()

    def _jobs(self) -> list[tuple[Work, Prompt]]:
        """Return the prompts by turns of the tasks, so that a run cut short has some of each."""
        longest = max(len(work.prompts) for work in self.works)
        return [
            (work, work.prompts[turn])
            for turn in range(longest)
            for work in self.works
            if turn < len(work.prompts)
        ]

    def _measure(
        self, work: Work, prompt: Prompt, missing: list[Cell], progress: Progress
    ) -> Iterator[Record]:
        with torch.inference_mode(), evaluation_attention(self._model):
            progress.begin(f"{work.label}: prefill of {len(prompt.token_ids):,} tokens")
            prefill = run_prefill(self._model, prompt.token_ids)
            asked = self._ask(work, prompt, prefill)
            for group in self._groups:
                if any(cell in missing for cell in group):
                    progress.begin(f"{work.label}: {_names(group)}")
                    for cell, record in zip(group, self._measure_group(asked, group)):
                        if cell in missing:
                            missing.remove(cell)
                            yield record

    def _ask(self, work: Work, prompt: Prompt, prefill: Prefill) -> _Asked:
        limits = Limits(
            self.settings.steps,
            self._max_new_tokens(work.task) if self.settings.answers else 1,
            lambda token_ids: work.task.is_done(self._decode(token_ids)),
        )
        full = self._open(self._full, prefill)
        reference = answer_reference(self._model, prefill, full.cache, limits)
        return _Asked(work, prompt, prefill, limits, reference)

    def _measure_group(self, asked: _Asked, group: list[Cell]) -> list[Record]:
        """Return a group's records, its methods having run as a batch beside the full cache."""
        runs = [self._open(cell, asked.prefill) for cell in group]
        probes = [LayerProbe(asked.prefill, run.attended) for run in runs]
        rows = [Row(x.cache, x.num_attended, probe) for x, probe in zip(runs, probes)]
        steps = min(self.settings.probed_steps, len(asked.reference.tokens))
        forced = force(self._model, asked.reference, rows, steps)
        for run in runs:
            run.close()
        answers = self._answer(asked, group, forced)
        sample = asked.prompt.sample
        records = []
        for cell, probe, seen, answer in zip(group, probes, forced, answers):
            agreement = compare(forced[0].log_probs, seen.log_probs)
            records.append(
                Record(
                    task=asked.work.label,
                    id=sample.id,
                    method=cell.method.label,
                    budget=cell.budget,
                    tokens=asked.prefill.num_tokens,
                    kl=agreement.kl,
                    top1=agreement.top1,
                    attended=seen.num_attended,
                    mass=tuple(probe.mass) if steps else (),
                    error=tuple(probe.error) if steps else (),
                    answer=answer,
                    score=None if answer is None else asked.work.task.score(answer, sample),
                )
            )
        return records

    def _answer(
        self, asked: _Asked, group: list[Cell], forced: list[Forced]
    ) -> list[str] | list[None]:
        """Return each method's answer; who likes the reference's tokens says what it says."""
        if not self.settings.answers:
            return [None] * len(group)
        reference = asked.reference
        answers = [reference.answer] * len(group)
        parted = [
            i
            for i, (cell, seen) in enumerate(zip(group, forced))
            if cell != self._full and not reference.is_shared_by(seen.best)
        ]
        runs = [self._open(group[i], asked.prefill) for i in parted]
        caches = [run.cache for run in runs]
        found = answer_freely(self._model, asked.prefill, caches, asked.limits)
        for i, token_ids in zip(parted, found, strict=True):
            answers[i] = token_ids
        for run in runs:
            run.close()
        return [asked.work.task.trim(self._decode(token_ids)) for token_ids in answers]

    def _open(self, cell: Cell, prefill: Prefill) -> OpenCache:
        return cell.method.method.open(self._model, prefill, cell.budget or 0)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def _tasks(self) -> Iterator[tuple[Task, int | None]]:
        for task in find_tasks(list(self.settings.tasks)):
            if task.is_generated:
                yield from ((task, length) for length in self.settings.lengths)
            else:
                yield task, None

    def _choose(self, task: Task, length: int | None) -> Work:
        settings = self.settings
        room = self._most_tokens(task)
        source = Source(
            data=settings.data,
            haystack=settings.haystack,
            length=room if length is None else length,
            tokenizer=self._tokenizer,
            seed=settings.seed,
            reserved=0 if length is None else self._reserved(task, length, room),
        )
        prompts = self._prompter.choose(task, task.load(source), room, settings.limit)
        ids = [prompt.sample.id for prompt in prompts]
        if len(set(ids)) < len(ids):
            raise InputError(f"{task.name}: several samples have the same id")
        return Work(task.name if length is None else f"{task.name}@{length}", task, prompts)

    def _reserved(self, task: Task, length: int, room: int) -> int:
        """Return what the template and further forced steps take of a length."""
        if length - max(task.max_new_tokens, self.settings.steps) > room:
            raise InputError(
                f"{task.name}: a length of {length:,} tokens is more than the model's context or "
                f"--max-length leave ({room:,} and the answer); lower --lengths"
            )
        further = max(0, self.settings.steps - task.max_new_tokens)
        return self._prompter.overhead(task) + further + _JOINTS

    def _most_tokens(self, task: Task) -> int:
        """Return the most tokens of a prompt: what is asked for and what the context leaves."""
        config = decoder_config(self._model.config)
        context = getattr(config, "max_position_embeddings", None)
        settings = self.settings
        ends = [] if settings.max_length is None else [settings.max_length]
        if context is not None:
            ends.append(context - max(settings.steps, self._max_new_tokens(task)))
        if not ends:
            raise InputError("the model names no longest context: give --max-length")
        return min(ends)

    def _max_new_tokens(self, task: Task) -> int:
        most = self.settings.max_new_tokens
        return task.max_new_tokens if most is None else min(most, task.max_new_tokens)


def check_names(settings: RunSettings) -> list[Cell]:
    """Return the methods at their budgets; takes no model, so that a wrong name costs no loading.

    Raises
    ------
    InputError
        On an unknown task or method.
    ConfigError
        On a method's parameter outside its rule, or a budget that it cannot keep.
    """
    find_tasks(list(settings.tasks))
    methods = parse_methods(list(settings.methods))
    for named, budget in product(methods, settings.budgets):
        named.method.check(budget)
    return [
        Cell(named, budget)
        for named in methods
        for budget in (sorted(settings.budgets) if named.method.has_budget else [None])
    ]


def _names(group: list[Cell]) -> str:
    """Return a group as a progress bar shows it."""
    names = [f"{cell.method.label} {cell.budget or ''}".strip() for cell in group]
    return ", ".join(names if len(names) < 4 else [*names[:2], "...", names[-1]])


def _key(work: Work, prompt: Prompt, cell: Cell) -> Key:
    return (work.label, prompt.sample.id, cell.method.label, cell.budget)
