"""A decode step of a model and of one or many caches as one compiled call.

Each cache is a list of layers, one a block of the model. A cache that fails leaves the call, and
the others go on.
"""

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from icecache.cache.fused import ATTENDED, NOTHING, STOPPED, FusedStep
from icecache.cache.layer import IceCacheLayer
from icecache.errors import IceCacheError, UnsupportedModel
from icecache.integrations.transformers.recipe import SCALARS, Recipe
from icecache.integrations.transformers.rooms import Rooms
from icecache.integrations.transformers.support import decoder_config, supports
from icecache.ops.native import Answer
from icecache.ops.native.forward import Place, load_forward

__all__ = [
    "Layers",
    "Outcome",
    "Teller",
    "build_of",
    "check_answers",
    "ready_steps",
    "require_managed",
    "run",
]

_CHECKED_TOKENS = 9
# the difference's root mean square over that of the logits: sums in another order give 1e-6, what
# torch rounds of bfloat16 some 0.05, another model 1
_MOST_DIFFERENT = {torch.float32: 1e-3, torch.bfloat16: 0.2}

Layers = Sequence[IceCacheLayer]


class Outcome(NamedTuple):
    """What a step was for one cache.

    Attributes
    ----------
    took_in : list of bool
        Of each layer, whether the token is there now.
    is_done : bool
        Whether all of it was done. Otherwise, without an error, the tokens were not finite: the
        model has to say so.
    error : IceCacheError, optional
    """

    took_in: list[bool]
    is_done: bool
    error: IceCacheError | None


class Teller(Protocol):
    """Asks the model itself, for `check_answers`."""

    def __call__(
        self, token_ids: Tensor, positions: Tensor
    ) -> AbstractContextManager[tuple[Tensor, Layers]]:
        """Give logits `[tokens, vocabulary]`, and layers that hold the first token alone."""


def ready_steps(layers: Layers, rooms: Rooms, cache: int) -> list[FusedStep] | None:
    """Return what takes a token into each layer; None unless all can by compiled calls."""
    steps = []
    for layer, token in zip(layers, rooms.tokens[cache], strict=True):
        step = layer.fused_step()
        if step is None or not step.ready(token):
            return None
        steps.append(step)
    return steps


def run(
    rooms: Rooms,
    caches: Sequence[Layers],
    steps: Sequence[list[FusedStep]],
    watched: Sequence[int | None] = (),
) -> tuple[Tensor, list[Outcome]]:
    """Do a step whose tokens `rooms` has been given.

    Returns
    -------
    logits : Tensor, shape [batch, vocabulary]
        Without meaning in the rows of caches that failed.
    outcomes : list of Outcome
        Of each cache.
    """
    at, answer = Place(-1, 0, -1), Answer()
    # where caches have failed, and how
    failed: dict[int, tuple[int, int, int]] = {}
    references = tuple(ctypes.byref(part) for part in (rooms.forward, at, answer))
    call, status = load_forward().icecache_forward, NOTHING
    outcomes = []
    try:
        opened = [
            [step.open(rooms.attended[cache]) for step in of_cache]
            for cache, of_cache in enumerate(steps)
        ]
        logits = rooms.begin(opened, watched)
        while (status := call(*references)) != ATTENDED:
            if status == STOPPED:
                steps[at.cache][at.block].provide(at.row, answer)
                # forks share a pool, whose arrays may lie elsewhere now
                for of_cache in steps[at.cache + 1 :]:
                    of_cache[at.block].point()
                continue
            failed[at.cache] = (at.block, status, at.row)
            rooms.leave_out(at.cache)
            at.cache, at.row, status = at.cache + 1, -1, NOTHING
    finally:
        # an interrupt comes behind the call, which has said by then how far it got
        here = at.block, NOTHING if status == STOPPED else status, at.row
        for cache, layers in enumerate(caches):
            # the caches before this one are done with this block
            elsewhere = at.block + (cache < at.cache), NOTHING, -1
            stop = failed.get(cache, here if cache == at.cache else elsewhere)
            outcomes.append(_close(layers, steps[cache], stop, rooms.rows))
    return logits, outcomes


def _close(
    layers: Layers, steps: list[FusedStep], stop: tuple[int, int, int], rows: int
) -> Outcome:
    """Count what each layer of a cache did: all before a block, some of that one, none behind."""
    block, *how = stop
    error = None
    for i, (layer, step) in enumerate(zip(layers, steps, strict=True)):
        done = (ATTENDED, rows) if i < block else how if i == block else (NOTHING, -1)
        try:
            layer.close_step(step, *done)
        except IceCacheError as raised:
            error = raised
    return Outcome([step.took_in for step in steps], block >= len(steps), error)


def require_managed(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModel` unless all layers keep their tokens in caches of ours."""
    report = supports(model)
    left = [layer.index for layer in report.layers if layer.status != "managed"]
    if left:
        raise UnsupportedModel(
            f"the native step needs every layer's cache to be IceCache's, and layer "
            f"{left[0]} of {report.model_type} keeps its own; pass native=False"
        )


def build_of(model: PreTrainedModel) -> tuple[object, ...]:
    """Return what changes when weights lie elsewhere, or modules are others or do otherwise."""
    tensors = (x.data_ptr() for x in (*model.parameters(), *model.buffers()))
    modules = (
        (
            id(x),
            type(x),
            *x._forward_hooks,
            *x._forward_pre_hooks,
            "forward" in vars(x),
            *(vars(x).get(name) for name in SCALARS),
        )
        for x in model.modules()
    )
    return *tensors, *modules


def check_answers(model: PreTrainedModel, recipe: Recipe, tell: Teller) -> None:
    """Ask the model and the native step the same, at its first and its last positions.

    Raises
    ------
    UnsupportedModel
        If they differ by more than rounding.
    """
    limits = getattr(decoder_config(model.config), "max_position_embeddings", 0) or 0
    # what some models do from some position on
    last = max(0, int(limits) - _CHECKED_TOKENS)
    difference = max(_difference(model, recipe, tell, first) for first in {0, last})
    limit = _MOST_DIFFERENT[recipe.dtype]
    # what is no number differs too
    if not difference <= limit:
        raise UnsupportedModel(
            f"{type(model).__name__} answers otherwise than the native step (by "
            f"{difference:.2g} of its logits, {limit:g} is rounding); pass native=False"
        )


@torch.no_grad()
def _difference(model: PreTrainedModel, recipe: Recipe, tell: Teller, first: int) -> float:
    """How far both are apart, on tokens from position `first` on."""
    vocabulary = recipe.embedding.shape[0]
    token_ids = torch.arange(1, _CHECKED_TOKENS + 1) * (vocabulary // 7 + 1) % vocabulary
    places = torch.arange(first, first + _CHECKED_TOKENS)
    rooms = Rooms(recipe, 1)

    def answer(i: int, layers: Layers) -> Tensor:
        steps = ready_steps(layers, rooms, 0)
        if steps is None:
            raise UnsupportedModel(
                f"the compiled ops do not attend heads as {type(model).__name__} has them; "
                "pass native=False"
            )
        rooms.set_tokens(token_ids[i, None, None], places[i, None, None])
        return run(rooms, [layers], [steps])[0][0]

    with tell(token_ids, places) as (told, layers):
        ours = torch.stack([answer(i, layers) for i in range(1, _CHECKED_TOKENS)]).float()
    told = told[1:].float()
    size = (told - told.mean(-1, keepdim=True)).pow(2).mean().sqrt()
    return float((ours - told).pow(2).mean().sqrt() / size)
