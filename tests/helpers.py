"""What the core's tests share: seeded tokens, slow truths and a plain model of a layer's tokens."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icecache import IceCacheConfig, IceCacheLayer
from icecache.cache.device.layer import DeviceLayer
from icecache.cache.make import make_layer
from icecache.ops.dispatch import resolve_backend
from tests.descent import estimate, heard, slow_descent

# small enough that a few dozen tokens reach every path
SMALL = {
    "budget": 24,
    "sink": 2,
    "window": 4,
    "leaf_size": 4,
    "leaf_target": 3,
    "page_size": 8,
    "draft": 8,
    "segment_tokens": 16,
    "fan_out": 2,
}
SMALL_HEADS, SMALL_DIM = 2, 16
# the compiled ops are tested wherever an installation has them
HAS_NATIVE = resolve_backend("auto") == "native"
BACKENDS = ["torch", "reference", *(["native"] if HAS_NATIVE else [])]
FAST_BACKENDS = [name for name in BACKENDS if name != "reference"]
# the device path in plain torch: another layer class of the same face
LAYER_BACKENDS = [*FAST_BACKENDS, "twin"]


class KeysValues(NamedTuple):
    """Keys and values, shape [batch, num_kv_heads, tokens, head_dim] twice."""

    keys: Tensor
    values: Tensor

    def __getitem__(self, index: Any) -> "KeysValues":  # type: ignore[override]
        return KeysValues(self.keys[index], self.values[index])


def rng(seed: int) -> torch.Generator:
    """Return a generator of its own."""
    return torch.Generator().manual_seed(seed)


def clustered(seed: int, *shape: int, centres: int = 12) -> Tensor:
    """Return vectors around a few centres beside a common offset, as keys are."""
    generator, dim = rng(seed), shape[-1]
    centre = 2.0 * torch.randn(centres, dim, generator=generator)
    label = torch.randint(centres, shape[:-1], generator=generator)
    offset = torch.randn(dim, generator=generator)
    return centre[label] + 0.7 * torch.randn(*shape, generator=generator) + offset


def make_tokens(
    seed: int,
    batch: int,
    tokens: int,
    *,
    heads: int = SMALL_HEADS,
    dim: int = SMALL_DIM,
    dtype: torch.dtype = torch.float32,
) -> KeysValues:
    """Return clustered keys and normal values."""
    keys = clustered(seed, batch, heads, tokens, dim)
    values = torch.randn(batch, heads, tokens, dim, generator=rng(seed + 1))
    return KeysValues(keys.to(dtype), values.to(dtype))


def make_query(
    seed: int,
    batch: int,
    heads: int,
    tokens: int = 1,
    *,
    dim: int = SMALL_DIM,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return normal queries, shape [batch, heads, tokens, dim]."""
    return torch.randn(batch, heads, tokens, dim, generator=rng(seed)).to(dtype)


def small_layer(**settings: Any) -> Any:
    """Return a layer of two KV heads of 16 that indexes beyond 24 tokens."""
    config = IceCacheConfig.from_kwargs(**{**SMALL, **settings})
    return make_layer(config, num_kv_heads=SMALL_HEADS, head_dim=SMALL_DIM, dtype=torch.float32)


def left_padded(lens: list[int], width: int | None = None) -> Tensor:
    """Return the mask of rows of these lengths, shape [rows, longest], True = token."""
    width = max(lens) if width is None else width
    return torch.arange(width)[None] >= width - torch.tensor(lens)[:, None]


