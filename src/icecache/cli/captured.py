"""How much of the full attention a budget captures: IceCache's choice beside two others.

Mass is the share of the softmax over all tokens that falls on the attended ones, per query head.
All three attend the same sink and window, and at most the budget.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from icecache import IceCacheConfig, IceCacheLayer
from icecache.cache.indexed import IndexedTokens
from icecache.cli.capture import Asked, Recording
from icecache.errors import InputError

__all__ = ["Captured", "PageMap", "measure"]


class PageMap(NamedTuple):
    """Tokens of one KV head in the last step, one entry a token in a page.

    Attributes
    ----------
    positions, pages : shape [tokens], int64. Pages are numbered by their mean position.
    attended : shape [tokens], bool
    """

    positions: Tensor
    pages: Tensor
    attended: Tensor


class Captured(NamedTuple):
    """One layer: mean mass over the steps, shape ``[num_q_heads]``, and the maps by KV head."""

    layer: int
    icecache: Tensor
    positional: Tensor
    best_tokens: Tensor
    maps: list[PageMap]
    positional_maps: list[PageMap]


def measure(recording: Recording, config: IceCacheConfig) -> Captured:
    """Let a fresh `IceCacheLayer` choose for each recorded query, and weigh what it chose.

    Raises
    ------
    InputError
        The context is not longer than the budget: there is nothing to choose.
    """
    keys, values, steps = recording.keys, recording.values, len(recording.asked)
    first = keys.shape[2] - steps
    if first < config.budget:
        raise InputError(
            f"the prompt has {first:,} tokens, the budget of {config.budget:,} attends to all of "
            "them; take a longer prompt or a smaller budget"
        )
    layer = IceCacheLayer(
        config, num_kv_heads=keys.shape[1], head_dim=keys.shape[3], dtype=keys.dtype
    )
    layer.prefill(keys[:, :, :first].contiguous(), values[:, :, :first].contiguous())
    masses: list[Tensor] = []
    for step, asked in enumerate(recording.asked, start=first):
        new = slice(step, step + 1)
        layer.append(keys[:, :, new].contiguous(), values[:, :, new].contiguous())
        share = _attention(asked, keys[0, :, : step + 1])
        ours, maps = _chosen_by(layer, asked, config)
        pages, positional = _positional_choice(asked, keys[0, :, : step + 1], config)
        best = _best_tokens(share, config)
        masses.append(torch.stack([_mass(share, mask) for mask in (ours, positional, best)]))
    middle = torch.arange(config.sink, keys.shape[2] - config.window)
    positional_maps = [PageMap(middle, pages, taken[middle]) for taken in positional]
    mean = torch.stack(masses).mean(0)
    return Captured(recording.layer, mean[0], mean[1], mean[2], maps, positional_maps)


def _attention(asked: Asked, keys: Tensor) -> Tensor:
    """Return the full attention, shape [num_kv_heads, heads of each, tokens]."""
    query = asked.query.view(keys.shape[0], -1, keys.shape[-1])
    return (query @ keys.float().transpose(1, 2) * asked.scaling).softmax(-1)


def _mass(share: Tensor, mask: Tensor) -> Tensor:
    return (share * mask[:, None]).sum(-1).flatten()


def _chosen_by(
    layer: IceCacheLayer, asked: Asked, config: IceCacheConfig
) -> tuple[Tensor, list[PageMap]]:
    indexed = _index_of(layer)
    query = asked.query.to(layer.dtype)[None, :, None]
    step = layer.inspect(query, scaling=asked.scaling)
    tokens, real = indexed.tokens()
    positions = indexed.pool.positions_of(tokens)
    chosen = step.chosen
    # the tree chooses leaves, the two other selections tokens
    taken = chosen[..., None] & real if config.selection == "tree" else chosen.view(real.shape)
    mask = _fixed_mask(len(indexed.lens), layer.num_tokens, config)
    maps = []
    for head in range(len(indexed.lens)):
        held = real[head]
        mask[head, positions[head][taken[head]]] = True
        pages = _by_position(tokens[head][held] // config.page_size, positions[head][held])
        maps.append(PageMap(positions[head][held], pages, taken[head][held]))
    return mask, maps


def _index_of(layer: IceCacheLayer) -> IndexedTokens:
    context = layer._context
    assert context is not None and context.indexed is not None
    return context.indexed


def _by_position(pages: Tensor, positions: Tensor) -> Tensor:
    _, number = torch.unique(pages, return_inverse=True)
    count = torch.bincount(number)
    mean = torch.bincount(number, weights=positions.double()) / count
    return mean.argsort().argsort()[number]


def _positional_choice(asked: Asked, keys: Tensor, config: IceCacheConfig) -> tuple[Tensor, Tensor]:
    """Choose pages of consecutive tokens by their mean key; the heads of a KV head vote."""
    heads, tokens, dim = keys.shape
    middle = keys[:, config.sink : tokens - config.window].float()
    pages = torch.arange(middle.shape[1]) // config.page_size
    count = torch.bincount(pages)
    mean = middle.new_zeros(heads, len(count), dim).index_add_(1, pages, middle)
    mean /= count[:, None]
    query = asked.query.view(heads, -1, dim)
    votes = (query @ mean.transpose(1, 2) * asked.scaling + count.log()).softmax(-1).sum(1)
    room = (config.budget - config.sink - config.window) // config.page_size
    best = votes.topk(min(room, votes.shape[1]), dim=1).indices
    chosen = torch.zeros_like(votes, dtype=torch.bool).scatter_(1, best, True)
    mask = _fixed_mask(heads, tokens, config)
    mask[:, config.sink : tokens - config.window] = chosen[:, pages]
    return pages, mask


def _best_tokens(share: Tensor, config: IceCacheConfig) -> Tensor:
    mask = _fixed_mask(share.shape[0], share.shape[2], config)
    votes = share.sum(1).masked_fill(mask, -1.0)
    best = votes.topk(config.budget - config.sink - config.window, dim=1).indices
    return mask.scatter_(1, best, True)


def _fixed_mask(heads: int, tokens: int, config: IceCacheConfig) -> Tensor:
    mask = torch.zeros(heads, tokens, dtype=torch.bool)
    mask[:, : config.sink] = True
    mask[:, tokens - config.window :] = True
    return mask
