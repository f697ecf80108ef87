"""ChaCha12 against published numbers and against a twin that works on whole rows of words."""

from __future__ import annotations

from itertools import islice

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.bench.streams.chacha import chacha12_u64, expand_seed


def words_of_blocks(key: bytes, n_blocks: int) -> list[int]:
    """Return the 32-bit words of the first blocks; every double round turns the rows so that diagonals are columns."""

    def turned(row: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint32]:
        return row << np.uint32(bits) | row >> np.uint32(32 - bits)

    def quarter(
        a: npt.NDArray[np.uint32], b: npt.NDArray[np.uint32], c: npt.NDArray[np.uint32], d: npt.NDArray[np.uint32]
    ) -> None:
        for left, right, other, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            left += right
            other ^= left
            other[:] = turned(other, bits)

    out: list[int] = []
    for counter in range(n_blocks):
        start = np.frombuffer(b"expand 32-byte k" + key + counter.to_bytes(8, "little") + bytes(8), "<u4")
        rows = start.reshape(4, 4).astype(np.uint32)
        for _ in range(6):
            quarter(*rows)
            for shift in (1, 2, 3):
                rows[shift] = np.roll(rows[shift], -shift)
            quarter(*rows)
            for shift in (1, 2, 3):
                rows[shift] = np.roll(rows[shift], shift)
        out += (rows.ravel() + start).tolist()
    return out


def test_the_published_block_of_an_all_zero_key() -> None:
    """J. Strombergson, "Test Vectors for the Stream Cipher ChaCha" (2013), TC1 for 256 bits and 12 rounds."""
    stream = b"".join(number.to_bytes(8, "little") for number in islice(chacha12_u64(bytes(32)), 8))
    assert stream.hex() == (
        "9bf49a6a0755f953811fce125f2683d50429c3bb49e074147e0089a52eae155f"
        "0564f879d27ae3c02ce82834acfa8c793a629f2ca0de6919610be82f411326be"
    )


def test_the_check_value_of_rand() -> None:
    key = bytes.fromhex("0100000017000000c8010000d21e0000") + bytes(16)
    assert next(chacha12_u64(key)) == 10719222850664546238


@given(key=st.binary(min_size=32, max_size=32))
@settings(max_examples=20, deadline=None)
def test_like_its_twin(key: bytes) -> None:
    words = words_of_blocks(key, 3)
    numbers = [low | high << 32 for low, high in zip(words[::2], words[1::2], strict=True)]
    assert list(islice(chacha12_u64(key), 24)) == numbers


@pytest.mark.parametrize("seed", [0, 1, 12_648_430, 2**64 - 1])
def test_the_key_of_a_seed(seed: int) -> None:
    """PCG-XSH-RR as in M. E. O'Neill's paper, with NumPy's 64-bit arithmetic, which wraps."""
    key = np.frombuffer(expand_seed(seed), "<u4")
    state = np.array([seed], np.uint64)
    for word in key:
        state = state * np.uint64(6364136223846793005) + np.uint64(11634580027462260723)
        old = int(state[0])
        unrotated = ((old >> 18) ^ old) >> 27 & 0xFFFFFFFF
        bits = f"{unrotated:032b}"
        turn = old >> 59
        assert int(word) == int(bits[32 - turn :] + bits[: 32 - turn], 2)
