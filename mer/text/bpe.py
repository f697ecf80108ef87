"""Byte-level BPE vocabularies (`tokenizer.ggml.model` "gpt2"): merges in the file, words cut by a pattern.

Reference: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import groupby

from mer.errors import UnsupportedModel
from mer.io.gguf_file import GGUFFile
from mer.quoting import quoted
from mer.text.cutting import cut
from mer.text.joining import join
from mer.text.merges import read_merges
from mer.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer, pre_tokenizer
from mer.text.spellings import Spellings
from mer.text.vocabulary import TokenType, Vocabulary
from mer.text.words import WordCache

_LONGEST_WORD = 1 << 16

# Here every pattern has the end of a word: a space after digits and punctuation; punctuation after letters and digits,
# but for the apostrophe; between letters and digits.
_ENDS = (
    r"(?<=[0-9!\"#%&'()*,\-./:;?@\[\\\]_{}])(?= )"
    r"|(?<=[A-Za-z0-9])(?=[\n!\"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~])"
    r"|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
    r"|(?<=[\u4e00-\u9fa5\u3041-\u3096\u30a1-\u30fa])(?=[\n\uff0c\uff01\uff1f\uff1a\uff1b\u3001\u3002])"
)
_SPACES = r"|(?<=[A-Za-z\u4e00-\u9fa5\u3041-\u3096\u30a1-\u30fa])(?= )"
_CUTS = {True: re.compile(_ENDS), False: re.compile(_ENDS + _SPACES)}


def cuts(cutter: PreTokenizer) -> re.Pattern[str]:
    """Return what matches nothing, at places where words of this pre-tokenizer end whatever stands around them."""
    return _CUTS[cutter.words_hold_spaces]


def byte_characters() -> list[str]:
    """Return the 256 characters that stand for the byte values 0 to 255 in the texts of byte-level tokens.

    Printable Latin-1 characters stand for themselves; the other byte values get the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


_CHARACTERS = byte_characters()
_BYTE_OF = {character: byte for byte, character in enumerate(_CHARACTERS)}


class BpeCodec:
    """Encodes plain text and spells tokens for one byte-level BPE vocabulary.

    Args:
        gguf: the file's metadata.
        vocabulary: the same file's checked vocabulary.

    Raises:
        UnsupportedModel: the pre-tokenizer is not known.
        TokenizerError: the merges are missing or malformed.
        GGUFError: a metadata value has the wrong type.
    """

    space_prefix = False

    def __init__(self, gguf: GGUFFile, vocabulary: Vocabulary) -> None:
        self._tokens = vocabulary.tokens
        name = gguf.get_str("tokenizer.ggml.pre", None)
        try:
            cutter = pre_tokenizer(name or None)
        except KeyError:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise UnsupportedModel(
                f"tokenizer.ggml.pre is {quoted(name or '')}, which is not known; known: {known}", gguf.paths[0]
            ) from None
        self.add_bos = cutter.add_bos
        self._raw = frozenset(vocabulary.ids_of(TokenType.USER_DEFINED))
        self._user = Spellings({vocabulary.tokens[i]: i for i in self._raw})
        self._ids = {vocabulary.tokens[i]: i for i in vocabulary.ids_of(TokenType.NORMAL, TokenType.BYTE)}
        for i in self._raw:  # Printable ASCII reads the same as a text and as bytes.
            if (
                vocabulary.tokens[i].isascii()
                and vocabulary.tokens[i].isprintable()
                and " " not in vocabulary.tokens[i]
            ):
                self._ids.setdefault(vocabulary.tokens[i], i)
        self._unspeakable = frozenset(b for b, character in enumerate(_CHARACTERS) if character not in self._ids)
        self._ranks = read_merges(gguf)
        self._cuts = cuts(cutter)
        self._splitter = cutter.splitter()
        self._normalizer = cutter.normalizer()
        self._whole_words = cutter.ignore_merges
        self._words = WordCache(self._word)

    def encode(self, text: str, tick: Callable[[], None]) -> Iterator[list[int]]:
        """Yield the ids of a plain text, piece by piece.

        Characters with a byte that the vocabulary has no token for are left out, as they were in the training: such
        vocabularies lack control characters and unassigned ones.

        Args:
            text: any text without lone surrogates.
            tick: called often; what it raises ends the encoding.

        Raises:
            RequestError: the text has a word of more than 65,536 characters.
        """
        for part in self._user.split(text, tick):
            if isinstance(part, int):
                yield [part]
                continue
            for piece in cut(part, self._cuts, _LONGEST_WORD):
                if self._normalizer is not None:
                    piece = self._normalizer.normalize_str(piece)
                ids: list[int] = []
                for word, _ in self._splitter.pre_tokenize_str(piece):
                    ids += self._words[word]
                yield ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token with a text stands for."""
        text = self._tokens[token_id]
        if token_id not in self._raw:
            try:
                return bytes([_BYTE_OF[character] for character in text])
            except KeyError:
                pass  # A text with other characters stands for itself.
        return text.encode()

    def _word(self, word: str) -> list[int]:
        """Return the ids of a word, which is written in byte characters."""
        if self._whole_words and word in self._ids:
            return [self._ids[word]]
        if self._unspeakable:
            data = bytes([_BYTE_OF[character] for character in word])
            if not self._unspeakable.isdisjoint(data):
                spoken = groupby(data.decode(), lambda character: self._unspeakable.isdisjoint(character.encode()))
                parts = ["".join(characters) for can_be, characters in spoken if can_be]
                return [i for part in parts for i in self._joined("".join(_CHARACTERS[b] for b in part.encode()))]
        return self._joined(word)

    def _joined(self, word: str) -> list[int]:
        ids = []
        for part in join(word, self._rank):
            i = self._ids.get(part)
            if i is None:  # Merges may make what is no token, or one that text must not become.
                ids += [self._ids[character] for character in part]
            else:
                ids.append(i)
        return ids

    def _rank(self, left: str, right: str) -> int | None:
        return self._ranks.get(f"{left} {right}")
