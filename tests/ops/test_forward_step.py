"""The native step of a model beside its plain twin, at odd shapes and over poisoned memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from icecache.cache.layer import IceCacheLayer
from icecache.config import IceCacheConfig
from icecache.errors import InputError
from icecache.integrations.transformers import one_call
from icecache.integrations.transformers.one_call import ready_steps
from icecache.integrations.transformers.recipe import BlockRecipe, Matrix, NormRecipe, Recipe
from icecache.integrations.transformers.rooms import Rooms
from icecache.ops.native.forward import ACTIVATIONS
from icecache.ops.reference_model import gated_mlp, rms_norm, rotate

HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCABULARY = 45, 77, 6, 2, 20, 131


class Angles(nn.Module):
    """Rotary angles of the first `dim` elements of a head."""

    def __init__(self, dim: int, rope_type: str) -> None:
        super().__init__()
        self.dim, self.rope_type, self.calls = dim, rope_type, 0

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        turns = torch.linspace(1.0, 0.05, self.dim // 2)
        angles = (positions[..., None].float() * turns).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def make_recipe(
    dtype: torch.dtype = torch.float32,
    *,
    rotary_dim: int = DIM,
    head_norms: int | None = None,
    activation: str = "silu",
    rope_type: str = "default",
    biases: bool = True,
) -> Recipe:
    """A decoder of random weights; head_norms: of so many heads at once, -1: of all."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    def matrix(num_out: int, num_in: int) -> Matrix:
        return Matrix(draw(num_out, num_in), draw(num_out) if biases else None)

    def norm(dim: int) -> NormRecipe:
        return NormRecipe(1.0 + draw(dim), 1e-5)

    def head_norm(heads: int) -> NormRecipe | None:
        if head_norms is None:
            return None
        return norm(DIM * (heads if head_norms < 0 else head_norms))

    blocks = tuple(
        BlockRecipe(
            before_attention=norm(HIDDEN),
            query=matrix(HEADS * DIM, HIDDEN),
            key=matrix(KV_HEADS * DIM, HIDDEN),
            value=matrix(KV_HEADS * DIM, HIDDEN),
            query_norm=head_norm(HEADS),
            key_norm=head_norm(KV_HEADS),
            output=matrix(HIDDEN, HEADS * DIM),
            before_mlp=norm(HIDDEN),
            gate=matrix(INNER, HIDDEN),
            up=matrix(INNER, HIDDEN),
            down=matrix(HIDDEN, INNER),
            activation=activation,
            rotates=number != 1,
            scaling=0.3 - 0.1 * number,
        )
        for number in range(3)
    )
    return Recipe(
        embedding=draw(VOCABULARY, HIDDEN),
        blocks=blocks,
        norm=norm(HIDDEN),
        head=matrix(VOCABULARY, HIDDEN),
        rotary=Angles(rotary_dim, rope_type),
        head_dim=DIM,
        embedding_scale=1.5,
        residual_scale=0.7,
        logit_scale=0.25,
    )


def make_layers(recipe: Recipe, batch: int, seed: int = 5) -> list[IceCacheLayer]:
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for _ in recipe.blocks:
        layer = IceCacheLayer(
            IceCacheConfig(), num_kv_heads=KV_HEADS, head_dim=DIM, dtype=recipe.dtype
        )
        past = torch.randn(2, batch, KV_HEADS, 7, DIM, generator=generator).to(recipe.dtype)
        layer.append(past[0], past[1])
        layers.append(layer)
    return layers


def run(
    recipe: Recipe, caches: list[list[IceCacheLayer]], ids: Tensor, positions: Tensor
) -> Tensor:
    """Logits of a step by the compiled call, [batch, tokens]; every buffer held NaN before."""
    rooms = poisoned(Rooms(recipe, ids.shape[0], len(caches)))
    rooms.set_tokens(ids, positions)
    steps = []
    for cache, layers in enumerate(caches):
        steps.append(ready_steps(layers, rooms, cache))
        assert steps[-1] is not None
    logits, outcomes = one_call.run(rooms, caches, steps)
    assert all(outcome.is_done and all(outcome.took_in) for outcome in outcomes)
    return logits


