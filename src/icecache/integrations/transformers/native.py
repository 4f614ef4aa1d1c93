"""A decode step of the whole model as one compiled call, weights read where they lie.

Where torch has no fast product for one token (bfloat16 on most processors) a step is several times
faster for it, and everywhere it does without the calls between products. The model itself is the
twin: before its first native step both are asked the same, and a model that answers otherwise
goes on as it is.
"""

import ctypes
import logging
from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from icecache.cache.fused import ATTENDED, NOTHING, STOPPED, FusedStep, NewToken
from icecache.cache.layer import IceCacheLayer
from icecache.errors import IceCacheError, UnsupportedModel
from icecache.integrations.transformers.cache import IceCache
from icecache.integrations.transformers.compiled import is_plain_step
from icecache.integrations.transformers.layer import ManagedLayer
from icecache.integrations.transformers.recipe import SCALARS, Recipe, recipe_of
from icecache.integrations.transformers.rooms import Rooms
from icecache.integrations.transformers.support import decoder_config, supports
from icecache.ops.native import Answer
from icecache.ops.native.forward import load_forward

__all__ = ["NativeStep"]

_LOGGER = logging.getLogger(__name__)
_CHECKED_TOKENS = 9
# the difference's root mean square over that of the logits: sums in another order give 1e-6, what
# torch rounds of bfloat16 some 0.05, another model 1
_MOST_DIFFERENT = {torch.float32: 1e-3, torch.bfloat16: 0.2}