def full_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attend causally in float64; one batch row.

    query: [heads, queries, dim], of the last of the keys' tokens; keys, values: [kv_heads, tokens,
    dim]; sink_logits: [heads]. Returns [heads, queries, dim].
    """
    heads, num_queries, dim = query.shape
    group, num_keys = heads // keys.shape[0], keys.shape[1]
    k, v = (x.double().repeat_interleave(group, 0) for x in (keys, values))
    logits = query.double() @ k.transpose(1, 2) * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    last = num_keys - num_queries + torch.arange(num_queries)
    logits = logits.masked_fill(torch.arange(num_keys)[None] > last[:, None], -math.inf)
    if sink_logits is not None:
        sink = sink_logits.double()[:, None, None].expand(-1, num_queries, 1)
        logits = torch.cat([logits, sink], -1)
    return torch.softmax(logits, -1)[..., :num_keys] @ v


@dataclass
class PlainRows:
    """The truth about a layer: every row's tokens, [kv_heads, tokens, dim], and nothing else."""

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def of(cls, tokens: KeysValues, mask: Tensor | None = None) -> "PlainRows":
        """Return the rows of a first call."""
        batch, heads, _, dim = tokens.keys.shape
        empty = [torch.zeros(heads, 0, dim, dtype=tokens.keys.dtype) for _ in range(batch)]
        rows = cls(list(empty), list(empty))
        rows.append(tokens, mask)
        return rows

    @property
    def lens(self) -> list[int]:
        """Tokens of each row."""
        return [k.shape[1] for k in self.keys]

    def append(self, tokens: KeysValues, mask: Tensor | None = None) -> None:
        """Take in what the mask leaves."""
        for row in range(len(self.keys)):
            kept = slice(None) if mask is None else mask[row]
            self.keys[row] = torch.cat([self.keys[row], tokens.keys[row][:, kept]], 1)
            self.values[row] = torch.cat([self.values[row], tokens.values[row][:, kept]], 1)

    def crop(self, num: int) -> None:
        """Drop the latest tokens of every row."""
        self.keys = [k[:, : k.shape[1] - num] for k in self.keys]
        self.values = [v[:, : v.shape[1] - num] for v in self.values]

    def reorder(self, rows: list[int]) -> None:
        """Take rows in a new order."""
        self.keys = [self.keys[row] for row in rows]
        self.values = [self.values[row] for row in rows]

    def attend(self, row: int, query: Tensor, **settings: Any) -> Tensor:
        """Return full attention of one row; query: [heads, queries, dim]."""
        return full_attention(query, self.keys[row], self.values[row], **settings)


def largest_error(ours: Tensor, truth: Tensor) -> float:
    """Return the largest absolute difference."""
    assert ours.shape == truth.shape, f"{tuple(ours.shape)} against {tuple(truth.shape)}"
    return float((ours.double() - truth.double()).abs().max())


def assert_as_good_as_torch(ours: Tensor, torchs: Tensor, truth: Tensor) -> None:
    """Assert the flash-attention rule: at most twice PyTorch's own error in that dtype + 1e-5."""
    allowed = 2 * largest_error(torchs, truth) + 1e-5
    error = largest_error(ours, truth)
    assert error <= allowed, f"error {error:.2e} where {allowed:.2e} is allowed"


def assert_full(layer: IceCacheLayer, rows: PlainRows, query: Tensor, **settings: Any) -> None:
    """Assert that `attend` equals full attention for every query of a real token."""
    out = layer.attend(query, **settings)
    assert out.shape == query.shape
    assert bool(torch.isfinite(out).all())
    for row, length in enumerate(rows.lens):
        real = min(query.shape[2], length)
        truth = rows.attend(row, query[row, :, query.shape[2] - real :], **settings)
        ours = out[row, :, query.shape[2] - real :]
        error = largest_error(ours, truth)
        assert error <= 1e-5, f"row {row}: {error:.2e} off full attention"


class Selected(NamedTuple):
    """What a sparse step of one row (batch row x KV head) took.

    Attributes
    ----------
    positions : positions attended exactly, between sink and window.
    rest : the leaves attended through their summaries.
    """

    positions: list[int]
    rest: list[int]


def selected_by_leaves(layer: IceCacheLayer, chosen: Tensor) -> list[Selected]:
    """Return per row what the chosen leaves hold; chosen: [rows, leaves], bool."""
    indexed = layer._context.indexed
    result = []
    for row in range(chosen.shape[0]):
        positions: list[int] = []
        leaves = range(int(indexed.leaves.num[row]))
        for leaf in (leaf for leaf in leaves if chosen[row, leaf]):
            page, slots = indexed.leaves.leaf(row, leaf)
            at = torch.tensor([page * layer.config.page_size + slot for slot in slots])
            at = indexed.pages.in_pool(row, at)
            positions.extend(indexed.pool.positions_of(at).tolist())
        result.append(Selected(positions, [leaf for leaf in leaves if not chosen[row, leaf]]))
    return result


