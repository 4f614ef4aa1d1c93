"""What a native decode step has to know of a model: its weights, and what is done with them.

A model is taken apart by its structure, not by its name: decoder blocks of two norms, an attention
with rotary embedding and a gated MLP, as Llama has them. Every parameter must have found its place
in the end. What cannot be read from the structure (what a norm computes, which activation) is asked
of the modules themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from icecache.errors import UnsupportedModel
from icecache.ops.native.forward import ACTIVATIONS
from icecache.ops.reference_model import ACTIVATION_OF, rms_norm

__all__ = ["SCALARS", "BlockRecipe", "Matrix", "NormRecipe", "Recipe", "recipe_of"]

# attributes of modules that a recipe reads
SCALARS = ("scaling", "head_dim", "residual_multiplier", "embedding_multiplier", "use_rope")

_DTYPES = (torch.float32, torch.bfloat16)
# rotary embeddings whose angles depend on the length of the context
_MOVING = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer, or rows of one.

    Attributes
    ----------
    weight : shape [num_out, num_in], contiguous
    bias : shape [num_out], optional
    """

    weight: Tensor
    bias: Tensor | None

    def rows(self, first: int, num: int) -> "Matrix":
        """Return some of the rows; views."""
        bias = None if self.bias is None else self.bias[first : first + num]
        return Matrix(self.weight[first : first + num], bias)


@dataclass(frozen=True, slots=True)
class NormRecipe:
    """A root mean square norm."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class BlockRecipe:
    """A decoder block; `query_norm` and `key_norm` are of each head, or of all at once."""

    before_attention: NormRecipe
    query: Matrix
    key: Matrix
    value: Matrix
    query_norm: NormRecipe | None
    key_norm: NormRecipe | None
    output: Matrix
    before_mlp: NormRecipe
    gate: Matrix
    up: Matrix
    down: Matrix
    activation: str
    rotates: bool
    scaling: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """A decoder, from token ids to logits."""

    embedding: Tensor
    blocks: tuple[BlockRecipe, ...]
    norm: NormRecipe
    head: Matrix
    rotary: nn.Module = field(repr=False)
    head_dim: int
    embedding_scale: float
    residual_scale: float
    logit_scale: float

    @property
    def dtype(self) -> torch.dtype:
        """Of all weights."""
        return self.embedding.dtype

    @property
    def num_heads(self) -> int:
        """Query heads of a block."""
        return self.blocks[0].query.weight.shape[0] // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a block."""
        return self.blocks[0].key.weight.shape[0] // self.head_dim

    @property
    def has_fixed_angles(self) -> bool:
        """Whether a position's angles are the same in every context."""
        return getattr(self.rotary, "rope_type", None) not in (None, *_MOVING)

    def weights(self) -> Iterator[Tensor]:
        """All tensors that a step reads, tied ones as often as they are."""
        yield self.embedding
        yield from _tensors_of(self.norm)
        yield from _tensors_of(self.head)
        for block in self.blocks:
            for name in BlockRecipe.__slots__:
                yield from _tensors_of(getattr(block, name))


def recipe_of(model: PreTrainedModel) -> Recipe:
    """Take a model apart.

    Raises
    ------
    UnsupportedModel
        If it is not built as the native step does it; says which part is not.
    """
    decoder, config = model.base_model, model.config
    _check_parameters(model)
    _refuse_hooks(model)
    parts = _children(decoder, {"embed_tokens", "layers", "norm", "rotary_emb"}, set(), "decoder")
    embedding = parts["embed_tokens"]
    if type(embedding) is not nn.Embedding:
        raise _unlike(f"embeddings of the kind {type(embedding).__name__}")
    if getattr(config, "final_logit_softcapping", None):
        raise _unlike("a softcap on its logits")
    blocks = tuple(_block(layer) for layer in parts["layers"])
    attention = parts["layers"][0].self_attn
    head_dim = getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int):
        raise _unlike("no head_dim in its attention")
    _check_shapes(blocks, head_dim, embedding.weight.shape[1])
    head = _matrix(model.get_output_embeddings(), "head")
    # a token that the head knows is the next one to be read
    if head.weight.shape != embedding.weight.shape:
        raise _unlike("a head of another shape than its embeddings")
    recipe = Recipe(
        embedding=embedding.weight,
        blocks=blocks,
        norm=_norm(parts["norm"], "norm"),
        head=head,
        rotary=parts["rotary_emb"],
        head_dim=head_dim,
        embedding_scale=float(getattr(decoder, "embedding_multiplier", 1.0)),
        residual_scale=float(getattr(parts["layers"][0], "residual_multiplier", 1.0)),
        logit_scale=1.0 / float(getattr(config, "logits_scaling", 1.0)),
    )
    _check_places(model, recipe)
    return recipe


