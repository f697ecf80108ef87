"""SentencePiece BPE vocabularies (`tokenizer.ggml.model` "llama"): pairs joined by score, byte fallback.

SentencePiece stores no merges. It joins, again and again, the neighbouring pair whose joined text is the token with the
best score, the leftmost one of equals.
Reference: Kudo and Richardson, "SentencePiece", 2018, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from mer.io.gguf_file import GGUFFile
from mer.quoting import quoted
from mer.text.cutting import cut
from mer.text.joining import join
from mer.text.spellings import Spellings
from mer.text.vocabulary import TokenType, Vocabulary, read_scores, refusal
from mer.text.words import WordCache

SPACE = "\u2581"
_LONGEST_WORD = 1 << 18
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class SpmCodec:
    """Encodes plain text and spells tokens for one SentencePiece vocabulary.

    Args:
        gguf: the file's metadata.
        vocabulary: the same file's checked vocabulary.

    Raises:
        TokenizerError: scores or byte tokens are malformed, or some text could not be encoded at all.
        GGUFError: a metadata value has the wrong type.
    """

    add_bos = True

    def __init__(self, gguf: GGUFFile, vocabulary: Vocabulary) -> None:
        self._tokens = vocabulary.tokens
        self.space_prefix = gguf.get_bool("tokenizer.ggml.add_space_prefix", True)
        scores = read_scores(gguf, len(vocabulary.tokens))
        self._bytes = _byte_tokens(gguf, vocabulary)
        user = {vocabulary.tokens[i].replace(" ", SPACE): i for i in vocabulary.ids_of(TokenType.USER_DEFINED)}
        normal = [i for i in vocabulary.ids_of(TokenType.NORMAL) if i not in self._bytes]
        self._ids = {vocabulary.tokens[i]: i for i in normal} | user
        best_first = sorted({scores[i] for i in self._ids.values()}, reverse=True)
        place = {score: rank for rank, score in enumerate(best_first)}
        self._ranks = {i: place[scores[i]] for i in self._ids.values()}
        self._user = Spellings(user)
        self._fallback = {value[0]: i for i, value in self._bytes.items()}
        self._unknown = vocabulary.unknown_id
        if len(self._fallback) < 256 and self._unknown is None:
            raise refusal(
                gguf,
                f"the vocabulary has {len(self._fallback)} of 256 byte tokens and no tokenizer.ggml.unknown_token_id: "
                "some text could not be encoded",
            )
        self._cuts = re.compile(f"{_no_token_across(self._ids, SPACE)}|{_no_token_across(self._ids, chr(10))}")
        self._words = WordCache(self._word)

    def encode(self, text: str, tick: Callable[[], None]) -> Iterator[list[int]]:
        """Yield the ids of a plain text that opens a prompt or follows a control token, piece by piece.

        Args:
            text: any text without lone surrogates, not empty.
            tick: called often; what it raises ends the encoding.

        Raises:
            RequestError: the text has a word of more than 262,144 characters.
        """
        if self.space_prefix:
            text = " " + text
        for part in self._user.split(text.replace(" ", SPACE), tick):
            if isinstance(part, int):
                yield [part]
                continue
            unknown = False  # whether the part so far ends in a character that the vocabulary cannot spell
            for piece in cut(part, self._cuts, _LONGEST_WORD):
                ids: list[int] = []
                for word in self._cuts.split(piece):
                    ids += self._words[word]
                if self._unknown in ids:
                    ids = [i for i, same in groupby(ids) for i in ([i] if i == self._unknown else same)]
                    if unknown and ids[0] == self._unknown:
                        del ids[0]
                if ids:
                    unknown = ids[-1] == self._unknown
                yield ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token with a text stands for."""
        value = self._bytes.get(token_id)
        return self._tokens[token_id].replace(SPACE, " ").encode() if value is None else value

    def _word(self, word: str) -> list[int]:
        ids: list[int] = []
        for part in join(word, self._rank):
            i = self._ids.get(part)
            ids += self._spelled(part) if i is None else [i]
        return ids

    def _rank(self, left: str, right: str) -> int | None:
        i = self._ids.get(left + right)
        return None if i is None else self._ranks[i]

    def _spelled(self, character: str) -> list[int]:
        """Return the byte tokens of a character that is no token, or the unknown one where some of them are missing."""
        ids = [self._fallback.get(byte) for byte in character.replace(SPACE, " ").encode()]
        if None in ids:
            assert self._unknown is not None
            return [self._unknown]
        return [i for i in ids if i is not None]


def _no_token_across(tokens: Iterable[str], second: str) -> str:
    """Return a pattern of the places before a character `second` that are inside of no token, whatever comes before."""
    across = {text[i - 1] for text in tokens for i in range(1, len(text)) if text[i] == second}
    return f"(?<=[^{re.escape(''.join(sorted(across)))}])(?={second})" if across else f"(?<=.)(?={second})"


def _byte_tokens(gguf: GGUFFile, vocabulary: Vocabulary) -> dict[int, bytes]:
    """Return what the byte tokens stand for; converters that know no types write them as ordinary ones."""
    found: dict[int, bytes] = {}
    for i in vocabulary.ids_of(TokenType.BYTE, TokenType.NORMAL):
        match = _BYTE_TOKEN.fullmatch(vocabulary.tokens[i])
        if match is not None:
            found[i] = bytes([int(match[1], 16)])
        elif vocabulary.types[i] == TokenType.BYTE:
            text = quoted(vocabulary.tokens[i])
            raise refusal(gguf, f"token {i} is a byte token but reads {text}, not '<0x00>' to '<0xFF>'")
    return found
