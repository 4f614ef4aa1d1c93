"""The next tokens of many answers by one compiled call, weights read where they lie.

A request goes this way by its own state alone, never by who else is served, and a product's result
does not depend on how many vectors there are: answers stay the same in any company.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from icecache.cache.fused import FusedStep
from icecache.engine.packed import Span
from icecache.errors import IceCacheError, InputError, UnsupportedModel
from icecache.integrations.transformers.one_call import (
    Outcome,
    Teller,
    build_of,
    check_answers,
    ready_steps,
    require_managed,
    run,
)
from icecache.integrations.transformers.recipe import recipe_of
from icecache.integrations.transformers.rooms import Rooms
from icecache.ops.native.forward import load_forward

__all__ = ["NativeSteps"]

_logger = logging.getLogger(__name__)


class NativeSteps:
    """Takes tokens of answers in, for the requests whose layers can do that natively.

    Parameters
    ----------
    model : PreTrainedModel
    tell : Teller
        Asks the model itself, which is the twin: both are compared before the first step.

    Attributes
    ----------
    steps : int
        Tokens that were taken in.

    Raises
    ------
    UnsupportedModel
        If the model is not built as the native step does it.
    BackendUnavailable
        If the compiled ops are not installed.
    """

    def __init__(self, model: PreTrainedModel, tell: Teller) -> None:
        load_forward()
        require_managed(model)
        self._model, self._tell = model, tell
        self.steps = 0
        self._make()

    def renew(self) -> None:
        """Look at the model again if it is no longer built as it was."""
        if self._build != build_of(self._model):
            try:
                self._make()
            except UnsupportedModel as reason:
                self._give_up(reason)

    def check(self) -> None:
        """Ask the model and the native step the same; `UnsupportedModel` if they differ."""
        check_answers(self._model, self._recipe, self._tell)
        self._is_checked = True

    def take(
        self, spans: Sequence[Span], token_ids: Sequence[int], positions: Sequence[int]
    ) -> dict[int, Tensor]:
        """Take in a token of each of some requests.

        Returns
        -------
        dict of int to Tensor, shape [vocabulary]
            The logits of those spans that are done, by their number. What is missing has an error
            now, or is as it was and the model's to do.
        """
        if not spans or not self._may_run():
            return {}
        rooms = self._rooms_for(len(spans))
        chosen, steps = self._choose(rooms, spans)
        if not chosen:
            return {}
        rooms.use(len(chosen))
        rooms.set_tokens(
            *(torch.tensor([x[i] for i in chosen])[:, None] for x in (token_ids, positions))
        )
        layers, watched = [spans[i].layers for i in chosen], [_turn(spans[i]) for i in chosen]
        logits, outcomes = run(rooms, layers, steps, watched)
        done = {}
        for row, (i, outcome) in enumerate(zip(chosen, outcomes, strict=True)):
            span = spans[i]
            try:
                self._conclude(span, outcome, rooms.watched_query[row : row + 1])
                done[i] = logits[row]
            except IceCacheError as error:
                span.error = error
        return done

    def _make(self) -> None:
        self._build = build_of(self._model)
        self._recipe = recipe_of(self._model)
        self._is_checked, self._can_run = False, True
        self._rooms: Rooms | None = None

    def _give_up(self, reason: UnsupportedModel) -> None:
        _logger.warning("no native decode steps: %s", reason)
        self._can_run = False

    def _conclude(self, span: Span, outcome: Outcome, query: Tensor) -> None:
        """Count a step, and let who watches look at it."""
        if outcome.error is not None:
            raise outcome.error
        if not outcome.is_done:
            raise InputError(
                "keys, values and query must be finite, and those of an answer are not"
            )
        self.steps += 1
        index = _turn(span)
        if span.watch is not None and index is not None:
            scaling = self._recipe.blocks[index].scaling
            span.watch.look(index, span.layers, query, {"scaling": scaling})

    def _may_run(self) -> bool:
        if self._can_run and not self._is_checked:
            try:
                self.check()
            except UnsupportedModel as reason:
                self._give_up(reason)
        return self._can_run

    def _rooms_for(self, num: int) -> Rooms:
        if self._rooms is None or self._rooms.num_caches < num:
            size = 1 << (num - 1).bit_length()
            self._rooms = Rooms(self._recipe, size, size)
        return self._rooms

    def _choose(
        self, rooms: Rooms, spans: Sequence[Span]
    ) -> tuple[list[int], list[list[FusedStep]]]:
        """Return which spans can go on natively, and what takes their tokens in."""
        chosen: list[int] = []
        steps: list[list[FusedStep]] = []
        for i, span in enumerate(spans):
            try:
                ready = ready_steps(span.layers, rooms, len(chosen))
            except IceCacheError as error:
                span.error = error
                continue
            if ready is not None:
                chosen.append(i)
                steps.append(ready)
        return chosen, steps


def _turn(span: Span) -> int | None:
    """The layer whose query is looked at in this step."""
    return None if span.watch is None else span.watch.turn
