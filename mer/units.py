"""Bytes and durations as text, and text as bytes."""

from __future__ import annotations

import re
from collections.abc import Collection

from mer.errors import ConfigError

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_FACTORS = {"": 1, "b": 1, "byte": 1, "bytes": 1} | {
    name: base**power
    for power, letter in enumerate("kmgtp", 1)
    for name, base in ((letter, 1024), (letter + "ib", 1024), (letter + "b", 1000))
}
_SIZE = re.compile(r"\s*(\d{1,3}(?:,\d{3}){1,9}|\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(value: int | str) -> int:
    """Return a number of bytes given as an int or as text such as "8GiB", "8G" (both 2**30) or "8GB" (10**9).

    A number without a unit is one of bytes. Every form in which mer prints sizes is taken.

    Raises:
        ConfigError: the text is not a size, or the size is negative.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"{value!r} is not a size; write an int of bytes or text such as '8GiB' or '512MiB'")
    if isinstance(value, int):
        if value < 0:
            raise ConfigError(f"a size cannot be negative: {value}")
        return value
    match = _SIZE.fullmatch(value)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None or (factor == 1 and "." in match[1]):
        raise ConfigError(
            f"{value!r} is not a size; write for example '8GiB', '8G' (both 2**30), '8GB' (10**9) or '512MiB'"
        )
    whole, _, fraction = match[1].replace(",", "").partition(".")
    return int(whole + fraction) * int(factor) // int("1" + "0" * len(fraction))


def format_bytes(n_bytes: int | float) -> str:
    """Return a byte count as text in binary units with three significant digits, e.g. "1.55 GiB"."""
    value = float(n_bytes)
    for unit in _BINARY:
        if abs(value) < 999.5 or unit == _BINARY[-1]:
            break
        value /= 1024
    if unit == "B":
        return f"{value:.0f} B"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def format_slots(counts: Collection[int], sizes: Collection[int]) -> str:
    """Return how many slots there are of each size, e.g. "20 slots of 3.10 MiB, 9 of 2.50 MiB"."""
    if not counts:
        return "no slots"
    first, *others = (f"{n} of {format_bytes(size)}" for n, size in zip(counts, sizes, strict=True))
    return ", ".join([first.replace(" of ", " slots of ", 1), *others])


def format_duration(seconds: float) -> str:
    """Return a duration as text with a fitting unit, e.g. "340 us", "12.5 ms", "3.20 s", "2 min 05 s"."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