def slow_sparse(
    layer: IceCacheLayer,
    rows: PlainRows,
    query: Tensor,
    selected: list[Selected],
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    least: float = 0.03,
) -> Tensor:
    """Return what a sparse step must give, one head at a time: [batch, heads, 1, dim], float32.

    Keys and values are the plain model's, by position; only summaries come from the layer.
    """
    batch, heads, _, dim = query.shape
    group = heads // layer.num_kv_heads
    out = torch.empty(batch, heads, 1, dim)
    for row, chosen in enumerate(selected):
        b, kv_head = row // layer.num_kv_heads, row % layer.num_kv_heads
        own = slice(kv_head * group, (kv_head + 1) * group)
        fixed = fixed_positions(layer, b, rows.lens[b])
        ask = query[b, own, 0].float(), scaling, softcap
        sinks = None if sink_logits is None else sink_logits[own].float()
        rest: list[tuple[int, int]] = []
        if layer.config.estimates_remainder:
            beside = _logits(rows.keys[b][kv_head, fixed], *ask, sinks).logsumexp(1)
            tree = layer._context.indexed.tree
            found = slow_descent(tree, layer.config, row, ask[0], beside, scaling, softcap)
            near = set(found.near)
            rest = [(0, leaf) for leaf in chosen.rest if leaf in near] + found.far
        at = torch.tensor(fixed + chosen.positions)
        logits = _logits(rows.keys[b][kv_head, at], *ask, sinks)
        values = rows.values[b][kv_head, at].float()
        if sinks is not None:
            values = torch.cat([values, torch.zeros(1, dim)])
        more, means = _estimates(layer, row, rest, *ask)
        share = torch.softmax(torch.cat([logits, more], 1), 1)
        out[b, own, 0] = (
            share[:, : len(values)] @ values + heard(share[:, len(values) :], least) @ means
        )
    return out


def fixed_log_sum_exp(
    layer: IceCacheLayer, rows: PlainRows, query: Tensor, scaling: float
) -> Tensor:
    """Return what sink and window weigh for every head, shape [batch x KV heads, group]."""
    group = query.shape[1] // layer.num_kv_heads
    found = []
    for b in range(query.shape[0]):
        fixed = fixed_positions(layer, b, rows.lens[b])
        for kv_head, own in enumerate(query[b, :, 0].float().split(group)):
            logits = _logits(rows.keys[b][kv_head, fixed], own, scaling, None, None)
            found.append(logits.logsumexp(1))
    return torch.stack(found)


def fixed_positions(layer: IceCacheLayer, row: int, length: int) -> list[int]:
    """Return the positions of sink and window of a batch row."""
    in_window = layer._context.tail.lens[row]
    sink = min(layer.config.sink, length - in_window)
    return list(range(sink)) + list(range(length - in_window, length))


def _logits(
    keys: Tensor, queries: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return logits of tokens and of learned sinks, shape [heads, tokens (+ 1)]."""
    logits = scaling * (queries @ keys.float().T)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits if sinks is None else torch.cat([logits, sinks[:, None]], 1)


def _estimates(
    layer: IceCacheLayer,
    row: int,
    rest: list[tuple[int, int]],
    queries: Tensor,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Return logits of leaves and nodes, shape [heads, n], and mean values, shape [n, dim]."""
    logits, means = (
        [queries.new_zeros(queries.shape[0], 0)],
        [queries.new_zeros(0, queries.shape[1])],
    )
    for number in sorted({number for number, _ in rest}):
        tree = layer._context.indexed.tree
        ids = [i for of, i in rest if of == number]
        parts = [estimate(tree, number, row, ids, q, scaling, softcap) for q in queries]
        logits.append(torch.stack([a + layer.config.spread_weight * c for a, c in parts]))
        means.append(tree.levels[number].at(row, torch.tensor(ids)).values())
    return torch.cat(logits, 1), torch.cat(means)


def poison(layer: Any) -> None:
    """Fill every free slot and the unused ends of the tail's buffers with NaN."""
    if isinstance(layer, DeviceLayer):
        poison_device(layer)
        return
    context = layer._context
    if context is None:
        return
    tail = context.tail
    for buffer in (tail._keys, tail._values):
        buffer[:, :, tail._end :] = torch.nan
        buffer[:, :, : tail._end - tail.longest] = torch.nan
    if context.indexed is not None:
        context.indexed.pool.poison()


def poison_device(layer: DeviceLayer) -> None:
    """Fill all that holds no token of a layer on a device with NaN."""
    held = layer._held
    if held is not None and held.index is not None:
        held.index.pool.poison()
        empty = held.index.window.positions() < 0
        for entries in held.index.window.fixed[:2]:
            entries[empty] = torch.nan
