"""Sizes and durations as text."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer.errors import ConfigError
from mer.units import format_bytes, format_duration, format_slots, parse_bytes

FACTORS = {"KiB": 2**10, "K": 2**10, "kb": 10**3, "MiB": 2**20, "m": 2**20, "MB": 10**6, "GiB": 2**30, "g": 2**30}
FACTORS |= {"GB": 10**9, "TiB": 2**40, "T": 2**40, "tb": 10**12, "PiB": 2**50, "P": 2**50, "PB": 10**15}


@given(st.integers(0, 10**9), st.integers(0, 999), st.sampled_from(sorted(FACTORS)), st.sampled_from(["", " ", "  "]))
def test_a_size_is_its_number_times_its_unit(whole: int, thousandths: int, unit: str, gap: str) -> None:
    assert parse_bytes(f"{whole}{gap}{unit}") == whole * FACTORS[unit]
    assert parse_bytes(f" {whole}.{thousandths:03d}{gap}{unit} ") == int(
        Fraction(whole * 1000 + thousandths, 1000) * FACTORS[unit]
    )


def test_bytes_may_be_plain() -> None:
    assert parse_bytes(0) == 0
    assert parse_bytes(12345) == 12345
    for text in ("12345B", "12345", "12,345", "12,345 bytes", "12345 bytes", " 12345 B "):
        assert parse_bytes(text) == 12345
    assert parse_bytes("1,234,567") == 1234567
    assert parse_bytes("8") == 8


@given(st.integers(0, 2**60))
def test_what_is_printed_can_be_read(n_bytes: int) -> None:
    assert parse_bytes(format_bytes(n_bytes)) == pytest.approx(n_bytes, rel=0.006)


@pytest.mark.parametrize(
    "value",
    [
        *(
            "",
            "GiB",
            "8XB",
            "-1GiB",
            "1e3K",
            "1.5B",
            "8 G iB",
            "٣GiB",
            "0x10K",
            "1,5G",
            "1,23",
            "12,34",
            "1,,234",
            "1,2345",
            "9" * 5000 + "G",
        ),
        *(-1, True, 1.5, None, b"8G"),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_what_is_not_a_size_is_refused(value: object) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(value)  # type: ignore[arg-type]


@given(st.integers(0, 2**59))
def test_a_size_as_text_is_within_half_a_percent(n_bytes: int) -> None:
    text = format_bytes(n_bytes)
    assert abs(parse_bytes(text.replace(" ", "")) - n_bytes) <= n_bytes * 0.0051 + 1
    number = text.split()[0]
    assert len(number.replace(".", "")) <= 4
    assert float(number) < 1025


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1023, "1.00 KiB"), (1536, "1.50 KiB"), (10 * 2**30, "10.0 GiB")]
)
def test_sizes_as_text(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 us"),
        (340e-6, "340 us"),
        (0.9996e-3, "1.0 ms"),
        (12.5e-3, "12.5 ms"),
        (0.9996, "1.00 s"),
        (3.2, "3.20 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7380, "2 h 03 min"),
    ],
)
def test_durations_as_text(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_slots_of_several_sizes() -> None:
    assert format_slots((20,), (2 << 20,)) == "20 slots of 2.00 MiB"
    assert format_slots([3, 12, 1], [5 << 20, 3 << 20, 999]) == "3 slots of 5.00 MiB, 12 of 3.00 MiB, 1 of 999 B"
