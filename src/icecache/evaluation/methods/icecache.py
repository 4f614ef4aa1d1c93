"""IceCache itself, through the library's own transformers cache."""

import copy
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from icecache.cache.layer import IceCacheLayer
from icecache.cache.stats import Phase
from icecache.config import IceCacheConfig
from icecache.errors import ConfigError
from icecache.evaluation.engine.attention import Call
from icecache.evaluation.engine.prefill import Prefill
from icecache.evaluation.methods.base import Method
from icecache.integrations.transformers import IceCache
from icecache.integrations.transformers.attention import icecache_attention

__all__ = ["IceCacheMethod", "IceCachePaper", "IceCacheReuse"]


@dataclass(frozen=True, slots=True)
class IceCacheMethod(Method):
    """IceCache, this library, after arXiv 2604.10539: leaves of a tree, the rest through summaries.

    Its parameters are those of `icecache.IceCacheConfig`, sink 16 and window 32 by default.

    Budget: sink + window + tokens of selected leaves; all other tokens are attended through their
    leaves' summaries. Extra memory: about 37 bytes a token and KV head at 64 dimensions (7 % of a
    float32 cache, 15 % of a bfloat16 one), beside the full cache in host memory.
    """

    name: ClassVar[str] = "icecache"
    paper: ClassVar[str] = "this library, after arXiv 2604.10539"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """Make a method from ``key=value`` texts of the config's fields."""
        known = [entry.name for entry in fields(IceCacheConfig) if entry.name != "budget"]
        found = {}
        for key, text in options.items():
            if key not in known:
                raise ConfigError(f"{cls.name} has no parameter {key!r}; known: {', '.join(known)}")
            found[key] = _parse(text)
        return cls(found)

    def config(self, budget: int) -> IceCacheConfig:
        """Return the config at a budget."""
        return IceCacheConfig.from_kwargs(budget=budget, **self.settings)

    def check(self, budget: int) -> None:
        """Raise `ConfigError` unless the config holds at this budget."""
        try:
            self.config(budget)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from error

    @torch.inference_mode()
    def open(self, model: PreTrainedModel, prefill: Prefill, budget: int) -> "IceCacheRun":
        """Return an `IceCache` that took in the prompt as it would have in its own prefill."""
        cache = IceCache(model, self.config(budget))
        kept = prefill.kept_layers()
        for index, layer in enumerate(cache.layers):
            if index not in prefill.prompts:
                vars(layer).update(copy.deepcopy(vars(kept[index])))
        modules, stand_in = _attention_modules(model, prefill.prompts), nn.Module().eval()
        for index, prompt in prefill.prompts.items():
            keys, values = cache.update(prompt.keys[None], prompt.values[None], index)
            # two of the prompt's own queries: several queries end a prefill, one begins decoding
            latest = prompt.queries[:, :, -2:].flatten(0, 1)[None]
            icecache_attention(
                modules.get(index, stand_in), latest, keys, values, None, scaling=prompt.scaling
            )
            core = cache.managed[index].core
            if isinstance(core, IceCacheLayer):
                # `attended` asks after a step what it selected
                core.keeps_window = True
        return IceCacheRun(cache)


@dataclass(frozen=True, slots=True)
class IceCachePaper(IceCacheMethod):
    """The paper's own IceCache (arXiv 2604.10539, section 4 and the reference code), as variant.

    `icecache.IceCacheConfig.paper`: pages of 16 by promotion alone in the lifted space, chosen by
    their best token, no remainder. Parameters as `icecache`'s.

    Budget: sink + window + whole pages. Extra memory: the tree's parents and the lifted keys,
    beside the full cache in host memory.
    """

    name: ClassVar[str] = "icecache-paper"
    paper: ClassVar[str] = "IceCache, arXiv 2604.10539"

    def config(self, budget: int) -> IceCacheConfig:
        """Return the paper's config at a budget."""
        return IceCacheConfig.paper(budget=budget, **self.settings)


@dataclass(frozen=True, slots=True)
class IceCacheReuse(IceCacheMethod):
    """IceCache(r) (arXiv 2604.10539): the layers of a group share the selection of its first layer.

    The paper's groups have 3 layers; here ``layer_reuse`` of `icecache.IceCacheConfig`, 3 unless
    told otherwise. Other parameters as `icecache`'s.

    Budget: as `icecache`'s. Extra memory: as `icecache`'s.
    """

    name: ClassVar[str] = "icecache-r"
    paper: ClassVar[str] = "IceCache(r), arXiv 2604.10539"

    def config(self, budget: int) -> IceCacheConfig:
        """Return a config with reuse at a budget."""
        return IceCacheConfig.from_kwargs(budget=budget, **{"layer_reuse": 3, **self.settings})


class IceCacheRun:
    """An `IceCache` as an `OpenCache`."""

    def __init__(self, cache: IceCache) -> None:
        self.cache: IceCache = cache

    def num_attended(self) -> float:
        """Return the tokens attended in the last step, mean over the managed layers."""
        counts = [
            layer.tokens_attended if layer.phase is Phase.INDEXED else float(layer.tokens)
            for layer in self.cache.stats().layers.values()
        ]
        return sum(counts) / len(counts)

    def attended(self, layer: int, call: Call) -> Tensor | None:
        """Return the positions of sink, window and the selected leaves."""
        core = self.cache.managed[layer].core
        if not isinstance(core, IceCacheLayer):
            raise ConfigError(
                "backend must be auto, native, torch or reference to list what a step attends, got "
                f"{self.cache.settings.backend!r}"
            )
        if core.phase is not Phase.INDEXED:
            return None
        if core.config.layer_reuse == 1:
            selected = core.search(
                call.query,
                scaling=call.rule.scaling,
                softcap=call.rule.softcap,
                sink_logits=call.rule.sinks,
            ).positions
        else:
            selected = self._selected_by_leader(layer)
        config, total = core.config, core.num_tokens
        ends = torch.cat([torch.arange(config.sink), torch.arange(total - config.window, total)])
        return torch.cat([ends.expand(len(selected), -1).int(), selected], 1)

    def _selected_by_leader(self, layer: int) -> Tensor:
        """Return what the first layer of a layer's group selected in this step."""
        managed = list(self.cache.managed)
        place = managed.index(layer)
        leader = managed[place - place % self.cache.settings.layer_reuse]
        core = self.cache.managed[leader].core
        assert core is not None and core.selection is not None
        return core.selection

    def close(self) -> None:
        """Free memory and threads."""
        self.cache.close()


def _attention_modules(model: PreTrainedModel, layers: Container[int]) -> dict[int, nn.Module]:
    """Return the attention module of each layer."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and index in layers and hasattr(module, "is_causal"):
            found.setdefault(index, module)
    return found


def _parse(text: str) -> Any:
    """Return what a text can mean; the config checks type, range and choice."""
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        return float(text)
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)