def _block(layer: nn.Module) -> BlockRecipe:
    parts = _children(
        layer,
        {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
        {"resid_attn_dropout", "resid_mlp_dropout"},
        "block",
    )
    attention, mlp = parts["self_attn"], parts["mlp"]
    if getattr(attention, "attn_logit_softcapping", None):
        raise _unlike("a softcap in its attention")
    query, key, value, output, norms = _attention(attention)
    gate, up, down, activation = _mlp(mlp)
    return BlockRecipe(
        before_attention=_norm(parts["input_layernorm"], "input_layernorm"),
        query=query,
        key=key,
        value=value,
        query_norm=norms[0],
        key_norm=norms[1],
        output=output,
        before_mlp=_norm(parts["post_attention_layernorm"], "post_attention_layernorm"),
        gate=gate,
        up=up,
        down=down,
        activation=activation,
        rotates=bool(getattr(attention, "use_rope", True)),
        scaling=_scaling(attention),
    )


def _scaling(attention: Any) -> float:
    scaling = getattr(attention, "scaling", None)
    if not isinstance(scaling, float):
        raise _unlike("no scaling in its attention")
    return scaling


def _attention(
    attention: Any,
) -> tuple[Matrix, Matrix, Matrix, Matrix, tuple[NormRecipe | None, NormRecipe | None]]:
    if hasattr(attention, "qkv_proj"):
        parts = _children(attention, {"qkv_proj", "o_proj"}, set(), "attention")
        joined, config = _matrix(parts["qkv_proj"], "qkv_proj"), attention.config
        heads, dim = config.num_attention_heads, attention.head_dim
        rows = [heads * dim] + 2 * [config.num_key_value_heads * dim]
        query, key, value = (joined.rows(sum(rows[:i]), rows[i]) for i in range(3))
    else:
        names = {"q_proj", "k_proj", "v_proj", "o_proj"}
        parts = _children(attention, names, {"q_norm", "k_norm"}, "attention")
        query, key, value = (_matrix(parts[f"{x}_proj"], f"{x}_proj") for x in "qkv")
    q_norm, k_norm = (
        _norm(parts[name], name) if name in parts else None for name in ("q_norm", "k_norm")
    )
    return query, key, value, _matrix(parts["o_proj"], "o_proj"), (q_norm, k_norm)


def _mlp(mlp: nn.Module) -> tuple[Matrix, Matrix, Matrix, str]:
    functions = ("act_fn", "activation_fn")
    if hasattr(mlp, "gate_up_proj"):
        parts = _children(mlp, {"gate_up_proj", "down_proj"}, set(functions), "mlp")
        joined = _matrix(parts["gate_up_proj"], "gate_up_proj")
        half = joined.weight.shape[0] // 2
        gate, up = joined.rows(0, half), joined.rows(half, half)
    else:
        parts = _children(mlp, {"gate_proj", "up_proj", "down_proj"}, set(functions), "mlp")
        gate, up = (_matrix(parts[name], name) for name in ("gate_proj", "up_proj"))
    activation = next((getattr(mlp, name) for name in functions if hasattr(mlp, name)), None)
    return gate, up, _matrix(parts["down_proj"], "down_proj"), _activation(activation)


def _children(module: nn.Module, needed: set[str], allowed: set[str], what: str) -> dict[str, Any]:
    found = {name: child for name, child in module.named_children() if child is not None}
    missing, unknown = needed - set(found), set(found) - needed - allowed
    if missing or unknown:
        raise _unlike(
            f"a {what} "
            + "".join(
                [f"without {', '.join(sorted(missing))}"] * bool(missing)
                + [" and "] * bool(missing and unknown)
                + [f"with {', '.join(sorted(unknown))}"] * bool(unknown)
            )
        )
    return found


def _matrix(module: Any, name: str) -> Matrix:
    if type(module) is not nn.Linear:
        raise _unlike(f"{name} of the kind {type(module).__name__}")
    return Matrix(module.weight, module.bias)


@torch.no_grad()
def _norm(module: nn.Module, name: str) -> NormRecipe:
    weight, eps = getattr(module, "weight", None), _eps(module)
    if (
        weight is None
        or weight.dim() != 1
        or eps is None
        or getattr(module, "bias", None) is not None
    ):
        raise _unlike(f"{name} of the kind {type(module).__name__}")
    x = torch.linspace(-2.0, 3.0, weight.shape[0])[None, None]
    if not torch.allclose(module(x), rms_norm(x, weight.float(), eps), rtol=1e-4, atol=1e-6):
        raise _unlike(f"{name} of the kind {type(module).__name__}")
    return NormRecipe(weight, eps)


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(module, name, None), float):
            return float(getattr(module, name))
    return None


