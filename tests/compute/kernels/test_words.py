"""The words of steps' rows: named, documented, each given once, and at the column where the kernel looks for it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

from mer.compute import kernels
from mer.compute.cpu.program import Program
from mer.compute.kernels.elementwise import gather, rms_norm
from mer.compute.kernels.entry import PRODUCT, TABLE, TableWords
from mer.compute.kernels.floats import FLOATS
from mer.compute.kernels.ir import load_i64, store_i64
from mer.compute.kernels.job_reads import AWAIT, await_reads
from mer.compute.kernels.step import step
from mer.compute.kernels.tile import TILES
from mer.compute.kernels.words import ENTRY, Words, columns
from tests._lib.all_kernels import all_steps
from tests._lib.steps import run_program

STEPS = all_steps()
FIRST = 3  # column, behind function, barrier and counter


class FirstWords(Words):
    """result (int64 [3]), a."""

    result: int
    a: int


class SumWords(FirstWords):
    """result, a (see `FirstWords`), c (5 unless given), b."""

    c: int = 5
    b: int


SUM = columns(SumWords)


@step(SumWords)
def copy_words(row: int, _thread: int, _n_threads: int) -> None:
    """Write a, b and c."""
    result = load_i64(row, SUM.result)
    store_i64(result, load_i64(row, SUM.a))
    store_i64(result + 8, load_i64(row, SUM.b))
    store_i64(result + 16, load_i64(row, SUM.c))


def test_a_kernel_finds_each_word_under_its_name() -> None:
    result = np.zeros(3, np.int64)
    for row, want in (
        (copy_words.row(b=11, c=13, result=int(result.ctypes.data), a=7), [7, 11, 13]),
        (copy_words.row(result=int(result.ctypes.data), b=2, a=-3), [-3, 2, 5]),
    ):
        program = Program()
        program.add(row)
        run_program(program)
        assert result.tolist() == want


def test_words_of_a_base_come_first_and_keep_their_columns() -> None:
    assert copy_words.words == ("result", "a", "c", "b")
    assert (SUM.result, SUM.a, SUM.c, SUM.b) == (FIRST, FIRST + 1, FIRST + 2, FIRST + 3)
    for product in (PRODUCT, TILES, FLOATS):
        assert (product.table, product.n_entries) == (TABLE.table, TABLE.n_entries) == (FIRST, FIRST + 1)
        assert (product.flags, product.chunk) == (PRODUCT.flags, PRODUCT.chunk) == (FIRST + 2, FIRST + 3)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_every_word_of_a_step_is_an_integer_that_its_docstring_names_in_order(name: str) -> None:
    made = STEPS[name]
    text = str(made.__doc__).partition("Words of a row of")[2]
    at = -1
    for word in made.words:
        found = re.search(rf"\b{word}\b", text[at + 1 :])
        assert found is not None, f"{word} is not explained, or not in its turn"
        at += 1 + found.start()
    assert made.words


@pytest.mark.parametrize("name", sorted(STEPS))
def test_every_word_is_asked_for_once(name: str) -> None:
    made = STEPS[name]
    values = {word: 1000 + number for number, word in enumerate(made.words)}
    backwards = dict(reversed(values.items()))
    assert made.row(**backwards) == (made, *values.values())
    optional = {"table", "n_entries"} if made.words[:2] == ("table", "n_entries") else set()
    optional |= {"index", "up", "activation"} if name == "pack" else set()
    optional |= {"first", "n_missing", "n_handed"} if made is await_reads else set()
    for word in made.words:
        others = {other: value for other, value in values.items() if other != word}
        if word in optional:
            made.row(**others)
            continue
        with pytest.raises(TypeError, match=rf"{made.name}\.row\(\) missing 1 required .*'{word}'"):
            made.row(**others)
    with pytest.raises(TypeError, match=rf"{made.name}\.row\(\) got an unexpected keyword argument 'q_rww'"):
        made.row(**values, q_rww=1)
    with pytest.raises(TypeError, match="positional"):
        made.row(*values.values())


def test_words_that_a_program_sets_are_zero_before() -> None:
    program = Program()
    program.add(await_reads.row(control=1, end=2, stop=3, layer=4, table=5, steps=6))
    assert program.rows[0, FIRST : FIRST + 9].tolist() == [1, 2, 3, 4, 5, 6, 0, 0, 0]
    assert (AWAIT.first, AWAIT.n_missing, AWAIT.n_handed) == (FIRST + 6, FIRST + 7, FIRST + 8)


def test_a_row_on_a_table_or_alone_has_the_same_words_behind_it() -> None:
    program, row = Program(), gather.row(x=1, stride=2, index=3, out=4)
    program.add_alone(row, (9, 8, 7, 6, 5, 4, 3, 2))
    program.add_on(row, 77, 5)
    assert program.rows[:, 0].tolist()[:2] == [gather.address] * 2
    assert program.rows[0, FIRST : FIRST + 6].tolist() == [0, 1, 1, 2, 3, 4]
    assert program.rows[0, ENTRY:].tolist() == [9, 8, 7, 6, 5, 4, 3, 2]
    assert program.rows[1, FIRST : FIRST + 6].tolist() == [77, 5, 1, 2, 3, 4]


def test_words_that_do_not_fit_or_come_twice_are_refused() -> None:
    class TwiceWords(TableWords):
        """table."""

        table: int

    with pytest.raises(TypeError, match=r"TwiceWords declares .*'table', 'n_entries', 'table'"):
        step(TwiceWords)(rms_norm.py_func)
    many = type("ManyWords", (Words,), {"__annotations__": {f"w{n}": "int" for n in range(ENTRY - FIRST + 1)}})
    with pytest.raises(TypeError, match="room for 21 words"):
        columns(many)


def test_no_kernel_counts_columns_by_hand() -> None:
    """Every load from a row names its word, so that a declaration and its kernel cannot drift apart."""
    folder = Path(str(kernels.__file__)).parent
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "load_i64":
                source, column = node.args
                if isinstance(source, ast.Name) and source.id == "row":
                    assert isinstance(column, ast.Attribute | ast.Name), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Name):
                assert node.id != "ARG0" or path.name == "words.py", f"{path.name}:{node.lineno}"


def test_declared_words_are_typed_as_integers() -> None:
    declared = [Words]
    for cls in declared:
        declared += [sub for sub in cls.__subclasses__() if sub.__module__.startswith(kernels.__name__)]
    assert len(declared) > 15
    for cls in declared:
        assert set(get_type_hints(cls).values()) <= {int}