class NativeStep:
    """Runs a model's decode steps as one compiled call, and all its other forwards as they are.

    Parameters
    ----------
    model : PreTrainedModel
        Attached to IceCache whenever this is called.
    otherwise : callable, optional
        What does ``model(**inputs)`` if the model turns out to have no native step; by default the
        model.

    Attributes
    ----------
    steps : int
        Forwards that ran as one compiled call.

    Raises
    ------
    UnsupportedModel
        If the model is not built as the native step does it.
    BackendUnavailable
        If the compiled ops are not installed.
    """

    def __init__(self, model: PreTrainedModel, otherwise: Callable[..., Any] | None = None) -> None:
        load_forward()
        self.model, self.otherwise = model, model if otherwise is None else otherwise
        self.steps = 0
        self._lock = Lock()
        self._make()

    def __getstate__(self) -> dict[str, Any]:
        # addresses are of this process and of this model's memory
        return {**self.__dict__, "_lock": None, "_rooms": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def renew(self) -> None:
        """Look at the model again if it is no longer built as it was."""
        if self._build != _build_of(self.model):
            try:
                self._make()
            except UnsupportedModel as reason:
                self._give_up(reason)
        renew = getattr(self.otherwise, "renew", None)
        if renew is not None:
            renew()

    def check(self) -> None:
        """Ask the model and the native step the same.

        Raises
        ------
        UnsupportedModel
            If they differ by more than rounding.
        """
        limits = getattr(decoder_config(self.model.config), "max_position_embeddings", 0) or 0
        # what some models do from some position on
        last = max(0, int(limits) - _CHECKED_TOKENS)
        difference = max(self._difference(first) for first in {0, last})
        self._is_checked = True
        limit = _MOST_DIFFERENT[self._recipe.dtype]
        # what is no number differs too
        if not difference <= limit:
            raise UnsupportedModel(
                f"{type(self.model).__name__} answers otherwise than the native step (by "
                f"{difference:.2g} of its logits, {limit:g} is rounding); pass native=False"
            )

    def __call__(self, **inputs: Any) -> Any:
        """Do what ``model(**inputs)`` does."""
        is_step = is_plain_step(inputs, may_be_padded=True) and not torch.is_grad_enabled()
        if not self._can_run:
            return self.otherwise(**inputs)
        if not is_step or self.model.training:
            return self.model(**inputs)
        if not self._is_checked:
            try:
                self.check()
            except UnsupportedModel as reason:
                self._give_up(reason)
                return self.otherwise(**inputs)
        cache: IceCache = inputs["past_key_values"]
        others = (inputs.get(name) for name in ("position_ids", "attention_mask"))
        # what a step works in is there once; another thread's goes through torch meanwhile
        if not self._lock.acquire(blocking=False):
            return self.model(**inputs)
        try:
            logits = self._step(cache, inputs["input_ids"], *others)
        finally:
            self._lock.release()
        if logits is None:
            return self.model(**inputs)
        self.steps += 1
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=cache)

    def _give_up(self, reason: UnsupportedModel) -> None:
        _LOGGER.warning("no native decode steps: %s", reason)
        self._can_run = False

    def _make(self) -> None:
        self._build = _build_of(self.model)
        self._can_run, self._is_checked = True, False
        report = supports(self.model)
        left = [layer.index for layer in report.layers if layer.status != "managed"]
        if left:
            raise UnsupportedModel(
                f"the native step needs every layer's cache to be IceCache's, and layer "
                f"{left[0]} of {report.model_type} keeps its own; pass native=False"
            )
        self._recipe: Recipe = recipe_of(self.model)
        self._rooms: Rooms | None = None

    def _step(
        self,
        cache: IceCache,
        token_ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | None:
        """Return the logits, [batch, tokens]; None, and nothing has changed, if only torch can."""
        layers = [layer for layer in cache.layers if isinstance(layer, ManagedLayer)]
        if len(layers) != len(self._recipe.blocks) or len(layers) != len(cache.layers):
            return None
        batch, (least, most) = token_ids.shape[0], token_ids.aminmax()
        if least < 0 or most >= self._recipe.embedding.shape[0]:
            return None
        if self._rooms is None or self._rooms.batch != batch:
            self._rooms = Rooms(self._recipe, batch)
        rooms = self._rooms
        steps = _ready_steps(layers, rooms.tokens)
        if steps is None:
            return None
        if positions is None:
            positions = torch.full_like(token_ids, cache.get_seq_length())
        rooms.set_tokens(token_ids, positions)
        cache.forward_pass.enter(0, rooms.key)
        try:
            logits = None
            if mask is None or cache.forward_pass.new_tokens(_padding(mask)) is None:
                logits = self._run(rooms, layers, steps)
        except BaseException:
            cache.undo()
            raise
        if logits is None:
            cache.undo()
        else:
            cache.forward_pass.settle()
        return logits

    def _run(
        self, rooms: Rooms, layers: list[ManagedLayer], steps: list[FusedStep]
    ) -> Tensor | None:
        block, row, answer = ctypes.c_int64(-1), ctypes.c_int64(-1), Answer()
        logits = rooms.begin([step.open(rooms.attended) for step in steps])
        references = ctypes.byref(rooms.forward), *map(ctypes.byref, (block, row, answer))
        call, status = load_forward().icecache_forward, NOTHING
        try:
            while (status := call(*references)) == STOPPED:
                steps[block.value].provide(row.value, answer)
        finally:
            # an interrupt comes behind the call, which has said by then how far it got
            status = NOTHING if status == STOPPED else status
            failure = _close(layers, steps, block.value, (status, row.value), rooms.rows)
        if failure is not None:
            raise failure
        return logits if status == ATTENDED else None

    @torch.no_grad()
    def _difference(self, first: int) -> float:
        """How far both are apart, on tokens from position `first` on."""
        vocabulary = self._recipe.embedding.shape[0]
        token_ids = torch.arange(1, _CHECKED_TOKENS + 1)[None] * (vocabulary // 7 + 1) % vocabulary
        places = torch.arange(first, first + _CHECKED_TOKENS)[None]
        told = self.model(input_ids=token_ids, position_ids=places, use_cache=False).logits
        told, cache = told[:, 1:].float(), IceCache(self.model)
        try:
            self.model(
                input_ids=token_ids[:, :1], position_ids=places[:, :1], past_key_values=cache
            )
            found = [
                self._step(cache, token_ids[:, i : i + 1], places[:, i : i + 1])
                for i in range(1, _CHECKED_TOKENS)
            ]
        finally:
            cache.close()
        steps = [step for step in found if step is not None]
        if len(steps) < len(found):
            raise UnsupportedModel(
                f"the compiled ops do not attend heads as {type(self.model).__name__} has them; "
                "pass native=False"
            )
        ours = torch.stack(steps, 1).float()
        size = (told - told.mean(-1, keepdim=True)).pow(2).mean().sqrt()
        return float((ours - told).pow(2).mean().sqrt() / size)


def _ready_steps(layers: list[ManagedLayer], tokens: list[NewToken]) -> list[FusedStep] | None:
    """Return what takes a token into each layer's cache; None unless all can by compiled calls."""
    steps = []
    for layer, token in zip(layers, tokens, strict=True):
        if not isinstance(layer.core, IceCacheLayer):
            return None
        step = layer.core.fused_step()
        if step is None or not step.ready(token):
            return None
        steps.append(step)
    return steps


def _close(
    layers: list[ManagedLayer],
    steps: list[FusedStep],
    block: int,
    how: tuple[int, int],
    rows: int,
) -> IceCacheError | None:
    """Count what each layer did: all before `block`, `how` that one, nothing behind it."""
    failure = None
    for i, (layer, step) in enumerate(zip(layers, steps, strict=True)):
        assert isinstance(layer.core, IceCacheLayer)
        done = (ATTENDED, rows) if i < block else how if i == block else (NOTHING, -1)
        try:
            layer.core.close_step(step, *done)
        except IceCacheError as error:
            failure = error
        layer.num_columns += step.took_in
    return failure


def _padding(mask: Tensor) -> Tensor | None:
    """A mask as attention gets it, ``[batch, 1, 1, columns]``; None where nothing is padded."""
    return None if bool(mask.all()) else mask.bool()[:, None, None]


def _build_of(model: PreTrainedModel) -> tuple[object, ...]:
    """What changes when weights lie elsewhere, or modules are others or do something else."""
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
