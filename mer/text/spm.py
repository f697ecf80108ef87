"""SentencePiece BPE vocabularies (`tokenizer.ggml.model` "llama"): pairs joined by score, byte fallback.

SentencePiece stores no merges. It joins, again and again, the neighbouring pair whose joined text is the token with the
best score, the leftmost one of equals.
Reference: Kudo and Richardson, "SentencePiece", 2018, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mer.io.gguf_file import GGUFFile
from mer.text.spaced import SPACE, SpacedCodec, places_before
from mer.text.vocabulary import Vocabulary, read_scores


class SpmCodec(SpacedCodec):
    """Encodes plain text and spells tokens for one SentencePiece vocabulary.

    Args:
        gguf: the file's metadata.
        vocabulary: the same file's checked vocabulary.

    Raises:
        TokenizerError: scores or byte tokens are malformed, or some text could not be encoded at all.
        GGUFError: a metadata value has the wrong type.
    """

    def __init__(self, gguf: GGUFFile, vocabulary: Vocabulary) -> None:
        self.space_prefix = gguf.get_bool("tokenizer.ggml.add_space_prefix", True)
        super().__init__(gguf, vocabulary)

    def _places(self, gguf: GGUFFile) -> re.Pattern[str]:
        scores = read_scores(gguf, len(self._tokens))
        best_first = sorted({scores[i] for i in self._ids.values()}, reverse=True)
        place = {score: rank for rank, score in enumerate(best_first)}
        self._ranks = {i: place[scores[i]] for i in self._ids.values()}
        return re.compile("|".join(places_before(second, self._before(second)) for second in (SPACE, "\n")))

    def _before(self, second: str) -> set[str]:
        """Return the characters that stand before this one inside of tokens."""
        return {text[i - 1] for text in self._ids for i in range(1, len(text)) if text[i] == second}

    def _rank(self, left: str, right: str) -> int | None:
        i = self._ids.get(left + right)
        return None if i is None else self._ranks[i]

    def _user_texts(self, texts: Mapping[str, int]) -> Mapping[str, int]:
        return {text.replace(" ", SPACE): i for text, i in texts.items()}

    def _opened(self, text: str) -> str:
        return ((" " if self.space_prefix else "") + text).replace(" ", SPACE)
