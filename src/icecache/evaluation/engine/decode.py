"""Decoding after a prefill: the full cache's answer, the same tokens forced, and free answers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from icecache.evaluation.engine.attention import Probe
from icecache.evaluation.engine.prefill import Prefill
from icecache.evaluation.engine.rows import step_rows

__all__ = ["Forced", "Limits", "Reference", "Row", "answer_freely", "answer_reference", "force"]

IsDone = Callable[[list[int]], bool]


class Reference(NamedTuple):
    """The full cache's own greedy answer.

    Attributes
    ----------
    tokens : list of int
        Fed to every method, one by one; an end of text is passed over, so that there are always
        as many as were asked for.
    log_probs : shape [steps, vocabulary], float32. After each of the first tokens.
    best : list of int
        The likeliest token after each of `tokens`, the end of text included.
    answer : list of int
        What the model says: `tokens` up to its first end of text, stop or the length limit.
    decisive : int
        How many of `best` decide the answer: a method that likes the same tokens says the same.
    """

    tokens: list[int]
    log_probs: Tensor
    best: list[int]
    answer: list[int]
    decisive: int

    def is_shared_by(self, best: Sequence[int]) -> bool:
        """Return whether a method that likes `best` on these tokens gives this answer."""
        return list(best[: self.decisive]) == self.best[: self.decisive]


class Row(NamedTuple):
    """A method's cache of the prompt, for `force`.

    Attributes
    ----------
    cache : Cache
    num_attended : callable. Tokens that a KV head attended in the last step.
    probe : Probe, optional. Sees the first steps.
    """

    cache: Cache
    num_attended: Callable[[], float]
    probe: Probe | None = None


class Forced(NamedTuple):
    """What a method makes of the reference's tokens.

    Attributes
    ----------
    log_probs : shape [steps, vocabulary], float32. After each of the first tokens.
    best : list of int. The likeliest token after each of the tokens.
    num_attended : float
    """

    log_probs: Tensor
    best: list[int]
    num_attended: float


class Limits(NamedTuple):
    """How far an answer goes.

    Attributes
    ----------
    steps : int. Steps whose distributions are kept.
    max_new_tokens : int
    is_done : callable. Whether the answer so far, token ids, has reached a stop.
    """

    steps: int
    max_new_tokens: int
    is_done: IsDone


def _end_token_ids(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


@torch.inference_mode()
def answer_reference(
    model: PreTrainedModel, prefill: Prefill, cache: Cache, limits: Limits
) -> Reference:
    """Answer greedily with a cache that attends to everything."""
    ends = _end_token_ids(model)
    answer = _Answer(limits, ends)
    answer.hear(int(prefill.logits.argmax()))
    tokens = [_best_other(prefill.logits, ends)]
    kept: list[Tensor] = []
    heard: list[int] = []
    decisive = 0
    while len(heard) < limits.steps or not answer.is_over:
        logits = step_rows(model, [cache], tokens[-1:], [None])[0]
        if len(kept) < limits.steps:
            kept.append(logits.log_softmax(-1))
        heard.append(int(logits.argmax()))
        if not answer.is_over:
            decisive = len(heard)
            answer.hear(heard[-1])
        tokens.append(_best_other(logits, ends))
    return Reference(tokens[: len(heard)], torch.stack(kept), heard, answer.tokens, decisive)


@torch.inference_mode()
def force(
    model: PreTrainedModel, reference: Reference, rows: Sequence[Row], probed_steps: int = 0
) -> list[Forced]:
    """Feed the reference's tokens to all rows, a batch; probes see the first `probed_steps`.

    Where rows are to be compared to the bit, their company has to be the same: a product over other
    rows may round otherwise.
    """
    caches = [row.cache for row in rows]
    kept: list[Tensor] = []
    best: list[Tensor] = []
    for step, token in enumerate(reference.tokens):
        probes = [row.probe if step < probed_steps else None for row in rows]
        logits = step_rows(model, caches, [token] * len(rows), probes)
        if step < len(reference.log_probs):
            kept.append(logits.log_softmax(-1))
        best.append(logits.argmax(-1))
    likeliest = torch.stack(best, 1).tolist()
    return [
        Forced(torch.stack([log_probs[i] for log_probs in kept]), likeliest[i], row.num_attended())
        for i, row in enumerate(rows)
    ]


@torch.inference_mode()
def answer_freely(
    model: PreTrainedModel, prefill: Prefill, caches: Sequence[Cache], limits: Limits
) -> list[list[int]]:
    """Answer greedily with each of the caches; returns token ids, the end of text left out."""
    ends = _end_token_ids(model)
    first = int(prefill.logits.argmax())
    answers = [_Answer(limits, ends) for _ in caches]
    for answer in answers:
        answer.hear(first)
    last = [first] * len(caches)
    while going := [i for i, answer in enumerate(answers) if not answer.is_over]:
        logits = step_rows(
            model, [caches[i] for i in going], [last[i] for i in going], [None] * len(going)
        )
        for i, token in zip(going, logits.argmax(-1).tolist(), strict=True):
            answers[i].hear(token)
            last[i] = token
    return [answer.tokens for answer in answers]


class _Answer:
    """An answer as it grows: over at the end of text, at a stop, or at its longest."""

    def __init__(self, limits: Limits, ends: set[int]) -> None:
        self.tokens: list[int] = []
        self.is_over = False
        self._limits, self._ends = limits, ends

    def hear(self, token: int) -> None:
        if self.is_over:
            return
        if token in self._ends:
            self.is_over = True
            return
        self.tokens.append(token)
        is_full = len(self.tokens) >= self._limits.max_new_tokens
        self.is_over = is_full or self._limits.is_done(self.tokens)


def _best_other(logits: Tensor, banned: set[int]) -> int:
    allowed = logits.clone()
    # a config may name ends that its vocabulary does not have
    allowed[[token for token in banned if token < len(logits)]] = float("-inf")
    return int(allowed.argmax())
