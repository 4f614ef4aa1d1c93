"""A decode step of the whole model as one compiled call, weights read where they lie.

Where torch has no fast product for one token (bfloat16 on most processors) a step is several times
faster for it, and everywhere it does without the calls between products. The model itself is the
twin: before its first native step both are asked the same, and a model that answers otherwise
goes on as it is.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from icecache.cache.fused import FusedStep
from icecache.cache.layer import IceCacheLayer
from icecache.errors import UnsupportedModel
from icecache.integrations.transformers.cache import IceCache
from icecache.integrations.transformers.compiled import is_plain_step
from icecache.integrations.transformers.layer import ManagedLayer
from icecache.integrations.transformers.one_call import (
    Layers,
    build_of,
    check_answers,
    ready_steps,
    require_managed,
    run,
)
from icecache.integrations.transformers.recipe import Recipe, recipe_of
from icecache.integrations.transformers.rooms import Rooms
from icecache.ops.native.forward import load_forward

__all__ = ["NativeStep"]

_LOGGER = logging.getLogger(__name__)


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
        if self._build != build_of(self.model):
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
        check_answers(self.model, self._recipe, self._tell)
        self._is_checked = True

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
        self._build = build_of(self.model)
        self._can_run, self._is_checked = True, False
        require_managed(self.model)
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
        cores = [layer.core for layer in layers if isinstance(layer.core, IceCacheLayer)]
        batch, (least, most) = token_ids.shape[0], token_ids.aminmax()
        if len(cores) < len(layers) or least < 0 or most >= self._recipe.embedding.shape[0]:
            return None
        if self._rooms is None or self._rooms.batch != batch:
            self._rooms = Rooms(self._recipe, batch)
        rooms = self._rooms
        steps = ready_steps(cores, rooms, 0)
        if steps is None:
            return None
        if positions is None:
            positions = torch.full_like(token_ids, cache.get_seq_length())
        rooms.set_tokens(token_ids, positions)
        cache.forward_pass.enter(0, rooms.key)
        try:
            logits = None
            if mask is None or cache.forward_pass.new_tokens(_padding(mask)) is None:
                logits = self._run(rooms, layers, cores, steps)
        except BaseException:
            cache.undo()
            raise
        if logits is None:
            cache.undo()
        else:
            cache.forward_pass.settle()
        return logits

    def _run(
        self, rooms: Rooms, layers: list[ManagedLayer], cores: Layers, steps: list[FusedStep]
    ) -> Tensor | None:
        try:
            logits, (outcome,) = run(rooms, [cores], [steps])
        finally:
            # also of what an interrupt has cut short
            for layer, step in zip(layers, steps, strict=True):
                layer.num_columns += step.took_in
        if outcome.error is not None:
            raise outcome.error
        return logits if outcome.is_done else None

    @contextmanager
    def _tell(self, token_ids: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Layers]]:
        ids, places = token_ids[None], positions[None]
        told = self.model(input_ids=ids, position_ids=places, use_cache=False).logits[0]
        cache, first = (
            IceCache(self.model),
            {"input_ids": ids[:, :1], "position_ids": places[:, :1]},
        )
        try:
            self.model(**first, past_key_values=cache)
            layers = [layer.core for layer in cache.layers if isinstance(layer, ManagedLayer)]
            yield told, [layer for layer in layers if isinstance(layer, IceCacheLayer)]
        finally:
            cache.close()


def _padding(mask: Tensor) -> Tensor | None:
    """A mask as attention gets it, ``[batch, 1, 1, columns]``; None where nothing is padded."""
    return None if bool(mask.all()) else mask.bool()[:, None, None]
