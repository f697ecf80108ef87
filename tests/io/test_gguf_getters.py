from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mer.errors import GGUFError
from mer.io.gguf import GGUFFile, read_gguf
from tests._lib import gguf_bytes as gb


@pytest.fixture(scope="module")
def blob() -> bytes:
    return gb.build(
        [
            gb.scalar("int", gb.I32, -5),
            gb.scalar("big", gb.U64, 2**64 - 1),
            gb.scalar("float", gb.F32, 1.5),
            gb.scalar("nan", gb.F32, float("nan")),
            gb.scalar("inf", gb.F64, float("-inf")),
            gb.scalar("bool", gb.BOOL, 1),
            gb.text("text", "hello"),
            gb.strings("texts", ["a", "b"]),
            gb.array("ints", gb.U8, [1, 255]),
            gb.array("bigs", gb.U64, [1, 2**63, 3]),
            gb.array("floats", gb.F32, [0.5, -2.0]),
            gb.array("nans", gb.F32, [0.5, float("nan")]),
            gb.array("bools", gb.BOOL, [1, 0]),
        ]
    )


@pytest.fixture(scope="module")
def header(blob: bytes, tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    path = tmp_path_factory.mktemp("getters") / "m.gguf"
    path.write_bytes(blob)
    return read_gguf(path)


def test_values_of_the_right_type_are_returned(header: GGUFFile) -> None:
    assert header.get_int("int") == -5
    assert header.get_int("big") == 2**64 - 1
    assert header.get_float("float") == 1.5
    assert header.get_bool("bool") is True
    assert header.get_str("text") == "hello"
    assert header.get_strings("texts") == ["a", "b"]
    np.testing.assert_array_equal(header.get_ints("ints"), [1, 255])
    assert header.get_ints("ints").dtype == np.int64
    np.testing.assert_array_equal(header.get_floats("floats"), [0.5, -2.0])
    assert header.get_floats("floats").dtype == np.float64


GETTERS: dict[str, tuple[str, set[str]]] = {
    "get_int": ("an integer", {"int", "big"}),
    "get_float": ("a float", {"float", "nan", "inf"}),
    "get_bool": ("a bool", {"bool"}),
    "get_str": ("a string", {"text"}),
    "get_strings": ("an array of strings", {"texts"}),
    "get_ints": ("an array of integers", {"ints", "bigs"}),
    "get_floats": ("an array of floats", {"floats", "nans"}),
}


@pytest.mark.parametrize("getter", GETTERS)
def test_every_other_type_is_refused_with_key_types_and_place(header: GGUFFile, getter: str) -> None:
    wanted, right = GETTERS[getter]
    get: Callable[..., Any] = getattr(header, getter)
    for key in header.metadata.keys() - right:
        for arguments in ((key,), (key, None)):  # a default does not excuse a wrong type
            with pytest.raises(GGUFError) as caught:
                get(*arguments)
            assert caught.value.reason == f"{key!r} has the type {header.value_types[key]}; it must be {wanted}"
            assert caught.value.offset == header.value_offsets[key]
            assert caught.value.path == header.paths[0]


@pytest.mark.parametrize("getter", GETTERS)
def test_a_missing_key_is_an_error_or_the_default(header: GGUFFile, getter: str) -> None:
    get: Callable[..., Any] = getattr(header, getter)
    with pytest.raises(GGUFError, match="lacks the key 'absent'"):
        get("absent")
    assert get("absent", None) is None
    assert get("absent", default="fallback") == "fallback"


def test_bounds_are_inclusive(header: GGUFFile) -> None:
    assert header.get_int("int", minimum=-5, maximum=-5) == -5
    assert header.get_float("float", minimum=1.5, maximum=1.5) == 1.5
    with pytest.raises(GGUFError, match="'int' is -5; it must be at least -4"):
        header.get_int("int", minimum=-4)
    with pytest.raises(GGUFError, match="'int' is -5; it must be at most -6"):
        header.get_int("int", 0, maximum=-6)
    with pytest.raises(GGUFError, match=r"'float' is 1\.5; it must be at least 2"):
        header.get_float("float", minimum=2)
    with pytest.raises(GGUFError, match=r"'float' is 1\.5; it must be at most 1"):
        header.get_float("float", maximum=1)


@pytest.mark.parametrize("key", ["nan", "inf"])
def test_a_float_must_be_finite(header: GGUFFile, key: str) -> None:
    with pytest.raises(GGUFError, match=f"'{key}' is .*; it must be finite"):
        header.get_float(key)


def test_elements_that_cannot_be_used_are_named(header: GGUFFile) -> None:
    with pytest.raises(GGUFError, match="'nans' holds nan at index 1"):
        header.get_floats("nans")
    with pytest.raises(GGUFError, match="'bigs' holds 9223372036854775808 at index 1, which does not fit int64"):
        header.get_ints("bigs")


def test_what_a_getter_returns_cannot_change_the_header(header: GGUFFile) -> None:
    header.get_strings("texts").append("c")
    assert header.get_strings("texts") == ["a", "b"]
    for array in (header.get_ints("ints"), header.get_floats("floats")):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
