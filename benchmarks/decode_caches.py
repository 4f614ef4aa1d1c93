"""The caches that the decode benchmark compares, and those that cannot run here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from decode_model import Subject
from decode_peers import INSTALL, LLAMA, LlamaPlayer
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from icecache.integrations.embedded import EMBEDDED
from icecache.integrations.transformers import IceCache, attach
from icecache.integrations.transformers.compiled import CompiledStep
from icecache.integrations.transformers.layer import ManagedLayer
from icecache.integrations.transformers.native import NativeStep

COMPILED, TORCH = "icecache:compiled", "icecache:torch"
_QUANTO = "pip install optimum-quanto ninja"
# the smallest group that 4-bit caches quantize together
_PROBE = 64


class LeftOut(Exception):
    """A cache cannot run here; the message says why, `install` how it could."""

    def __init__(self, reason: str, install: str | None = None) -> None:
        super().__init__(reason)
        self.install = install


class Opening(NamedTuple):
    """What a cache may ask for when it is made."""

    model: PreTrainedModel
    capacity: int  # tokens
    settings: dict[str, Any]  # of IceCache
    is_embedded: bool = False


def _icecache(opening: Opening) -> Cache:
    return IceCache(opening.model, **opening.settings)


def _dynamic(opening: Opening) -> Cache:
    return DynamicCache(config=opening.model.config)


def _static(opening: Opening) -> Cache:
    return StaticCache(config=opening.model.config, max_cache_len=opening.capacity)


def _quantized(opening: Opening) -> Cache:
    if is_optimum_quanto_available():
        return QuantizedCache("quanto", opening.model.config)
    if is_hqq_available():
        return QuantizedCache("hqq", opening.model.config, axis_key=1, axis_value=1)
    reason = "QuantizedCache in 4 bits needs optimum-quanto or hqq, and neither is installed"
    raise LeftOut(reason, f"{_QUANTO}, or pip install hqq")


def _fp8(opening: Opening) -> Cache:
    return QuantizedCache("fp8", opening.model.config)


def _offloaded(opening: Opening) -> Cache:
    where = opening.model.device
    if where.type == "cuda":
        return DynamicCache(config=opening.model.config, offloading=True)
    raise LeftOut(
        "DynamicCache(offloading=True) moves layers between an accelerator and the host through "
        f"streams, and the model runs on the {where.type}"
    )


def _kvpress(opening: Opening) -> Cache:
    raise LeftOut(
        "kvpress 0.5.5 asks for transformers < 5.3 and IceCache for 5.23: they do not install "
        "side by side",
        "pip install kvpress, in an environment of its own",
    )


def _llama(opening: Opening) -> Cache:
    if find_spec("llama_cpp") is None:
        raise LeftOut("llama-cpp-python is not installed", INSTALL)
    if not opening.is_embedded:
        raise LeftOut("llama.cpp has the embedded model only: --model embedded")
    raise AssertionError("llama.cpp has no cache; make_player makes its player")


OPENERS: dict[str, Callable[[Opening], Cache]] = {
    "icecache": _icecache,
    COMPILED: _icecache,
    TORCH: _icecache,
    "dynamic": _dynamic,
    "static": _static,
    "quantized": _quantized,
    "quantized:fp8": _fp8,
    "offloaded": _offloaded,
    "kvpress:snapkv": _kvpress,
    LLAMA: _llama,
}


class Player:
    """One cache in the comparison: it decodes in its turns, and is timed by who calls."""

    def __init__(self, name: str, opening: Opening) -> None:
        self.name = name
        self.model = opening.model
        self.cache = OPENERS[name](opening)
        self._settings = opening.settings
        make = {"icecache": _native_step, COMPILED: _compiled_step}.get(name)
        self._step = None if make is None else make(opening.model)
        self._native_before = self._count_native()

    def attached(self) -> AbstractContextManager[Any]:
        """Let the model run the attention of this cache, and no longer than that."""
        if isinstance(self.cache, IceCache):
            return attach(self.model, native=False, compile=False, **self._settings)
        return nullcontext()

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits of the last of `token_ids`, `[1, tokens]`, which the cache takes in."""
        inputs = {"input_ids": token_ids, "past_key_values": self.cache, "use_cache": True}
        if self._step is not None and token_ids.shape[1] == 1:
            output = self._step(**inputs)
        else:
            output = self.model(**inputs, logits_to_keep=1)
        return output.logits[:, -1]

    def take(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Take in a layer's keys and values as if they were a prompt's."""
        layer = self.cache.layers[index]
        if not isinstance(layer, ManagedLayer):
            self.cache.update(keys, values, index)
            return
        layer.lazy_initialization(keys, values)
        layer.core.prefill(keys, values)
        layer.num_columns = keys.shape[2]

    def settle(self) -> None:
        """Wait for what the cache still does in threads of its own."""
        if isinstance(self.cache, IceCache):
            self.cache.stats()

    def close(self) -> None:
        if isinstance(self.cache, IceCache):
            self.cache.close()

    @property
    def native_steps(self) -> int:
        """Steps that ran as one compiled call, those before the timed ones included."""
        return self._count_native() - self._native_before

    def _count_native(self) -> int:
        # one step serves all contexts
        return self._step.steps if isinstance(self._step, NativeStep) else 0

    @property
    def held_bytes(self) -> int:
        """Keys, values and whatever index there is, room that is not yet used included."""
        held = 0
        for layer in self.cache.layers:
            if isinstance(layer, ManagedLayer):
                stats = layer.stats()
                held += stats.host_bytes + stats.device_bytes if stats else 0
            else:
                held += sum(_bytes(getattr(layer, part, None)) for part in _PARTS)
        return held


@lru_cache(maxsize=1)
def _compiled_step(model: PreTrainedModel) -> CompiledStep:
    """One graph for all lengths."""
    with attach(model, native=False, compile=False):
        return CompiledStep(model)


@lru_cache(maxsize=1)
def _native_step(model: PreTrainedModel) -> NativeStep | None:
    """What `attach` would run; None for models that have no native step."""
    with attach(model, compile=False) as attachment:
        return attachment.decode if isinstance(attachment.decode, NativeStep) else None


def make_player(name: str, opening: Opening) -> Player | LlamaPlayer:
    """The player of a name; `LeftOut` where it cannot run here."""
    if name != LLAMA:
        return Player(name, opening)
    if find_spec("llama_cpp") is None or not opening.is_embedded:
        OPENERS[name](opening)
    config = opening.model.config
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    return LlamaPlayer(opening.capacity, 2 * 2 * config.num_hidden_layers * heads * dim)


_PARTS = ("keys", "values", "_quantized_keys", "_quantized_values")


def _bytes(held: Any) -> int:
    """Bytes of a tensor, of the plain tensors inside a quantized one, or of several."""
    if isinstance(held, (tuple, list)):
        return sum(_bytes(part) for part in held)
    if isinstance(held, dict):
        return sum(_bytes(part) for part in held.values())
    if not isinstance(held, Tensor):
        return 0
    if type(held) is not Tensor and hasattr(held, "__tensor_flatten__"):
        return sum(_bytes(getattr(held, name)) for name in held.__tensor_flatten__()[0])
    return held.nbytes


def sort_out(
    names: Iterable[str], subject: Subject, settings: dict[str, Any]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the caches that can run here, and a record of each other with reason and remedy.

    Each decodes one token after a short prompt as a trial, which warms the model up as well. What
    is wrong with IceCache or its settings is an error of the whole run.
    """
    tried = {name: _trial(name, subject, settings) for name in names}
    running = [name for name, left in tried.items() if left is None]
    return running, [
        {"cache": name, "context": None, "reason": str(left), "install": left.install}
        for name, left in tried.items()
        if left is not None
    ]


def _trial(name: str, subject: Subject, settings: dict[str, Any]) -> LeftOut | None:
    """Why a cache cannot run here, or None when it did."""
    try:
        opening = Opening(subject.model, _PROBE + 1, settings, subject.name == EMBEDDED)
        player = make_player(name, opening)
        with player.attached():
            player.forward(torch.ones(1, _PROBE, dtype=torch.long))
            player.forward(torch.ones(1, 1, dtype=torch.long))
        player.close()
    except LeftOut as left:
        return left
    except (ImportError, RuntimeError, ValueError) as error:
        if name.startswith("icecache"):
            raise
        return LeftOut(f"{type(error).__name__}: {error}")
    return None
