"""What a native decode step works in, made once and used by every step."""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from icecache.cache.fused import NewToken
from icecache.integrations.transformers.recipe import (
    Matrix,
    NormRecipe,
    Recipe,
)
from icecache.ops.native import DTYPES, Decode
from icecache.ops.native.forward import ACTIVATIONS, Block, Forward, Linear, Norm

__all__ = ["Rooms"]

# positions whose angles are asked of the model at once
_ANGLES = 64


class Rooms:
    """Buffers and addresses of the native steps of one model.

    Parameters
    ----------
    recipe : Recipe
        Its tensors must stay where they are.
    batch : int
        Rows of all caches together.
    num_caches : int, default 1
        Whose rows these are, as many for each.

    Attributes
    ----------
    forward : Forward
        What the compiled call is given.
    key : Tensor, shape [batch, num_kv_heads, 1, head_dim]
    attended : list of Tensor, shape [batch / num_caches, num_heads, 1, head_dim]
        Of each cache.
    tokens : list of list of NewToken
        What each cache is given, block by block; query, key and value are the same memory for all.
    rows : int
        A cache's rows, one a KV head.
    """

    def __init__(self, recipe: Recipe, batch: int, num_caches: int = 1) -> None:
        self.recipe, self.batch, self.num_caches = recipe, batch, num_caches
        self._each = batch // num_caches
        self.rows = self._each * recipe.num_kv_heads
        heads, kv_heads, dim = recipe.num_heads, recipe.num_kv_heads, recipe.head_dim
        self.query = torch.zeros(batch, heads, 1, dim, dtype=recipe.dtype)
        self.key = torch.zeros(batch, kv_heads, 1, dim, dtype=recipe.dtype)
        self.value, self._attended = torch.zeros_like(self.key), torch.zeros_like(self.query)
        self.watched_query = torch.zeros_like(self.query)
        self.tokens = [self._tokens(cache) for cache in range(num_caches)]
        self.attended = [self._attended[self._of(cache)] for cache in range(num_caches)]
        self._decodes = (ctypes.c_void_p * (len(recipe.blocks) * num_caches))()
        self._watched = np.full(num_caches, -1, dtype=np.int64)
        self._token_ids = np.zeros(batch, dtype=np.int64)
        # which positions the angles are of
        self._first: int | None = None
        self._table: tuple[np.ndarray, np.ndarray] | None = None
        self._blocks = (Block * len(recipe.blocks))(*map(self._block, range(len(recipe.blocks))))
        self.forward = self._make()

    def use(self, num_caches: int) -> None:
        """Let the next steps be of the first so many caches."""
        self.batch = num_caches * self._each
        self.forward.num_caches, self.forward.batch = num_caches, self.batch

    def set_tokens(self, token_ids: Tensor, positions: Tensor) -> None:
        """Give the next step its tokens, `[batch, 1]` both."""
        self._token_ids[: self.batch] = token_ids[:, 0].numpy()
        where = positions.expand(self.batch, 1)
        if not self.recipe.has_fixed_angles:
            self._set_angles(*(x[:, 0].numpy() for x in self._angles(where)))
            return
        places = where[:, 0].tolist()
        low, high = min(places), max(places)
        if self._first is None or not self._first <= low <= high < self._first + _ANGLES:
            if high - low >= _ANGLES:
                self._set_angles(*(x[:, 0].numpy() for x in self._angles(where)))
                return
            cosines, sines = self._angles(torch.arange(low, low + _ANGLES)[None])
            self._first, self._table = low, (cosines[0].numpy(), sines[0].numpy())
        assert self._table is not None
        at = [place - self._first for place in places]
        self._set_angles(self._table[0][at], self._table[1][at])

    def begin(
        self, decodes: Sequence[Sequence[Decode]], watched: Sequence[int | None] = ()
    ) -> Tensor:
        """Point to what each cache is given, block by block; return where the logits will be.

        watched: of each cache, the block whose query is wanted, in `watched_query`.
        """
        for cache, of_blocks in enumerate(decodes):
            for block, decode in enumerate(of_blocks):
                self._decodes[block * self.num_caches + cache] = ctypes.addressof(decode)
        self._watched[:] = -1
        self._watched[: len(watched)] = [-1 if block is None else block for block in watched]
        num_tokens = self.recipe.head.weight.shape[0]
        logits = torch.empty(self.batch, num_tokens, dtype=self.recipe.dtype)
        self.forward.logits = logits.data_ptr()
        self.forward.threads = torch.get_num_threads()
        return logits

    def leave_out(self, cache: int) -> None:
        """Let the rest of a step do without a cache."""
        for block in range(len(self.recipe.blocks)):
            self._decodes[block * self.num_caches + cache] = None

    def _of(self, cache: int) -> slice:
        return slice(cache * self._each, (cache + 1) * self._each)

    def _tokens(self, cache: int) -> list[NewToken]:
        query, key, value = (x[self._of(cache)] for x in (self.query, self.key, self.value))
        scalings = {block.scaling for block in self.recipe.blocks}
        tokens = {scaling: NewToken(query, key, value, scaling, None) for scaling in scalings}
        return [tokens[block.scaling] for block in self.recipe.blocks]

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cosines, sines = self.recipe.rotary(torch.zeros(1), positions)
        return cosines, sines

    def _set_angles(self, cosines: np.ndarray, sines: np.ndarray) -> None:
        self._cosines[: self.batch], self._sines[: self.batch] = cosines, sines

    def _make(self) -> Forward:
        recipe, batch = self.recipe, self.batch
        block = recipe.blocks[0]
        hidden, inner = recipe.embedding.shape[1], block.gate.weight.shape[0]
        num_tokens, heads = recipe.head.weight.shape[0], block.query.weight.shape[0]
        joined = heads + block.key.weight.shape[0] + block.value.weight.shape[0]
        widest = max(hidden, 2 * inner, num_tokens, joined)
        rotary_dim = self._angles(torch.zeros(1, 1, dtype=torch.int64))[0].shape[-1]
        self._cosines, self._sines = np.zeros((2, batch, rotary_dim), dtype=np.float32)
        self._hidden = np.zeros((batch, hidden), dtype=np.float32)
        self._products = np.zeros((batch, widest), dtype=np.float32)
        self._vectors = np.zeros((batch, max(hidden, heads)), dtype=np.float32)
        self._inner = np.zeros((batch, inner), dtype=np.float32)
        return Forward(
            blocks=ctypes.addressof(self._blocks),
            norm=_norm(recipe.norm),
            head=_linear(recipe.head),
            embedding=recipe.embedding.data_ptr(),
            num_blocks=len(recipe.blocks),
            num_caches=self.num_caches,
            batch=batch,
            hidden=hidden,
            num_heads=recipe.num_heads,
            num_kv_heads=recipe.num_kv_heads,
            head_dim=recipe.head_dim,
            rotary_dim=rotary_dim,
            inner=inner,
            embedding_scale=recipe.embedding_scale,
            residual_scale=recipe.residual_scale,
            logit_scale=recipe.logit_scale,
            dtype=DTYPES[recipe.dtype],
            token_ids=self._token_ids.ctypes.data,
            cosines=self._cosines.ctypes.data,
            sines=self._sines.ctypes.data,
            hidden_states=self._hidden.ctypes.data,
            products=self._products.ctypes.data,
            vectors=self._vectors.ctypes.data,
            inner_vectors=self._inner.ctypes.data,
            widest=widest,
            query=self.query.data_ptr(),
            key=self.key.data_ptr(),
            value=self.value.data_ptr(),
            attended=self._attended.data_ptr(),
            watched=self._watched.ctypes.data,
            watched_query=self.watched_query.data_ptr(),
        )

    def _block(self, number: int) -> Block:
        block = self.recipe.blocks[number]
        first = number * self.num_caches * ctypes.sizeof(ctypes.c_void_p)
        return Block(
            before_attention=_norm(block.before_attention),
            of_query=_norm(block.query_norm),
            of_key=_norm(block.key_norm),
            before_mlp=_norm(block.before_mlp),
            query=_linear(block.query),
            key=_linear(block.key),
            value=_linear(block.value),
            output=_linear(block.output),
            gate=_linear(block.gate),
            up=_linear(block.up),
            down=_linear(block.down),
            activation=ACTIVATIONS.index(block.activation),
            rotates=block.rotates,
            decodes=ctypes.addressof(self._decodes) + first,
        )


def _linear(matrix: Matrix) -> Linear:
    bias = None if matrix.bias is None else matrix.bias.data_ptr()
    return Linear(matrix.weight.data_ptr(), bias, *matrix.weight.shape)


def _norm(norm: NormRecipe | None) -> Norm:
    if norm is None:
        return Norm()
    return Norm(norm.weight.data_ptr(), norm.weight.shape[0], norm.eps)
