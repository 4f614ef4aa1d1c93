"""SnapKV: what the prompt's last queries look at is kept."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from icecache.errors import ConfigError
from icecache.evaluation.engine.attend import Rule, Selection
from icecache.evaluation.engine.prefill import OBSERVED
from icecache.evaluation.engine.tokens import Tokens
from icecache.evaluation.methods.base import SelectionMethod

__all__ = ["SnapKV"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV(SelectionMethod):
    """SnapKV (arXiv 2404.14469): evicts at the end of the prefill, once.

    The attention of the prompt's last `window` queries to each earlier token, summed over them,
    smoothed over `kernel` neighbours and averaged over the query heads of a KV head, says what is
    kept; the observing tokens themselves are kept too. There is no sink beside that.

    Budget: kept prompt tokens + the latest `window` tokens. The prompt tokens that were selected
    stay for the whole answer; the window, at first the observing tokens, slides on to generated
    ones, so that a step never attends more than the budget. A prompt with fewer tokens than the
    budget leaves the rest of it to the window. With `grows` it is as in the paper: the observing
    tokens are kept too, and the answer's come on top, one more with every step.
    Extra memory: none, or that of the answer; the rest of the prompt is gone.

    Parameters
    ----------
    kernel : int
        Odd width of the smoothing, in tokens.
    grows : bool
        Attend more than the budget, by the tokens that were generated.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    kernel: int = 5
    grows: bool = False

    def __post_init__(self) -> None:
        # the zero-argument form of super does not work in a dataclass with slots
        SelectionMethod.__post_init__(self)
        if self.kernel % 2 == 0:
            raise ConfigError(f"snapkv: kernel must be odd, got {self.kernel}")
        if self.window > OBSERVED:
            raise ConfigError(
                f"snapkv: window must be at most {OBSERVED}, the queries that a prefill keeps, "
                f"got {self.window}"
            )

    def policy(self, budget: int, layer: int) -> "_Snapshot":
        """Return a policy that keeps what was best at the end of the prefill."""
        return _Snapshot(budget, self.window, self.kernel, self.grows)


class _Snapshot:
    def __init__(self, budget: int, window: int, kernel: int, grows: bool) -> None:
        self._budget, self._window, self._kernel = budget, window, kernel
        self._grows, self._num_prompt = grows, 0
        self._kept: Tensor | None = None

    def start(self, tokens: Tokens) -> None:
        self._num_prompt = tokens.num_tokens
        scores = observed_scores(tokens, self._window, self._kernel)
        num_others = int(scores[0].isfinite().sum())
        room = min(self._budget - self._window, num_others)
        self._kept = scores[:, :num_others].topk(room, dim=1).indices

    def select(self, query: Tensor, tokens: Tokens, rule: Rule) -> Selection:
        assert self._kept is not None
        num_latest = self._budget - self._kept.shape[1]
        if self._grows:
            # all but those prompt tokens that were dropped
            dropped = max(0, self._num_prompt - self._budget)
            num_latest = tokens.num_tokens - dropped - self._kept.shape[1]
        latest = torch.arange(tokens.num_tokens - num_latest, tokens.num_tokens)
        return Selection(torch.cat([self._kept, latest.expand(query.shape[0], -1)], 1))


def observed_scores(tokens: Tokens, window: int, kernel: int) -> Tensor:
    """Return the score of every prompt token, ``[G, T]``; the observing ones have infinity."""
    prompt = tokens.prompt
    window = min(window, prompt.queries.shape[2])
    queries = prompt.queries[:, :, -window:]
    logits = torch.einsum("grwd,gtd->grwt", queries, prompt.keys).float() * prompt.scaling
    num_tokens = logits.shape[-1]
    later = torch.ones(window, num_tokens, dtype=torch.bool).triu(num_tokens - window + 1)
    shares = logits.masked_fill(later, float("-inf")).softmax(-1).sum(2)[..., : -window or None]
    if shares.shape[-1]:
        shares = avg_pool1d(shares, kernel, stride=1, padding=kernel // 2)
    scores = shares.mean(1)
    return torch.cat([scores, scores.new_full((len(scores), window), float("inf"))], 1)
