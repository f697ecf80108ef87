"""Text that `mer` did not write, in errors: one line, escaped, short."""

from __future__ import annotations

import ast
import errno
import os
from pathlib import Path

import numpy as np
import pytest

from mer.errors import GGUFError, MerError, NotEnoughMemory, ReadError, TokenizerError, UnsupportedModel, naming
from mer.quoting import MAX_ECHO, echo, one_line, quoted

ROOT = Path(__file__).parents[1]
WILD = "a\nb\r\x00\x1b[31m\x7f\x9b\u2028\u2029\u202e\u2066\udcffz"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("llama", "'llama'"),
        (b"PK\x03\x04", r"b'PK\x03\x04'"),
        ("a\nb", r"'a\nb'"),
        ("it's", '"it\'s"'),
        ("x" * 80, repr("x" * 80)),
        ("x" * 81, repr("x" * 80) + "..."),
        ("\x1b" * 300, repr("\x1b" * 20) + "..."),
        ("\u202e", r"'\u202e'"),
        ("\udcff", r"'\udcff'"),
        ("Größe \u4e2d", "'Größe \u4e2d'"),
    ],
)
def test_text_of_a_file_is_quoted(text: str | bytes, shown: str) -> None:
    assert quoted(text) == shown


def test_any_value_of_a_file_is_shown_short_and_on_one_line() -> None:
    for value in (2**63, 0.5, True, "x" * 999, ["a\nb"] * 999, np.zeros((99, 99)), np.arange(9999), b"\n" * 999):
        shown = echo(value)
        assert "\n" not in shown
        assert len(shown) <= MAX_ECHO + len("b''...")


def test_one_line_keeps_what_can_be_printed() -> None:
    assert one_line("Größe \u4e2d\t") == "Größe \u4e2d\\t"
    assert one_line(WILD) == r"a\nb\r\x00\x1b[31m\x7f\x9b\u2028\u2029\u202e\u2066\udcffz"


@pytest.mark.parametrize(
    "error",
    [
        MerError(WILD),
        GGUFError(WILD, 5, WILD),
        ReadError(WILD, 0, 7, WILD),
        UnsupportedModel(WILD, WILD),
        TokenizerError(WILD),
    ],
)
def test_every_error_is_one_line_whatever_the_file_is_called(error: MerError) -> None:
    assert "a\\nb" in str(error)
    assert one_line(str(error)) == str(error)


def test_an_error_with_lines_of_its_own_obeys_nothing_else() -> None:
    error = NotEnoughMemory("first\nsecond\x1b[31m", budget_bytes=1, needed_bytes=2)
    assert str(error) == "first\nsecond\\x1b[31m"


def test_an_error_that_does_not_know_its_file_is_told() -> None:
    with pytest.raises(TokenizerError, match=r"^m\.gguf: odd$") as caught, naming("m.gguf"):
        raise TokenizerError("odd")
    assert caught.value.path == Path("m.gguf")
    with pytest.raises(TokenizerError, match=r"^m\.gguf: odd$"), naming("m.gguf"):
        raise TokenizerError("m.gguf: odd")
    with pytest.raises(GGUFError, match=r"^first\.gguf: odd$"), naming("second.gguf"):
        raise GGUFError("first.gguf", None, "odd")
    with pytest.raises(OSError, match=r"No space left on device: 'm\.trace'"), naming("m.trace"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match="'there'"), naming("m.trace"):
        raise FileNotFoundError(errno.ENOENT, "gone", "there")


MODULES = [
    *sorted((ROOT / "mer" / "io").glob("gguf*.py")),
    ROOT / "mer" / "io" / "extents.py",
    *sorted((ROOT / "mer" / "model").glob("*.py")),
    ROOT / "mer" / "demo" / "upcycle.py",
]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_what_reads_model_files_quotes_their_text_with_quoted(module: Path) -> None:
    """`repr` in an f-string would show as much of a file's text as there is."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.FormattedValue) and node.conversion == ord("r")), f"{module}:{node.lineno}"
