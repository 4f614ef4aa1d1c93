"""Whether to compile a model's decode step: when that pays, and only if it turns out faster."""

import logging
import statistics
import time
from typing import Any

from transformers import PreTrainedModel

from icecache.errors import IceCacheError
from icecache.integrations.transformers.compiled import (
    CompiledStep,
    is_plain_step,
    require_compilable,
)

__all__ = ["PATIENCE", "PacedStep"]

_LOGGER = logging.getLogger(__name__)
# a graph takes as long to make as so many steps take without it, or a few times longer
PATIENCE = 4096
_TRIAL = 32


class PacedStep:
    """Runs a model as it is at first, and its decode steps compiled where they prove faster.

    The first `PATIENCE` decode steps are not compiled: a short conversation would wait longer for
    the graph than it could win. The next ones are, and both are timed.

    Parameters
    ----------
    model : PreTrainedModel
        Attached to IceCache whenever this is called.
    """

    def __init__(self, model: PreTrainedModel, patience: int = PATIENCE) -> None:
        self.model = model
        self.compiled: CompiledStep | None = None
        self._left = patience
        self._eager: list[float] = []
        self._trial: list[float] = []
        try:
            require_compilable(model)
        except IceCacheError as reason:
            _LOGGER.info("decode steps stay uncompiled: %s", reason)
            self._left = -1

    @property
    def steps(self) -> int:
        """Forwards that ran compiled."""
        return 0 if self.compiled is None else self.compiled.steps

    def renew(self) -> None:
        """Forget a graph whose weights have changed."""
        if self.compiled is not None:
            self.compiled.renew()

    def __call__(self, **inputs: Any) -> Any:
        """Do what ``model(**inputs)`` does."""
        if self._left < 0 or not is_plain_step(inputs):
            return self.model(**inputs)
        if self._left > 0:
            self._left -= 1
            return self._timed(self.model, self._eager, inputs)
        if self.compiled is None:
            _LOGGER.info("compiling the decode step after %d steps without", len(self._eager))
            self.compiled = CompiledStep(self.model)
            return self.compiled(**inputs)
        if len(self._trial) == _TRIAL:
            return self.compiled(**inputs)
        output = self._timed(self.compiled, self._trial, inputs)
        if len(self._trial) == _TRIAL and not self._is_faster():
            _LOGGER.info("decode steps stay uncompiled: the graph is slower")
            self._left = -1
        return output

    def _is_faster(self) -> bool:
        return statistics.median(self._trial) < statistics.median(self._eager)

    def _timed(self, call: Any, seconds: list[float], inputs: dict[str, Any]) -> Any:
        start = time.perf_counter()
        output = call(**inputs)
        seconds.append(time.perf_counter() - start)
        del seconds[:-_TRIAL]
        return output
