"""Command-line flags made from the fields of `IceCacheConfig`: a default is written once, there."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from icecache.config import IceCacheConfig

__all__ = ["Command", "with_config_options"]

Command = Callable[..., None]
_PANEL = "IceCache settings"


def with_config_options(command: Command) -> Command:
    """Give a command, whose first parameter is `config`, one flag per field of the config.

    A field that the command has a parameter for is the command's own concern.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    taken = {parameter.name for parameter in own}
    fields = [field for field in dataclasses.fields(IceCacheConfig) if field.name not in taken]
    flags = [_flag(field) for field in fields]
    names = [flag.name for flag in flags]

    def run(**values: Any) -> None:
        settings = {name: values.pop(name) for name in names}
        command(IceCacheConfig.from_kwargs(**settings), **values)

    signature = inspect.Signature([*own, *flags])
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    return run


def _flag(field: "dataclasses.Field[Any]") -> inspect.Parameter:
    name = "--" + field.name.replace("_", "-")
    kind = get_type_hints(IceCacheConfig)[field.name]
    switch = f"{name}/--no-{name[2:]}" if kind in (bool, bool | None) else name
    option = typer.Option(switch, help=_help(field.name), rich_help_panel=_PANEL)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default,
        annotation=Annotated[kind, option],
    )


def _help(name: str) -> str:
    """Return the first sentence that the config's docstring says about a field."""
    text = inspect.getdoc(IceCacheConfig) or ""
    entry = re.search(
        rf"^(?:\w+, )*{name}(?:, \w+)* :.*\n((?: {{4}}.*\n?)+)", text, flags=re.MULTILINE
    )
    words = " ".join(entry.group(1).split()) if entry else ""
    return re.split(r"(?<=[.;]) ", words)[0].rstrip(";").replace("`", "")