def poisoned(rooms: Rooms) -> Rooms:
    for buffer in (rooms._products, rooms._vectors, rooms._inner, rooms._hidden):
        buffer.fill(np.nan)
    for heads in (rooms.query, rooms.key, rooms.value, *rooms.attended):
        heads.fill_(float("nan"))
    return rooms


def twin(recipe: Recipe, layers: list[IceCacheLayer], ids: Tensor, positions: Tensor) -> Tensor:
    """The same in plain PyTorch, float32; heads and logits are rounded."""

    def wide(matrix: Matrix) -> tuple[Tensor, Tensor | None]:
        return matrix.weight.float(), None if matrix.bias is None else matrix.bias.float()

    def normed(x: Tensor, norm: NormRecipe | None) -> Tensor:
        if norm is None:
            return x
        pieces = x.unflatten(-1, (-1, norm.weight.shape[0]))
        return rms_norm(pieces, norm.weight.float(), norm.eps).flatten(-2)

    cosines, sines = recipe.rotary(torch.zeros(1), positions)
    x = recipe.embedding_scale * recipe.embedding.float()[ids[:, 0]]
    for block, layer in zip(recipe.blocks, layers, strict=True):
        h = normed(x, block.before_attention)
        heads = []
        for matrix, norm, turns in (
            (block.query, block.query_norm, block.rotates),
            (block.key, block.key_norm, block.rotates),
            (block.value, None, False),
        ):
            found = normed(functional.linear(h, *wide(matrix)), norm).unflatten(-1, (-1, DIM))
            heads.append((rotate(found, cosines, sines) if turns else found)[:, :, None])
        query, key, value = (head.to(recipe.dtype) for head in heads)
        layer.append(key, value)
        out = layer.attend(query, scaling=block.scaling).float().flatten(1)
        x = x + recipe.residual_scale * functional.linear(out, *wide(block.output))
        h = normed(x, block.before_mlp)
        found = gated_mlp(h, wide(block.gate), wide(block.up), wide(block.down), block.activation)
        x = x + recipe.residual_scale * found
    return recipe.logit_scale * functional.linear(normed(x, recipe.norm), *wide(recipe.head))


