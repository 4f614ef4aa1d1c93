"""A decode step of the whole model through `torch.compile`, one graph without breaks.

The cache is hidden behind one operator: the graph sees a layer's query, keys and values go in and
an output come out, so that its shapes stay the same however long the context grows.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from icecache.errors import BackendUnavailable, IceCacheError, UnsupportedModel
from icecache.integrations.transformers.cache import IceCache
from icecache.integrations.transformers.support import supports

__all__ = [
    "CompiledStep",
    "decode_of",
    "find_compiler",
    "is_plain_step",
    "require_compilable",
    "run_for",
]


class _Run:
    """A decode step on its way; its error, as a graph in C++ makes another one of it."""

    def __init__(self, cache: IceCache) -> None:
        self.cache = cache
        self.error: BaseException | None = None


# torch's operators belong to the process and know no objects: the running step says whose it is
_running: ContextVar[_Run] = ContextVar("icecache_running")
_SCHEMA = (
    "step(Tensor query, Tensor key, Tensor value, int layer, float scaling, float? softcap,"
    " Tensor? sinks) -> Tensor"
)
# weights become constants, laid out once; one product where several have the same input; calls
# between the products from C++
_INDUCTOR = {"freezing": True, "cpp.enable_concat_linear": True, "cpp_wrapper": True}
_PLAINLY = nullcontext()
_tracing = Lock()
_MOST_GRAPHS = 4
_PLAIN = {"input_ids", "position_ids", "past_key_values", "use_cache", "return_dict"}
_IGNORED = {"attention_mask", "logits_to_keep", "cache_position"}


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    run = _running.get()
    try:
        output = run.cache.step(query, key, value, layer, scaling, softcap, sinks)
    except BaseException as error:
        run.error = error
        raise
    return output.transpose(1, 2).contiguous()


def _shape_of_step(query: Tensor, *others: object) -> Tensor:
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, tokens, heads, dim)


@lru_cache(maxsize=1)
def _operator() -> tuple[Callable[..., Tensor], torch.library.Library]:
    library = torch.library.Library("icecache", "FRAGMENT")  # type: ignore[no-untyped-call]
    tags = (torch.Tag.cudagraph_unsafe,)
    library.define(_SCHEMA, tags=tags)  # type: ignore[no-untyped-call]
    for device in ("CPU", "CUDA"):
        library.impl("step", _step, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake("icecache::step", _shape_of_step, lib=library)
    # the operator lives as long as its library
    return torch.ops.icecache.step, library


@contextmanager
def _options_for_tracing() -> Iterator[None]:
    """Set inductor's options, which belong to the process: one graph at a time."""
    with _tracing, torch._inductor.config.patch(_INDUCTOR):
        yield


def decode_of(model: PreTrainedModel) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from token ids and positions to logits, for the cache of `run_for`."""
    operator, _ = _operator()

    def decode(token_ids: Tensor, positions: Tensor) -> Tensor:
        output = model(
            input_ids=token_ids,
            position_ids=positions,
            use_cache=False,
            return_dict=True,
            icecache_step=operator,
        )
        logits: Tensor = output.logits
        return logits

    return decode


def run_for(
    cache: IceCache,
    decode: Callable[[Tensor, Tensor], Tensor],
    token_ids: Tensor,
    positions: Tensor,
    undo: bool = True,
) -> Tensor:
    """Run a function of `decode_of` with a cache; `undo`: take a step that fails back."""
    run = _Run(cache)
    token = _running.set(run)
    try:
        with torch.no_grad():
            return decode(token_ids, positions)
    except BaseException as raised:
        error = raised if run.error is None else run.error
        if undo and isinstance(error, IceCacheError):
            cache.undo()
        if error is raised:
            raise
        raise error from None
    finally:
        _running.reset(token)
        run.error = None


def find_compiler() -> str | None:
    """Return the C++ compiler that inductor would call, None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def require_compilable(model: PreTrainedModel) -> None:
    """Raise unless the model's decode step can be compiled here.

    Raises
    ------
    BackendUnavailable
        Without a C++ compiler.
    UnsupportedModel
        If some layer's cache stays with the model.
    """
    if find_compiler() is None:
        raise BackendUnavailable(
            "compile=True needs a C++ compiler, and g++ is not there; install one, set CXX, or "
            "pass compile=False"
        )
    report = supports(model)
    left = [layer.index for layer in report.layers if layer.status != "managed"]
    if left:
        raise UnsupportedModel(
            f"compile=True needs every layer's cache to be IceCache's, and layer {left[0]} of "
            f"{report.model_type} keeps its own; pass compile=False"
        )


class CompiledStep:
    """Runs a model's decode steps compiled, and all its other forwards as they are.

    Parameters
    ----------
    model : PreTrainedModel
        Attached to IceCache whenever this is called.

    Attributes
    ----------
    steps : int
        Forwards that ran compiled.

    Notes
    -----
    The graph holds copies of the weights, laid out for the CPU. `renew` makes a new one when the
    weights have been changed since.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        require_compilable(model)
        self.model = model
        self.steps = 0
        self._shapes: set[torch.Size] = set()
        self._weights: tuple[tuple[int, int], ...] = ()
        self._compiled = self._compile()

    def renew(self) -> None:
        """Forget the graph if the model's weights are no longer those that it was made of."""
        weights = _fingerprint(self.model)
        if weights != self._weights:
            self._weights, self._compiled = weights, self._compile()

    def __call__(self, **inputs: Any) -> Any:
        """Do what ``model(**inputs)`` does."""
        if self.model.training or not is_plain_step(inputs):
            return self.model(**inputs)
        cache: IceCache = inputs["past_key_values"]
        token_ids = inputs["input_ids"]
        # a graph for each batch size, and dynamo makes only so many of them
        if token_ids.shape not in self._shapes and len(self._shapes) == _MOST_GRAPHS:
            return self.model(**inputs)
        positions = inputs.get("position_ids")
        if positions is None:
            positions = torch.full_like(token_ids, cache.get_seq_length())
        # a view of more tokens has other strides, and would be another graph
        token_ids = token_ids.clone(memory_format=torch.contiguous_format)
        positions = positions.clone(memory_format=torch.contiguous_format)
        is_new = token_ids.shape not in self._shapes
        with _options_for_tracing() if is_new else _PLAINLY:
            logits = run_for(cache, self._compiled, token_ids, positions)
        self._shapes.add(token_ids.shape)
        self.steps += 1
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _compile(self) -> Callable[[Tensor, Tensor], Tensor]:
        self._shapes.clear()
        return torch.compile(decode_of(self.model), fullgraph=True, dynamic=False)


def is_plain_step(inputs: dict[str, Any], may_be_padded: bool = False) -> bool:
    """Whether this is a forward of one token for each row, without extras and without padding."""
    token_ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    if token_ids is None or token_ids.shape[1] != 1 or not isinstance(cache, IceCache):
        return False
    if not cache.is_initialized or any(
        value is not None and value is not False
        for name, value in inputs.items()
        if name not in _PLAIN and name not in _IGNORED
    ):
        return False
    if inputs.get("use_cache") is False or inputs.get("return_dict") is False:
        return False
    mask, width = inputs.get("attention_mask"), cache.get_seq_length() + 1
    if mask is None:
        return True
    is_plain = mask.dim() == 2 and mask.shape[1] == width
    return is_plain and (may_be_padded or bool(mask.all()))


def _fingerprint(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """What changes when weights are replaced or written to."""
    return tuple((weight.data_ptr(), weight._version) for weight in model.parameters())
