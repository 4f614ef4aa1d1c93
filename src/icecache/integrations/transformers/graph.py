"""A decode step of the whole model as one CUDA graph: recorded once, replayed for every token.

On the device path a step does the same work on the same addresses every time, and what the host has
to know of it can be counted without asking the device. So after a few steps as they are, one is
recorded; from then on the host only puts the token in and takes the logits out. When something has
moved (a context outgrew its room, another cache) one step runs as it is, and the next is recorded
anew.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from icecache.cache.device.layer import DeviceLayer
from icecache.errors import BackendUnavailable, IceCacheError, UnsupportedModel
from icecache.integrations.transformers.cache import IceCache
from icecache.integrations.transformers.compiled import decode_of, is_plain_step, run_for
from icecache.integrations.transformers.support import supports

__all__ = ["CudaRecorder", "GraphStep", "Recorder", "require_recordable"]

_LOGGER = logging.getLogger(__name__)
_WARM_STEPS = 3


class Recorder(Protocol):
    """Records what a call does on the device, without doing it."""

    def record(self, call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Return the tensor that the call returns, and what fills it by doing the work again."""


class CudaRecorder:
    """Records CUDA graphs; all of them share one pool of memory.

    Raises
    ------
    BackendUnavailable
        Without a CUDA device.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BackendUnavailable("graph=True needs a CUDA device; pass graph=False")
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Capture the call; see `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            result = call()
        return result, graph.replay


def require_recordable(model: PreTrainedModel) -> None:
    """Raise unless the model's decode steps can be recorded.

    Raises
    ------
    UnsupportedModel
        If some layer's cache stays with the model.
    """
    report = supports(model)
    left = [layer for layer in report.layers if layer.status != "managed"]
    if left:
        raise UnsupportedModel(
            f"graph=True needs every layer's cache to be IceCache's, and layer {left[0].index} of "
            f"{report.model_type} ({left[0].kind}) keeps its own; pass graph=False"
        )


class _Recorded(NamedTuple):
    """A recorded step, and what it was recorded for."""

    signature: tuple[object, ...]
    token_ids: Tensor
    positions: Tensor
    logits: Tensor
    replay: Callable[[], None]


class _Counted(NamedTuple):
    """What the host counted before a step."""

    cache: IceCache
    cores: list[DeviceLayer]
    marks: list[object]
    columns: int

    @classmethod
    def of(cls, cache: IceCache, cores: list[DeviceLayer]) -> "_Counted":
        return cls(cache, cores, [core.mark() for core in cores], cache.get_seq_length())

    def put_back(self) -> None:
        for core, mark in zip(self.cores, self.marks, strict=True):
            core.rewind(mark)
        self.cache.forward_pass.forget(self.columns)


class GraphStep:
    """Runs a model's decode steps from a recording, and all its other forwards as they are.

    Parameters
    ----------
    model : PreTrainedModel
        Attached to IceCache whenever this is called.
    recorder : Recorder
    compile : bool, default False
        Record the step as `torch.compile` makes it, with its small operations fused.

    Attributes
    ----------
    steps : int
        Forwards that ran from a recording.
    """

    def __init__(self, model: PreTrainedModel, recorder: Recorder, compile: bool = False) -> None:
        self.model, self._recorder = model, recorder
        decode = decode_of(model)
        self._decode = torch.compile(decode, fullgraph=True, dynamic=False) if compile else decode
        self.steps = 0
        self._warm = 0
        self._warmed_for: tuple[object, ...] | None = None
        self._can_record = True
        self._recorded: _Recorded | None = None

    def renew(self) -> None:
        """Do nothing: where the weights lie is part of what a recording is made for."""

    def __call__(self, **inputs: Any) -> Any:
        """Do what ``model(**inputs)`` does."""
        if self.model.training or not is_plain_step(inputs):
            return self.model(**inputs)
        cache: IceCache = inputs["past_key_values"]
        token_ids, positions = inputs["input_ids"], inputs.get("position_ids")
        if positions is None:
            positions = torch.full_like(token_ids, cache.get_seq_length())
        cores = _steady_cores(cache)
        if cores is None or not self._can_record:
            return self.model(**inputs)
        signature = self._signature(cores, token_ids)
        is_new = self._recorded is None or self._recorded.signature != signature
        # kernels that this cache needs are compiled outside of a recording
        if is_new and (self._warm < _WARM_STEPS or self._warmed_for != signature):
            output = self._eager(cache, token_ids, positions)
            self._warm, self._warmed_for = self._warm + 1, signature
            return output
        # a recording must not wait for another stream, and a replay runs nothing that would
        for core in cores:
            core.join_transfers()
        logits = self._replay(cache, cores, signature if is_new else None, token_ids, positions)
        if logits is None:
            return self.model(**inputs)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _eager(self, cache: IceCache, token_ids: Tensor, positions: Tensor) -> Any:
        logits = run_for(cache, self._decode, token_ids, positions)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _replay(
        self,
        cache: IceCache,
        cores: list[DeviceLayer],
        signature: tuple[object, ...] | None,
        token_ids: Tensor,
        positions: Tensor,
    ) -> Tensor | None:
        """Return a step's logits, None if it cannot be recorded; signature: to record it first.

        The host counts before the device works. Who interrupts between the two finds the cache as
        it was, and torn if the device may have begun.
        """
        before = _Counted.of(cache, cores)
        has_begun = False
        try:
            if signature is None:
                _count_replay(cache, cores)
            else:
                self._recorded = None
                self._recorded = self._record(cache, signature, token_ids, positions)
            if self._recorded is None:
                before.put_back()
                return None
            self._recorded.token_ids.copy_(token_ids)
            self._recorded.positions.copy_(positions)
            has_begun = True
            self._recorded.replay()
        except BaseException:
            if has_begun:
                for core in cores:
                    core.tear()
            else:
                before.put_back()
            raise
        self.steps += 1
        # the next replay writes to the same place
        return self._recorded.logits.clone()

    def _record(
        self,
        cache: IceCache,
        signature: tuple[object, ...],
        token_ids: Tensor,
        positions: Tensor,
    ) -> _Recorded | None:
        """Record the next step; the host counts it, as the replay that follows does it."""
        inputs = token_ids.clone(), positions.clone()
        try:
            logits, replay = self._recorder.record(
                lambda: run_for(cache, self._decode, *inputs, undo=False)
            )
        except (RuntimeError, IceCacheError) as reason:
            _LOGGER.warning("decode steps run without a CUDA graph: %s", reason)
            self._can_record = False
            return None
        return _Recorded(signature, *inputs, logits, replay)

    def _signature(self, cores: list[DeviceLayer], token_ids: Tensor) -> tuple[object, ...]:
        weights = tuple(weight.data_ptr() for weight in self.model.parameters())
        return token_ids.shape, weights, *(core.addresses() for core in cores)


def _steady_cores(cache: IceCache) -> list[DeviceLayer] | None:
    """Return the layers, with room for a token more; None unless all do the same every step."""
    cores = []
    for layer in cache.layers:
        core = getattr(layer, "core", None)
        if not isinstance(core, DeviceLayer) or not core.is_steady():
            return None
        cores.append(core)
    return cores


def _count_replay(cache: IceCache, cores: list[DeviceLayer]) -> None:
    cache.forward_pass.settle()
    for core in cores:
        core.count_step()
    for layer in cache.managed.values():
        layer.num_columns += 1
