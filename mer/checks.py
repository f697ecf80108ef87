"""Converters and validators of settings, for attrs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs

from mer.errors import ConfigError
from mer.units import parse_bytes


def at_least(minimum: int) -> Callable[[Any, attrs.Attribute[Any], int], None]:
    """Return a validator of whole numbers."""

    def check(_instance: Any, attribute: attrs.Attribute[Any], value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(f"{attribute.name} is {value!r}; it must be a whole number from {minimum} up")

    return check


def one_of(*names: str) -> Callable[[Any, attrs.Attribute[Any], str], None]:
    """Return a validator of names."""

    def check(_instance: Any, attribute: attrs.Attribute[Any], value: str) -> None:
        if value not in names:
            raise ConfigError(f"{attribute.name} is {value!r}; it may be {', '.join(names)}")

    return check


def true_or_false(_instance: Any, attribute: attrs.Attribute[Any], value: object) -> None:
    """Refuse what is no bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{attribute.name} is {value!r}; it may be True or False")


def name(_instance: Any, attribute: attrs.Attribute[Any], value: object) -> None:
    """Refuse what is no text."""
    if not isinstance(value, str):
        raise ConfigError(f"{attribute.name} is {value!r}; it must be a name")


def function(_instance: Any, attribute: attrs.Attribute[Any], value: object) -> None:
    """Refuse what cannot be called."""
    if not callable(value):
        raise ConfigError(f"{attribute.name} is {value!r}; it must be a function")


def device(_instance: Any, _attribute: attrs.Attribute[Any], value: object) -> None:
    """Refuse what names no device."""
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?|torch-cpu", value, re.ASCII):
        raise ConfigError(f"device is {value!r}; it may be auto, cpu, cuda or cuda:N")


def model_path(value: str | os.PathLike[str]) -> Path:
    """Return the path of a model."""
    try:
        return Path(value)
    except TypeError:
        raise ConfigError(f"path is {value!r}; it must be the path of a GGUF file") from None


def optional_path(value: str | os.PathLike[str] | None) -> Path | None:
    """Return the path of a file that may not be given."""
    try:
        return None if value is None else Path(value)
    except TypeError:
        raise ConfigError(f"{value!r} is given as a file; it must be a path") from None


def mirror_paths(values: Iterable[str | os.PathLike[str]]) -> tuple[Path, ...]:
    """Return the paths of a model's copies; a single text, which is a list of letters too, is refused."""
    try:
        if not isinstance(values, str | os.PathLike):
            return tuple(map(Path, values))
    except TypeError:
        pass
    raise ConfigError(f"mirrors is {values!r}; it must be a list of paths of copies of the model")


def memory_bytes(value: int | str | None) -> int | None:
    """Return the bytes of a memory budget, given as a number or as text."""
    return _bytes("memory", value)


def vram_bytes(value: int | str | None) -> int | None:
    """Return the bytes of a budget of the GPU's memory, given as a number or as text."""
    return _bytes("vram", value)


def _bytes(setting: str, value: int | str | None) -> int | None:
    try:
        return None if value is None else parse_bytes(value)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from None
