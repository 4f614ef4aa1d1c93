"""All methods by name."""

from dataclasses import dataclass

from icecache.errors import ConfigError, InputError
from icecache.evaluation.methods.arkvale import ArkVale
from icecache.evaluation.methods.base import Method
from icecache.evaluation.methods.full import Full
from icecache.evaluation.methods.icecache import IceCacheMethod, IceCachePaper, IceCacheReuse
from icecache.evaluation.methods.magicpig import MagicPIG
from icecache.evaluation.methods.omnikv import OmniKV
from icecache.evaluation.methods.pqcache import PQCache
from icecache.evaluation.methods.quest import Quest
from icecache.evaluation.methods.snapkv import SnapKV
from icecache.evaluation.methods.streaming import Streaming
from icecache.evaluation.methods.topk import TopK

__all__ = ["METHODS", "NamedMethod", "parse_methods"]

_CLASSES: tuple[type[Method], ...] = (
    *(Full, TopK, Streaming, SnapKV, Quest, ArkVale, PQCache, MagicPIG, OmniKV),
    *(IceCacheMethod, IceCacheReuse, IceCachePaper),
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _CLASSES}


@dataclass(frozen=True, slots=True)
class NamedMethod:
    """A method under the name that results carry: as the user wrote it."""

    label: str
    method: Method


def parse_methods(specs: list[str]) -> list[NamedMethod]:
    """Return the methods that texts such as ``quest`` or ``quest:page_size=32,sink=4`` name.

    ``all`` is every method. `full` comes first and once: everything is measured against it.

    Raises
    ------
    InputError
        On an unknown method, a method named twice, or none at all.
    ConfigError
        On an unknown parameter or a value outside its rule.
    """
    names = [name for spec in specs for name in (METHODS if spec == "all" else [spec])]
    wanted = ["full", *(name for name in names if name != "full")]
    twice = sorted({name for name in wanted if wanted.count(name) > 1})
    if twice:
        raise InputError(f"method named twice: {', '.join(twice)}")
    if not specs:
        raise InputError(f"no method given; known: {', '.join(METHODS)}")
    return [NamedMethod(spec, _parse(spec)) for spec in wanted]


def _parse(spec: str) -> Method:
    name, colon, tail = spec.partition(":")
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; known: {', '.join(METHODS)}, all")
    options = {}
    for entry in tail.split(",") if colon else []:
        key, equals, value = entry.partition("=")
        if not equals:
            raise ConfigError(f"{name}: a parameter is written key=value, got {entry!r}")
        options[key] = value
    return METHODS[name].from_options(options)
