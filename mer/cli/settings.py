"""Options of the command line made from the settings of the engine."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, Any, Final, TypeVar, get_origin, get_type_hints

import attrs
from cyclopts import Parameter

from mer.config import EngineConfig
from mer.setting import Option, descriptions

T = TypeVar("T")

OPTIONS: Final = {name: said.option for name, said in descriptions(EngineConfig).items() if said.option is not None}
_TYPES: Final = get_type_hints(EngineConfig)


def in_group(group: str) -> tuple[str, ...]:
    """Return the settings whose options the help shows in one group, in their order."""
    return tuple(name for name, option in OPTIONS.items() if option.group == group)


def with_settings(names: Collection[str]) -> Callable[[type[T]], type[T]]:
    """Give a class of options one for each of these settings, before those that it has, and make it one of attrs.

    A class that named them would say each a second time. It would let a type checker see them as attributes, which
    nobody needs: they go from here to `open_engine`, which checks them, by `settings_given`.
    """

    def decorate(options: type[T]) -> type[T]:
        own = dict(options.__annotations__)
        options.__annotations__ = {}
        for name in names:
            options.__annotations__[name] = _annotation(name, OPTIONS[name])
            setattr(options, name, getattr(attrs.fields(EngineConfig), name).default)
        options.__annotations__ |= own
        return attrs.frozen(kw_only=True)(options)

    return decorate


def settings_given(options: Any) -> dict[str, Any]:
    """Return the settings among options, as keyword arguments of `open_engine` and `EngineConfig`."""
    return {name: getattr(options, name) for name in OPTIONS if hasattr(options, name)}


def spellings(name: str) -> tuple[str, ...]:
    """Return how the option of a setting may be written."""
    option = OPTIONS[name]
    return (option.name or f"--{name.replace('_', '-')}", *option.short)


def _annotation(name: str, option: Option) -> Any:
    kind = _TYPES[name] if option.type is None else option.type
    repeated: dict[str, Any] = {"negative": "", "show_default": False} if get_origin(kind) is tuple else {}
    parameter = Parameter(
        name=option.name, alias=option.short or None, env_var=option.variable, help=option.help, **repeated
    )
    return Annotated[kind, parameter]
