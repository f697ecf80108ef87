"""Vocabularies of Gemma 4 (`tokenizer.ggml.model` "gemma4"): BPE with merges on plain characters, byte fallback.

There is no pre-tokenizer: merges go across words, but never across the ends of a run of line breaks.
"""

from __future__ import annotations

import re

from mer.io.gguf_file import GGUFFile
from mer.text.merges import read_merges
from mer.text.spaced import SPACE, SpacedCodec, places_before


class GemmaCodec(SpacedCodec):
    """Encodes plain text and spells tokens for one vocabulary of Gemma 4.

    Args:
        gguf: the file's metadata.
        vocabulary: the same file's checked vocabulary.

    Raises:
        TokenizerError: merges or byte tokens are malformed, or some text could not be encoded at all.
        GGUFError: a metadata value has the wrong type.
    """

    def _places(self, gguf: GGUFFile) -> re.Pattern[str]:
        self._ranks = read_merges(gguf)
        # A token goes across a place only if a merge does.
        pairs = (line.split(" ") for line in self._ranks)
        across = {left[-1] for left, right in pairs if right[0] == SPACE}
        return re.compile(rf"(?<=[^\n])(?=\n)|(?<=\n)(?=[^\n])|{places_before(SPACE, across)}")

    def _rank(self, left: str, right: str) -> int | None:
        return self._ranks.get(f"{left} {right}")

    def _word(self, word: str) -> list[int]:
        if word[0] == "\n" and word in self._ids:  # No merges lead to the tokens of several line breaks.
            return [self._ids[word]]
        return super()._word(word)
