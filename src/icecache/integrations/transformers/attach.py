"""`attach`: let a model's own `generate` run with IceCache, and take that back."""

import logging
from types import TracebackType
from typing import Any

from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from icecache.cache.make import runs_on_device
from icecache.config import IceCacheConfig
from icecache.errors import BackendUnavailable, IceCacheError, InputError, UnsupportedModel
from icecache.integrations.transformers.attention import NAME, register
from icecache.integrations.transformers.cache import IceCache, combine, warn_if_nothing_managed
from icecache.integrations.transformers.compiled import CompiledStep, require_compilable
from icecache.integrations.transformers.graph import CudaRecorder, GraphStep, require_recordable
from icecache.integrations.transformers.native import NativeStep
from icecache.integrations.transformers.pace import PacedStep
from icecache.integrations.transformers.support import decoder_config, supports
from icecache.ops.dispatch import resolve_backend

__all__ = ["Attachment", "attach", "attention_of", "restore_attention", "set_attention"]

_LOGGER = logging.getLogger(__name__)
_HOOK = "_prepare_cache_for_generation"
# what generate asks for the call that decodes: whether to compile it, and the call
_MAY_COMPILE, _CALL = "_valid_auto_compile_criteria", "get_compiled_call"


DecodeStep = NativeStep | CompiledStep | PacedStep | GraphStep


