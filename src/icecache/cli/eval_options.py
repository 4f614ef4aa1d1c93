"""Flags of ``icecache eval run``, made from the fields of `RunSettings`, where defaults stand."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from itertools import zip_longest
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from icecache.errors import InputError

__all__ = ["SpreadCommand", "spread", "with_settings_options"]

_LISTS = ("--tasks", "--methods", "--budgets", "--lengths")


class SpreadCommand(TyperCommand):
    """Takes ``--budgets 64 128 256`` for ``--budgets 64 --budgets 128 --budgets 256``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the spread arguments."""
        return super().parse_args(ctx, spread(args))


def spread(arguments: list[str]) -> list[str]:
    """Repeat the flag of a list before each of its values; `InputError` if it has none."""
    found: list[str] = []
    flag = None
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="-"):
        if argument in _LISTS and following.startswith("-"):
            raise InputError(f"{argument} must have a value or more, got none")
        if argument.startswith("-"):
            flag = argument if argument in _LISTS else None
            found += [] if flag else [argument]
        else:
            found += [flag, argument] if flag else [argument]
    return found


def with_settings_options(settings: type, command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose first parameter is `settings`, one flag per field of the settings.

    A field without a default becomes a flag that must be given, a tuple one that takes several.
    """
    flags = [_flag(settings, field) for field in dataclasses.fields(settings)]
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    def run(**values: Any) -> None:
        given = {flag.name: values.pop(flag.name) for flag in flags}
        made = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        command(settings(**made), **values)

    signature = inspect.Signature([*flags, *own])
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    return run


def _flag(settings: type, field: "dataclasses.Field[Any]") -> inspect.Parameter:
    name = "--" + field.name.replace("_", "-")
    kind = get_type_hints(settings)[field.name]
    default = ... if field.default is dataclasses.MISSING else field.default
    if get_origin(kind) is tuple:
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
        default = list(default) if isinstance(default, tuple) else default
    switch = f"{name}/--no-{name[2:]}" if kind is bool else name
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(switch, help=_help(settings, field.name))],
    )


def _help(settings: type, name: str) -> str:
    """Return what the settings' docstring says about a field."""
    text = inspect.getdoc(settings) or ""
    entry = re.search(
        rf"^(?:\w+, )*{name}(?:, \w+)* :.*\n((?: {{4}}.*\n?)+)", text, flags=re.MULTILINE
    )
    return " ".join(entry.group(1).split()).replace("`", "") if entry else ""
