"""MagicPIG: tokens sampled by locality-sensitive hashing, weighted by how likely they were."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from icecache.errors import ConfigError
from icecache.evaluation.engine.attend import Rule, Selection
from icecache.evaluation.engine.tokens import Tokens
from icecache.evaluation.methods.base import SelectionMethod, fixed_positions

__all__ = ["MagicPIG"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MagicPIG(SelectionMethod):
    """MagicPIG (arXiv 2410.16179): attention as importance sampling, the sampler a hash table.

    Centred keys and the query are hashed by `tables` groups of `bits` random planes. A token is in
    a query head's sample if it falls into the query's bucket in two tables or more; its weight is
    divided by the probability of that, which the angle between key and query gives. Each head uses
    its own sample; the heads of a KV head share the budget. The setting (8 bits, 75 tables) is the
    cheapest of the paper's; its first layers are dense there, none is here.

    Budget: sink + window + sampled tokens. A sample's size depends on the query, so the tables are
    read one after the other only as far as the union of the heads' samples fits the budget; with
    all tables read it may stay below. Extra memory: `tables` bytes a token and KV head (0.15 of a
    float32 cache at 64 dimensions), beside the full cache in host memory.

    Parameters
    ----------
    bits : int
        Planes of a table, at most 8.
    tables : int
    seed : int
        Of the planes.
    """

    name: ClassVar[str] = "magicpig"
    paper: ClassVar[str] = "MagicPIG, arXiv 2410.16179"
    bits: int = 8
    tables: int = 75
    seed: int = 0

    def __post_init__(self) -> None:
        # the zero-argument form of super does not work in a dataclass with slots
        SelectionMethod.__post_init__(self)
        if self.bits > 8:
            raise ConfigError(f"magicpig: bits must be at most 8, a byte a table, got {self.bits}")
        if self.tables < 2:
            raise ConfigError(f"magicpig: tables must be at least 2, got {self.tables}")

    def policy(self, budget: int, layer: int) -> "_Sampler":
        """Return a policy over hash codes."""
        return _Sampler(budget, self, self.seed + layer)


class _Sampler:
    def __init__(self, budget: int, method: MagicPIG, seed: int) -> None:
        self._room = budget - method.sink - method.window
        self._method, self._seed = method, seed
        self._planes: Tensor | None = None
        self._center: Tensor | None = None
        self._codes: Tensor | None = None  # [G, tokens, tables], from the sink on

    def start(self, tokens: Tokens) -> None:
        generator = torch.Generator().manual_seed(self._seed)
        dim = tokens.prompt.keys.shape[2]
        shape = (dim, self._method.tables * self._method.bits)
        self._planes = torch.randn(shape, generator=generator)
        self._center = tokens.prompt.keys.float().mean(1, keepdim=True)
        end = max(self._method.sink, tokens.num_prompt - self._method.window)
        self._codes = self._hash(tokens.keys(self._method.sink, end).float() - self._center)

    def select(self, query: Tensor, tokens: Tokens, rule: Rule) -> Selection:
        method = self._method
        assert self._codes is not None and self._center is not None
        held, end = method.sink + self._codes.shape[1], tokens.num_tokens - method.window
        if held < end:
            fresh = self._hash(tokens.keys(held, end).float() - self._center)
            self._codes = torch.cat([self._codes, fresh], 1)
        second = _second_match(self._codes, self._hash(query.float()), method.tables)
        rows = [self._sample(row) for row in second]
        index, is_there = _pad([picked for picked, _ in rows])
        num_tables = torch.tensor([count for _, count in rows])[:, None, None]
        in_sample = second.gather(2, index[:, None].expand(-1, query.shape[1], -1)) <= num_tables
        keys, _ = tokens.gather(index + method.sink)
        bias = -self._log_chance(query.float(), keys.float(), num_tables)
        bias = bias.masked_fill(~in_sample, -math.inf)
        fixed = fixed_positions(tokens.num_tokens, method.sink, method.window)
        fixed = fixed.expand(len(index), -1)
        return Selection(
            torch.cat([fixed, index + method.sink], 1),
            torch.cat([torch.ones_like(fixed, dtype=torch.bool), is_there], 1),
            torch.cat([bias.new_zeros(*bias.shape[:2], fixed.shape[1]), bias], 2),
        )

    def _hash(self, vectors: Tensor) -> Tensor:
        """Return the codes ``[G, n, tables]``, uint8, of vectors ``[G, n, D]``."""
        assert self._planes is not None
        powers = 2 ** torch.arange(self._method.bits)
        found = [
            (torch.unflatten(part @ self._planes > 0, 2, (-1, self._method.bits)) * powers).sum(-1)
            for part in torch.split(vectors, 2048, dim=1)
        ]
        return torch.cat(found, 1).to(torch.uint8)

    def _sample(self, second: Tensor) -> tuple[Tensor, int]:
        """Return the tokens of one KV head's sample and the number of tables read for it."""
        earliest = second.amin(0)
        found = (earliest <= self._method.tables).nonzero()[:, 0]
        order = earliest[found].sort(stable=True)
        num_tables = self._method.tables
        if len(found) > self._room:
            num_tables = int(order.values[self._room]) - 1
        return found[earliest[found] <= num_tables], num_tables

    def _log_chance(self, query: Tensor, keys: Tensor, num_tables: Tensor) -> Tensor:
        """Return the log probability of two matches in so many tables, ``[G, R, n]``."""
        assert self._center is not None
        keys = keys - self._center
        cosine = torch.nn.functional.normalize(query, dim=-1) @ torch.nn.functional.normalize(
            keys, dim=-1
        ).transpose(1, 2)
        plane = 1 - torch.acos(cosine.clamp(-1, 1)) / math.pi
        match = plane.clamp(1e-4, 1 - 1e-4).double() ** self._method.bits
        none = (1 - match) ** num_tables
        one = num_tables * match * (1 - match) ** (num_tables - 1).clamp(min=0)
        return (1 - none - one).clamp(min=1e-9).log().float()


def _second_match(codes: Tensor, query: Tensor, num_tables: int) -> Tensor:
    """Return after how many tables each token matched twice, ``[G, R, n]``; one more is never."""
    never = num_tables + 1
    second = torch.full((query.shape[0], query.shape[1], codes.shape[1]), never)
    for head in range(query.shape[0]):
        for row in range(query.shape[1]):
            equal = codes[head] == query[head, row]
            twice = (equal.sum(-1) >= 2).nonzero()[:, 0]
            order = equal[twice].cumsum(-1) >= 2
            second[head, row, twice] = order.int().argmax(-1) + 1
    return second


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    index = torch.zeros(len(rows), longest, dtype=torch.long)
    is_there = torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        index[number, : len(row)] = row
        is_there[number, : len(row)] = True
    return index, is_there