@torch.no_grad()
def _activation(function: Any) -> str:
    x = torch.linspace(-4.0, 4.0, 257)
    told = None if function is None else function(x)
    for name in ACTIVATIONS:
        if told is not None and torch.allclose(told, ACTIVATION_OF[name](x), rtol=0, atol=1e-6):
            return name
    raise _unlike(f"an activation that is none of {', '.join(ACTIVATIONS)}")


def _refuse_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise _unlike(f"hooks or another forward on {name or 'itself'}")


def _check_parameters(model: PreTrainedModel) -> None:
    first = next(model.parameters()).dtype
    for name, weight in model.named_parameters():
        if weight.dtype not in _DTYPES or weight.dtype != first or not weight.is_cpu:
            raise _unlike(f"{name} in {weight.dtype} on {weight.device.type}")
        # quantized weights are tensors of another class, which say that they are these
        is_plain = type(weight) in (nn.Parameter, Tensor) and weight.layout is torch.strided
        if not is_plain or not weight.is_contiguous() or weight.data_ptr() == 0:
            raise _unlike(f"{name} in another layout")


def _check_shapes(blocks: tuple[BlockRecipe, ...], head_dim: int, hidden: int) -> None:
    first = blocks[0]
    heads, kv_heads, inner = (x.weight.shape[0] for x in (first.query, first.key, first.gate))
    told = [
        (heads, hidden),
        *((kv_heads, hidden),) * 2,
        (hidden, heads),
        *((inner, hidden),) * 2,
        (hidden, inner),
    ]
    for b in blocks:
        matrices = (b.query, b.key, b.value, b.output, b.gate, b.up, b.down)
        if [tuple(x.weight.shape) for x in matrices] != told:
            raise _unlike("blocks of several shapes")
    if heads % head_dim or kv_heads % head_dim or heads % kv_heads:
        raise _unlike(f"{heads} query and {kv_heads} key features in heads of {head_dim}")


def _check_places(model: PreTrainedModel, recipe: Recipe) -> None:
    used = {weight.data_ptr() for weight in recipe.weights()}
    for name, weight in model.named_parameters():
        if weight.data_ptr() not in used:
            raise _unlike(f"{name}, which has no place in the native step")


def _tensors_of(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Matrix):
        yield part.weight
        if part.bias is not None:
            yield part.bias
    elif isinstance(part, NormRecipe):
        yield part.weight


def _unlike(what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the native step is for decoders built like Llama's in float32 or bfloat16 on the CPU, "
        f"and this one has {what}; pass native=False"
    )
