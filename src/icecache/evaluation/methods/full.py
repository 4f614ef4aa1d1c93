"""The full cache: every token in every step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from icecache.errors import ConfigError
from icecache.evaluation.engine.attend import Rule, Selection
from icecache.evaluation.engine.tokens import Tokens
from icecache.evaluation.methods.base import SelectionMethod

__all__ = ["Full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Full(SelectionMethod):
    """The full cache, the yardstick of all others.

    It has no parameters of its own and no budget: a step attends to the whole context.
    Extra memory: none beside the cache itself.
    """

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "the model itself"
    has_budget: ClassVar[bool] = False

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """Make the method; any option is a `ConfigError`."""
        if options:
            raise ConfigError(f"full takes no parameters, got {', '.join(options)}")
        return cls()

    def check(self, budget: int) -> None:
        """Accept any budget: it is not used."""

    def policy(self, budget: int, layer: int) -> "_Everything":
        """Return a policy that selects everything."""
        return _Everything()


class _Everything:
    def start(self, tokens: Tokens) -> None:
        pass

    def select(self, query: Tensor, tokens: Tokens, rule: Rule) -> Selection | None:
        return None
