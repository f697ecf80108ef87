"""Metadata of a setting: its description, its option of the command line, and the functions that take it."""

from __future__ import annotations

import difflib
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import attrs

P = ParamSpec("P")
T = TypeVar("T")
_COLUMNS = 120


@attrs.frozen
class Option:
    """How the command line offers a setting.

    Args:
        help: one or two sentences; a default that is chosen, not fixed, follows in brackets.
        type: what the command line makes of the text, where it is not the setting's own type.
        name: of the option, where it is not that of the setting.
        short: further names.
        variable: the environment variable that gives it where the option does not.
        group: of options that the help shows together.
    """

    help: str
    type: Any = attrs.field(default=None, kw_only=True)
    name: str | None = attrs.field(default=None, kw_only=True)
    short: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    variable: str | None = attrs.field(default=None, kw_only=True)
    group: str = attrs.field(default="engine", kw_only=True)


@attrs.frozen
class About:
    """Metadata of a setting besides its name, type, default and range.

    Args:
        description: for docstrings; begins small, as a line of "Args" does.
        option: None where the command line does not have it.
    """

    description: str
    option: Option | None = None


def about(description: str, option: Option | None = None) -> Mapping[str, About]:
    """Return the metadata of an attribute that is a setting."""
    return {"about": About(description, option)}


def descriptions(config: type) -> dict[str, About]:
    """Return what is said of every setting of a class, in their order."""
    return {attribute.name: attribute.metadata["about"] for attribute in attrs.fields(config)}


def documented(config: type[T]) -> type[T]:
    """Add the descriptions of a class's settings to its docstring."""
    if config.__doc__ is not None:  # as it is with python -OO
        config.__doc__ = _with_arguments(config.__doc__, config, indent=4)
    return config


def takes_settings_of(config: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Give a function the parameters of a class of settings: for type checkers, for `help` and for who calls it.

    Type checkers take names, types and defaults from the constructor that attrs makes, which is why there is no
    TypedDict of them: that would say each name and type a second time.

    Raises:
        TypeError: of the function that is returned: it was called with something that is no setting.
    """
    signature = inspect.signature(config)
    names = tuple(signature.parameters)

    def decorate(function: Callable[..., T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*arguments: P.args, **settings: P.kwargs) -> T:
            for name in settings:
                if name not in names:
                    close = difflib.get_close_matches(name, names, 1)
                    hint = f"Did you mean {close[0]!r}?" if close else f"The settings are {', '.join(names)}."
                    raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}. {hint}")
            try:
                signature.bind(*arguments, **settings)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            return function(*arguments, **settings)

        returned = inspect.signature(function).return_annotation
        call.__signature__ = signature.replace(return_annotation=returned)  # type: ignore[attr-defined]
        if function.__doc__ is not None and isinstance(config, type):
            call.__doc__ = _with_arguments(function.__doc__, config, indent=4)
        return call

    return decorate


def _with_arguments(doc: str, config: type, *, indent: int) -> str:
    """Put a section of arguments into a docstring, in front of what it raises."""
    inner = " " * (indent + 4)
    lines = [" " * indent + "Args:"]
    for name, said in descriptions(config).items():
        lines += textwrap.wrap(
            f"{name}: {said.description}", _COLUMNS, initial_indent=inner, subsequent_indent=inner + " " * 4
        )
    section = "\n".join(lines)
    before, mark, after = doc.partition(" " * indent + "Raises:")
    return f"{before}{section}\n\n{mark}{after}" if mark else f"{doc.rstrip()}\n\n{section}\n"
