"""Decoding after a prefill: the full cache's answer, the same tokens forced, and free answers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from icecache.evaluation.engine.attention import Probe
from icecache.evaluation.engine.prefill import Prefill

__all__ = ["Forced", "Limits", "Reference", "answer_freely", "answer_reference", "force"]

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


class Forced(NamedTuple):
    """A method's distributions on the reference's tokens; shapes as in `Reference`."""

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
    best = int(prefill.logits.argmax())
    answer.hear(best)
    tokens = [_best_other(prefill.logits, ends)]
    kept: list[Tensor] = []
    heard: list[int] = []
    decisive = 0
    while len(heard) < limits.steps or not answer.is_over:
        logits = _step(model, cache, tokens[-1], None)
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
    model: PreTrainedModel,
    reference: Reference,
    cache: Cache,
    attended: Callable[[], float],
    probe: Probe | None = None,
    probed_steps: int = 0,
) -> Forced:
    """Feed the reference's tokens to another cache; the probe sees the first `probed_steps`."""
    kept: list[Tensor] = []
    best: list[int] = []
    for step, token in enumerate(reference.tokens):
        logits = _step(model, cache, token, probe if step < probed_steps else None)
        if step < len(reference.log_probs):
            kept.append(logits.log_softmax(-1))
        best.append(int(logits.argmax()))
    return Forced(torch.stack(kept), best, attended())


@torch.inference_mode()
def answer_freely(
    model: PreTrainedModel, prefill: Prefill, cache: Cache, limits: Limits
) -> list[int]:
    """Answer greedily with any cache; returns the token ids, the end of text left out."""
    answer = _Answer(limits, _end_token_ids(model))
    token = int(prefill.logits.argmax())
    answer.hear(token)
    while not answer.is_over:
        token = int(_step(model, cache, token, None).argmax())
        answer.hear(token)
    return answer.tokens


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


def _step(model: PreTrainedModel, cache: Cache, token: int, probe: Probe | None) -> Tensor:
    extra = {} if probe is None else {"probe": probe}
    output = model(
        input_ids=torch.tensor([[token]], device=model.device),
        past_key_values=cache,
        use_cache=True,
        **extra,
    )
    logits: Tensor = output.logits[0, -1].float()
    return logits


def _best_other(logits: Tensor, banned: set[int]) -> int:
    allowed = logits.clone()
    # a config may name ends that its vocabulary does not have
    allowed[[token for token in banned if token < len(logits)]] = float("-inf")
    return int(allowed.argmax())
