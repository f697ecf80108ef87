"""Vocabularies of plain characters that write a space as U+2581 and spell what is no token in bytes."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby

from mer.io.gguf_file import GGUFFile
from mer.quoting import quoted
from mer.text.cutting import cut
from mer.text.joining import join
from mer.text.spellings import Spellings
from mer.text.vocabulary import TokenType, Vocabulary, refusal
from mer.text.words import WordCache

SPACE = "\u2581"
_LONGEST_WORD = 1 << 18
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class SpacedCodec(abc.ABC):
    """Encodes plain text and spells tokens; what two neighbours are worth to be joined is the subclasses' to say.

    Args:
        gguf: the file's metadata.
        vocabulary: the same file's checked vocabulary.

    Raises:
        TokenizerError: byte tokens are malformed, or some text could not be encoded at all.
    """

    add_bos = True
    space_prefix = False

    def __init__(self, gguf: GGUFFile, vocabulary: Vocabulary) -> None:
        self._tokens = vocabulary.tokens
        self._bytes = _byte_tokens(gguf, vocabulary)
        user = vocabulary.ids_of(TokenType.USER_DEFINED)
        normal = [i for i in vocabulary.ids_of(TokenType.NORMAL) if i not in self._bytes]
        self._ids = {self._tokens[i]: i for i in normal} | {self._tokens[i].replace(" ", SPACE): i for i in user}
        self._user = Spellings(self._user_texts({self._tokens[i]: i for i in user}))
        self._fallback = {value[0]: i for i, value in self._bytes.items()}
        self._unknown = vocabulary.unknown_id
        if len(self._fallback) < 256 and self._unknown is None:
            raise refusal(
                gguf,
                f"the vocabulary has {len(self._fallback)} of 256 byte tokens and no tokenizer.ggml.unknown_token_id: "
                "some text could not be encoded",
            )
        self._cuts = self._places(gguf)
        self._words = WordCache(self._word)

    def encode(self, text: str, tick: Callable[[], None]) -> Iterator[list[int]]:
        """Yield the ids of a plain text that opens a prompt or follows a control token, piece by piece.

        Args:
            text: any text without lone surrogates, not empty.
            tick: called often; what it raises ends the encoding.

        Raises:
            RequestError: the text has a word of more than 262,144 characters.
        """
        for part in self._user.split(self._opened(text), tick):
            if isinstance(part, int):
                yield [part]
                continue
            unknown = False  # whether the part so far ends in a character that the vocabulary cannot spell
            for piece in cut(part.replace(" ", SPACE), self._cuts, _LONGEST_WORD):
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

    @abc.abstractmethod
    def _places(self, gguf: GGUFFile) -> re.Pattern[str]:
        """Read the order of joining, and return what matches nothing, at places that no token goes across."""

    @abc.abstractmethod
    def _rank(self, left: str, right: str) -> int | None:
        """Return what joining two parts is worth, as `join` asks."""

    def _user_texts(self, texts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the texts of the user-defined tokens as they stand in an opened text."""
        return texts

    def _opened(self, text: str) -> str:
        """Return a text as the search for user-defined tokens sees it."""
        return text

    def _word(self, word: str) -> list[int]:
        ids: list[int] = []
        for part in join(word, self._rank):
            i = self._ids.get(part)
            # Merges may make what is no token, or one that text must not become.
            ids += [i] if i is not None else [i for character in part for i in self._spelled(character)]
        return ids

    def _spelled(self, character: str) -> list[int]:
        """Return a character's token, or its byte tokens, or the unknown one where some of them are missing."""
        if character in self._ids:
            return [self._ids[character]]
        ids = [self._fallback.get(byte) for byte in character.replace(SPACE, " ").encode()]
        if None in ids:
            assert self._unknown is not None
            return [self._unknown]
        return [i for i in ids if i is not None]


def places_before(second: str, across: Iterable[str]) -> str:
    """Return a pattern of the places before a character `second`, but for those behind one of `across`."""
    behind = re.escape("".join(sorted(across)))
    return f"(?<=[^{behind}])(?={second})" if behind else f"(?<=.)(?={second})"


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
