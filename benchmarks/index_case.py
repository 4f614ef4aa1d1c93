"""What the index benchmark measures on: one layer's tokens, from random keys or recorded ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import KVRecord, kv_files, read_records
from synthetic import clustered_record
from torch import Tensor

from icecache import IceCacheConfig, IceCacheLayer
from icecache.cache.flat import FlatTokens
from icecache.cache.indexed import IndexedTokens
from icecache.store.memory import check_host_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FLOAT32_BYTES = 2 << 30
# rows' keys, at a build's peak: so the resident bytes say at 8 x 128 and 65,536 tokens
_FLOAT32_ROWS = 1


class Shape(NamedTuple):
    """Heads of a synthetic layer; `group` query heads read one KV head."""

    kv_heads: int
    head_dim: int
    group: int


@dataclass(frozen=True, slots=True)
class Case:
    """One layer's context in the three places where a layer holds it, and tokens to insert."""

    source: str
    layer: int
    sink: int
    keys: Tensor  # [G, M, D], what is under the tree
    values: Tensor  # [G, M, D]
    fixed_keys: Tensor  # [G, sink + window, D]
    fixed_values: Tensor  # [G, sink + window, D]
    extra_keys: Tensor  # [G, inserts, D]
    extra_values: Tensor  # [G, inserts, D]
    queries: Tensor  # [S, H, D] float32

    @property
    def tokens(self) -> int:
        """Tokens of the context, sink and window included."""
        return self.keys.shape[1] + self.fixed_keys.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[0]

    @property
    def scaling(self) -> float:
        return float(self.keys.shape[2]) ** -0.5

    @property
    def inserts(self) -> int:
        return self.extra_keys.shape[1]

    @property
    def dtype_name(self) -> str:
        return str(self.keys.dtype).removeprefix("torch.")

    def head(self, head: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a KV head by position, two of shape [1, tokens, head_dim], float64."""
        found = []
        for fixed, middle in (
            (self.fixed_keys, self.keys),
            (self.fixed_values, self.values),
        ):
            parts = (fixed[head, : self.sink], middle[head], fixed[head, self.sink :])
            found.append(torch.cat(parts).double()[None])
        return found[0], found[1]


class Job(NamedTuple):
    """A case to come: what it is called, and what makes it."""

    name: str
    tokens: int
    make: Callable[[], Case]


def split(
    record: KVRecord,
    source: str,
    *,
    tokens: int,
    inserts: int,
    config: IceCacheConfig,
    dtype: torch.dtype,
) -> Case:
    """A context of `tokens` tokens: the record's sink and its latest tokens.

    Those are what the recorded queries belong to. The tokens left out between the two are the ones
    to insert, so the record holds at least `tokens + inserts`.
    """
    sink, window = config.sink, config.window
    end = record.keys.shape[1]
    first = end - tokens + sink
    assert first - sink >= inserts, "the record is too short"

    def parts(of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        middle = of[:, first : end - window].to(dtype).contiguous()
        fixed = torch.cat([of[:, :sink], of[:, end - window :]], 1).to(dtype)
        return middle, fixed, of[:, sink : sink + inserts].to(dtype).contiguous()

    keys, fixed_keys, extra_keys = parts(record.keys)
    values, fixed_values, extra_values = parts(record.values)
    return Case(
        source, record.layer, sink, keys, values, fixed_keys, fixed_values,
        extra_keys, extra_values, record.queries.float(),
    )  # fmt: skip


def choose_dtype(name: str, kv_heads: int, head_dim: int, tokens: int) -> torch.dtype:
    """The named type; for "auto" float32 until keys and values pass 2 GiB, bfloat16 beyond."""
    if name != "auto":
        return DTYPES[name]
    fits = 2 * 4 * kv_heads * head_dim * tokens <= _FLOAT32_BYTES
    return torch.float32 if fits else torch.bfloat16


def synthetic_jobs(
    shapes: list[Shape],
    sizes: list[int],
    *,
    steps: int,
    inserts: int,
    dtype: str,
    config: IceCacheConfig,
) -> list[Job]:
    """One job for each shape and size."""

    def make(shape: Shape, tokens: int) -> Case:
        kind = choose_dtype(dtype, shape.kv_heads, shape.head_dim, tokens)
        record = clustered_record(
            tokens + inserts, num_kv_heads=shape.kv_heads, queries_per_kv_head=shape.group,
            head_dim=shape.head_dim, steps=steps, dtype=kind,
        )  # fmt: skip
        return split(record, "synthetic", tokens=tokens, inserts=inserts, config=config, dtype=kind)

    return [
        Job(
            f"{tokens} tokens, {shape.kv_heads} x {shape.head_dim}",
            tokens,
            lambda shape=shape, tokens=tokens: make(shape, tokens),
        )
        for shape in shapes
        for tokens in sizes
    ]


def recorded_jobs(
    folder: Path,
    sizes: list[int],
    *,
    steps: int,
    inserts: int,
    dtype: str,
    config: IceCacheConfig,
) -> tuple[list[Job], list[dict[str, Any]]]:
    """A job for each recorded layer and size that it holds, and the sizes that it does not."""

    def make(record: KVRecord, source: str, tokens: int) -> Case:
        kind = choose_dtype(dtype, record.keys.shape[0], record.keys.shape[2], tokens)
        return split(record, source, tokens=tokens, inserts=inserts, config=config, dtype=kind)

    jobs, skipped = [], []
    for path in kv_files(folder):
        for record in read_records(path, steps):
            longest = record.keys.shape[1] - inserts
            for tokens in sizes:
                name = f"{path.stem} layer {record.layer}, {tokens} tokens"
                if tokens > longest:
                    reason = f"the record holds {longest} tokens beside {inserts} to insert"
                    skipped.append({"source": name, "tokens": tokens, "reason": reason})
                    continue
                call = lambda one=record, file=path.stem, size=tokens: make(one, file, size)  # noqa: E731
                jobs.append(Job(name, tokens, call))
    return jobs, skipped


def flat_tokens(case: Case) -> FlatTokens:
    """The tokens that go under the tree, as the index takes a prompt."""
    heads, middle, _ = case.keys.shape
    return FlatTokens(
        case.keys.flatten(0, 1),
        case.values.flatten(0, 1),
        torch.arange(heads).repeat_interleave(middle),
        torch.arange(case.sink, case.sink + middle).repeat(heads),
    )


def check_memory(case: Case, config: IceCacheConfig) -> None:
    """Raise `HostMemoryExceeded` unless pages, index and what a build holds on the way fit."""
    layer = empty_layer(case, config)
    on_the_way = _FLOAT32_ROWS * 4 * case.keys[0].numel()
    check_host_memory(layer.estimate_bytes(1, case.tokens) + on_the_way)


def empty_layer(case: Case, config: IceCacheConfig) -> IceCacheLayer:
    heads, _, head_dim = case.keys.shape
    return IceCacheLayer(config, num_kv_heads=heads, head_dim=head_dim, dtype=case.keys.dtype)


def layer_around(case: Case, config: IceCacheConfig, indexed: IndexedTokens) -> IceCacheLayer:
    """A layer that holds the case, with an index that is already built.

    Prefilling the whole context would build the index a second time and hold its tokens three
    times on the way. The layer takes sink, window and just enough to pass its budget instead.
    """
    layer = empty_layer(case, config)
    few = config.budget

    def prompt(fixed: Tensor, middle: Tensor) -> Tensor:
        return torch.cat([fixed[:, : case.sink], middle[:, :few], fixed[:, case.sink :]], 1)[None]

    layer.prefill(prompt(case.fixed_keys, case.keys), prompt(case.fixed_values, case.values))
    layer.attend(layer_query(case, 0), scaling=case.scaling)
    assert layer._context is not None
    layer._context.indexed = indexed
    assert layer.num_tokens == case.tokens
    return layer


def layer_query(case: Case, step: int) -> Tensor:
    """A step's query as a layer takes it, `[1, q_heads, 1, head_dim]`."""
    return case.queries[step][None, :, None].to(case.keys.dtype)
