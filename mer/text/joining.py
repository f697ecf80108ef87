"""Byte-pair merging: neighbours are joined, best pair first, until no pair can be.

Reference: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016, section 3.2.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable

_POSITION_BITS = 32
_LENGTH_BITS = 32


def join(text: str, rank: Callable[[str, str], int | None]) -> list[str]:
    """Join the characters of a text to tokens, and return these in order.

    Takes O(n log n) calls of `rank` for n characters, whatever the vocabulary, and some 60 bytes for each of them.

    Args:
        text: the text; each character begins as a separate part.
        rank: what joining two neighbouring parts is worth: the lowest number from 0 up goes first, the leftmost of
            equals, and None cannot be joined.
    """
    # The merges of a vocabulary that has only scores could be rebuilt first, and applied as those of byte-level files.
    # But that takes work and memory by the square of the tokens' lengths. So `rank` is asked for each pair in turn.
    n = len(text)
    lengths = array("i", [1]) * n  # of the part that begins at each position; 0 where none does
    before = array("i", range(-1, n - 1))
    after = array("i", range(1, n + 1))  # n: there is none
    queue: list[int] = []

    def offer(left: int, right: int) -> int | None:
        """Return the pair's place in the order of joining; its length tells later whether both parts are still so."""
        length, joined = lengths[left], lengths[left] + lengths[right]
        value = rank(text[left : left + length], text[right : right + lengths[right]])
        if value is None:
            return None
        return ((value << _POSITION_BITS | left) << _LENGTH_BITS) | joined

    for left in range(n - 1):
        pair = offer(left, left + 1)
        if pair is not None:
            queue.append(pair)
    heapq.heapify(queue)
    length_mask, position_mask = (1 << _LENGTH_BITS) - 1, (1 << _POSITION_BITS) - 1
    while queue:
        pair = heapq.heappop(queue)
        left = pair >> _LENGTH_BITS & position_mask
        right = after[left]
        if not lengths[left] or right == n or lengths[left] + lengths[right] != pair & length_mask:
            continue  # One of the two has been joined with another neighbour.
        lengths[left] += lengths[right]
        lengths[right] = 0
        after[left] = following = after[right]
        if following < n:
            before[following] = left
            pair = offer(left, following)
            if pair is not None:
                heapq.heappush(queue, pair)
        if before[left] >= 0:
            pair = offer(before[left], left)
            if pair is not None:
                heapq.heappush(queue, pair)
    parts = []
    position = 0
    while position < n:
        parts.append(text[position : position + lengths[position]])
        position = after[position]
    return parts
