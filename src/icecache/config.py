"""The one place of every setting and its default."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from icecache.errors import ConfigError

__all__ = ["IceCacheConfig"]

Selection = Literal["tree", "exact", "paper"]
Unit = Literal["leaf", "page"]
Backend = Literal["auto", "native", "torch", "reference", "triton", "twin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IceCacheConfig:
    """Settings of an IceCache; immutable, every value checked at construction.

    Parameters
    ----------
    budget : int, default 256
        Tokens that a KV head attends exactly in one decode step: sink, window and selected
        tokens. A context that is not longer is attended in full. Larger costs time and, when
        pages are offloaded, transfers; quality rises towards the full cache's.
    sink, window : int, default 16 and 32
        First and latest tokens, always attended exactly.
    leaf_size : int, default 8
        Most tokens of a leaf, the unit of choice and of summary. Smaller is more faithful and
        costs index bytes and scan time in proportion.
    leaf_target : int, default 5
        Tokens per leaf that a build aims at; at most `leaf_size`.
    page_size : int, default 16
        Slots of a page, the unit of storage and transfer; at least `leaf_size`.
    fan_out : int, default 12
        Leaves, or nodes, that share a parent node when a tree is built; a node holds twice as
        many at most.
    crossover : int, default 16384
        Leaves up to which a row is scanned flat; with more, a search descends from the top. A row
        of no more leaves than the budget has tokens is always scanned flat.
    field_of_view : int, default 576
        Nodes above the leaves that a descent expands, and half as many of each level further up;
        the others are attended through their own summaries. Larger is more faithful and costs scan
        time in proportion.
    dense_until : int, default 0
        A context of up to so many tokens is attended in full although it passes the budget: exact,
        and on a CPU faster too up to some 2,000 tokens (docs/performance.md). With 0 the budget
        alone decides.
    layer_reuse : int, default 1
        Layers in a row that share the selection of their first; the remainder stays each layer's
        own. 1 lets each layer select. Saves fetches where pages travel, and costs fidelity.
    remainder : bool, optional
        Attend to unselected tokens through their leaves' summaries instead of dropping them.
        By default on for ``selection="tree"``; the two other selections have no summaries.
    selection : {"tree", "exact", "paper"}, default "tree"
        ``"tree"``: leaves of the DCI-tree by their summaries. ``"exact"``: the brute-force twin,
        the truly best tokens by reading every key. ``"paper"``: the variant of arXiv 2604.10539
        (see `IceCacheConfig.paper`).
    unit : {"leaf", "page"}, default "leaf"
        What is attended when a leaf is chosen: its tokens, or all of its page's (they count
        against the budget). Where pages travel, ``"page"`` fetches fewer of them.
    refine_rounds : int, default 2
        Rounds that move promoted parents to the mean of their keys; 0 is the paper's promotion.
    cut_rounds : int, default 4
        Rounds that then cut the leaves in two whose farthest key is farthest from their mean, an
        eighth of them each, so that a key is less likely to hide among others unlike it; fewer
        are promoted, so that leaves keep about their size. 0 leaves promotion's leaves as they
        are.
    segment_tokens : int, default 2048
        Keys clustered together in one batch; the cost of a build is linear in the context for
        any value and proportional to this one.
    spread_weight : float, default 0.5
        Share of the spread's second-order correction that enters a summary's weight in the
        remainder; 0 takes the mean key alone.
    seed : int, default 0
        Which keys are promoted. Same input and seed give the same pages, bit for bit.
    draft : int, default 64
        An `append` of up to so many tokens can be taken back by `crop` (assisted decoding); a
        longer one as far as the window.
    offload : {"auto", "none", "host"}, default "auto"
        Where pages live: in pinned host memory (``"host"``), or on the device of the model
        (``"none"``: sparse attention without transfers). ``"auto"`` keeps them on the device while
        half of its free memory holds them; `LayerStats.offload` says which. On a CPU all three
        keep them in host memory, in place.
    page_dtype : {"auto", "int8"}, default "auto"
        Of offloaded pages: the model's dtype, or int8 codes with a scale per token, for half the
        host memory and transfers. The device path alone has it.
    device_slots : int, optional
        Pages that a KV head keeps on the device; by default twice the most that a step takes tokens
        from. More take device memory and save transfers.
    max_context : int, optional
        Tokens of a row that the device path makes room for at once; by default those of the prompt
        and some more. A context that outgrows its room is moved, which takes time once.
    overlap : bool, default True
        Build the trees of a prompt in threads of the cache while the model computes its next
        layers; `IceCacheLayer` does so with an executor of the caller's.
    max_host_memory : int, optional
        Bytes that one layer's pages and index may take; by default what the machine has free.
    backend : {"auto", "native", "torch", "reference", "triton", "twin"}, default "auto"
        Which implementation of the ops runs. On a CPU ``"native"`` is compiled at installation and
        fuses a step; ``"torch"`` runs everywhere; ``"reference"`` is slow and the truth.
        ``"triton"`` and ``"twin"`` are the device path (docs/gpu.md): Triton's kernels on CUDA, and
        the same in plain torch on any device, slow and the truth. ``"auto"`` takes the best that
        is there; `LayerStats.backend` says which.

    Raises
    ------
    ConfigError
        On a value outside its rule; in `from_kwargs` and `replace` also on an unknown key.
    TypeError
        On an unknown key in the constructor itself.
    """

    budget: int = 256
    sink: int = 16
    window: int = 32
    leaf_size: int = 8
    leaf_target: int = 5
    page_size: int = 16
    fan_out: int = 12
    crossover: int = 16384
    field_of_view: int = 576
    dense_until: int = 0
    layer_reuse: int = 1
    remainder: bool | None = None
    selection: Selection = "tree"
    unit: Unit = "leaf"
    refine_rounds: int = 2
    cut_rounds: int = 4
    segment_tokens: int = 2048
    spread_weight: float = 0.5
    seed: int = 0
    draft: int = 64
    offload: Literal["auto", "none", "host"] = "auto"
    page_dtype: Literal["auto", "int8"] = "auto"
    device_slots: int | None = None
    max_context: int | None = None
    overlap: bool = True
    max_host_memory: int | None = None
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        for name, low, high in _INTEGER_RANGES:
            _check_integer(name, getattr(self, name), low, high)
        for name, choices in _CHOICES:
            _require(
                getattr(self, name) in choices,
                name,
                f"must be one of {', '.join(choices)}",
                getattr(self, name),
            )
        _require(
            isinstance(self.spread_weight, int | float) and 0.0 <= self.spread_weight <= 1.0,
            "spread_weight",
            "must be a number from 0 to 1",
            self.spread_weight,
        )
        for name, high in _OPTIONAL_INTEGERS:
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1, high)
        _require(isinstance(self.overlap, bool), "overlap", "must be a bool", self.overlap)
        known = self.remainder is None or isinstance(self.remainder, bool)
        _require(known, "remainder", "must be a bool or None", self.remainder)
        self._check_together()

    def _check_together(self) -> None:
        _require(
            self.leaf_target <= self.leaf_size,
            "leaf_target",
            f"must be at most leaf_size ({self.leaf_size})",
            self.leaf_target,
        )
        _require(
            self.page_size >= self.leaf_size,
            "page_size",
            f"must be at least leaf_size ({self.leaf_size})",
            self.page_size,
        )
        least = self.sink + self.window + self.selected_unit_size
        _require(
            self.budget >= least,
            "budget",
            f"must be at least sink + window + one {self.unit} = {least}",
            self.budget,
        )
        _require(
            self.segment_tokens >= 2 * self.leaf_size,
            "segment_tokens",
            f"must be at least two leaves ({2 * self.leaf_size})",
            self.segment_tokens,
        )
        _require(
            not (self.remainder and self.selection != "tree"),
            "remainder",
            f'must be False with selection="{self.selection}", which keeps no summaries',
            self.remainder,
        )
        _require(
            self.layer_reuse == 1 or self.selection == "tree",
            "layer_reuse",
            f'must be 1 with selection="{self.selection}"',
            self.layer_reuse,
        )

    @property
    def estimates_remainder(self) -> bool:
        """Whether unselected tokens are attended through summaries: `remainder`, or its default."""
        return self.selection == "tree" if self.remainder is None else self.remainder

    @property
    def selected_unit_size(self) -> int:
        """Most tokens that one choice brings, in tokens."""
        return self.page_size if self.unit == "page" else self.leaf_size

    @property
    def most_dense_tokens(self) -> int:
        """Tokens up to which a context is attended in full."""
        return max(self.budget, self.dense_until)

    @property
    def most_flat_leaves(self) -> int:
        """Leaves up to which a row is scanned flat; one within the budget is attended in full."""
        return max(self.crossover, self.budget)

    @classmethod
    def from_kwargs(cls, **settings: Any) -> "IceCacheConfig":
        """Return a config from keyword arguments; an unknown key raises `ConfigError`."""
        _check_known(cls, settings)
        return cls(**settings)

    @classmethod
    def paper(cls, **settings: Any) -> "IceCacheConfig":
        """Return the paper's own variant (arXiv 2604.10539, section 4 and the reference code).

        Promotion only, in the lifted space k' = [k/c, sqrt(1-|k|^2/c^2)]; pages of 16 cut along
        a random projection below each parent, chosen by their best token; no remainder.
        """
        base: dict[str, Any] = {
            "selection": "paper",
            "unit": "page",
            "page_size": 16,
            "leaf_size": 16,
            "leaf_target": 12,
            "refine_rounds": 0,
            "cut_rounds": 0,
        }
        return cls.from_kwargs(**{**base, **settings})

    def replace(self, **settings: Any) -> "IceCacheConfig":
        """Return a copy with some settings changed; `ConfigError` as at construction."""
        _check_known(type(self), settings)
        return dataclasses.replace(self, **settings)


_SIZE_LIMIT = 1 << 20
_INTEGER_RANGES = (
    ("budget", 1, 1 << 31),
    ("sink", 0, _SIZE_LIMIT),
    ("window", 1, _SIZE_LIMIT),
    ("leaf_size", 1, 128),
    ("leaf_target", 1, 128),
    ("page_size", 1, 255),
    ("fan_out", 2, 64),
    ("crossover", 0, 1 << 31),
    ("field_of_view", 1, _SIZE_LIMIT),
    ("dense_until", 0, 1 << 31),
    ("layer_reuse", 1, 1024),
    ("refine_rounds", 0, 100),
    ("cut_rounds", 0, 16),
    ("segment_tokens", 2, 1 << 14),
    ("seed", 0, (1 << 63) - 1),
    ("draft", 1, _SIZE_LIMIT),
)
_OPTIONAL_INTEGERS = (
    ("max_host_memory", 1 << 62),
    ("device_slots", _SIZE_LIMIT),
    ("max_context", 1 << 31),
)
_CHOICES = (
    ("selection", ("tree", "exact", "paper")),
    ("unit", ("leaf", "page")),
    ("offload", ("auto", "none", "host")),
    ("page_dtype", ("auto", "int8")),
    ("backend", get_args(Backend)),
)


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"{name} {rule}, got {value!r}")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    _require(is_integer, name, "must be an integer", value)
    _require(low <= value <= high, name, f"must be from {low} to {high}", value)  # type: ignore[operator]


def _check_known(cls: Callable[..., Any], settings: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}; known: {', '.join(known)}")
