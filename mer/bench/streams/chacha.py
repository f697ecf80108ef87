"""ChaCha12 as a generator of random numbers, seeded and read as version 0.8 of Rust's `rand` does in `StdRng`.

Sources: D. J. Bernstein, "ChaCha, a variant of Salsa20" (2008), with 12 rounds, a 64-bit block counter from 0 and a
stream number of 0; `rand_core` 0.6 for the expansion of a 64-bit seed; M. E. O'Neill, "PCG" (2014), for its generator.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

_MASK32: Final = (1 << 32) - 1
_MASK64: Final = (1 << 64) - 1
_CONSTANTS: Final = struct.unpack("<4I", b"expand 32-byte k")
_QUARTERS: Final = (  # of a double round: columns, then diagonals
    (0, 4, 8, 12),
    (1, 5, 9, 13),
    (2, 6, 10, 14),
    (3, 7, 11, 15),
    (0, 5, 10, 15),
    (1, 6, 11, 12),
    (2, 7, 8, 13),
    (3, 4, 9, 14),
)
_DOUBLE_ROUNDS: Final = 6


def expand_seed(seed: int) -> bytes:
    """Return the 32-byte key of a 64-bit seed: eight outputs of PCG-XSH-RR 64/32."""
    key = bytearray()
    state = seed
    for _ in range(8):
        state = (state * 6364136223846793005 + 11634580027462260723) & _MASK64
        shifted = ((state >> 18) ^ state) >> 27 & _MASK32
        turn = state >> 59
        key += ((shifted >> turn | shifted << (-turn & 31)) & _MASK32).to_bytes(4, "little")
    return bytes(key)


def _block(key: tuple[int, ...], counter: int) -> list[int]:
    """Return the 16 words of one block."""
    start = [*_CONSTANTS, *key, counter & _MASK32, counter >> 32, 0, 0]
    x = start.copy()
    for _ in range(_DOUBLE_ROUNDS):
        for a, b, c, d in _QUARTERS:
            for left, right in ((16, 12), (8, 7)):
                x[a] = (x[a] + x[b]) & _MASK32
                mixed = x[d] ^ x[a]
                x[d] = (mixed << left | mixed >> (32 - left)) & _MASK32
                x[c] = (x[c] + x[d]) & _MASK32
                mixed = x[b] ^ x[c]
                x[b] = (mixed << right | mixed >> (32 - right)) & _MASK32
    return [(before + after) & _MASK32 for before, after in zip(start, x, strict=True)]


def chacha12_u64(key: bytes) -> Iterator[int]:
    """Yield the 64-bit numbers of a 32-byte key, without end."""
    words = struct.unpack("<8I", key)
    counter = 0
    while True:
        block = _block(words, counter)
        for low, high in zip(block[::2], block[1::2], strict=True):
            yield low | high << 32
        counter += 1
