"""Every setting is checked at construction; the message has its name, its rule and the value."""

import dataclasses
import math
import re
from typing import Any

import pytest

from icecache import IceCacheConfig
from icecache.errors import ConfigError, IceCacheError

DEFAULTS = {
    "budget": 256,
    "sink": 16,
    "window": 32,
    "leaf_size": 8,
    "page_size": 16,
    "remainder": None,
    "selection": "tree",
    "draft": 64,
    "offload": "auto",
    "max_host_memory": None,
}
BAD: list[tuple[str, Any, str]] = [
    *(
        (name, value, "must be an integer")
        for name in (
            "budget",
            "sink",
            "window",
            "leaf_size",
            "leaf_target",
            "page_size",
            "fan_out",
            "refine_rounds",
            "cut_rounds",
            "segment_tokens",
            "seed",
            "draft",
            "max_host_memory",
        )
        for value in (1.5, "8", True)
    ),
    ("budget", 0, "must be from 1 to"),
    ("budget", -256, "must be from 1 to"),
    ("budget", 1 << 40, "must be from 1 to"),
    ("sink", -1, "must be from 0 to"),
    ("window", 0, "must be from 1 to"),
    ("window", -4, "must be from 1 to"),
    ("leaf_size", 0, "must be from 1 to 128"),
    ("leaf_size", 129, "must be from 1 to 128"),
    ("leaf_target", 0, "must be from 1 to 128"),
    ("leaf_target", 9, "must be at most leaf_size (8)"),
    ("page_size", 7, "must be at least leaf_size (8)"),
    ("page_size", 256, "must be from 1 to 255"),
    ("fan_out", 1, "must be from 2 to 64"),
    ("refine_rounds", -1, "must be from 0 to 100"),
    ("cut_rounds", -1, "must be from 0 to 16"),
    ("cut_rounds", 17, "must be from 0 to 16"),
    ("segment_tokens", 15, "must be at least two leaves (16)"),
    ("segment_tokens", 1 << 30, "must be from 2 to"),
    ("spread_weight", -0.1, "must be a number from 0 to 1"),
    ("spread_weight", 1.1, "must be a number from 0 to 1"),
    ("spread_weight", math.nan, "must be a number from 0 to 1"),
    ("spread_weight", "half", "must be a number from 0 to 1"),
    ("seed", -1, "must be from 0 to"),
    ("draft", 0, "must be from 1 to"),
    ("max_host_memory", 0, "must be from 1 to"),
    ("max_host_memory", -5, "must be from 1 to"),
    ("remainder", "yes", "must be a bool"),
    ("remainder", 1, "must be a bool"),
    ("selection", "best", "must be one of tree, exact, paper"),
    ("unit", "token", "must be one of leaf, page"),
    ("offload", "disk", "must be one of auto, none, host"),
    ("backend", "cuda", "must be one of auto, native, torch, reference"),
]


@pytest.mark.parametrize(("name", "value", "rule"), BAD)
def test_a_bad_value_is_named_with_its_rule(name: str, value: Any, rule: str) -> None:
    expected = re.escape(f"{name} {rule}") + ".*" + re.escape(f"got {value!r}")
    with pytest.raises(ConfigError, match=expected):
        IceCacheConfig(**{name: value})
    with pytest.raises(ConfigError, match=expected):
        IceCacheConfig().replace(**{name: value})


def test_the_defaults() -> None:
    config = IceCacheConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(("unit", "size"), [("leaf", 8), ("page", 16)])
def test_the_budget_has_room_for_sink_window_and_one_unit(unit: str, size: int) -> None:
    least = 16 + 32 + size
    assert IceCacheConfig.from_kwargs(budget=least, unit=unit).budget == least
    rule = re.escape(
        f"budget must be at least sink + window + one {unit} = {least}, got {least - 1}"
    )
    with pytest.raises(ConfigError, match=rule):
        IceCacheConfig.from_kwargs(budget=least - 1, unit=unit)


@pytest.mark.parametrize(
    "make", [IceCacheConfig.from_kwargs, IceCacheConfig().replace, IceCacheConfig.paper]
)
def test_an_unknown_setting_is_refused_with_the_known_ones(make: Any) -> None:
    with pytest.raises(ConfigError, match="unknown setting 'bugdet'; known: budget, sink, window"):
        make(bugdet=128)


def test_the_constructor_refuses_unknown_settings_too() -> None:
    with pytest.raises(TypeError, match="bugdet"):
        IceCacheConfig(bugdet=128)  # type: ignore[call-arg]


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        IceCacheConfig().budget = 64  # type: ignore[misc]


def test_replace_returns_a_changed_copy() -> None:
    config = IceCacheConfig(budget=128, seed=3)
    changed = config.replace(budget=512)
    assert (config.budget, changed.budget, changed.seed) == (128, 512, 3)


@pytest.mark.parametrize("selection", ["exact", "paper"])
def test_only_the_tree_has_a_remainder(selection: str) -> None:
    assert IceCacheConfig.from_kwargs(selection=selection).estimates_remainder is False
    rule = f'remainder must be False with selection="{selection}".*got True'
    with pytest.raises(ConfigError, match=rule):
        IceCacheConfig.from_kwargs(selection=selection, remainder=True)


def test_changing_the_selection_decides_the_remainder_anew() -> None:
    exact = IceCacheConfig().replace(selection="exact")
    assert exact.estimates_remainder is False
    assert exact.replace(selection="tree").estimates_remainder is True
    assert exact.replace(selection="tree", remainder=False).estimates_remainder is False
    assert IceCacheConfig(remainder=False).replace(selection="tree").estimates_remainder is False
    assert IceCacheConfig(remainder=False).replace(budget=300).estimates_remainder is False


def test_the_papers_variant() -> None:
    config = IceCacheConfig.paper(budget=128)
    assert (config.selection, config.unit, config.page_size) == ("paper", "page", 16)
    assert (config.refine_rounds, config.estimates_remainder, config.budget) == (0, False, 128)
    assert IceCacheConfig.paper(page_size=32).page_size == 32


def test_config_errors_can_be_caught_as_values_and_as_ours() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, IceCacheError)


def test_equal_settings_are_equal_and_hash_alike() -> None:
    assert IceCacheConfig() == IceCacheConfig(budget=256)
    assert len({IceCacheConfig(), IceCacheConfig(), IceCacheConfig(seed=1)}) == 2