class Attachment:
    """A model that runs with IceCache until `detach`; a context manager that detaches at its end.

    Parameters
    ----------
    model : PreTrainedModel
        As given to `attach`.
    settings : IceCacheConfig
        Of every cache that ``model.generate(...)`` makes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: IceCacheConfig,
        decode: DecodeStep | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.cache: IceCache | None = None
        self.decode = decode
        self._implementations = attention_of(model)
        self._is_attached = True
        register()
        try:
            set_attention(model, NAME)
        except ValueError:
            restore_attention(self._implementations)
            raise
        hooks: dict[str, Any] = {_HOOK: self._prepare_cache}
        if self.decode is not None:
            hooks |= {_MAY_COMPILE: self._may_compile, _CALL: self._decode_call}
        self._prepare = getattr(model, _HOOK)
        self._before = {name: vars(model).get(name) for name in hooks}
        # on this one instance: its class and every other model stay as they are
        for name, hook in hooks.items():
            setattr(model, name, hook)

    def detach(self) -> None:
        """Put the model back as it was; calling it again changes nothing. Caches stay readable."""
        if self._is_attached:
            for name, before in self._before.items():
                delattr(self.model, name)
                if before is not None:
                    setattr(self.model, name, before)
            restore_attention(self._implementations)
            self._is_attached = False

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def _prepare_cache(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        _check_prompt(model_kwargs)
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise InputError(
                f"cache_implementation={implementation!r} asks for another cache than the IceCache "
                "that the model is attached to; drop it, or detach"
            )
        self._prepare(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            raise InputError(
                "generate runs without a cache (use_cache=False) on a model that is attached to "
                "IceCache; drop use_cache=False, or detach"
            )
        # generate makes a plain DynamicCache where nobody asked for another one
        if type(cache) is DynamicCache and not getattr(cache, "_is_user_defined", False):
            cache = IceCache.for_attached(self.model, self.settings)
            # it outlives this call, as a cache given by the caller does
            cache._is_user_defined = True
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache
        if not isinstance(cache, IceCache):
            raise InputError(
                f"generate would run with a {type(cache).__name__} on a model that is attached to "
                "IceCache; drop past_key_values or pass an IceCache, or detach"
            )
        self.cache = cache

    @property
    def native_steps(self) -> int:
        """Forwards of ``generate`` that ran as one call of the compiled ops."""
        return self.decode.steps if isinstance(self.decode, NativeStep) else 0

    @property
    def compiled_steps(self) -> int:
        """Forwards of ``generate`` that ran through `torch.compile`, or from a recorded graph."""
        decode = self.decode.otherwise if isinstance(self.decode, NativeStep) else self.decode
        return decode.steps if isinstance(decode, CompiledStep | PacedStep | GraphStep) else 0

    def _may_compile(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        # what cannot be compiled, the call below runs as it is; native steps compile nothing
        return isinstance(self.decode, NativeStep) or not generation_config.disable_compile

    def _decode_call(self, *args: Any, **kwargs: Any) -> Any:
        assert self.decode is not None
        self.decode.renew()
        return self.decode


def attach(
    model: PreTrainedModel,
    settings: IceCacheConfig | None = None,
    *,
    native: bool | None = None,
    compile: bool | None = None,
    graph: bool | None = None,
    **config: Any,
) -> Attachment:
    """Let ``model.generate(...)``, and pipelines around the model, run with IceCache.

    Parameters
    ----------
    model : PreTrainedModel
        A causal decoder; see `icecache.supports`.
    settings : IceCacheConfig, optional
        All settings at once.
    native : bool, optional
        Run the decode steps of ``generate`` as one call of the compiled ops, products with the
        weights included. By default wherever the model can: a decoder built like Llama's, in
        float32 or bfloat16 on the CPU, every layer's cache IceCache's; before the first such step
        it is compared with the model itself. True raises where that cannot be, False never does it.
    compile : bool, optional
        Run the decode steps of ``generate`` through `torch.compile`, as one graph. By default, for
        models without a native step, that begins after some thousand steps, because making the
        graph takes a minute, and goes on if the steps are faster for it. True begins at once, in
        place of native steps; False never does. The graph holds copies of the weights. On the
        device path nothing is compiled by default, and True compiles what `graph` records.
    graph : bool, optional
        Record a decode step of ``generate`` as one CUDA graph and replay it: on CUDA by default.
        Steps with padding run as they are, and so does by default a model of which some layer keeps
        its own cache, such as a sliding window; True refuses that model.
    **config
        Single settings, such as ``budget=128``; see `icecache.IceCacheConfig`.

    Returns
    -------
    Attachment
        Use it in a ``with`` statement, or call its ``detach()``. Its ``cache`` is the `IceCache` of
        the last ``generate``: pass it as ``past_key_values`` to go on with that conversation.

    Raises
    ------
    ConfigError
        On an unknown setting or a value outside its rule.
    UnsupportedModel
        If the model cannot run with IceCache, natively, compiled or recorded as asked for; it is
        left as it was.
    BackendUnavailable
        If it is to run natively without the compiled ops, to be compiled without a C++ compiler, or
        to be recorded without CUDA.

    Examples
    --------
    >>> with icecache.attach(model, budget=256) as attachment:    # doctest: +SKIP
    ...     output = model.generate(**inputs, max_new_tokens=64)
    ...     print(attachment.cache.stats().sparse_steps)
    """
    settings = combine(settings, config)
    report = supports(model)
    report.require()
    if isinstance(getattr(vars(model).get(_HOOK), "__self__", None), Attachment):
        raise InputError("the model is attached to IceCache already; detach it first")
    if getattr(decoder_config(model.config), "output_attentions", False):
        raise InputError(
            "model.config.output_attentions is True, but IceCache never forms attention matrices; "
            "set it to False first"
        )
    warn_if_nothing_managed(report)
    if native and (compile or graph):
        raise InputError("native, compile and graph are ways to run a step; pass one as True")
    attachment = Attachment(model, settings, _decode_step(model, settings, native, compile, graph))
    if native:
        assert isinstance(attachment.decode, NativeStep)
        try:
            attachment.decode.check()
        except BaseException:
            attachment.detach()
            raise
    return attachment


def _decode_step(
    model: PreTrainedModel,
    settings: IceCacheConfig,
    native: bool | None,
    compile: bool | None,
    graph: bool | None,
) -> DecodeStep | None:
    """Return what runs the decode steps, None to run them as they are."""
    if native:
        return _native_step(model, settings, False)
    if runs_on_device(settings, model.device):
        is_recorded = model.device.type == "cuda" if graph is None else graph
        if graph:
            require_recordable(model)
        if compile:
            require_compilable(model)
            if not is_recorded:
                raise InputError(
                    "compile=True compiles what graph=True records on the device path, got "
                    "graph=False; pass compile=False"
                )
        return GraphStep(model, CudaRecorder(), bool(compile)) if is_recorded else None
    if graph:
        raise BackendUnavailable("graph=True needs a model on a CUDA device; pass graph=False")
    if compile:
        return CompiledStep(model)
    if native is None:
        try:
            return _native_step(model, settings, compile)
        except IceCacheError as reason:
            _LOGGER.info("decode steps run through torch: %s", reason)
    return None if compile is False else PacedStep(model)


def _native_step(
    model: PreTrainedModel, settings: IceCacheConfig, compile: bool | None
) -> NativeStep:
    """Return native steps; compile: None to run them compiled if they turn out impossible."""
    if resolve_backend(settings.backend) != "native":
        raise BackendUnavailable(
            "the native step is one of the compiled ops, and the backend is "
            f"{settings.backend!r} here; pass native=False"
        )
    if settings.layer_reuse > 1 or settings.max_host_memory is not None:
        raise InputError(
            "native steps neither share selections nor ask for memory, got layer_reuse="
            f"{settings.layer_reuse} and max_host_memory={settings.max_host_memory}; pass "
            "native=False"
        )
    return NativeStep(model, PacedStep(model) if compile is None else None)


def _check_prompt(model_kwargs: dict[str, Any]) -> None:
    mask, positions = (model_kwargs.get(name) for name in ("attention_mask", "position_ids"))
    is_empty = positions is not None and positions.shape[-1] == 0
    if is_empty or (mask is not None and not bool(mask.any(dim=-1).all())):
        raise InputError("every prompt must hold at least one token, got an empty one")


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Let a model's decoder run a registered attention; `UnsupportedModel` if it refuses."""
    decoder = decoder_config(model.config)
    names = [key for key in model.config.sub_configs if getattr(model.config, key) is decoder]
    # encoders beside the decoder keep their own attention
    requested: str | dict[str, str] = {"": name, names[0]: name} if names else name
    model.set_attn_implementation(requested)
    if decoder._attn_implementation != name:
        raise UnsupportedModel(
            f"{type(model).__name__} refused the attention implementation {name!r}; "
            "run this model without IceCache"
        )


def restore_attention(implementations: list[tuple[PreTrainedConfig, str | None]]) -> None:
    """Let all parts of a model run again what `attention_of` said."""
    for config, implementation in implementations:
        config._attn_implementation_internal = implementation


def attention_of(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str | None]]:
    """Return the attention implementation of each part of a model."""
    found: dict[int, PreTrainedConfig] = {}
    waiting = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            parts = [getattr(config, key, None) for key in config.sub_configs]
            waiting += [part for part in parts if part is not None]
    return [(config, config._attn_implementation) for config in found.values()]
