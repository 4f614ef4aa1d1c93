"""PQCache: logits estimated by product quantisation of the keys."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from icecache.errors import InputError
from icecache.evaluation.engine.attend import Rule
from icecache.evaluation.engine.tokens import Tokens
from icecache.evaluation.methods.base import SelectionMethod, TokenScores

__all__ = ["PQCache"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PQCache(SelectionMethod):
    """PQCache (arXiv 2407.12820): tokens by logits that product quantisation estimates.

    The prompt's keys are cut into `parts`, each clustered into ``2**bits`` centroids; a token's
    logit is estimated by the sum of its centroids' dot products, and the best tokens are attended
    exactly. Generated tokens take their nearest centroids when they leave the window.

    Budget: sink + window + chosen tokens. Extra memory: `parts` codes of `bits` bits a token and KV
    head and ``2**bits`` centroids a head, beside the full cache in host memory.

    Parameters
    ----------
    parts, bits : int
        Of the quantisation; the paper's setting for LongBench.
    rounds : int
        Of the clustering.
    seed : int
        Which keys the clustering begins with.
    """

    name: ClassVar[str] = "pqcache"
    paper: ClassVar[str] = "PQCache, arXiv 2407.12820"
    parts: int = 2
    bits: int = 6
    rounds: int = 10
    seed: int = 0

    def policy(self, budget: int, layer: int) -> "_Quantised":
        """Return a policy over codes."""
        return _Quantised(budget, self, self.seed + layer)


class _Quantised(TokenScores):
    def __init__(self, budget: int, method: PQCache, seed: int) -> None:
        super().__init__(budget, method.sink, method.window)
        self._method, self._seed = method, seed
        self._centroids: Tensor | None = None  # [G * parts, centroids, D / parts]
        self._codes: Tensor | None = None  # [G * parts, tokens], from the sink on

    def start(self, tokens: Tokens) -> None:
        keys = self._parts_of(tokens, tokens.num_prompt - self.window)
        if keys.shape[1]:
            self._centroids = cluster(keys, 2**self._method.bits, self._method.rounds, self._seed)
            self._codes = nearest(keys, self._centroids)

    def estimate(self, query: Tensor, tokens: Tokens, rule: Rule) -> Tensor:
        heads, num_queries, _ = query.shape
        if self._centroids is None:
            self._centroids = self._parts_of(tokens, self.sink + 1)
            self._codes = self._centroids.new_zeros(self._centroids.shape[:2], dtype=torch.long)
        assert self._codes is not None
        held = self.sink + self._codes.shape[1]
        fresh = self._parts_of(tokens, tokens.num_tokens - self.window, held)
        if fresh.shape[1]:
            self._codes = torch.cat([self._codes, nearest(fresh, self._centroids)], 1)
        parts = torch.unflatten(query, 2, (self._method.parts, -1)).transpose(1, 2).flatten(0, 1)
        table = parts @ self._centroids.transpose(1, 2)  # [G * parts, R, centroids]
        found = table.gather(2, self._codes[:, None].expand(-1, num_queries, -1))
        return torch.unflatten(found, 0, (heads, -1)).sum(1) * rule.scaling

    def _parts_of(self, tokens: Tokens, end: int, start: int | None = None) -> Tensor:
        """Return the keys up to `end`, part by part: ``[G * parts, tokens, D / parts]``."""
        start = self.sink if start is None else start
        keys = tokens.keys(start, max(start, end))
        if keys.shape[2] % self._method.parts:
            raise InputError(
                f"pqcache: parts must divide the model's head dimension {keys.shape[2]}, "
                f"got {self._method.parts}"
            )
        return torch.unflatten(keys, 2, (self._method.parts, -1)).transpose(1, 2).flatten(0, 1)


def cluster(points: Tensor, count: int, rounds: int, seed: int) -> Tensor:
    """Return k-means centroids ``[B, count, d]`` of points ``[B, n, d]``; at most n of them."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(points.shape[1], generator=generator)[:count]
    centroids = points[:, chosen].clone()
    for _ in range(rounds):
        codes = nearest(points, centroids)
        index = codes[..., None].expand(-1, -1, points.shape[2])
        total = torch.zeros_like(centroids).scatter_add_(1, index, points)
        size = torch.zeros_like(centroids[..., 0]).scatter_add_(
            1, codes, torch.ones_like(points[..., 0])
        )
        # an empty cluster stays where it is
        centroids = torch.where(
            size[..., None] > 0, total / size.clamp(min=1)[..., None], centroids
        )
    return centroids


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest centroid of each point, ``[B, n]``."""
    half_norm = centroids.square().sum(-1)[:, None] / 2
    return (half_norm - points @ centroids.transpose(1, 2)).argmin(-1)