def compare(recipe: Recipe, batch: int, atol: float) -> None:
    ids = torch.tensor([[130], [0], [57]])[:batch]
    positions = torch.tensor([[7], [100], [33]])[:batch]
    ours = run(recipe, [make_layers(recipe, batch)], ids, positions)
    told = twin(recipe, make_layers(recipe, batch), ids, positions)
    assert ours.dtype == recipe.dtype
    assert ours.shape == (batch, VOCABULARY)
    assert told.std() > 0.1
    assert (ours.float() - told).abs().max() <= atol


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_a_step_is_its_twins(dtype: torch.dtype, atol: float, batch: int) -> None:
    compare(make_recipe(dtype), batch, atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_same_in_any_company(dtype: torch.dtype) -> None:
    """Bit for bit, with caches of their own: alone, and beside up to ten others."""
    recipe = make_recipe(dtype)
    ids, positions = torch.arange(11)[:, None] * 11, torch.arange(11)[:, None] * 9
    alone = torch.cat(
        [
            run(recipe, [make_layers(recipe, 1, seed=i)], ids[i : i + 1], positions[i : i + 1])
            for i in range(11)
        ]
    )
    for num in (2, 3, 4, 5, 11):
        caches = [make_layers(recipe, 1, seed=i) for i in range(num)]
        assert torch.equal(run(recipe, caches, ids[:num], positions[:num]), alone[:num])


def test_a_cache_that_fails_leaves_the_others_alone() -> None:
    """Attention overflows in the second block of the second cache, of three each."""
    recipe = make_recipe()
    ids, positions = torch.tensor([[3], [5], [9]]), torch.tensor([[7], [7], [7]])
    caches = [make_layers(recipe, 1, seed=i) for i in range(3)]
    alone = torch.cat(
        [
            run(recipe, [make_layers(recipe, 1, seed=i)], ids[i : i + 1], positions[i : i + 1])
            for i in (0, 2)
        ]
    )
    huge = torch.full((1, KV_HEADS, 1, DIM), 3e38)
    caches[1][1].append(huge, huge)
    rooms = poisoned(Rooms(recipe, 3, 3))
    rooms.set_tokens(ids, positions)
    steps = [ready_steps(layers, rooms, cache) for cache, layers in enumerate(caches)]
    logits, outcomes = one_call.run(rooms, caches, steps)
    assert torch.equal(logits[[0, 2]], alone)
    assert [outcome.is_done for outcome in outcomes] == [True, False, True]
    assert isinstance(outcomes[1].error, InputError)
    assert outcomes[1].took_in[0]
    assert not outcomes[1].took_in[2]
    assert [layer.num_tokens for layer in caches[0]] == [8, 8, 8]


def test_a_block_can_be_watched() -> None:
    recipe = make_recipe()
    ids, positions = torch.tensor([[3], [5]]), torch.tensor([[7], [7]])
    caches = [make_layers(recipe, 1, seed=i) for i in range(2)]
    rooms = Rooms(recipe, 4, 4)
    rooms.use(2)
    rooms.set_tokens(ids, positions)
    seen: list[Tensor] = []
    for watched in ([None, 1], [2, None]):
        caches = [make_layers(recipe, 1, seed=i) for i in range(2)]
        rooms.watched_query.fill_(float("nan"))
        steps = [ready_steps(layers, rooms, cache) for cache, layers in enumerate(caches)]
        one_call.run(rooms, caches, steps, watched)
        is_seen = rooms.watched_query.isfinite().flatten(1).all(1)
        assert is_seen.tolist() == [watched[0] is not None, watched[1] is not None, False, False]
        seen.append(rooms.watched_query[is_seen.nonzero().item()])
    # the last block's queries are there still
    assert torch.equal(seen[1], rooms.query[0])
    assert not torch.equal(seen[0], rooms.query[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    compare(make_recipe(activation=activation), 1, 1e-6)


@pytest.mark.parametrize("head_norms", [1, -1])
def test_norms_of_heads(head_norms: int) -> None:
    compare(make_recipe(head_norms=head_norms), 3, 1e-6)


@pytest.mark.parametrize("rotary_dim", [2, 12])
def test_a_part_of_a_head_is_rotated(rotary_dim: int) -> None:
    compare(make_recipe(rotary_dim=rotary_dim), 3, 1e-6)


def test_without_biases() -> None:
    compare(make_recipe(torch.bfloat16, biases=False), 1, 8e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_weight_that_are_not_the_first(dtype: torch.dtype) -> None:
    recipe = make_recipe(dtype)
    first = recipe.blocks[0]
    joined = Matrix(
        torch.cat([first.up.weight, first.gate.weight]), torch.cat([first.up.bias, first.gate.bias])
    )
    changed = replace(first, gate=joined.rows(INNER, INNER), up=joined.rows(0, INNER))
    joint = replace(recipe, blocks=(changed, *recipe.blocks[1:]))
    ids, positions = torch.tensor([[5]]), torch.tensor([[9]])
    a, b = (run(r, [make_layers(recipe, 1)], ids, positions) for r in (recipe, joint))
    assert torch.equal(a, b)


def test_angles_are_asked_for_in_blocks_where_they_are_fixed() -> None:
    for rope_type, calls in (("default", 3), ("dynamic", 80)):
        recipe = make_recipe(rope_type=rope_type)
        rooms, rotary = Rooms(recipe, 1), recipe.rotary
        rotary.calls = 0
        for position in [*range(70), *range(200, 210)]:
            rooms.set_tokens(torch.tensor([[1]]), torch.tensor([[position]]))
            cosines, _ = Angles(DIM, rope_type)(torch.zeros(1), torch.tensor([[position]]))
            assert np.array_equal(rooms._cosines[0], cosines[0, 0].numpy())
        assert rotary.calls == calls


def test_rows_far_apart_get_their_own_angles() -> None:
    recipe = make_recipe()
    rooms = Rooms(recipe, 2)
    rooms.set_tokens(torch.tensor([[1], [2]]), torch.tensor([[3], [500]]))
    cosines, sines = recipe.rotary(torch.zeros(1), torch.tensor([[3], [500]]))
    assert np.array_equal(rooms._cosines, cosines[:, 0].numpy())
    assert np.array_equal(rooms._sines, sines[:, 0].numpy())
