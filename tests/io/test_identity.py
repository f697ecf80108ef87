"""Which file a header was read from, and whether the path still leads to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mer.errors import FileChanged
from mer.io.gguf import read_gguf
from mer.io.identity import FileIdentity
from mer.io.thread_reader import ThreadReader
from tests._lib.extents import read_extent
from tests.io.test_gguf_split import part, part_name


async def test_a_part_that_is_replaced_after_its_header_was_read_is_not_read(tmp_path: Path) -> None:
    paths = [tmp_path / part_name(index) for index in range(3)]
    for index, path in enumerate(paths):
        path.write_bytes(part(index))
    header = read_gguf(paths[1])
    assert header.paths == tuple(paths)
    assert header.identities == tuple(FileIdentity.of(os.stat(path)) for path in paths)
    with ThreadReader(header.paths, expected=header.identities) as reader:
        await read_extent(reader, 2, 0, 10)
        twin = tmp_path / "twin"
        twin.write_bytes(paths[2].read_bytes())
        twin.replace(paths[2])
        assert (await read_extent(reader, 2, 0, 10)).tobytes() == part(2)[:10]  # what is open stays what it was
    with pytest.raises(FileChanged, match=r"00003-of-00003.gguf: is not as it was .*another file has taken its name"):
        ThreadReader(header.paths, expected=header.identities).__enter__()


def test_a_change_is_put_into_words() -> None:
    was = FileIdentity(1, 2, 300, 4)
    assert was.change_to(FileIdentity(1, 2, 300, 4)) == ""
    assert was.change_to(FileIdentity(1, 2, 300, 5)) == "it was written to"
    assert was.change_to(FileIdentity(1, 2, 301, 5)) == "its size went from 300 to 301 bytes"
    for other in (FileIdentity(1, 3, 300, 4), FileIdentity(2, 2, 300, 4)):
        assert was.change_to(other) == "another file has taken its name"
